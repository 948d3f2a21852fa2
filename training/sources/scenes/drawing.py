"""How an embedded scene is drawn: objects on a background, so that each stays sufficiently in sight. The design is ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.sources.scenes.semantics import SceneObject
from training.sources.scenes.shapes import FORMS, distance, rotate

COLORS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 22),
    "yellow": (247, 220, 60),
    "green": (40, 160, 60),
    "blue": (38, 92, 214),
    "purple": (130, 56, 178),
    "white": (242, 242, 240),
    "black": (34, 34, 38),
}
MIN_SIZE, MAX_SIZE = 64, 512  # sides of an image in pixels

SUPERSAMPLING = 3
MIN_PIXELS = 40 / 96**2  # least visible area of an object, as a share of the image


@dataclass(frozen=True)
class Draft:
    """What an object is to look like: the attributes of [`SceneObject`], the radius in units of the side, thinness 0..1."""

    shape: str
    color: str
    size: str
    texture: str
    rgb: tuple[int, int, int]
    radius: float
    thinness: float = 0.0


@dataclass(frozen=True, eq=False)
class Tile:
    """One object drawn on its own: coverage (h, h) in 0..1, color (h, h, 3) in 0..255."""

    coverage: np.ndarray
    color: np.ndarray


def check_size(size: int) -> None:
    """ValueError where an image's side is out of range."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"A scene's size must be between {MIN_SIZE} and {MAX_SIZE} pixels, got {size}.")


