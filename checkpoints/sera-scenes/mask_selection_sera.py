"""Mask selection on the logits' own grid: the expected-IoU threshold, the largest connected component, and the score (ours).

The grid has some ten thousand cells, an image some million pixels. So everything is decided on the cells that the image covers.
Then the logits are interpolated to the image's pixels, and the mask lies above the threshold. numpy computes all of it in double
precision, on the CPU: every device decides the same.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

EXPECTED_IOU = "expected_iou"
# How far below the threshold's logit the cells of other components are put. Rounding cannot raise them so far.
MARGIN = 1e-3


class GridSelection(NamedTuple):
    """What was decided on the grid.

    Attributes:
        threshold: Probability in [0, 1] above which a pixel is in the mask.
        logits: float32 (h, w), the given ones. Where one component is kept, the cells of the others lie below the threshold.
        expected_iou: The expected IoU of the mask in [0, 1], see `expected_iou`.
    """

    threshold: float
    logits: np.ndarray
    expected_iou: float


def select_on_grid(logits: np.ndarray, threshold: float | str, keep_largest_component: bool) -> GridSelection:
    """Decide on the grid what a mask is to be.

    Args:
        logits: float32 (h, w), of the cells that the image covers.
        threshold: Probability in (0, 1), or `EXPECTED_IOU`.
        keep_largest_component: Whether only the component with the largest sum of probabilities stays.
    """
    exact = logits.astype(np.float64)
    probabilities = sigmoid(exact)
    if threshold == EXPECTED_IOU:
        threshold = expected_iou_threshold(probabilities)
    mask = probabilities > threshold
    if keep_largest_component and mask.any():
        edge = math.log(threshold) - math.log1p(-threshold)
        kept = largest_component(mask, probabilities, diagonal_links(exact - edge))
        logits = np.where(mask & ~kept, np.float32(edge - MARGIN), logits)
        mask = kept
    return GridSelection(float(threshold), logits, expected_iou(mask, probabilities))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities in [0, 1] of logits."""
    small = np.exp(-np.abs(logits))  # never overflows
    return np.where(logits < 0, small, 1) / (1 + small)


def expected_iou(mask: np.ndarray, probabilities: np.ndarray) -> float:
    """The ratio of expected intersection to expected union of a mask, if cells are independent; 0 for an empty mask.

    Args:
        mask: bool (h, w).
        probabilities: (h, w), in [0, 1].
    """
    count = int(mask.sum())
    return float(probabilities[mask].sum() / (count + probabilities[~mask].sum())) if count else 0.0


def expected_iou_threshold(probabilities: np.ndarray) -> float:
    """The threshold of the mask with the largest expected IoU.

    A cell raises a ratio J if its probability is above J / (1 + J). So the best mask, of ratio J, has the cells above
    J / (1 + J). The threshold is low if the model is uncertain, and 0.5 if the model is sure of every cell.

    Args:
        probabilities: (h, w), in [0, 1].

    Returns:
        In [0, 0.5]; 0 only if all probabilities are 0.
    """
    values = np.sort(probabilities, axis=None)[::-1]
    intersections = values.cumsum()
    unions = np.arange(1, len(values) + 1) + intersections[-1] - intersections
    best = float((intersections / unions).max())
    return best / (1 + best)


def diagonal_links(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where two cells that touch at a corner are connected in the interpolated image.

    Between four cells bilinear interpolation has a saddle. The two high cells of a diagonal are connected if the saddle is above
    the threshold. So components of the grid are those of the interpolated image.

    Args:
        heights: (h, w), logits minus the logit of the threshold.

    Returns:
        Two bool (h - 1, w - 1): whether a cell is connected with the one below it at the right, and whether its right neighbour
        is connected with the cell below it.
    """
    above, right, below, opposite = heights[:-1, :-1], heights[:-1, 1:], heights[1:, :-1], heights[1:, 1:]
    falling, rising = above * opposite, right * below
    return (
        (above > 0) & (opposite > 0) & (right <= 0) & (below <= 0) & (falling > rising),
        (right > 0) & (below > 0) & (above <= 0) & (opposite <= 0) & (rising > falling),
    )


def largest_component(
    mask: np.ndarray, probabilities: np.ndarray, diagonals: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """The connected component of a mask with the largest sum of probabilities. An expression means one thing.

    Args:
        mask: bool (h, w). Cells are connected over their sides.
        probabilities: (h, w), in [0, 1].
        diagonals: From `diagonal_links`: where cells are connected over a corner too. `None`: nowhere.

    Returns:
        bool (h, w). Of equal sums the component of the first cell, row by row. Of an empty mask the mask itself.
    """
    labels = connected_components(mask, diagonals)
    if not mask.any():
        return mask
    return labels == np.bincount(labels[mask], weights=probabilities[mask]).argmax()


def connected_components(mask: np.ndarray, diagonals: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """The components of a mask, by union-find over the runs of its rows.

    Args:
        mask: bool (h, w).
        diagonals: As of `largest_component`.

    Returns:
        int64 (h, w): a number for each component, lower where its first cell comes earlier, row by row; -1 outside of the mask.
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    runs = starts.cumsum().reshape(mask.shape) - 1  # of each cell of the mask the number of its run
    number = int(starts.sum())
    if number == 0:
        return np.full(mask.shape, -1)
    both = mask[:-1] & mask[1:]
    upper, lower = [runs[:-1][both]], [runs[1:][both]]
    if diagonals is not None:
        falling, rising = diagonals
        upper += [runs[:-1, :-1][falling], runs[:-1, 1:][rising]]
        lower += [runs[1:, 1:][falling], runs[1:, :-1][rising]]
    links = np.unique(np.concatenate(upper) * number + np.concatenate(lower))
    parents = list(range(number))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    for one, other in zip((links // number).tolist(), (links % number).tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    return np.where(mask, np.array([root(run) for run in range(number)])[runs], -1)


def calibrated(raw: float, knots: Sequence[Sequence[float]]) -> float:
    """The IoU that a raw score stands for: linear between the knots, constant beyond them."""
    positions, values = zip(*knots, strict=True)
    return float(np.interp(raw, positions, values))


def checked_calibration(knots: Sequence[Sequence[float]] | None) -> list[list[float]] | None:
    """The knots of a calibration as lists of floats.

    Raises:
        ValueError: They are no pairs [raw score, IoU] within [0, 1] with rising raw scores and no falling IoU.
    """
    if knots is None:
        return None
    try:
        pairs = [[float(raw), float(iou)] for raw, iou in knots]
    except (TypeError, ValueError):
        pairs = []
    is_monotone = all(before[0] < after[0] and before[1] <= after[1] for before, after in pairwise(pairs))
    if not pairs or not is_monotone or not all(0 <= value <= 1 for pair in pairs for value in pair):
        raise ValueError(
            "score_calibration must be a list of pairs [raw score, IoU] within [0, 1], with rising raw scores and no falling IoU, "
            f"got {knots!r}."
        )
    return pairs


__all__ = [
    "EXPECTED_IOU",
    "GridSelection",
    "calibrated",
    "checked_calibration",
    "connected_components",
    "diagonal_links",
    "expected_iou",
    "expected_iou_threshold",
    "largest_component",
    "select_on_grid",
]
