"""How far a score would move with other pictures: bootstrap intervals (Efron, 1979), resampled by picture."""

from collections.abc import Sequence

import numpy as np

from training.referring_iou.referring_iou import Terms

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**22  # drawn pictures held at once


def bootstrap_intervals(
    terms: Terms, pictures: Sequence[int], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of ratios of sums, from resampled pictures.

    Expressions about one picture share its difficulty, so it is pictures that are drawn, with replacement and as many as there
    are, each with all its expressions. A resample without any expression that a metric counts (no-target rows are few, say) has
    no value of it and is left out of that metric's interval.

    Args:
        terms: Per metric the numerators and denominators of N expressions.
        pictures: The picture of each of the N expressions, any integers.
        resamples: How many times pictures are drawn.
        level: Share of the resamples between the two ends, in (0, 1).
        seed: Of the draws; the same pictures are drawn for every metric.

    Returns:
        Per metric the lower and the upper end.
    """
    _, picture = np.unique(np.asarray(pictures), return_inverse=True)
    number = int(picture.max()) + 1
    columns = [side for pair in terms.values() for side in pair]
    totals = np.stack([np.bincount(picture, weights=side, minlength=number) for side in columns], axis=1)
    rng = np.random.default_rng(seed)
    step = max(_CHUNK // number, 1)
    sums = []
    for start in range(0, resamples, step):
        drawn = rng.integers(number, size=(min(step, resamples - start), number))
        places = drawn + number * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums.append(times @ totals)
    numerators, denominators = np.concatenate(sums).reshape(resamples, -1, 2).transpose(2, 1, 0)
    ends = (0.5 - level / 2, 0.5 + level / 2)
    intervals = {}
    for name, over, under in zip(terms, numerators, denominators, strict=True):
        defined = under > 0
        values = over[defined] / under[defined] if defined.any() else np.ones(1)  # no pixel anywhere: all rightly empty
        low, high = np.quantile(values, ends)
        intervals[name] = (float(low), float(high))
    return intervals
