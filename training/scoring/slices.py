"""Scores by object size (COCO's), length, wording, relation, number of targets and category; thinness of objects (ours)."""

import re
from collections import defaultdict
from collections.abc import Sequence

import datasets
import numpy as np
from scipy.ndimage import distance_transform_edt

from training.scoring.metric import SentenceScore

# COCO's areas in pixels of the image: "small" is below the first, "large" starts at the second
SIZE_BOUNDS = (32**2, 96**2)
SIZES = ("small", "medium", "large")
# share of an object's area that the largest disc inside of it has: 1 for a disc, 0.79 for a square, 0.39 for two squares in a row
THIN, COMPACT = 0.25, 0.5
THICKNESSES = ("thin", "medium thick", "compact")
LENGTHS = ((2, "1-2 words"), (5, "3-5 words"), (10, "6-10 words"))
LONGEST = "11 words or more"
NO_TARGET = "no target"

# Words for a place in the image. "left of" and similar words name a place next to something else, so they are relations.
_LOCATION = re.compile(
    r"\b(?:(?:left|right)(?!\s+of\b)(?:most|hand)?|(?:far|very)\s+(?:left|right)|top|bottom|upper|lower|middle|cent(?:er|re)"
    r"|front|back|foreground|background|corner|edge|side|closest|nearest|furthest|farthest|first|second|third|fourth|last)\b",
    re.IGNORECASE,
)
# Words that relate the target to another thing. "in", "on" and "with" alone mostly name clothes and places, so they do not count.
_RELATION = re.compile(
    r"\b(?:(?:left|right)\s+of|next\s+to|in\s+front\s+of|on\s+top\s+of|close\s+to|beside|besides|behind|between|among|near|by"
    r"|under|underneath|beneath|below|above|over|against|around|inside|outside|across|facing|holding|riding|touching|carrying"
    r"|pulling|pushing|leaning|attached|surrounded|than)\b",
    re.IGNORECASE,
)
# Kinds of relations. If a sentence has several, the first of this list counts.
_RELATION_WORDS = {
    "nearest or farthest": r"closest|nearest|furthest|farthest",
    "in front or behind": r"in\s+front\s+of|behind|covering|covers|(?:hidden|covered)\s+by",
    "above or below": r"above|below|over|under|underneath|beneath|(?:higher|lower)\s+than|on\s+top\s+of",
    "left or right of": r"(?:left|right)\s+of",
}
_RELATIONS = {name: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for name, words in _RELATION_WORDS.items()}
_RELATIONS["another relation"] = _RELATION
NO_RELATION = "no relation"
_WORDINGS = {
    (True, True): "location and relation",
    (True, False): "location",
    (False, True): "relation",
    (False, False): "neither",
}


def size_of(area: float) -> str:
    """COCO's size class of an object of `area` pixels."""
    return SIZES[sum(area >= bound for bound in SIZE_BOUNDS)] if area else NO_TARGET


def thickness_of(mask: np.ndarray) -> str:
    """How thin the object of a (H, W) boolean mask is, by the share of its area that the largest disc inside of it has."""
    if not mask.any():
        return NO_TARGET
    # from the centre of a pixel to the nearest edge of a pixel outside
    radius = distance_transform_edt(np.pad(mask, 1)).max() - 0.5
    share = np.pi * radius**2 / np.count_nonzero(mask)
    return THICKNESSES[sum(share >= bound for bound in (THIN, COMPACT))]


def length_of(sentence: str) -> str:
    """Range of the number of words, which are separated by white space."""
    words = len(sentence.split())
    return next((name for most, name in LENGTHS if words <= most), LONGEST)


def wording_of(sentence: str) -> str:
    """Whether a sentence has words for a location in the image, for a relation to another thing, for both or for neither."""
    relations = bool(_RELATION.search(sentence))
    rest = _RELATION.sub(" ", sentence)  # "front" in "in front of" is not a place in the image
    return _WORDINGS[bool(_LOCATION.search(rest)), relations]


def relation_of(sentence: str) -> str:
    """The kind of relation to another thing that a sentence has words for."""
    return next((name for name, words in _RELATIONS.items() if words.search(sentence)), NO_RELATION)


def slice_scores(rows: datasets.Dataset, scores: Sequence[SentenceScore]) -> dict[str, dict[str, list[SentenceScore]]]:
    """Scores by "size", "length", "wording", "relation" and "category"; and by "targets", if some expressions have several or none.

    Args:
        rows: The split that was scored.
        scores: The scores of its sentences.

    Returns:
        Per dimension the labels that occur, in a fixed order, with their scores. Each dimension holds every score once.
    """
    sentences, categories, annotations = rows["sentences"][:], rows["category"][:], rows["ann_ids"][:]
    sliced: dict[str, dict[str, list[SentenceScore]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        sentence = sentences[score.row][score.sentence]
        several = "several targets" if len(annotations[score.row]) > 1 else "one target"
        labels = {
            "size": size_of(score.truth),
            "length": length_of(sentence),
            "wording": wording_of(sentence),
            "relation": relation_of(sentence),
            "targets": several if score.truth else NO_TARGET,
            "category": categories[score.row] or "(none)",
        }
        for dimension, label in labels.items():
            sliced[dimension][label].append(score)
    if len(sliced["targets"]) < 2:
        del sliced["targets"]
    order = [*SIZES, *(name for _, name in LENGTHS), LONGEST, *_WORDINGS.values()]
    order += [*_RELATIONS, NO_RELATION]
    order += ["one target", "several targets", NO_TARGET]
    rank = {label: i for i, label in enumerate(order)}
    return {
        dimension: dict(sorted(groups.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))
        for dimension, groups in sliced.items()
    }
