"""Whether a mask agrees with the box and the area that stand beside it, and which known mistake explains it where not (ours).

A mask with run lengths in the wrong order, with x and y swapped or in the coordinates of a resized image is still a mask. Only its
box and its area tell that it is not the one that was meant.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from training.sources.masks import encode_mask, polygon_points, run_lengths, segmentation_to_rle

Box = Sequence[float]  # x, y, width, height in pixels

MIN_BOX_IOU = 0.5  # below, a mask contradicts its box; on refer-mini the smallest is 0.92
SURE_BOX_IOU = 0.8  # below, it is doubtful; above, undoing a mistake explains it
EDGE_TOLERANCE = 1.5  # pixels that every edge may differ by: the IoU of small boxes says nothing
AREA_TOLERANCE = 0.25  # of the larger area, beside a pixel all around the box
SAME_SCALE = 1.1  # ratio of sizes up to which a mask counts as not resized


@dataclass(frozen=True)
class Agreement:
    """How a mask compares with what stands beside it.

    Attributes:
        box_iou: IoU of the mask's box and the given box, in [0, 1]; 1 where no edge differs by more than EDGE_TOLERANCE.
        area_agrees: Whether the mask's area is near the given one; true where none is given.
        is_contradiction: Whether the mask cannot be the one that the box is about.
        mistake: Where the boxes contradict each other: a sentence about the mistake that explains it, or "".
    """

    box_iou: float
    area_agrees: bool = True
    is_contradiction: bool = False
    mistake: str = ""

    @property
    def is_doubtful(self) -> bool:
        """Whether the mask should be looked at."""
        return not self.is_contradiction and (self.box_iou < SURE_BOX_IOU or not self.area_agrees)


def compare_mask(rle: Mapping[str, Any], box: Box, area: float | None = None, segmentation: Any = None) -> Agreement:
    """Compare a mask with its box and, where it is known, its area.

    A mask contradicts its box below an IoU of MIN_BOX_IOU of the boxes. A mask inside its box that has the given area is doubtful
    instead, unless a known mistake explains it.

    Args:
        rle: Code of the mask as `encode_mask` gives it.
        box: x, y, width and height in pixels. What lies outside the image is not compared.
        area: Area in pixels.
        segmentation: What the mask was made of: polygons or a run-length code. None: `rle`.
    """
    height, width = rle["size"]
    measured = coco_mask.toBbox(rle).tolist()
    expected = _clipped(box, height, width)
    iou, pixels = _agreement(measured, expected), float(coco_mask.area(rle))
    tolerance = AREA_TOLERANCE * max(pixels, area or 0) + measured[2] + measured[3]
    area_agrees = area is None or abs(pixels - area) <= tolerance
    if iou >= MIN_BOX_IOU:
        return Agreement(iou, area_agrees)
    mistake = _find_mistake(rle if segmentation is None else segmentation, measured, box, height, width)
    # Polygons lose stray pixels far from the object, which count for the box and hardly for the area.
    lost_pixels = bool(area and pixels and area_agrees and _lies_in(measured, expected) and not mistake)
    return Agreement(iou, area_agrees, not lost_pixels, mistake)


def describe_contradiction(agreement: Agreement, rle: Mapping[str, Any], box: Box) -> str:
    """What is wrong, as the end of a sentence that begins with whose mask it is, and the mistake that explains it."""
    measured = [round(edge) for edge in coco_mask.toBbox(rle).tolist()]
    given = [round(float(edge), 1) for edge in box]
    found = (
        f"has the box {measured}"
        if measured[2]
        else f"has no pixel in its image of {rle['size'][0]} x {rle['size'][1]}"
    )
    said = (
        f"{found}, its given box is {given} (their IoU is {agreement.box_iou:.2f}, {MIN_BOX_IOU} or more is accepted)"
    )
    return f"{said}. {agreement.mistake}" if agreement.mistake else said


def draw_checked(
    segmentation: Any, height: int, width: int, box: Box | None = None, area: float | None = None
) -> tuple[dict[str, Any], bool]:
    """Draw an annotation's mask and compare it with the box and the area that stand beside it.

    Args:
        segmentation: Polygons or a run-length code, as `segmentation_to_rle` takes them.
        height: Of the image in pixels.
        width: Of the image in pixels.
        box: x, y, width and height in pixels; None where there is none, and then nothing is compared.
        area: Area in pixels, where it is known.

    Returns:
        The mask's code, and whether it agrees only roughly with what stands beside it.

    Raises:
        ValueError: Where the segmentation is malformed or the mask contradicts its box; the end of a sentence that begins with what
            the annotation is called.
    """
    try:
        rle = segmentation_to_rle(segmentation, height, width)
    except ValueError as error:
        raise ValueError(f"is malformed: {error}") from error
    if box is None:
        if not isinstance(segmentation, Mapping) and max(height, width) > 1 and _are_shares(segmentation):
            raise ValueError(
                "is malformed: its coordinates all lie between 0 and 1. They look like shares of the image's sides, and must be "
                "pixels."
            )
        return rle, False
    agreement = compare_mask(rle, box, area, segmentation)
    if agreement.is_contradiction:
        raise ValueError(f"contradicts itself: its mask {describe_contradiction(agreement, rle, box)}")
    return rle, agreement.is_doubtful


def union_box(boxes: Sequence[Box]) -> list[float]:
    """The smallest box around one or more boxes."""
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return [left, top, right - left, bottom - top]


def _agreement(a: Box, b: Box) -> float:
    edges = zip((a[0], a[1], a[0] + a[2], a[1] + a[3]), (b[0], b[1], b[0] + b[2], b[1] + b[3]), strict=True)
    is_nothing = [not (box[2] or box[3]) for box in (a, b)]
    if is_nothing[0] or is_nothing[1]:
        return float(all(is_nothing))
    return 1.0 if all(abs(one - other) <= EDGE_TOLERANCE for one, other in edges) else _iou(a, b)


def _lies_in(inner: Box, outer: Box) -> bool:
    starts = all(inner[axis] >= outer[axis] - EDGE_TOLERANCE for axis in (0, 1))
    return starts and all(inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] + EDGE_TOLERANCE for i in (0, 1))


def _iou(a: Box, b: Box) -> float:
    overlap = math.prod(max(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    return overlap / union if union > 0 else 0.0


def _clipped(box: Box, height: int, width: int) -> list[float]:
    """What of a box lies in the image; all zeros where nothing does."""
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return [left, top, right - left, bottom - top] if right >= left and bottom >= top else [0, 0, 0, 0]


def _are_shares(polygons: Any) -> bool:
    return all(0 <= coordinate <= 1 for polygon in polygons for coordinate in polygon)


def _find_mistake(segmentation: Any, measured: Box, box: Box, height: int, width: int) -> str:
    """The mistake that, undone, makes mask and box agree; "" where none does."""
    corners = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    if min(corners[2:]) > 0 and _iou(measured, corners) >= SURE_BOX_IOU:
        return "The given box looks like two corners; it must be [x, y, width, height]."
    if isinstance(segmentation, Mapping):
        by_rows = np.repeat(np.arange(len(runs := run_lengths(segmentation))) % 2 == 1, runs).reshape(height, width)
        if _iou(coco_mask.toBbox(encode_mask(by_rows)).tolist(), box) >= SURE_BOX_IOU:
            return "Its run lengths look as if they were counted row by row; COCO counts them column by column."
        bounds = measured
    else:
        points = np.concatenate([points for points in map(polygon_points, segmentation) if len(points) >= 3])
        bounds = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
    if _iou([bounds[1], bounds[0], bounds[3], bounds[2]], box) >= SURE_BOX_IOU:
        return "Its x and y look swapped."
    if min(bounds[2], bounds[3], box[2], box[3]) > 0:
        scale = math.sqrt(bounds[2] * bounds[3] / (box[2] * box[3]))
        is_resized = not 1 / SAME_SCALE < scale < SAME_SCALE
        if is_resized and _iou([edge / scale for edge in bounds], box) >= SURE_BOX_IOU:
            return f"Its coordinates look like those of the image before it was resized, {scale:.3g} times as large as the box's."
    return ""


__all__ = ["Agreement", "Box", "compare_mask", "describe_contradiction", "draw_checked", "union_box"]
