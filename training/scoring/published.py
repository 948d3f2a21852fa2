"""The columns of the papers' table, and published figures beside which a model's own stand.

The figures are from public notes on the papers (about SERA: arXiv 2603.12538), not from the papers themselves. The notes round mIoU
to one decimal. What they do not state stays blank here: nothing is filled in from memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from training.scoring.reports import SET_NAMES


class Column(NamedTuple):
    """A split of a REFER set.

    Attributes:
        dataset: Name of the set, such as "refcoco+".
        split_by: Whose split, such as "unc".
        split: Name of the split.
    """

    dataset: str
    split_by: str
    split: str

    @property
    def key(self) -> str:
        """Its name in files and options."""
        return "-".join(self)

    @property
    def label(self) -> str:
        """Its name in tables: RefCOCOg has two splits called val."""
        name = SET_NAMES.get(self.dataset, self.dataset)
        return f"{name} {self.split}" + (f"({self.split_by[0]})" if self.dataset == "refcocog" else "")


REFCOCO, REFCOCO_PLUS = (
    tuple(Column(name, "unc", split) for split in ("val", "testA", "testB")) for name in ("refcoco", "refcoco+")
)
REFCOCOG_UMD = tuple(Column("refcocog", "umd", split) for split in ("val", "test"))
REFCOCOG_GOOGLE = (Column("refcocog", "google", "val"),)
EIGHT = REFCOCO + REFCOCO_PLUS + REFCOCOG_UMD
NINE = EIGHT + REFCOCOG_GOOGLE
GENERALIZED = tuple(Column("grefcoco", "unc", split) for split in ("val", "testA", "testB"))
COLUMNS = NINE + GENERALIZED
MEANS: Mapping[str, tuple[Column, ...]] = {"mean of 8": EIGHT, "mean of 9": NINE}
MEANS_NOTE = (
    "Mean of 8: RefCOCO and RefCOCO+ val, testA and testB, and RefCOCOg val(u) and test(u). Mean of 9: these and RefCOCOg "
    "val(g)."
)


@dataclass(frozen=True)
class PublishedRow:
    """Published figures of a model, in percent.

    Attributes:
        name: The model.
        on_mixture: Whether one model was trained on several sets together. `None` where no source tells.
        figures: By metric and column.
        means: By metric and the name of a mean, where the source states the mean itself.
    """

    name: str
    on_mixture: bool | None
    figures: Mapping[str, Mapping[Column, float]] = field(default_factory=dict)
    means: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def mean(self, metric: str, name: str) -> float | None:
        """A mean over MEANS: as the source states it, else of the single figures; `None` where one is missing."""
        stated = self.means.get(metric, {}).get(name)
        values = [self.figures.get(metric, {}).get(column) for column in MEANS[name]]
        if stated is not None:
            return stated
        return None if None in values else sum(values) / len(values)


def _nine(*values: float) -> dict[Column, float]:
    return dict(zip(NINE, values, strict=True))


PUBLISHED = (
    PublishedRow(
        "SERA",
        False,
        {"mIoU": _nine(76.5, 78.2, 73.7, 70.4, 74.4, 62.8, 68.8, 68.9, 66.6), "oIoU": {REFCOCO[0]: 74.74}},
        {"mIoU": {"mean of 8": 71.7}},
    ),
    PublishedRow(
        "DETRIS-B",
        False,
        {"mIoU": _nine(76.0, 78.2, 73.5, 68.9, 74.0, 61.5, 67.9, 68.1, 65.9)},
        {"mIoU": {"mean of 8": 71.0}},
    ),
    PublishedRow("AMLRIS", False, means={"mIoU": {"mean of 8": 72.9}}),
    PublishedRow("C3VG", True, means={"mIoU": {"mean of 8": 78.2}}),
    PublishedRow(
        "DeRIS-B",
        True,
        {"gIoU": {GENERALIZED[0]: 74.1}, "N-acc": {GENERALIZED[0]: 77.0}},
        {"mIoU": {"mean of 8": 78.1}},
    ),
)

__all__ = ["COLUMNS", "EIGHT", "GENERALIZED", "MEANS", "MEANS_NOTE", "NINE", "PUBLISHED", "Column", "PublishedRow"]
