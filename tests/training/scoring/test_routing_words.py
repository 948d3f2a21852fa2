"""Which words and groups go to which expert, on weights whose answer is known; the figures and tables of the report."""

import numpy as np
import pytest

from training.scoring.routing_words import (
    explained_variance,
    frequent_words,
    indicators,
    mean_weights,
    most_different_pairs,
    top_words,
    word_effects,
    words_of,
)
from training.scoring.slices import thickness_of

RNG = np.random.default_rng(0)
SENTENCES = [f"The {colour} {shape}" for colour in ("striped", "plain") for shape in ("cup", "disc") for _ in range(20)]
IS_STRIPED = np.array(["striped" in sentence for sentence in SENTENCES])


def one_hot(places: np.ndarray) -> np.ndarray:
    return np.eye(4)[places]


def test_words_are_found_in_any_spelling_and_counted_once_per_sentence():
    assert words_of("The cup's left-hand cup, THE one") == {"the", "cup's", "left-hand", "cup", "one"}
    found = frequent_words(["a b", "a a", "a c", "b"], least=1)
    assert {word: has.tolist() for word, has in found.items()} == {
        "a": [True, True, True, False],
        "b": [True, False, False, True],
        "c": [False, False, True, False],
    }
    assert list(frequent_words(["a b", "a a", "a c", "b"], least=2)) == ["b"]  # "a" is missing in one only


def test_a_word_that_decides_has_the_effect_of_its_sentences():
    weights = {"tap 1": one_hot(np.where(IS_STRIPED, 2, 3)), "tap 2": np.full((80, 4), 0.25)}
    effects = word_effects(SENTENCES, weights)
    assert set(effects) == {"striped", "plain", "cup", "disc"}
    assert effects["striped"]["sentences"] == 40
    assert effects["striped"]["effects"]["tap 1"] == pytest.approx(
        {"spatial": 0, "context": 0, "boundary": 1, "shape": -1}
    )
    assert effects["cup"]["effects"]["tap 1"] == pytest.approx(
        dict.fromkeys(("spatial", "context", "boundary", "shape"), 0)
    )
    assert all(value == 0 for found in effects.values() for value in found["effects"]["tap 2"].values())
    assert top_words(effects, "tap 1", "boundary", 3) == ["striped"]
    assert top_words(effects, "tap 2", "boundary", 3) == []


def test_the_variance_that_words_explain():
    noise = RNG.normal(size=(80, 2))
    decided = np.stack([IS_STRIPED, ~IS_STRIPED], axis=1).astype(float)
    weights = {
        "adapter 1": decided,
        "adapter 2": noise,
        "adapter 3": np.full((80, 2), 0.5),
        "adapter 4": decided + noise,
    }
    features = np.stack(list(frequent_words(SENTENCES).values()), axis=1).astype(float)
    found = explained_variance(features, weights)
    assert found["adapter 1"] == pytest.approx(1) and abs(found["adapter 2"]) < 0.1 and found["adapter 3"] is None
    assert 0.1 < found["adapter 4"] < 0.5
    by_kind = explained_variance(indicators(["a" if striped else "b" for striped in IS_STRIPED]), weights)
    assert by_kind["adapter 1"] == pytest.approx(1)
    assert explained_variance(RNG.normal(size=(80, 80)), weights)["adapter 1"] is None  # as many features as sentences


def test_mean_weights_of_groups():
    weights = {"adapter 1": np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])}
    found = mean_weights(weights, {"size": ["small", "large", "small"]})
    assert list(found) == ["all", "size"] and list(found["size"]) == ["small", "large"]
    assert found["all"]["all"]["adapter 1"] == {"spatial": 0.5, "boundary": 0.5}
    assert found["size"]["large"]["adapter 1"] == {"spatial": 0.5, "boundary": 0.5}
    assert found["size"]["small"]["adapter 1"] == {"spatial": 0.5, "boundary": 0.5}


def test_the_pairs_are_those_that_are_routed_most_differently():
    first = np.array([1.0, 0.9, 0.2, 0.5, 0.1, 0.7, 0.7])
    weights = {"adapter 1": np.stack([first, 1 - first], axis=1), "adapter 2": np.full((7, 2), 0.5)}
    images = np.array([4, 4, 4, 9, 9, 2, 2])
    assert most_different_pairs(images, weights, 6) == [(0, 2), (3, 4)]  # image 2 routes both alike
    assert most_different_pairs(images, weights, 1) == [(0, 2)]


def test_thickness_of_known_shapes():
    rows, columns = np.mgrid[0:60, 0:60] + 0.5
    distance = np.hypot(rows - 30, columns - 30)
    assert thickness_of(distance < 20) == "compact"
    assert thickness_of((rows < 12) & (columns < 12)) == "compact"  # also at the border of the image
    assert thickness_of((rows < 12) & (columns < 24)) == "medium thick"
    assert thickness_of((rows < 4) & (columns < 40)) == "thin"
    assert thickness_of((distance < 20) & (distance > 16)) == "thin"
    assert thickness_of(np.zeros((5, 5), bool)) == "no target"
