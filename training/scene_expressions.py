"""Expressions about a drawn scene: what each one means, and how it is worded.

Reading order: the records (what an object is, what an expression means), `SceneSemantics` (the one place where a
meaning is executed over the objects), the search for meanings that single out an object, and the wording.

A predicate has three values. An object satisfies it *clearly* (with a margin), *possibly* (a viewer could argue, or
would under another reading of the words) or not at all. A meaning denotes an object only where exactly one object
satisfies it clearly and no other one even possibly, so that the answer is plain to see. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np

KINDS = ("location", "appearance", "relation")  # after RefCOCO, RefCOCO+ and G-Ref
SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
# Relations that weigh the candidates against each other; the others concern one candidate at a time.
COMPARISONS = ("rank", "largest", "smallest", "nearest", "farthest")

# Distances are in units of the picture's side, between centres of visible pixels.
RANK_MARGIN = 0.08  # two objects closer than this along an axis have no clear order
FIRST_CLEAR = 0.42  # the leftmost of all is not called "left" where it lies further right than this
SIDE_CLEAR, SIDE_POSSIBLE = 0.36, 0.50  # distance from the side an object is said to be on
CORNER_CLEAR, CORNER_POSSIBLE = 0.40, 0.52
MIDDLE_CLEAR, MIDDLE_POSSIBLE = 0.14, 0.25  # from the centre, along either axis
BESIDE_CLEAR, BESIDE_POSSIBLE = 0.12, -0.03  # how far to the left of the anchor "left of" needs
DISTANCE_MARGIN = 0.08  # nearest and farthest, both from centre to centre and to the object's rim
LARGER_RADIUS, LARGER_AREA = 1.25, 1.15  # ratios to every other candidate
CONTACT_CLEAR = 0.06  # visible overlap as a share of the smaller object
CONTACT_POSSIBLE = 0.02  # objects within this distance of each other may seem to touch

LOOK_ALIKES = {"circle": ("ring",), "square": ("frame",), "small": ("medium",), "large": ("medium",)}

ATTRIBUTES = ("shape", "color", "size", "texture")
Attributes = tuple[str | None, str | None, str | None, str | None]  # values of ATTRIBUTES
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One drawn object. `mask` (H, W) bool holds its visible pixels, `full_mask` also those that others hide.

    `size` is "small", "medium" (never named) or "large"; `rgb` the colour drawn, 0..255; `radius` in pixels, half of
    the shape's extent; `center` the mean (x, y) of the visible pixels, in pixels; `area` their number.
    """

    shape: str
    color: str
    size: str
    texture: str
    rgb: tuple[int, int, int]
    radius: float
    center: tuple[float, float]
    area: int
    mask: np.ndarray
    full_mask: np.ndarray


class Clause(NamedTuple):
    """What a meaning says beyond attributes. `relation` is one of

    - "rank": number `rank` along the axis, counted from `direction` ("left", "right", "top", "bottom")
    - "side": near the `direction` side; "corner": near both sides of `direction` ("top left", …); "middle"
    - "largest", "smallest": among the candidates, which share a shape
    - "beside": to the `direction` of the anchor; "nearest", "farthest": the candidate closest to / farthest from it
    - "overlapping", "front", "behind": in visible contact with the anchor, drawn over it, drawn under it
    """

    relation: str
    direction: str = ""
    rank: int = 1


class Meaning(NamedTuple):
    """A small program: filter the objects by `attributes` (None: any), then by the clause, if there is one.

    The anchor of a clause has a meaning of its own that denotes one object; that object is never a candidate.
    """

    attributes: Attributes
    clause: Clause | None = None
    anchor: Meaning | None = None


@dataclass(frozen=True)
class Expression:
    """A wording of `meaning`, which denotes the object number `target`; `kind` is one of KINDS."""

    text: str
    kind: str
    target: int
    meaning: Meaning


