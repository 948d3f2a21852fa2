"""Training images that no run trains on: the split "held_out" (ours)."""

import hashlib

import datasets

SPLIT = "held_out"


def is_held_out(image_id: int, share: float) -> bool:
    """Whether an image is held out, by its id alone. A larger share holds out the same images and more.

    Args:
        image_id: The image's id in its set.
        share: Share of images to hold out, in [0, 1].
    """
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def divide(rows: datasets.Dataset, share: float, *, held_out: bool) -> datasets.Dataset:
    """The rows of a training split whose images are held out, or the others."""
    if not share:
        return rows.select([]) if held_out else rows
    chosen = [row for row, image_id in enumerate(rows["image_id"]) if is_held_out(image_id, share) == held_out]
    return rows.select(chosen)


__all__ = ["SPLIT", "divide", "is_held_out"]
