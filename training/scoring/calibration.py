"""Honest scores: a map from raw scores to the IoU that they stand for, and how far scores are from the truth (ours)."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

BINS = 5  # of equal mass, for the expected calibration error
GOOD_IOU = 0.5  # a mask above it is one that the score should rank high
IDENTITY = [[0.0, 0.0], [1.0, 1.0]]  # the calibration that gives the raw score
MAX_KNOTS, EXPRESSIONS_PER_KNOT, MIN_EXPRESSIONS = 10, 30, 30


def fit_calibration(raw: Sequence[float], ious: Sequence[float]) -> list[list[float]]:
    """Fit the IoU as a rising function of the raw score: isotonic regression, reduced to a few knots.

    A knot is the mean of neighbours in equal numbers. A raw score of 0 is an empty mask, of IoU 0. The last part goes on to a raw
    score of 1, so that higher raw scores stay higher.

    Args:
        raw: Raw scores in [0, 1], one per expression.
        ious: The IoU of their masks, in [0, 1].

    Returns:
        Pairs [raw score, IoU], as `SeraProcessor` takes them.

    Raises:
        ValueError: There are fewer than MIN_EXPRESSIONS expressions.
    """
    from scipy.optimize import isotonic_regression  # slow to import

    if len(raw) < MIN_EXPRESSIONS:
        raise ValueError(f"There are {len(raw)} expressions; scores are fitted on {MIN_EXPRESSIONS} or more.")
    order = np.argsort(raw, kind="stable")
    positions, values = np.asarray(raw, np.float64)[order], np.asarray(ious, np.float64)[order]
    values = isotonic_regression(values).x
    parts = np.array_split(np.arange(len(order)), min(MAX_KNOTS, len(order) // EXPRESSIONS_PER_KNOT))
    knots = [[0.0, 0.0]]
    for part in parts:
        position, value = round(float(positions[part].mean()), 4), round(float(values[part].mean()), 4)
        if knots[-1][0] < position:
            knots.append([position, value])
    if 0 < knots[-1][0] < 1:
        (before, low), (last, high) = knots[-2:]
        knots.append([1.0, round(min(1.0, high + (high - low) / (last - before) * (1 - last)), 4)])
    return knots


def score_quality(
    scores: Sequence[float], ious: Sequence[float], images: Sequence[Hashable]
) -> dict[str, float | list[dict[str, float]] | None]:
    """How honest scores are, as estimates of the IoU.

    Args:
        scores: In [0, 1], one per expression, at least one.
        ious: The IoU of their masks, in [0, 1].
        images: The image of each expression. Expressions about one image are not independent.

    Returns:
        "ECE": expected calibration error in BINS bins of equal mass. It is the mean over the bins of the difference between mean
        score and mean IoU, weighted by the expressions. "ECE_by_chance": what a perfect estimate would have on average, because
        a bin has few images. "AUC": area under the ROC curve of the score for IoU > GOOD_IOU; `None` if all masks are on one side.
        "bins": number, mean score and mean IoU of each bin.
    """
    scores, ious = np.asarray(scores, np.float64), np.asarray(ious, np.float64)
    _, images = np.unique(np.array([str(image) for image in images]), return_inverse=True)
    order = np.argsort(scores, kind="stable")
    bins, error, chance = [], 0.0, 0.0
    for part in np.array_split(order, min(BINS, len(order))):
        misses = ious[part] - scores[part]
        share = len(part) / len(order)
        error += share * abs(misses.mean())
        # the standard error of the mean over images; the mean size of a normal value is that times the root of 2 / pi
        by_image = np.bincount(images[part], weights=misses - misses.mean())
        chance += share * math.sqrt(2 / math.pi) * math.sqrt(np.square(by_image).sum()) / len(part)
        bins.append({"number": len(part), "score": float(scores[part].mean()), "IoU": float(ious[part].mean())})
    return {"ECE": float(error), "ECE_by_chance": chance, "AUC": area_under_roc(scores, ious > GOOD_IOU), "bins": bins}


def area_under_roc(scores: np.ndarray, is_good: np.ndarray) -> float | None:
    """The probability that a good mask has a higher score than another; equal scores count half. `None` if all are on one side."""
    from scipy.stats import rankdata  # slow to import

    good = int(is_good.sum())
    others = len(is_good) - good
    if not good or not others:
        return None
    return float((rankdata(scores)[is_good].sum() - good * (good + 1) / 2) / (good * others))


__all__ = ["IDENTITY", "area_under_roc", "fit_calibration", "score_quality"]
