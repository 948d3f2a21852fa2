"""The boundary F-score: how well the outlines of two masks agree (Perazzi et al., "DAVIS", 2016; exact definition below)."""

import math

import numpy as np

TOLERANCE = 0.008  # of the image's diagonal, as on DAVIS


def mask_outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a (H, W) boolean mask with a neighbour (of four) outside of the mask or of the image."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def boundary_f_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of the outlines' precision and recall, in [0, 1].

    Precision is the share of the predicted outline's pixels that lie within r pixels of a pixel of the true outline. Distances are
    Euclidean, between pixel centres, and r = ⌈0.008 · image diagonal⌉. Recall is the same with the two outlines exchanged.
    Two empty masks score 1. An empty and a non-empty mask score 0.

    Args:
        predicted: (H, W) boolean mask at the image's own size.
        truth: The same.
    """
    if not predicted.any() or not truth.any():
        return float(predicted.any() == truth.any())
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    either = predicted | truth
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # it contains both outlines
    outlines = mask_outline(predicted[window]), mask_outline(truth[window])
    hits = [
        np.count_nonzero(own & dilate(other, radius)) / np.count_nonzero(own)
        for own, other in (outlines, outlines[::-1])
    ]
    return 2 * hits[0] * hits[1] / sum(hits) if any(hits) else 0.0


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` pixels of a (H, W) boolean mask. The loop runs over the disc's rows, from its tip to its middle."""
    height, width = mask.shape
    widened, reach, result = mask.copy(), 0, np.zeros_like(mask)
    for offset in range(radius, -1, -1):
        while reach < math.isqrt(radius**2 - offset**2):
            reach += 1
            widened[:, reach:] |= mask[:, : max(width - reach, 0)]
            widened[:, : max(width - reach, 0)] |= mask[:, reach:]
        result[offset:] |= widened[: max(height - offset, 0)]
        result[: max(height - offset, 0)] |= widened[offset:]
    return result
