"""Bootstrap intervals of scores (Efron, 1979), resampled by image: how much a score would vary with other images."""

from collections.abc import Sequence

import numpy as np

from training.scoring.referring_iou.referring_iou import Terms

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**22  # drawn images held at once


def bootstrap_intervals(
    terms: Terms, images: Sequence[int], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of ratios of sums, from resampled images.

    Expressions about one image share its difficulty. So images are drawn with replacement, each with all its expressions, until
    there are as many as in the data. A resample may hold no expression that a metric counts, because rows without a target are few,
    for example. It is then left out of that metric's interval.

    Args:
        terms: Per metric the numerators and denominators of N expressions.
        images: The image of each of the N expressions, any integers.
        resamples: Number of resamples.
        level: Share of the resamples between the two ends, in (0, 1).
        seed: Seed of the draws. The same images are drawn for every metric.

    Returns:
        Per metric the lower and the upper end.
    """
    numerators, denominators = _resampled(terms, images, resamples, seed)
    intervals = {}
    for name, over, under in zip(terms, numerators, denominators, strict=True):
        defined = under > 0
        values = (
            over[defined] / under[defined] if defined.any() else np.ones(1)
        )  # no pixel anywhere: all masks are correctly empty
        intervals[name] = _ends(values, level)
    return intervals


def paired_intervals(
    terms: Terms,
    other: Terms,
    images: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of each metric in `terms` minus the same metric in `other`, for the same expressions.

    Both are scored on the same resampled images. So an image that is hard for both does not widen the interval.

    Args:
        terms: Per metric the numerators and denominators of N expressions. An expression may occur several times, for example once
            per seed.
        other: The same for another model.
        images: The image of each of the N expressions, any integers.
        resamples: Number of resamples.
        level: Share of the resamples between the two ends, in (0, 1).
        seed: Seed of the draws.

    Returns:
        Per metric that both have, the lower and the upper end.
    """
    names = [name for name in terms if name in other]
    both = {("terms", name): terms[name] for name in names} | {("other", name): other[name] for name in names}
    over, under = _resampled(both, images, resamples, seed)
    values = np.divide(over, under, out=np.ones_like(over), where=under > 0)
    return {
        name: _ends(first - second, level)
        for name, first, second in zip(names, values[: len(names)], values[len(names) :], strict=True)
    }


def _resampled(terms: Terms, images: Sequence[int], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, both (metrics, resamples), summed over the images that each resample drew."""
    _, image = np.unique(np.asarray(images), return_inverse=True)
    number = int(image.max()) + 1
    columns = [side for pair in terms.values() for side in pair]
    totals = np.stack([np.bincount(image, weights=side, minlength=number) for side in columns], axis=1)
    rng = np.random.default_rng(seed)
    step = max(_CHUNK // number, 1)
    sums = []
    for start in range(0, resamples, step):
        drawn = rng.integers(number, size=(min(step, resamples - start), number))
        places = drawn + number * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums.append(times @ totals)
    numerators, denominators = np.concatenate(sums).reshape(resamples, -1, 2).transpose(2, 1, 0)
    return numerators, denominators


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2))
    return float(low), float(high)
