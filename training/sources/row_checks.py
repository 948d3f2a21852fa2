"""Rows that someone made, checked before they are used (ours)."""

import logging
from collections.abc import Mapping
from typing import Any

import datasets

from training.sources.agreement import compare_mask, describe_contradiction, union_box
from training.sources.masks import mask_area
from training.sources.refer_records import is_number, is_text, shown

logger = logging.getLogger(__name__)

CHECKED = ("ref_id", "no_target", "sentences", "sentence_ids", "sentence_kinds", "mask", "boxes")


def check_rows(rows: datasets.Dataset, name: str) -> None:
    """Check every row but for its image. A warning counts the rows whose mask agrees only roughly with its boxes.

    Args:
        rows: Rows of REFER_FEATURES.
        name: What messages call them, such as their folder.

    Raises:
        ValueError: For a row that cannot be used, with its number, its ref_id and the reason.
    """
    doubtful = []
    batches = rows.select_columns(list(CHECKED)).iter(batch_size=1000)  # several times as fast as row by row
    every = (
        dict(zip(CHECKED, values, strict=True))
        for batch in batches
        for values in zip(*map(batch.get, CHECKED), strict=True)
    )
    for number, row in enumerate(every):
        try:
            if _is_doubtful(row):
                doubtful.append(row["ref_id"])
        except ValueError as error:
            raise ValueError(f"{name}: row {number} (ref_id {row['ref_id']}) cannot be used: {error}") from error
    if doubtful:
        logger.warning(
            "%s: %d masks agree only roughly with their own boxes; the first has ref_id %s. They are used as they are.",
            name,
            len(doubtful),
            doubtful[0],
        )


def count_doubtful(rows: datasets.Dataset) -> int:
    """The number of rows, all of them checked before, whose mask agrees only roughly with its boxes."""
    batches = rows.select_columns(["mask", "boxes"]).iter(batch_size=1000)
    pairs = (pair for batch in batches for pair in zip(batch["mask"], batch["boxes"], strict=True))
    return sum(compare_mask(mask, union_box(boxes)).is_doubtful for mask, boxes in pairs if boxes)


def check_sentences(sentences: Any) -> None:
    """`ValueError` where sentences are not texts, one or more."""
    if not sentences or not all(map(is_text, sentences)):
        raise ValueError(f"its sentences must be texts, one or more, got {shown(sentences)}")


def check_target(mask: Mapping[str, Any], no_target: bool | None) -> None:
    """`ValueError` where a mask is damaged, has no pixel and a target, or has pixels and no target."""
    is_empty = not mask_area(mask)
    if is_empty != bool(no_target):
        raise ValueError(
            f"its mask has {'no pixel' if is_empty else 'pixels'} and no_target is {no_target}: no_target is true where the "
            "sentences mean nothing in the image, and only there"
        )


def _is_doubtful(row: Mapping[str, Any]) -> bool:
    """Whether a row's mask agrees only roughly with its boxes; `ValueError` where the row cannot be used."""
    sentences = row["sentences"]
    check_sentences(sentences)
    for column in ("sentence_ids", "sentence_kinds"):
        values = row[column]
        if values is None or len(values) != len(sentences) or None in values:
            raise ValueError(f"its {column} must be as many as its sentences, {len(sentences)}, got {shown(values)}")
    mask = row["mask"]
    if mask is None:
        raise ValueError("it has no mask")
    check_target(mask, row["no_target"])
    boxes = row["boxes"]
    if row["no_target"] or not boxes:
        return False
    for box in boxes:
        if box is None or len(box) != 4 or not all(map(is_number, box)) or min(box[2:]) < 0:
            raise ValueError(f"its boxes must be [x, y, width, height] in pixels each, got {shown(boxes)}")
    agreement = compare_mask(mask, box := union_box(boxes))
    if agreement.is_contradiction:
        raise ValueError(f"it contradicts itself: its mask {describe_contradiction(agreement, mask, box)}")
    return agreement.is_doubtful


__all__ = ["check_rows", "check_sentences", "check_target", "count_doubtful"]
