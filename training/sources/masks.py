"""Masks as COCO run-length codes and polygons.

The code is COCO's, computed by pycocotools; the rest is ours.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Masks of more pixels are refused: Pillow opens no larger image by default.
MAX_PIXELS = 178_956_970

MAX_RUN_LETTERS = 8  # of a run in the compressed counts; a larger one fits no mask

# Polygons are clipped this many pixels outside the image: pycocotools then rounds at the border as ever.
CLIP_MARGIN = 1.0

# Beyond this, float64 no longer resolves a pixel and a clipped edge would land anywhere.
MAX_COORDINATE = 1e15


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask (H, W) as a COCO compressed run-length code {"size": [H, W], "counts": str}.

    The mask is a bool array or one of whole numbers, 0 and 1 or 0 and 255. Grey values between them are refused: a mask that went
    through JPEG or was resized has a wide grey edge, which would all count as object.

    Raises ValueError for anything else, and for a mask without a pixel on one side.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "bui" or mask.ndim != 2 or mask.size == 0:
        given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"a mask must be a non-empty array (height, width) of bools or whole numbers, got {given}")
    if mask.dtype != bool:
        white = 255 if mask.max() > 1 else 1
        grey = mask[(mask != 0) & (mask != white)]
        if grey.size:
            raise ValueError(
                f"a mask of whole numbers holds 0 and 1, or 0 and 255; {grey.size} of {mask.size} pixels have other values, for "
                f"example {grey[0]}. Cut it at half first, for example mask > 127."
            )
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes a COCO run-length code {"size": [H, W], "counts": str, bytes or list} to a bool mask (H, W).

    Raises ValueError when the code is damaged or its runs do not add up to H * W pixels.
    """
    return coco_mask.decode(_checked_rle(rle)).astype(bool)


