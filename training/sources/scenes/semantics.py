"""What an expression about an embedded scene means: the records, and the one place where a meaning is executed over the objects.

A predicate has three values. An object satisfies it *clearly* (with a margin), *possibly* (some viewers would say so) or not at
all. A meaning denotes an object where exactly one object satisfies it clearly and no other one satisfies it possibly. So every
viewer finds the same answer. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("location", "appearance", "relation")  # after RefCOCO, RefCOCO+ and RefCOCOg
SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
# Relations that weigh the candidates against each other; the others concern one candidate at a time.
COMPARISONS = ("rank", "largest", "smallest", "nearest", "farthest")

# Distances are in units of the image's side, between centres of visible pixels.
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

# Other things that a viewer may call by the same name; a moon and an arch differ only at their ends.
LOOK_ALIKES = {
    "circle": ("ring",),
    "square": ("frame",),
    "moon": ("arch",),
    "arch": ("moon",),
    "small": ("medium",),
    "large": ("medium",),
}

ATTRIBUTES = ("shape", "color", "size", "texture")
Attributes = tuple[str | None, str | None, str | None, str | None]  # values of ATTRIBUTES


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
            for value in {
                *values,
                *LOOK_ALIKES,
            }:  # a viewer may call a look-alike by a name that no object has
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
        return only_one(self.denote(meaning))

    def can_hold(self, i: int, clause: Clause | None, anchor: int | None) -> bool:
        """False where the clause is not clearly true of object i, whatever the phrase before it."""
        if clause is None or clause.relation in COMPARISONS:
            return True
        return bool(self.relate((self.everything, self.everything), clause, anchor)[0] >> i & 1)

    def _along(self, i: int, direction: str) -> float:
        """Distance of object i from the image's `direction` side."""
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


def only_one(found: tuple[int, int]) -> int | None:
    """The number of the one object that is found clearly, where no other is found possibly."""
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
