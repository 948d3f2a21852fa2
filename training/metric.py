"""What is measured: pixel counts per sentence, and the scores made of them."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import evaluate

METRIC = Path(__file__).parent / "referring_iou"


@dataclass
class SentenceScore:
    """One expression's result: its place in the split, its kind, and the pixel counts that every metric is made of."""

    row: int
    sentence: int
    kind: str
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union in [0, 1]; 1 where both masks are empty."""
        return self.intersection / self.union if self.union else 1.0


def summarize(scores: list[SentenceScore]) -> dict[str, dict[str, float]]:
    """mIoU, oIoU, Pr@X and the number of expressions: over all, and per kind of sentence where there are several kinds."""
    groups = defaultdict(list, all=scores)
    if len({score.kind for score in scores}) > 1:
        for score in scores:
            groups[score.kind].append(score)
    metric = evaluate.load(str(METRIC))
    return {
        name: metric.compute(
            intersections=[score.intersection for score in group], unions=[score.union for score in group]
        )
        for name, group in groups.items()
    }


def format_table(summaries: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of several summaries (`{"model": summarize(…), "shuffled": …}`), percentages with one decimal."""
    columns = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
    lines = ["| expressions | number | asked | " + " | ".join(columns) + " |", "|---|--:|---|" + "--:|" * len(columns)]
    for group in next(iter(summaries.values())):
        for asked, summary in summaries.items():
            values = " | ".join(f"{100 * summary[group][column]:.1f}" for column in columns)
            lines.append(f"| {group} | {summary[group]['num_expressions']} | {asked} | {values} |")
    return "\n".join(lines)
