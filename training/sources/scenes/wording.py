"""How the meaning of an expression about an embedded scene is put into words (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from training.sources.scenes.semantics import Attributes, Meaning

T = TypeVar("T")

NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop"),
    "frame": ("frame",),
    "bar": ("bar", "rod", "stick"),
    "heart": ("heart",),
    "cross": ("cross", "cross", "plus"),
    "moon": ("moon", "moon", "crescent"),
    "hourglass": ("hourglass",),
    "arch": ("arch", "arch", "arc"),
    None: ("thing", "object", "shape"),
}
SIZES = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
BAR_SIZES = {"large": ("long",), "small": ("short",)}
TEXTURES = {
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "plain": ("plain",),
}
SUFFIXES = {"striped": (" with stripes",), "dotted": (" with dots", " with spots"), "checkered": (" with checks",)}
SUPERLATIVES = {"largest": ("largest", "biggest"), "smallest": ("smallest",)}
ORDINALS = {2: "second", 3: "third"}

HORIZONTAL = (
    "{side} {np}",
    "{side} {np}",
    "{side} {np}",
    "{side}most {np}",
    "far {side} {np}",
    "{np} on the far {side}",
)
RANK_FIRST = {
    "left": HORIZONTAL,
    "right": HORIZONTAL,
    "top": ("top {np}", "top {np}", "highest {np}", "topmost {np}"),
    "bottom": ("bottom {np}", "bottom {np}", "lowest {np}"),
}
RANK_LATER = ("{ordinal} {np} from the {side}", "{ordinal} {np} from {side}")
SIDE = {
    "left": ("{np} on the left", "{np} on the left side", "{np} on left"),
    "right": ("{np} on the right", "{np} on the right side", "{np} on right"),
    "top": ("{np} at the top", "{np} near the top"),
    "bottom": ("{np} at the bottom", "{np} near the bottom"),
}
CORNER = ("{v} {h} {np}", "{v} {h} {np}", "{np} in the {v} {h} corner", "{np} {v} {h}", "{np} at the {v} {h}")
VERTICAL = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
MIDDLE = ("{np} in the middle", "{np} in the center", "center {np}")
BESIDE = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "top": ("above", "above", "higher than"),
    "bottom": ("below", "below", "lower than"),
}
TO_ANCHOR = {
    "nearest": ("closest to", "nearest to", "that is closest to", "that is nearest to"),
    "farthest": ("farthest from", "that is farthest away from"),
    "overlapping": ("overlapping", "that overlaps", "touching", "that touches"),
    "front": ("in front of", "that is in front of", "covering part of", "that covers part of"),
    "behind": ("behind", "that is behind", "partly hidden by", "that is partly covered by"),
}
JOINTS = ("", "", "that is ", "which is ", "located ")


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def noun_phrase(attributes: Attributes, rng: np.random.Generator, plural: bool = False) -> str:
    """The attributes in words, without an article: "small striped red circle"."""
    shape, color, size, texture = attributes
    words, suffix = [], ""
    if size is not None:
        words.append(_pick(rng, (BAR_SIZES if shape == "bar" else SIZES)[size]))
    if texture in SUFFIXES and rng.random() < 0.25:
        suffix = _pick(rng, SUFFIXES[texture])
    elif texture is not None:
        words.append(_pick(rng, TEXTURES[texture]))
    if color is not None:
        words.append(color)
    noun = _pick(rng, NOUNS[shape])
    if shape is None and words and not plural and rng.random() < 0.5:
        noun = "one"
    if plural:
        noun += "es" if noun.endswith(("s", "ch")) else "s"
    return " ".join((*words, noun)) + suffix


def word(meaning: Meaning, kind: str, candidates: int, rng: np.random.Generator) -> str:
    """One wording of the meaning in the manner of its kind. `candidates` counts what the noun phrase alone may mean."""
    relation, side, rank = meaning.clause or (None, "", 1)
    phrase = noun_phrase(meaning.attributes, rng)
    if kind == "relation":
        if relation in SUPERLATIVES:
            superlative = _pick(rng, SUPERLATIVES[relation])
            if rng.random() < 0.3:
                return f"the {phrase} that is the {superlative}"
            return f"the {superlative} of the {noun_phrase(meaning.attributes, rng, plural=True)}"
        return f"the {phrase} {_to_anchor(meaning, rng)}"

    if relation is None:
        text = phrase
    elif relation in SUPERLATIVES:
        text = f"{_pick(rng, SUPERLATIVES[relation])} {phrase}"
    elif relation == "rank" and rank == 1:
        text = _pick(rng, RANK_FIRST[side]).format(np=phrase, side=side)
    elif relation == "rank":
        text = _pick(rng, RANK_LATER).format(np=phrase, side=side, ordinal=ORDINALS[rank])
    elif relation == "side":
        text = _pick(rng, SIDE[side]).format(np=phrase)
    elif relation == "corner":
        vertical, horizontal = side.split()
        text = _pick(rng, CORNER).format(np=phrase, v=_pick(rng, VERTICAL[vertical]), h=horizontal)
    else:
        # the "middle" one of three would be the second from either side
        text = _pick(rng, MIDDLE if candidates > 2 else (*MIDDLE, "middle {np}")).format(np=phrase)
    return f"the {text}" if rng.random() < 0.15 else text


def _to_anchor(meaning: Meaning, rng: np.random.Generator) -> str:
    """The relation to the anchor and what that is called, which may hold a relation to a further one."""
    relation, side, _ = meaning.clause
    link = _pick(rng, JOINTS) + _pick(rng, BESIDE[side]) if relation == "beside" else _pick(rng, TO_ANCHOR[relation])
    text = f"{link} the {noun_phrase(meaning.anchor.attributes, rng)}"
    return text if meaning.anchor.clause is None else f"{text} {_to_anchor(meaning.anchor, rng)}"
