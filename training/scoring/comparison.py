"""Two models on the same sentences: differences with paired intervals over images (ours)."""

from collections.abc import Mapping
from typing import Any

from training.scoring.intervals import LEVEL, RESAMPLES, paired_intervals
from training.scoring.metric import SentenceScore, score_terms
from training.scoring.paper_tables import Table, in_order
from training.scoring.published import MEANS, MEANS_NOTE, Column
from training.scoring.referring_iou.referring_iou import Terms, ratio

Record = dict[str, Any]
METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "N-acc", "T-acc", "boundary_F")


def compare_records(first: Record, second: Record) -> dict[str, Any]:
    """Compare two evaluations of a split on the sentences that both scored.

    Args:
        first: An evaluation with "data_checksum" and "rows", the split's row of each of its rows (`None`: all, in order).
        second: One of another model.

    Returns:
        "expressions" and "images", their numbers; "first_better" and "second_better", numbers of expressions with the higher IoU;
        and "metrics": by name the two values and the interval of their difference, or `None` with fewer than two images.

    Raises:
        ValueError: Where the two are about other data, or share no sentence.
    """
    if first["data_checksum"] != second["data_checksum"]:
        raise ValueError(
            f"The evaluations of {first['model']} and {second['model']} on {'-'.join(first['column'])} are about other data; make "
            "both tables from the same --root."
        )
    keyed = [_by_sentence(record) for record in (first, second)]
    shared = sorted(keyed[0].keys() & keyed[1].keys())
    if not shared:
        raise ValueError(f"{first['model']} and {second['model']} share no sentence of {'-'.join(first['column'])}.")
    mine, theirs = ([scores[key][0] for key in shared] for scores in keyed)
    images = [keyed[0][key][1] for key in shared]
    terms = [score_terms(scores) for scores in (mine, theirs)]
    intervals = paired_intervals(*terms, images) if len(set(images)) > 1 else {}
    return {
        "expressions": len(shared),
        "images": len(set(images)),
        "first_better": sum(a.iou > b.iou for a, b in zip(mine, theirs, strict=True)),
        "second_better": sum(a.iou < b.iou for a, b in zip(mine, theirs, strict=True)),
        "metrics": {
            name: {"values": _values(terms, name), "interval": intervals.get(name)}
            for name in METRICS
            if name in terms[0]
        },
    }


def comparison_table(first: Mapping[Column, Record], second: Mapping[Column, Record]) -> Table:
    """The comparison of two models on every split that both were scored on.

    Raises:
        ValueError: As `compare_records`, or where they share no split.
    """
    columns = [column for column in in_order(first) if column in second]
    if not columns:
        raise ValueError("The two models were scored on no common split.")
    names = [next(iter(records.values()))["model"] for records in (first, second)]
    compared = {column: compare_records(first[column], second[column]) for column in columns}
    rows = []
    for column, found in compared.items():
        better = f"{found['first_better']} : {found['second_better']}"
        for metric, figures in found["metrics"].items():
            values = figures["values"]
            ends = figures["interval"]
            difference = f"{100 * (values[0] - values[1]):+.1f}"
            difference += f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else ""
            counts = (str(found["expressions"]), str(found["images"]), better) if metric == "mIoU" else ("", "", "")
            cells = [f"{100 * value:.1f}" for value in values]
            rows.append((column.label, metric, *counts, *cells, difference))
    for mean, members in MEANS.items():
        if not all(member in compared for member in members):
            continue
        for metric in ("mIoU", "oIoU"):
            pairs = [compared[member]["metrics"][metric]["values"] for member in members]
            values = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
            cells = [f"{100 * value:.1f}" for value in values]
            rows.append((mean, metric, "", "", "", *cells, f"{100 * (values[0] - values[1]):+.1f}"))
    caption = (
        f"{names[0]} against {names[1]}, sentence by sentence, in percent. Difference: the first minus the second; in brackets "
        f"{LEVEL:.0%} of the differences in {RESAMPLES} paired resamples of images. Better: expressions for which the first or the "
        f"second has the higher IoU. Means have no interval: their splits share images. {MEANS_NOTE}"
    )
    header = ("split", "metric", "expressions", "images", "better", *_told_apart(names), "difference")
    return Table(caption, header, tuple(rows), 2)


def _told_apart(names: list[str]) -> list[str]:
    """Two names, with a number behind them where they are the same."""
    return names if names[0] != names[1] else [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _by_sentence(record: Record) -> dict[tuple[int, int], tuple[SentenceScore, int]]:
    """The scores and their images by (row of the split, sentence)."""
    rows, images = record["rows"], record["image_ids"]
    scores = (SentenceScore(**score) for score in record["scores"])
    return {
        (score.row if rows is None else rows[score.row], score.sentence): (score, images[score.row]) for score in scores
    }


def _values(terms: list[Terms], name: str) -> list[float]:
    return [ratio(*each[name]) for each in terms]


__all__ = ["compare_records", "comparison_table"]
