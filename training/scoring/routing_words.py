"""Which words and which groups of expressions a router sends to which expert (ours)."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from training.learning.routing_health import experts_of
from training.scoring.slices import NO_TARGET, SIZES, THICKNESSES

LEAST_OCCURRENCES = 10  # sentences with a word; the standard error of its effect is then 0.3 at most
CONSTANT = 1e-6  # standard deviation of a weight that is constant but for rounding
_ORDER = {label: i for i, label in enumerate((*SIZES, *THICKNESSES, NO_TARGET))}
_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Weights = dict[str, dict[str, float]]  # per router the mean weight of each expert


def words_of(sentence: str) -> set[str]:
    """The different words of a sentence, in lower case."""
    return set(_WORD.findall(sentence.lower()))


def frequent_words(sentences: Sequence[str], least: int = LEAST_OCCURRENCES) -> dict[str, np.ndarray]:
    """Words that stand in at least `least` sentences, and are missing in at least as many. (N,) bool: which have the word."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, sentence in enumerate(sentences):
        for word in words_of(sentence):
            found[word].append(i)
    return {
        word: np.isin(np.arange(len(sentences)), places)
        for word, places in sorted(found.items())
        if least <= len(places) <= len(sentences) - least
    }


def word_effects(
    sentences: Sequence[str], weights: dict[str, np.ndarray], least: int = LEAST_OCCURRENCES
) -> dict[str, dict[str, Any]]:
    """How much more weight the sentences with a word give to each expert.

    Args:
        sentences: N sentences.
        weights: Per router (N, experts).
        least: Sentences that must have the word, and that must not have it.

    Returns:
        `{word: {"sentences": number with the word, "effects": {router: {expert: effect}}}}`. An effect is the mean weight over the
        sentences with the word minus the mean over all, in standard deviations of the weight over all sentences. It is 0 where the
        weight does not vary.
    """
    standard = {}
    for router, table in weights.items():
        spread = table.std(axis=0)
        standard[router] = (table - table.mean(axis=0)) / np.where(spread > CONSTANT, spread, np.inf)
    return {
        word: {
            "sentences": int(has_word.sum()),
            "effects": {
                router: dict(zip(experts_of(router), table[has_word].mean(axis=0).tolist(), strict=True))
                for router, table in standard.items()
            },
        }
        for word, has_word in frequent_words(sentences, least).items()
    }


def top_words(effects: dict[str, dict[str, Any]], router: str, expert: str, number: int) -> list[str]:
    """The words that send most weight to an expert, the strongest first; only those with a positive effect."""
    strengths = {word: found["effects"][router][expert] for word, found in effects.items()}
    return sorted((word for word in strengths if strengths[word] > 0), key=lambda word: -strengths[word])[:number]


def explained_variance(features: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Share of the variance of each router's weights that is linear in some features of the sentences.

    It is adjusted for the number of features (Ezekiel's adjusted R²). So features without any relation give about 0, also below.

    Args:
        features: (N, F).
        weights: Per router (N, experts). The variances of the experts are added.

    Returns:
        Per router the share, at most 1; `None` if the weights do not vary or if there are too few sentences.
    """
    centred = features - features.mean(axis=0)
    found: dict[str, float | None] = {}
    for router, table in weights.items():
        deviations = table - table.mean(axis=0)
        coefficients, _, rank, _ = np.linalg.lstsq(centred, deviations, rcond=None)
        free = len(table) - 1 - rank
        if free < 1 or table.std(axis=0).max() <= CONSTANT:
            found[router] = None
            continue
        residual = np.square(deviations - centred @ coefficients).sum() / np.square(deviations).sum()
        found[router] = float(1 - residual * (len(table) - 1) / free)
    return found


def indicators(labels: Sequence[str]) -> np.ndarray:
    """One column per different label, (N, labels): 1 where a sentence has it, else 0."""
    _, number = np.unique(np.asarray(labels), return_inverse=True)
    return np.eye(number.max() + 1)[number]


def mean_weights(weights: dict[str, np.ndarray], groups: dict[str, Sequence[str]]) -> dict[str, dict[str, Weights]]:
    """The mean weight of every expert over groups of expressions.

    Args:
        weights: Per router (N, experts).
        groups: Per dimension, such as "size", the label of each of the N expressions.

    Returns:
        Per dimension and label the mean weights. The first dimension is "all", with the one label "all".
    """
    found: dict[str, dict[str, Weights]] = {}
    size = len(next(iter(weights.values())))
    for dimension, labels in ({"all": ["all"] * size} | groups).items():
        given = np.asarray(labels)
        found[dimension] = {
            str(label): {
                router: dict(zip(experts_of(router), table[given == label].mean(axis=0).tolist(), strict=True))
                for router, table in weights.items()
            }
            for label in sorted(set(labels), key=lambda label: (_ORDER.get(label, -1), label))
        }
    return found


def most_different_pairs(images: np.ndarray, weights: dict[str, np.ndarray], number: int) -> list[tuple[int, int]]:
    """The two expressions about an image that are routed most differently, for the `number` images where they differ most.

    The difference is the total variation distance of the weights, in [0, 1], averaged over the routers.

    Args:
        images: (N,) the image of each expression.
        weights: Per router (N, experts).
        number: Number of pairs at most. Images with equal routing of all expressions give none.

    Returns:
        Numbers of two expressions each, the most different pair first.
    """
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    by_image: dict[int, list[int]] = defaultdict(list)
    for i, image in enumerate(images.tolist()):
        by_image[image].append(i)
    for image, places in by_image.items():
        for a, b in combinations(places, 2):
            distance = float(np.mean([np.abs(table[a] - table[b]).sum() / 2 for table in weights.values()]))
            if distance > max(CONSTANT, best.get(image, (0.0, ()))[0]):
                best[image] = distance, (a, b)
    return [pair for _, pair in sorted(best.values(), key=lambda found: -found[0])[:number]]


__all__ = [
    "Weights",
    "explained_variance",
    "frequent_words",
    "indicators",
    "mean_weights",
    "most_different_pairs",
    "top_words",
    "word_effects",
    "words_of",
]
