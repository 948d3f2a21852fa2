"""The metrics: pixel counts and the boundary score of each sentence, and the scores that they give."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np

from training.scoring.referring_iou.referring_iou import Terms, ratio, ratio_terms

METRIC = Path(__file__).parent / "referring_iou"


@dataclass
class SentenceScore:
    """The result of one expression: its place in the split, its kind, and the values that every metric needs.

    Attributes:
        row: Row of the split.
        sentence: Number of the sentence in that row.
        kind: Kind of the sentence, under which it is reported too.
        intersection: Pixels in both masks.
        predicted: Pixels in the predicted mask; 0 predicts that there is no target.
        truth: Pixels in the true mask; 0 if there is no target.
        boundary_f: Boundary F-score in [0, 1].
        no_target: The model's probability of no target, in [0, 1]. `None` if the model does not predict presence.
        score: The score of the mask, in [0, 1]. `None` in older records.
    """

    row: int
    sentence: int
    kind: str
    intersection: int
    predicted: int
    truth: int
    boundary_f: float
    no_target: float | None = None
    score: float | None = None

    @property
    def union(self) -> int:
        """Pixels in either mask."""
        return self.predicted + self.truth - self.intersection

    @property
    def iou(self) -> float:
        """Intersection over union in [0, 1]; 1 if both masks are empty."""
        return self.intersection / self.union if self.union else 1.0


def score_terms(scores: Sequence[SentenceScore]) -> Terms:
    """Numerators and denominators of every metric, including the mean boundary F-score."""
    terms = ratio_terms(**_counts(scores))
    return terms | {"boundary_F": (np.array([score.boundary_f for score in scores]), np.ones(len(scores)))}


def summarize(scores: Sequence[SentenceScore]) -> dict[str, dict[str, float]]:
    """Every metric and the number of expressions: over all, and per kind of sentence if there are several kinds."""
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return {
        name: metric.compute(**_counts(group)) | {"boundary_F": ratio(*score_terms(group)["boundary_F"])}
        for name, group in by_kind(scores).items()
    }


def by_kind(scores: Sequence[SentenceScore]) -> dict[str, list[SentenceScore]]:
    """The scores under "all" and, if there are several kinds, under each kind."""
    groups = defaultdict(list, all=list(scores))
    if len({score.kind for score in scores}) > 1:
        for score in scores:
            groups[score.kind].append(score)
    return dict(groups)


def format_table(
    summaries: Mapping[str, Mapping[str, Mapping[str, float]]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
    """Markdown table of several summaries (`{"as written": summarize(…), "shuffled": …}`), percentages with one decimal.

    `intervals` are those of the first summary. They follow its values.
    """
    first, groups = next(iter(summaries.items()))
    columns = [name for name in groups["all"] if name != "num_expressions"]
    lines = ["| expressions | number | asked | " + " | ".join(columns) + " |", "|---|--:|---|" + "--:|" * len(columns)]
    for group in groups:
        for asked, summary in summaries.items():
            ends = intervals[group] if intervals and asked == first else {}
            cells = [format_value(summary[group].get(column), ends.get(column)) for column in columns]
            lines.append(f"| {group} | {summary[group]['num_expressions']} | {asked} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_value(value: float | None, ends: tuple[float, float] | None = None) -> str:
    """A share as a percentage, with the ends of its interval if they are given; a dash for an undefined value."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def _counts(scores: Sequence[SentenceScore]) -> dict[str, list[int]]:
    return {
        "intersections": [score.intersection for score in scores],
        "predicted_areas": [score.predicted for score in scores],
        "truth_areas": [score.truth for score in scores],
    }
