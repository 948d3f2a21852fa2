"""The benchmark's scenes: compositions that training never shows, three levels of difficulty, and photographs' nuisances.

`draw_benchmark_scene` draws one scene, which depends on (seed, split, number, size) alone. `describe_benchmark_scene` writes its
sentences of one of three kinds, after RefCOCO, RefCOCO+ and RefCOCOg: "location" (location words are allowed), "appearance" (they
are excluded) and "relation" (long, over two steps). The sentences of a kind do not depend on the other kinds. The design is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from training.sources.scenes.drawing import (
    COLORS,
    Draft,
    arrange,
    background,
    check_size,
    draw_color,
    paint,
    placed_objects,
    render,
)
from training.sources.scenes.expressions import describe, describe_absent
from training.sources.scenes.nuisances import add_clutter, cast_shadow, jpeg_quality, photograph
from training.sources.scenes.semantics import KINDS, Attributes, Expression, SceneObject, SceneSemantics
from training.sources.scenes.shapes import FORMS

VERSION = "1"  # of images and sentences; every change of a pixel or a word needs a new one
SPLITS = ("train", "val", "test", "test_seen")

# in the order in which the rule for held-out compositions numbers them
SHAPES, COLOR_NAMES = tuple(FORMS), tuple(COLORS)
SOLID_SHAPES = tuple(shape for shape in SHAPES if FORMS[shape].solid)
THIN_SHAPES = tuple(shape for shape in SHAPES if not FORMS[shape].solid)
TEXTURES = ("plain", "striped", "dotted", "checkered")
TEXTURE_SHARES = (0.52, 0.2, 0.14, 0.14)
RADII = {"small": (0.105, 0.116), "medium": (0.142, 0.154), "large": (0.190, 0.210)}  # in units of the side
UNSEEN_SHARE = (
    0.5  # share of objects with unseen compositions in val and test, after the first two, which all have them
)


@dataclass(frozen=True)
class Level:
    """How hard scenes are.

    Attributes:
        share: Share of the scenes.
        objects: Least and largest number of objects.
        company: Share of the tries that place an object beside another, so that they overlap.
        min_visible: Share of an object's area that stays in sight.
        look_alikes: Probability that an object is a copy of another object with one attribute changed.
        thin: Probability that a shape of the scene's pool is hollow or thin.
        thinness: Range of the strokes of such shapes, from 0 (thickest) to 1.
        small: Probability that an object is small.
        clutter: Least and largest number of scribbles and specks.
        nuisance: Strength of light, shadows, blur, noise and JPEG, 0..1.
    """

    share: float
    objects: tuple[int, int]
    company: float
    min_visible: float
    look_alikes: float
    thin: float
    thinness: tuple[float, float]
    small: float
    clutter: tuple[int, int]
    nuisance: float


LEVELS = {
    "easy": Level(0.4, (4, 5), 0.1, 0.85, 0.25, 0.15, (0.0, 0.3), 0.2, (0, 2), 0.3),
    "medium": Level(0.4, (5, 7), 0.25, 0.7, 0.45, 0.3, (0.2, 0.6), 0.33, (3, 7), 0.6),
    "hard": Level(0.2, (7, 10), 0.4, 0.55, 0.65, 0.45, (0.5, 1.0), 0.45, (8, 14), 1.0),
}


@dataclass(frozen=True, eq=False)
class BenchmarkScene:
    """A drawn scene.

    Attributes:
        image: (S, S, 3) uint8, before its compression.
        objects: In drawing order.
        targets: Numbers of the objects that expressions may mean. In val and test these are the objects of unseen compositions.
        level: One of LEVELS.
        quality: Quality of the image's JPEG file.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    targets: tuple[int, ...]
    level: str
    quality: int

    @cached_property
    def semantics(self) -> SceneSemantics:
        """What executes meanings over the objects."""
        return SceneSemantics(self.objects)


def held_out_for(shape: str, other: str) -> str | None:
    """The only split, "test" or "val", that shows this pair of a shape and a color or a texture; None where all splits do.

    Shapes, colors and textures are numbered from 0 in the order of SHAPES, COLOR_NAMES and TEXTURES. Take the shape's number minus
    the other's, modulo 6. At 0 the pair belongs to the test split, at 3 to the val split. "plain" is held out for no shape.
    """
    if other == "plain":
        return None
    names = TEXTURES if other in TEXTURES else COLOR_NAMES
    return {0: "test", 3: "val"}.get((SHAPES.index(shape) - names.index(other)) % 6)