class SceneSemantics:
    """Executes meanings over the objects of one scene, given in drawing order (back to front).

    Sets of objects are bit masks: bit i stands for object i.
    """

    def __init__(self, objects: Sequence[SceneObject]) -> None:
        self.objects = tuple(objects)
        self.everything = (1 << len(objects)) - 1
        height, width = objects[0].mask.shape
        self.x = [item.center[0] / width for item in objects]
        self.y = [item.center[1] / height for item in objects]
        self.radius = [item.radius / width for item in objects]

        full = np.stack([item.full_mask for item in objects])
        visible = np.stack([item.mask for item in objects])
        near = _dilate(full, max(1, round(CONTACT_POSSIBLE * width)))
        full_rows, visible_rows, near_rows = (
            m.reshape(len(objects), -1).astype(np.float32) for m in (full, visible, near)
        )
        hidden = visible_rows @ full_rows.T  # [i, j]: pixels of j under the visible part of i
        np.fill_diagonal(hidden, 0)
        areas = full_rows.sum(1)
        self.contact = (hidden + hidden.T >= CONTACT_CLEAR * np.minimum.outer(areas, areas)).tolist()
        self.near = (near_rows @ full_rows.T > 0).tolist()

        self._truths: dict[tuple[Clause, int | None, int], tuple[int, int]] = {}
        self._attributes: dict[tuple[str, str], tuple[int, int]] = {}
        for name in ATTRIBUTES:
            values = [getattr(item, name) for item in objects]
            for value in set(values):
                clear = _bits(i for i, other in enumerate(values) if other == value)
                alike = _bits(i for i, other in enumerate(values) if other in LOOK_ALIKES.get(value, ()))
                self._attributes[name, value] = clear, clear | alike

    def filter(self, attributes: Attributes) -> tuple[int, int]:
        """Objects that have the named attributes: (clearly, possibly); the first is a subset of the second."""
        clear = possible = self.everything
        for name, value in zip(ATTRIBUTES, attributes, strict=True):
            if value is not None:
                has, may_have = self._attributes.get((name, value), (0, 0))
                clear, possible = clear & has, possible & may_have
        return clear, possible

    def denote(self, meaning: Meaning) -> tuple[int, int]:
        """Objects that satisfy the whole meaning: (clearly, possibly); the first is a subset of the second."""
        candidates = self.filter(meaning.attributes)
        anchor = None
        if meaning.anchor is not None:
            anchor = self.referent(meaning.anchor)
            if anchor is None:
                return 0, candidates[1]
        return self.relate(candidates, meaning.clause, anchor)

    def relate(self, candidates: tuple[int, int], clause: Clause | None, anchor: int | None) -> tuple[int, int]:
        """Those candidates (clear, possible) of which the clause holds (clearly, possibly). The anchor is not one."""
        clear, possible = candidates
        if clause is None:
            return candidates
        if anchor is not None:
            clear, possible = clear & ~(1 << anchor), possible & ~(1 << anchor)
        among = self.everything
        if clause.relation in COMPARISONS:
            if clear != possible:  # a comparison among candidates needs to know who they are
                return 0, possible
            among = clear
        key = (clause, anchor, among)
        if key not in self._truths:
            members = _members(among)
            if clause.relation in COMPARISONS:
                truth = [self._compare(i, members, clause, anchor) for i in members]
            else:
                truth = [self._holds(i, clause, anchor) for i in members]
            self._truths[key] = (
                _bits(i for i, (holds, _) in zip(members, truth, strict=True) if holds),
                _bits(i for i, values in zip(members, truth, strict=True) if any(values)),
            )
        holds, may_hold = self._truths[key]
        return clear & holds, possible & may_hold

    def referent(self, meaning: Meaning) -> int | None:
        """The one object that the meaning denotes, or None where none or several could be meant."""
        return _only(self.denote(meaning))

    def can_hold(self, i: int, clause: Clause | None, anchor: int | None) -> bool:
        """False where the clause is not clearly true of object i, whatever the phrase before it."""
        if clause is None or clause.relation in COMPARISONS:
            return True
        return bool(self.relate((self.everything, self.everything), clause, anchor)[0] >> i & 1)

    def _along(self, i: int, direction: str) -> float:
        """Distance of object i from the picture's `direction` side."""
        return {"left": self.x[i], "right": 1 - self.x[i], "top": self.y[i], "bottom": 1 - self.y[i]}[direction]

    def _holds(self, i: int, clause: Clause, anchor: int | None) -> tuple[bool, bool]:
        """Predicates about object i alone, or about i and the anchor: (clearly, possibly)."""
        relation = clause.relation
        if relation in ("side", "corner"):
            distance = max(self._along(i, side) for side in clause.direction.split())
            limits = (SIDE_CLEAR, SIDE_POSSIBLE) if relation == "side" else (CORNER_CLEAR, CORNER_POSSIBLE)
            return distance < limits[0], distance < limits[1]
        if relation == "middle":
            distance = max(abs(self.x[i] - 0.5), abs(self.y[i] - 0.5))
            return distance < MIDDLE_CLEAR, distance < MIDDLE_POSSIBLE
        if relation == "beside":
            along = self._along(anchor, clause.direction) - self._along(i, clause.direction)
            dx, dy = abs(self.x[i] - self.x[anchor]), abs(self.y[i] - self.y[anchor])
            across = dy if clause.direction in ("left", "right") else dx
            return along > max(BESIDE_CLEAR, across), along > BESIDE_POSSIBLE
        order = {"overlapping": True, "front": i > anchor, "behind": i < anchor}[relation]
        return order and self.contact[i][anchor], order and self.near[i][anchor]

    def _compare(self, i: int, members: Sequence[int], clause: Clause, anchor: int | None) -> tuple[bool, bool]:
        """Predicates about object i among the candidates: (clearly, possibly)."""
        others = [j for j in members if j != i]
        relation = clause.relation
        if relation == "rank":
            place, before = self._along(i, clause.direction), clause.rank - 1
            distances = [self._along(j, clause.direction) - place for j in others]
            surely = sum(distance < -RANK_MARGIN for distance in distances)
            maybe = sum(distance < RANK_MARGIN for distance in distances)
            # "second" of two reads wrong, and so does "left" where the only candidate is not at the left
            first_clear = FIRST_CLEAR if others else SIDE_CLEAR
            sensible = place < first_clear if before == 0 else len(others) > before
            return surely == maybe == before and sensible, surely <= before <= maybe
        if not others:  # a superlative of one thing says nothing
            return False, True
        if relation in ("largest", "smallest"):
            if len({self.objects[j].shape for j in members}) > 1:  # how large is a bar beside a ring?
                return False, True
            pairs = [(i, j) if relation == "largest" else (j, i) for j in others]
            return (
                all(self._larger(a, b) for a, b in pairs),
                not any(self._larger(b, a) for a, b in pairs),
            )
        sign = 1 if relation == "nearest" else -1

        def leads(a: int, b: int) -> bool:
            """Object a is clearly nearer to (farther from) the anchor than b, by its centre and by its rim."""
            by_center = sign * (self._distance(b, anchor) - self._distance(a, anchor))
            by_rim = by_center + sign * (self.radius[a] - self.radius[b])
            return min(by_center, by_rim) > DISTANCE_MARGIN

        return all(leads(i, j) for j in others), not any(leads(j, i) for j in others)

    def _larger(self, a: int, b: int) -> bool:
        """Object a is clearly larger than b, both in extent and in what is seen of it."""
        first, second = self.objects[a], self.objects[b]
        return first.radius >= LARGER_RADIUS * second.radius and first.area >= LARGER_AREA * second.area

    def _distance(self, a: int, b: int) -> float:
        return ((self.x[a] - self.x[b]) ** 2 + (self.y[a] - self.y[b]) ** 2) ** 0.5