def draw_color(name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A shade of a named color, 0..255."""
    rgb = np.clip(np.array(COLORS[name]) * rng.uniform(0.92, 1.05) + rng.normal(0, 5, 3), 0, 255).astype(int)
    return tuple(rgb.tolist())


def render(draft: Draft, size: int, light: float, rng: np.random.Generator) -> Tile:
    """Draws one object with its texture, a soft shade towards the light (an angle) and a darker rim."""
    form, radius = FORMS[draft.shape], draft.radius * size
    half = math.ceil(1.2 * radius) + 1
    axis = ((np.arange(2 * half * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - half).astype(np.float32)
    shift_x, shift_y, turn, phase_a, phase_b = rng.uniform(-0.5, 0.5, 5).tolist()
    x, y = (axis - shift_x)[None, :] / radius, (axis - shift_y)[:, None] / radius
    u, v = rotate(x, y, 2 * turn * form.turn)
    depth = form.depth_at(u, v, draft.thinness)
    coverage = _average(depth > 0)

    middle = np.s_[SUPERSAMPLING // 2 :: SUPERSAMPLING]
    shade = 1 + 0.08 * (x[:, middle] * math.cos(light) + y[middle] * math.sin(light))
    color = np.array(draft.rgb, np.float32) * shade[..., None]
    lightness = np.dot(draft.rgb, (0.30, 0.59, 0.11))
    if draft.texture != "plain":
        # a bar's stripes run across it
        a, b = (u, v) if draft.shape == "bar" else rotate(u, v, math.pi / 4 * int(rng.random() * 4))
        period = 0.06 * size / radius
        a, b = a / period + phase_a, b / period + phase_b
        marked = _marked(draft.texture, a - np.floor(a), b - np.floor(b))
        color += 0.6 * _average(marked)[..., None] * ((90 if lightness > 190 else 255) - color)
    rim = _average(depth < min(0.012 * size / radius, 0.08))[..., None]
    color += 0.5 * rim * ((120 if lightness < 60 else 0) - color)  # sets overlapping objects of one color apart
    return Tile(coverage, color)


def _marked(texture: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where a texture's marks are, bool; `a` and `b` go from 0 to 1 in each of its periods."""
    if texture == "striped":
        return a < 0.5
    if texture == "dotted":
        return distance(a - 0.5, b - 0.5) < 0.31
    return (a < 0.5) ^ (b < 0.5)


def _average(samples: np.ndarray) -> np.ndarray:
    """Share of True in each SUPERSAMPLING x SUPERSAMPLING block of (h, w) bool samples, float32."""
    rows = sum(samples[i::SUPERSAMPLING].view(np.uint8) for i in range(SUPERSAMPLING))
    return sum(rows[:, i::SUPERSAMPLING] for i in range(SUPERSAMPLING)) / np.float32(SUPERSAMPLING**2)


def arrange(
    tiles: Sequence[Tile], size: int, rng: np.random.Generator, company: float, min_visible: float
) -> list[tuple[int, int]] | None:
    """A top left corner for every tile so that all objects stay in sight, or None if that needs too many tries.

    Args:
        tiles: the objects, from back to front.
        size: side of the image in pixels.
        rng: draws the places.
        company: share of the tries that place an object beside another, so that they overlap.
        min_visible: share of an object's own area that the others leave in sight.
    """
    order = np.full((size, size), len(tiles), np.int8)
    visible, needed, corners = np.zeros(len(tiles) + 1), np.zeros(len(tiles) + 1), []
    for i, tile in enumerate(tiles):
        mask = tile.coverage >= 0.5
        extent, area = len(mask), np.count_nonzero(mask)
        visible[i], needed[i] = area, max(min_visible * area, MIN_PIXELS * size**2)
        if area < needed[i]:
            return None
        for _ in range(20):
            if corners and rng.random() < company:
                j = int(rng.random() * i)
                angle, reach = rng.random() * 2 * math.pi, 0.36 * (extent + len(tiles[j].coverage))
                top = round(corners[j][0] + (len(tiles[j].coverage) - extent) / 2 + reach * math.sin(angle))
                left = round(corners[j][1] + (len(tiles[j].coverage) - extent) / 2 + reach * math.cos(angle))
                if not (0 <= top <= size - extent and 0 <= left <= size - extent):
                    continue
            else:
                top, left = (rng.random(2) * (size - extent + 1)).astype(int).tolist()
            window = order[top : top + extent, left : left + extent]
            remaining = visible - np.bincount(window[mask], minlength=len(tiles) + 1)
            if (remaining[:i] >= needed[:i]).all():
                visible[:i] = remaining[:i]
                window[mask] = i
                corners.append((top, left))
                break
        else:
            return None
    return corners


def paint(canvas: np.ndarray, tile: Tile, corner: tuple[int, int]) -> None:
    """Paints a tile onto the canvas (S, S, 3) float32 with its top left corner at `corner`."""
    top, left = corner
    window = np.s_[top : top + len(tile.coverage), left : left + len(tile.coverage)]
    canvas[window] += tile.coverage[..., None] * (tile.color - canvas[window])


def placed_objects(
    drafts: Sequence[Draft], tiles: Sequence[Tile], corners: Sequence[tuple[int, int]], size: int
) -> list[SceneObject]:
    """The objects with their masks, each hidden by those after it."""
    order = np.full((size, size), -1, np.int8)  # which object each pixel shows
    full_masks = np.zeros((len(drafts), size, size), bool)
    for i, (tile, (top, left)) in enumerate(zip(tiles, corners, strict=True)):
        window = np.s_[top : top + len(tile.coverage), left : left + len(tile.coverage)]
        full_masks[i][window] = tile.coverage >= 0.5
        order[full_masks[i]] = i
    objects = []
    for i, draft in enumerate(drafts):
        mask = order == i
        rows, columns = np.nonzero(mask)
        objects.append(
            SceneObject(
                shape=draft.shape,
                color=draft.color,
                size=draft.size,
                texture=draft.texture,
                rgb=draft.rgb,
                radius=draft.radius * size,
                center=(float(columns.mean()) + 0.5, float(rows.mean()) + 0.5),
                area=len(rows),
                mask=mask,
                full_mask=full_masks[i],
            )
        )
    return objects


def background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted gradient with soft blotches, at times a faint pattern, and grain: (S, S, 3) float32 in 0..255."""
    base = rng.uniform(100, 165) + rng.normal(0, 13, (2, 3))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.random() * 2 * math.pi
    across, along = rotate(axis[None, :], axis[:, None], angle)
    mix = (0.5 + 0.4 * across)[..., None]
    light = smooth_noise(6, 9, size, rng) + smooth_noise(size // 3, 3, size, rng)
    pattern = rng.random()
    if pattern < 0.25:
        light = light + 5 * np.sin(along * rng.uniform(12, 30))
    elif pattern < 0.5:
        frequency = rng.uniform(8, 20)
        light = light + 5 * np.sign(np.sin(along * frequency) * np.sin(across * frequency))
    return (base[0] + mix * (base[1] - base[0]) + light[..., None]).astype(np.float32)


def smooth_noise(cells: int, amplitude: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of the standard deviation `amplitude`, `cells` blobs to a side: (S, S) float32."""
    coarse = Image.fromarray(amplitude * rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def to_image(canvas: np.ndarray) -> np.ndarray:
    """The canvas (S, S, 3) float32 as uint8."""
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
