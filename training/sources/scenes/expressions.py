"""The search for expressions about an embedded scene: meanings that single out an object, put into words.

`semantics` says what a meaning is, `wording` how it is said. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np

from training.sources.scenes.semantics import (
    CORNERS,
    KINDS,
    SIDES,
    Attributes,
    Clause,
    Expression,
    Meaning,
    SceneObject,
    SceneSemantics,
    only_one,
)
from training.sources.scenes.wording import word

REDUNDANT = 0.4  # share of the clauses that may follow a noun phrase which is clear by itself
LONG = 0.7  # share of the relations of `describe` with two steps, where two are possible
OVER_SPECIFIED = 0.5  # share of the noun phrases that name one attribute more than needed, as people do

_Option = tuple[float, Clause | None, int | None]  # weight, clause, number of the anchor
_Phrase = tuple[Attributes, tuple[int, int]]  # attributes and who has them

LOCATION_OPTIONS: tuple[_Option, ...] = (
    *((weight, Clause("rank", side, rank), None) for side in SIDES for rank, weight in ((1, 3.0), (2, 0.5), (3, 0.2))),
    *((1.2, Clause("side", side), None) for side in SIDES),
    *((3.0, Clause("corner", corner), None) for corner in CORNERS),
    (4.0, Clause("middle"), None),
)
SUPERLATIVE_OPTIONS: tuple[_Option, ...] = ((1.0, Clause("largest"), None), (1.0, Clause("smallest"), None))
APPEARANCE_OPTIONS: tuple[_Option, ...] = ((8.0, None, None), *SUPERLATIVE_OPTIONS)
TO_ANCHOR_OPTIONS = (
    *((4.0, Clause("beside", side)) for side in SIDES),
    (0.6, Clause("nearest")),
    (0.2, Clause("farthest")),
    (1.0, Clause("overlapping")),
    (1.0, Clause("front")),
    (1.0, Clause("behind")),
)


def write_expressions(objects: Sequence[SceneObject], rng: np.random.Generator) -> tuple[Expression, ...]:
    """At most one expression of each kind for every object; a kind with no clear expression is left out.

    Args:
        objects: the objects of one scene in drawing order, all with a visible pixel.
        rng: draws the choices among all meanings that work, and the wording.
    """
    semantics = SceneSemantics(objects)
    phrases = [_phrases(semantics, item, rng) for item in objects]
    anchors = [_specify(semantics, i, phrases[i], [(1.0, None, None)], [], rng) for i in range(len(objects))]
    expressions = []
    for target in range(len(objects)):
        usable = [i for i, anchor in enumerate(anchors) if anchor is not None and i != target]
        relations = [(weight, clause, i) for i in usable for weight, clause in TO_ANCHOR_OPTIONS]
        options = (LOCATION_OPTIONS, APPEARANCE_OPTIONS, (*SUPERLATIVE_OPTIONS, *relations))
        for kind, choice in zip(KINDS, options, strict=True):
            meaning = _specify(semantics, target, phrases[target], choice, anchors, rng)
            if meaning is not None:
                candidates = semantics.filter(meaning.attributes)[1].bit_count()
                expressions.append(Expression(word(meaning, kind, candidates, rng), kind, target, meaning))
    return tuple(expressions)


def describe(
    semantics: SceneSemantics, kind: str, targets: Sequence[int], rng: np.random.Generator
) -> tuple[Expression, ...]:
    """At most one expression of the kind for each target; a target with no clear one is left out.

    Unlike those of `write_expressions`, relations mostly go over two steps: "the disc left of the bar that is above the star".

    Args:
        semantics: of one scene.
        kind: one of KINDS.
        targets: numbers of the objects that are described.
        rng: draws the choices among all meanings that work, and the wording.
    """
    numbers = range(len(semantics.objects)) if kind == "relation" else targets
    phrases = {i: _phrases(semantics, semantics.objects[i], rng) for i in numbers}
    if kind == "relation":
        short, long = _anchors(semantics, phrases, rng)
    expressions = []
    for target in targets:
        if kind != "relation":
            options = LOCATION_OPTIONS if kind == "location" else APPEARANCE_OPTIONS
            meaning = _specify(semantics, target, phrases[target], options, [], rng)
        else:
            meaning = None
            if rng.random() < LONG:
                # "left of the bar above the disc" is no way to speak of that disc
                usable = [i for i, anchor in long.items() if semantics.referent(anchor.anchor) != target]
                meaning = _specify(semantics, target, phrases[target], _relations(usable, target), long, rng)
            if meaning is None:
                options = (*SUPERLATIVE_OPTIONS, *_relations(short, target))
                meaning = _specify(semantics, target, phrases[target], options, short, rng)
        if meaning is not None:
            candidates = semantics.filter(meaning.attributes)[1].bit_count()
            expressions.append(Expression(word(meaning, kind, candidates, rng), kind, target, meaning))
    return tuple(expressions)


def describe_absent(
    semantics: SceneSemantics, kind: str, attributes: Attributes, rng: np.random.Generator
) -> str | None:
    """An expression of the kind about a thing with attributes that no object has, not even possibly.

    None where the kind is "relation" and the scene has nothing that can be called by its attributes.

    Raises:
        ValueError: if some object may have the attributes.
    """
    if semantics.filter(attributes)[1]:
        raise ValueError(f"An object of the scene may be called {attributes}.")
    meaning = Meaning(attributes)
    if kind == "location":
        weights = np.array([weight for weight, _, _ in LOCATION_OPTIONS])
        chosen = int(rng.choice(len(weights), p=weights / weights.sum()))
        meaning = Meaning(attributes, LOCATION_OPTIONS[chosen][1])
    elif kind == "relation":
        phrases = {i: _phrases(semantics, item, rng) for i, item in enumerate(semantics.objects)}
        short, long = _anchors(semantics, phrases, rng)
        anchors = long if long and rng.random() < LONG else short
        if not anchors:
            return None
        weights = np.array([weight for weight, _ in TO_ANCHOR_OPTIONS])
        clause = TO_ANCHOR_OPTIONS[int(rng.choice(len(weights), p=weights / weights.sum()))][1]
        meaning = Meaning(attributes, clause, list(anchors.values())[int(rng.random() * len(anchors))])
    return word(meaning, kind, 2, rng)


def _anchors(
    semantics: SceneSemantics, phrases: Mapping[int, Sequence[_Phrase]], rng: np.random.Generator
) -> tuple[dict[int, Meaning], dict[int, Meaning]]:
    """Names for objects as anchors: by attributes alone, and by attributes with a relation that they need.

    The attributes of the second kind fit several objects. So nobody can take such an anchor's relation for the target's.
    """
    short, long = {}, {}
    for i in phrases:
        meaning = _specify(semantics, i, phrases[i], [(1.0, None, None)], [], rng)
        if meaning is not None:
            short[i] = meaning
    for i in phrases:
        meaning = _specify(semantics, i, phrases[i], _relations(short, i), short, rng, always_needed=True)
        if meaning is not None:
            long[i] = meaning
    return short, long


def _relations(anchors: Iterable[int], target: int) -> list[_Option]:
    """Every clause about the target and one of the anchors."""
    return [(weight, clause, i) for i in anchors if i != target for weight, clause in TO_ANCHOR_OPTIONS]


def _phrases(semantics: SceneSemantics, item: SceneObject, rng: np.random.Generator) -> list[_Phrase]:
    """Every combination of the object's nameable attributes, roughly from the shortest to the longest."""
    values = (item.shape, item.color, item.size, item.texture)
    costs = {}
    for named, noise in zip(product((False, True), repeat=4), rng.random(16).tolist(), strict=True):
        if named[2] and item.size == "medium":
            continue
        # a shape makes the noun; that something is plain is said only where it matters
        cost = sum(named) + 1.3 * (not named[0]) + 1.5 * (named[3] and item.texture == "plain") + noise
        costs[tuple(value if name else None for value, name in zip(values, named, strict=True))] = cost
    return [(attributes, semantics.filter(attributes)) for attributes in sorted(costs, key=costs.__getitem__)]