def composition_split(shape: str, color: str, texture: str = "plain") -> str | None:
    """Where an object may be a target: "train" (and test_seen), "val" or "test". None: nowhere, since it has pairs of both.

    Objects of "train" also stand beside the targets of val and test.
    """
    held_out = {held_out_for(shape, color), held_out_for(shape, texture)} - {None}
    return None if len(held_out) > 1 else next(iter(held_out), "train")


def compositions(split: str) -> list[tuple[str, str, str]]:
    """Every (shape, color, texture) that may be a target in "train", "val" or "test"; only wide shapes have dots or checks."""
    return [
        (shape, color, texture)
        for shape in SHAPES
        for color in COLOR_NAMES
        for texture in TEXTURES[: 4 if FORMS[shape].solid else 2]
        if composition_split(shape, color, texture) == split
    ]


def _split_of_targets(split: str) -> str:
    return "train" if split == "test_seen" else split


def _stream(seed: int, split: str, number: int, part: int) -> np.random.Generator:
    """The random numbers of one part of one scene; the scenes of the demo use other ones."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), number, part)))


def draw_benchmark_scene(seed: int, split: str, number: int, size: int = 112) -> BenchmarkScene:
    """Draws scene `number` of a split: 4 to 10 objects, each visible as far as the level wants it.

    Args:
        seed: any non-negative integer.
        split: one of SPLITS.
        number: of the scene.
        size: side of the square image in pixels, 64..512.

    Raises:
        ValueError: if the size is out of range.
    """
    check_size(size)
    rng = _stream(seed, split, number, 0)
    name = str(rng.choice(list(LEVELS), p=[level.share for level in LEVELS.values()]))
    level = LEVELS[name]
    while True:
        drafts = _sample_drafts(level, _split_of_targets(split), rng)
        if drafts is None:
            continue
        light = rng.random() * 2 * math.pi
        tiles = [render(draft, size, light, rng) for draft in drafts]
        corners = arrange(tiles, size, rng, level.company, level.min_visible)
        if corners is not None:
            break
    canvas = add_clutter(background(size, rng), int(rng.integers(*level.clutter, endpoint=True)), rng)
    for tile, corner in zip(tiles, corners, strict=True):
        cast_shadow(canvas, tile, corner, light, level.nuisance)
        paint(canvas, tile, corner)
    objects = placed_objects(drafts, tiles, corners, size)
    image = photograph(canvas, level.nuisance, rng)
    return BenchmarkScene(image, tuple(objects), _targets(objects, split), name, jpeg_quality(level.nuisance, rng))


def _targets(objects: list[SceneObject], split: str) -> tuple[int, ...]:
    wanted = _split_of_targets(split)
    return tuple(
        i for i, item in enumerate(objects) if composition_split(item.shape, item.color, item.texture) == wanted
    )


def describe_benchmark_scene(
    scene: BenchmarkScene, kind: str, seed: int, split: str, number: int
) -> tuple[Expression, ...]:
    """At most one expression of the kind ("location", "appearance", "relation") for each of the scene's targets.

    `seed`, `split` and `number` are those that the scene was drawn from.
    """
    rng = _stream(seed, split, number, 1 + KINDS.index(kind))
    return describe(scene.semantics, kind, scene.targets, rng)


def describe_nothing(scene: BenchmarkScene, kind: str, seed: int, split: str, number: int) -> str | None:
    """An expression of the kind about a composition that is not in the scene; None where none was found.

    The composition may be a target in the split. If possible the scene has both its shape and its color or texture,
    else one of them.
    """
    rng = _stream(seed, split, number, 4 + KINDS.index(kind))
    absent = _absent_attributes(scene.semantics, _split_of_targets(split))
    if not absent:
        return None
    nearest = max(absent.values())
    close = [attributes for attributes, shared in absent.items() if shared == nearest]
    return describe_absent(scene.semantics, kind, close[int(rng.random() * len(close))], rng)


def _absent_attributes(semantics: SceneSemantics, split: str) -> dict[Attributes, int]:
    """Pairs of a shape and a color or a texture that no object may have, with the number of the two that the scene has."""
    objects = semantics.objects
    shapes, colors, textures = ({getattr(item, name) for item in objects} for name in ("shape", "color", "texture"))
    found = {}
    for shape, color, texture in compositions(split):
        pairs: list[tuple[Attributes, bool]] = []
        if texture == "plain":
            pairs.append(((shape, color, None, None), color in colors))
        elif held_out_for(shape, color) is None and (held_out_for(shape, texture) or "train") == split:
            pairs.append(((shape, None, None, texture), texture in textures))
        for attributes, shared in pairs:
            if not semantics.filter(attributes)[1]:
                found[attributes] = (shape in shapes) + shared
    return found


def _sample_drafts(level: Level, split: str, rng: np.random.Generator) -> list[Draft] | None:
    """A level's objects from a few shapes and colors, so that many share them; None where the chosen ones do not suffice.

    In val and test at least two objects are of unseen compositions.
    """
    count = int(rng.integers(*level.objects, endpoint=True))
    shapes = _sample_shapes(level, 3 + (count > 5), rng)
    colors = rng.permutation(COLOR_NAMES)[: rng.integers(3, 5, endpoint=True)].tolist()
    wanted = ["train"] * count
    if split != "train":
        unseen = 2 + np.count_nonzero(rng.random(count - 2) < UNSEEN_SHARE)
        wanted[:unseen] = [split] * unseen
        rng.shuffle(wanted)
    drafts: list[Draft] = []
    for of in wanted:
        draft = None
        if drafts and rng.random() < level.look_alikes:
            draft = _look_alike(drafts[int(rng.random() * len(drafts))], shapes, colors, of, level, rng)
        if draft is None:
            draft = _sample_draft(shapes, colors, of, level, rng)
        if draft is None:
            return None
        drafts.append(draft)
    return drafts


def _sample_shapes(level: Level, number: int, rng: np.random.Generator) -> list[str]:
    solid, thin = rng.permutation(SOLID_SHAPES).tolist(), rng.permutation(THIN_SHAPES).tolist()
    return [(thin if rng.random() < level.thin else solid).pop() for _ in range(number)]


def _sample_size(level: Level, rng: np.random.Generator) -> str:
    shares = np.cumsum((level.small, 0.4 * (1 - level.small)))
    return ("small", "medium", "large")[int(np.searchsorted(shares, rng.random()))]


def _sample_draft(
    shapes: list[str], colors: list[str], of: str, level: Level, rng: np.random.Generator
) -> Draft | None:
    """An object of a composition of "train", "val" or "test", its texture drawn first; None where there is no such composition."""
    texture = TEXTURES[int(np.searchsorted(np.cumsum(TEXTURE_SHARES)[:-1], rng.random()))]
    fitting = [
        (shape, color)
        for shape in shapes
        for color in colors
        if _is_drawn(shape, texture) and composition_split(shape, color, texture) == of
    ]
    if not fitting:
        return None
    shape, color = fitting[int(rng.random() * len(fitting))]
    return _finish(Draft(shape, color, _sample_size(level, rng), texture, (0, 0, 0), 0.0), level, rng)


def _look_alike(
    model: Draft, shapes: list[str], colors: list[str], of: str, level: Level, rng: np.random.Generator
) -> Draft | None:
    """An object that differs from the model in one attribute alone and is of "train", "val" or "test"; None where there is none."""
    changed = [replace(model, shape=shape) for shape in shapes if shape != model.shape]
    changed += [replace(model, color=color) for color in colors if color != model.color]
    changed += [replace(model, texture=texture) for texture in TEXTURES if texture != model.texture]
    changed += [replace(model, size=size) for size in ("small", "large") if size != model.size]
    fitting = [
        draft
        for draft in changed
        if _is_drawn(draft.shape, draft.texture) and composition_split(draft.shape, draft.color, draft.texture) == of
    ]
    return _finish(fitting[int(rng.random() * len(fitting))], level, rng) if fitting else None


def _is_drawn(shape: str, texture: str) -> bool:
    """Dots and checks need a wide shape."""
    return FORMS[shape].solid or texture in ("plain", "striped")


def _finish(draft: Draft, level: Level, rng: np.random.Generator) -> Draft:
    """The draft with a shade of its color, a radius of its size and a stroke of the level."""
    return replace(
        draft,
        rgb=draw_color(draft.color, rng),
        radius=rng.uniform(*RADII[draft.size]),
        thinness=rng.uniform(*level.thinness),
    )
