"""Honest scores: the map to the IoU, its error, and what it is by chance."""

import numpy as np
import pytest

from processing_sera.mask_selection_sera import calibrated, checked_calibration
from training.scoring.calibration import area_under_roc, fit_calibration, score_quality


def sample(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores that are too high, and IoUs that scatter around the square of them."""
    rng = np.random.default_rng(seed)
    raw = rng.random(number)
    return raw, (raw**2 + rng.normal(scale=0.04, size=number)).clip(0, 1)


def test_fitted_scores_are_the_mean_iou_and_keep_their_order():
    knots = fit_calibration(*sample(2000))
    assert checked_calibration(knots) == knots and len(knots) <= 12
    assert knots[0] == [0.0, 0.0] and knots[-1][0] == 1.0
    for raw in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert calibrated(raw, knots) == pytest.approx(raw**2, abs=0.04)
    raw, ious = sample(2000, seed=1)  # others
    scores = [calibrated(value, knots) for value in raw]
    before, after = (score_quality(values, ious, range(2000)) for values in (raw, scores))
    assert before["ECE"] > 0.1 > 0.03 > after["ECE"] and after["AUC"] == pytest.approx(before["AUC"], abs=0.01)


@pytest.mark.parametrize(
    "raw", [np.linspace(0, 1, 40), np.full(40, 0.3), np.zeros(40), np.ones(40), np.repeat([0.2, 0.9], 20)]
)
@pytest.mark.parametrize("ious", [np.zeros(40), np.ones(40), np.linspace(1, 0, 40), np.linspace(0, 1, 40)])
def test_every_fit_is_a_calibration(raw, ious):
    assert checked_calibration(fit_calibration(raw, ious))


def test_few_expressions_fit_nothing():
    with pytest.raises(ValueError, match="There are 29 expressions; scores are fitted on 30 or more"):
        fit_calibration(np.zeros(29), np.zeros(29))


def test_the_error_is_that_of_five_equal_bins():
    scores = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 4)
    ious = np.repeat([0.2, 0.3, 0.2, 0.8, 0.7], 4)
    quality = score_quality(scores, ious, range(20))
    assert quality["ECE"] == pytest.approx(np.mean([0.1, 0.0, 0.3, 0.1, 0.2]))
    assert quality["ECE_by_chance"] == 0 and [part["number"] for part in quality["bins"]] == [4] * 5
    assert [part["IoU"] for part in quality["bins"]] == pytest.approx([0.2, 0.3, 0.2, 0.8, 0.7])
    constant = score_quality(np.full(20, ious.mean()), ious, range(20))
    assert constant["AUC"] == 0.5  # a constant estimate passes for honest, but ranks nothing


def test_the_level_of_chance_is_the_error_of_a_perfect_estimate():
    """Also where expressions share images, whose misses are alike."""
    rng = np.random.default_rng(0)
    for per_image in (1, 5):
        errors, levels = [], []
        for _ in range(300):
            scores = np.repeat(rng.uniform(0.2, 0.8, 300 // per_image), per_image)
            ious = scores + np.repeat(rng.normal(scale=0.1, size=300 // per_image), per_image)
            quality = score_quality(scores, ious, np.repeat(np.arange(300 // per_image), per_image))
            errors.append(quality["ECE"])
            levels.append(quality["ECE_by_chance"])
        assert np.mean(levels) == pytest.approx(np.mean(errors), rel=0.1)


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, is_good = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[is_good] for b in scores[~is_good]]
    assert area_under_roc(scores, is_good) == pytest.approx(np.mean(pairs))
    assert area_under_roc(scores, np.ones(40, bool)) is None and area_under_roc(scores, np.zeros(40, bool)) is None


def test_a_single_expression_has_a_quality():
    assert score_quality([0.4], [0.6], ["a"])["ECE"] == pytest.approx(0.2)
