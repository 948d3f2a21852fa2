"""How many refs the splits of the REFER sets have, as their authors publish them."""

from collections.abc import Mapping

# By (dataset, split_by).
PUBLISHED_REFS: Mapping[tuple[str, str], Mapping[str, int]] = {
    ("refcoco", "unc"): {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    ("refcoco+", "unc"): {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    ("refcocog", "umd"): {"train": 42226, "val": 2573, "test": 5023},
    ("refcocog", "google"): {"train": 44822, "val": 5000},
}


def is_part(dataset: str, split_by: str, split: str, number: int) -> bool:
    """Whether so many refs are another number than the split's published one. False where none is published."""
    return PUBLISHED_REFS.get((dataset, split_by), {}).get(split, number) != number


__all__ = ["PUBLISHED_REFS", "is_part"]