def _specify(
    semantics: SceneSemantics,
    target: int,
    phrases: Sequence[_Phrase],
    options: Sequence[_Option],
    anchors: Sequence[Meaning | None] | Mapping[int, Meaning],
    rng: np.random.Generator,
    always_needed: bool = False,
) -> Meaning | None:
    """A meaning that denotes `target`: the first of the options, in weighted random order, that a short phrase completes.

    An option whose clause the phrase needs mostly comes before one whose clause is not needed. With `always_needed` the others are
    not used. None if nothing works. `anchors` are the meanings of the options' anchors.
    """
    keys = rng.random(len(options)).tolist()  # sorted by u^(1/weight): Efraimidis and Spirakis, 2006
    order = sorted(range(len(options)), key=lambda i: keys[i] ** (1 / options[i][0]), reverse=True)
    over_specified = rng.random() < OVER_SPECIFIED
    passes = (True,) if always_needed else (True, False) if rng.random() > REDUNDANT else (False,)
    for needed in passes:
        for _, clause, anchor in (options[i] for i in order):
            if not semantics.can_hold(target, clause, anchor):
                continue
            fitting = (
                attributes
                for attributes, candidates in phrases
                if (clause is None or not needed or candidates[1].bit_count() > 1)
                and only_one(semantics.relate(candidates, clause, anchor)) == target
            )
            chosen = next(fitting, None)
            if chosen is None:
                continue
            if over_specified:
                chosen = next((longer for longer in fitting if _adds_one(chosen, longer)), chosen)
            return Meaning(chosen, clause, None if anchor is None else anchors[anchor])
    return None


def _adds_one(attributes: Attributes, longer: Attributes) -> bool:
    pairs = list(zip(attributes, longer, strict=True))
    return sum(a != b for a, b in pairs) == 1 and all(a in (None, b) for a, b in pairs)