def mask_area(rle: Mapping[str, Any]) -> int:
    """The number of pixels of a mask by its code; raises ValueError as decode_mask does."""
    return int(coco_mask.area(_checked_rle(rle)))


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Turns a COCO `segmentation` of an image of `height` x `width` pixels into a code like encode_mask's.

    Takes COCO's three forms: a list of polygons [x0, y0, x1, y1, ...] in pixels, whose union is meant; a
    run-length code, uncompressed (`counts` a list) or compressed (str or bytes). What lies outside the image
    is cut off. A polygon of one or two points (COCO holds a few) has no area and adds nothing.

    Raises ValueError for anything malformed: an odd number of coordinates, coordinates that are not finite,
    no polygon of three points or more, a run-length code that is damaged or of another size than the image.
    """
    if isinstance(segmentation, Mapping):
        rle = _checked_rle(segmentation)
        if rle["size"] != [height, width]:
            raise ValueError(f"the run-length code has the size {rle['size']}, its image {[height, width]}")
        return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    if not isinstance(segmentation, (list, tuple)):
        given = type(segmentation).__name__
        raise ValueError(f"a segmentation is a list of polygons or a run-length code, got {given}")
    polygons = [points for points in map(polygon_points, segmentation) if len(points) >= 3]
    if not polygons:
        raise ValueError("the segmentation has no polygon of at least 3 points")
    visible = [points for points in (_clip(points, height, width) for points in polygons) if len(points) >= 3]
    if not visible:
        return encode_mask(np.zeros((height, width), dtype=bool))
    rles = coco_mask.frPyObjects([points.ravel().tolist() for points in visible], height, width)
    return {"size": [height, width], "counts": coco_mask.merge(rles)["counts"].decode("ascii")}


def merge_rles(rles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of one or more codes that encode_mask or segmentation_to_rle gave, all of one size, as such a code."""
    merged = coco_mask.merge([{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles])
    return {"size": list(rles[0]["size"]), "counts": merged["counts"].decode("ascii")}


def run_lengths(rle: Mapping[str, Any]) -> list[int]:
    """The runs of a code, zeros first, in pixels.

    Raises ValueError for counts that are not whole numbers or text.
    """
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")
    if isinstance(counts, bytes):
        return _decompress_runs(counts)
    if isinstance(counts, (list, tuple)) and all(_is_whole(run) for run in counts):
        return [int(run) for run in counts]
    raise ValueError(f"the counts of a run-length code are whole numbers or text, got {str(counts)[:60]}")


def _checked_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"size": [H, W], "counts": compressed bytes}; raises ValueError for a damaged code, with which
    pycocotools would read and write out of bounds."""
    size = rle.get("size")
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(_is_whole(side) and side > 0 for side in size) or math.prod(map(int, size)) > MAX_PIXELS:
        raise ValueError(
            f"the size of a run-length code is [height, width], {MAX_PIXELS:,} pixels at most, got {str(size)[:60]}"
        )
    size, runs = [int(side) for side in size], run_lengths(rle)
    if sum(runs) != math.prod(size) or min(runs) < 0:
        raise ValueError(f"the runs must be >= 0 and fill a mask of size {size}, they add up to {sum(runs)}")
    counts = rle["counts"]
    if isinstance(counts, (list, tuple)):
        counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
    return {"size": size, "counts": counts.encode("ascii") if isinstance(counts, str) else counts}


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _decompress_runs(counts: bytes) -> list[int]:
    """Reads COCO's compressed counts; raises ValueError where they are damaged.

    Each character, counted from "0", holds five bits of a number, low bits first, and a sixth for "more
    follow"; the highest bit is the sign. The fourth run and later ones are differences to the one two before.
    """
    letters = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    if not letters.size:
        return []
    if letters.min() < 0 or letters.max() >= 64:
        wrong = int(letters[(letters < 0) | (letters >= 64)][0]) + ord("0")
        raise ValueError(f"the counts of a run-length code hold the character {chr(wrong)!r}")
    ends = np.flatnonzero(letters & 0x20 == 0)
    if not ends.size or ends[-1] != len(letters) - 1:
        raise ValueError("the counts of a run-length code end in the middle of a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_RUN_LETTERS:
        raise ValueError("the counts of a run-length code hold a number that is too large")
    shifts = 5 * (np.arange(len(letters)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 0x1F) << shifts, starts)
    runs -= np.where(letters[ends] & 0x10, np.int64(1) << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs.tolist()


def polygon_points(polygon: Any) -> np.ndarray:
    """Returns a flat COCO polygon as points (N, 2), x before y, in pixels. Raises ValueError."""
    numbers = polygon if isinstance(polygon, (list, tuple)) else [None]
    kinds = set(map(type, numbers))
    if not kinds <= {int, float} and not all(issubclass(kind, Real) and kind is not bool for kind in kinds):
        raise ValueError(f"a polygon is a flat list of numbers [x0, y0, x1, ...], got {str(polygon)[:60]}")
    if len(polygon) % 2:
        raise ValueError(f"a polygon needs an even number of coordinates, got {len(polygon)}")
    if polygon and not (max(polygon) <= MAX_COORDINATE and min(polygon) >= -MAX_COORDINATE):
        raise ValueError(f"the coordinates of a polygon must be finite and sensible, got {_first_outside(polygon)}")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    if np.isnan(points).any():  # which no comparison finds for certain
        raise ValueError("the coordinates of a polygon must be finite and sensible, got nan")
    return points


def _first_outside(polygon: Sequence[float]) -> float:
    return next(number for number in polygon if not abs(number) <= MAX_COORDINATE)


def _clip(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clips a polygon (N, 2) to the image and its margin; returns points (M, 2), none when it lies outside.

    pycocotools walks every edge in full, outside the image too: time and memory grow with the coordinates.
    After Sutherland and Hodgman, "Reentrant polygon clipping", 1974, one side of the frame after the other;
    the pieces of a concave polygon stay joined by edges along the frame, which enclose nothing.
    """
    for axis, side in ((0, width), (1, height)):
        for bound, inward in ((-CLIP_MARGIN, 1.0), (side + CLIP_MARGIN, -1.0)):
            depth = inward * (points[:, axis] - bound)
            if (depth >= 0).all():
                continue
            kept: list[np.ndarray] = []
            for i in range(len(points)):
                if (depth[i - 1] < 0) != (depth[i] < 0):
                    share = depth[i - 1] / (depth[i - 1] - depth[i])
                    crossing = points[i - 1] + share * (points[i] - points[i - 1])
                    crossing[axis] = bound
                    kept.append(crossing)
                if depth[i] >= 0:
                    kept.append(points[i])
            points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return points
