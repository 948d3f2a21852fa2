"""The scenes of the demo: large objects, plain images, short relations; easy enough to be learnt in minutes.

A scene depends on nothing but its seed and size. What is drawn from a seed never changes. The design is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    to_image,
)
from training.sources.scenes.expressions import write_expressions
from training.sources.scenes.semantics import Expression, SceneObject
from training.sources.scenes.shapes import FORMS

SHAPES = ("circle", "square", "triangle", "star", "ring", "frame", "bar")
RADII = {"small": (0.135, 0.150), "medium": (0.175, 0.187), "large": (0.218, 0.245)}  # in units of the side


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene: `image` (S, S, 3) uint8, its objects in drawing order, and what is said about them."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]


def draw_scene(seed: int | np.random.SeedSequence | np.random.Generator, size: int = 96) -> Scene:
    """Draws one scene of 4 to 8 objects, each with at least one expression.

    Args:
        seed: what `numpy.random.default_rng` takes.
        size: side of the square image in pixels, 64..512.

    Raises:
        ValueError: if the size is out of range.
    """
    check_size(size)
    rng = np.random.default_rng(seed)
    while True:  # a scene in which some object cannot be told apart in words is drawn anew
        image, objects = _draw_objects(size, rng)
        expressions = write_expressions(objects, rng)
        if len({expression.target for expression in expressions}) == len(objects):
            return Scene(image, objects, expressions)


def _draw_objects(size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[SceneObject]]:
    """Image (S, S, 3) uint8 and its objects, each sufficiently in sight; starts over where they do not fit."""
    while True:
        drafts = _sample_drafts(rng)
        light = rng.random() * 2 * math.pi
        tiles = [render(draft, size, light, rng) for draft in drafts]
        corners = arrange(tiles, size, rng, company=0.2, min_visible=0.6)
        if corners is not None:
            break
    canvas = background(size, rng)
    for tile, corner in zip(tiles, corners, strict=True):
        paint(canvas, tile, corner)
    return to_image(canvas), placed_objects(drafts, tiles, corners, size)


def _sample_drafts(rng: np.random.Generator) -> list[Draft]:
    """4 to 8 objects, from so few shapes and colors that many are shared."""
    count = int(rng.choice(5, p=(0.45, 0.27, 0.14, 0.08, 0.06))) + 4
    most = 3 if count < 6 else 4
    shapes = rng.permutation(SHAPES)[: rng.integers(2, most, endpoint=True)].tolist()
    colors = rng.permutation(list(COLORS))[: rng.integers(3, 5, endpoint=True)].tolist()
    drafts = []
    for _ in range(count):
        shape, color = (pool[int(rng.random() * len(pool))] for pool in (shapes, colors))
        size = ("small", "medium", "large")[int(np.searchsorted((0.42, 0.58), rng.random()))]
        texture = ("plain", "striped", "dotted")[int(np.searchsorted((0.6, 0.82), rng.random()))]
        if texture == "dotted" and not FORMS[shape].solid:
            texture = "striped"
        rgb = draw_color(color, rng)
        drafts.append(Draft(shape, color, size, texture, rgb, rng.uniform(*RADII[size])))
    return drafts