def _only(found: tuple[int, int]) -> int | None:
    clear, possible = found
    return clear.bit_length() - 1 if clear == possible and clear.bit_count() == 1 else None


def _bits(indices: Iterable[int]) -> int:
    total = 0
    for index in indices:
        total |= 1 << index
    return total


def _members(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def _dilate(masks: np.ndarray, pixels: int) -> np.ndarray:
    """Grows bool masks (N, H, W) by a square of `pixels` in every direction."""
    grown = masks.copy()
    for _ in range(pixels):
        grown[:, 1:] |= grown[:, :-1]
        grown[:, :-1] |= grown[:, 1:]
    for _ in range(pixels):
        grown[:, :, 1:] |= grown[:, :, :-1]
        grown[:, :, :-1] |= grown[:, :, 1:]
    return grown


# ------------------------------------------------------------------------------------ The search for meanings

REDUNDANT = 0.4  # share of the clauses that may follow a noun phrase which is clear by itself
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
                expressions.append(Expression(_word(meaning, kind, candidates, rng), kind, target, meaning))
    return tuple(expressions)


def _phrases(semantics: SceneSemantics, item: SceneObject, rng: np.random.Generator) -> list[_Phrase]:
    """Every combination of the object's nameable attributes, by and large from the shortest to the longest."""
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
    anchors: Sequence[Meaning | None],
    rng: np.random.Generator,
) -> Meaning | None:
    """A meaning that denotes `target`: the first of the options, in weighted random order, that a short phrase completes.

    Mostly, an option whose clause the phrase needs is preferred to one whose clause only adds to it. None if nothing
    works. `anchors` are the meanings that the options' anchors are called by.
    """
    keys = rng.random(len(options)).tolist()  # sorted by u^(1/weight): Efraimidis and Spirakis, 2006
    order = sorted(range(len(options)), key=lambda i: keys[i] ** (1 / options[i][0]), reverse=True)
    over_specified = rng.random() < OVER_SPECIFIED
    for needed in (True, False) if rng.random() > REDUNDANT else (False,):
        for _, clause, anchor in (options[i] for i in order):
            if not semantics.can_hold(target, clause, anchor):
                continue
            fitting = (
                attributes
                for attributes, candidates in phrases
                if (clause is None or not needed or candidates[1].bit_count() > 1)
                and _only(semantics.relate(candidates, clause, anchor)) == target
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


# ------------------------------------------------------------------------------------------------ The wording

NOUNS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop"),
    "frame": ("frame",),
    "bar": ("bar", "rod", "stick"),
    None: ("thing", "object", "shape"),
}
SIZES = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
BAR_SIZES = {"large": ("long",), "small": ("short",)}
TEXTURES = {"striped": ("striped",), "dotted": ("dotted", "spotted"), "plain": ("plain",)}
SUFFIXES = {"striped": (" with stripes",), "dotted": (" with dots", " with spots")}
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


def _noun_phrase(attributes: Attributes, rng: np.random.Generator, plural: bool = False) -> str:
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


def _word(meaning: Meaning, kind: str, candidates: int, rng: np.random.Generator) -> str:
    """One wording of the meaning in the manner of its kind. `candidates` counts what the noun phrase alone may mean."""
    relation, side, rank = meaning.clause or (None, "", 1)
    phrase = _noun_phrase(meaning.attributes, rng)
    if kind == "relation":
        if relation in SUPERLATIVES:
            superlative = _pick(rng, SUPERLATIVES[relation])
            if rng.random() < 0.3:
                return f"the {phrase} that is the {superlative}"
            return f"the {superlative} of the {_noun_phrase(meaning.attributes, rng, plural=True)}"
        beside = relation == "beside"
        link = _pick(rng, JOINTS) + _pick(rng, BESIDE[side]) if beside else _pick(rng, TO_ANCHOR[relation])
        return f"the {phrase} {link} the {_noun_phrase(meaning.anchor.attributes, rng)}"

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
