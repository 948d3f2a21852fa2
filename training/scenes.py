"""The embedded data set: scenes drawn from a seed, with expressions that each denote exactly one object.

`draw_scene` draws one scene, `generate_scenes` and `build_scenes` turn many into the columns every referring data set
here has, `train_tokenizer` builds the small CLIP vocabulary that goes with them. Nothing is downloaded, and a scene
depends on nothing but (seed, split, its number). The design of the scenes is ours.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from training.data import REFER_FEATURES, encode_mask
from training.scene_expressions import KINDS, Expression, SceneObject, write_expressions

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
RADII = {"small": (0.135, 0.150), "medium": (0.175, 0.187), "large": (0.218, 0.245)}  # in units of the side
TEXTURES = ("plain", "striped", "dotted")
SPLITS = ("train", "val", "test")
MIN_SIZE, MAX_SIZE = 64, 512

SUPERSAMPLING = 3
MIN_VISIBLE = 0.6  # share of an object's own area that the others leave in sight
MIN_PIXELS = 40 / 96**2  # the same as a share of the picture
SCENES_PER_CHUNK = 100
MAX_SCENES = 10_000_000  # the ids of a split leave room for as many
VOCABULARY = 1000  # entries of the tokenizer at most


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene: `image` (S, S, 3) uint8, its objects in drawing order, and what is said about them."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    expressions: tuple[Expression, ...]


# -------------- Shapes: depth below the rim at (u, v), in units of the radius, positive inside; v points down

Depth = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _radius(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)  # several times as fast as np.hypot


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.95 - _radius(u, v)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.82 - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v - 0.2  # its centroid lies below the middle of its height
    return 0.54 - np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    fifth = 2 * math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)  # 0 at a tip, fifth / 2 at a notch
    tip, notch = 1.1, 0.55
    # the edge from the tip (tip, 0) to the notch, as a line n . p = tip * n_x
    n_x, n_y = notch * math.sin(fifth / 2), tip - notch * math.cos(fifth / 2)
    n_x, n_y = n_x / math.hypot(n_x, n_y), n_y / math.hypot(n_x, n_y)
    r = _radius(u, v)
    return tip * n_x - r * (n_x * np.cos(angle) + n_y * np.sin(angle))


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    r = _radius(u, v)
    return np.minimum(1 - r, r - 0.5)


def _frame(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    m = np.maximum(np.abs(u), np.abs(v))
    return np.minimum(0.88 - m, m - 0.42)


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(1.2 - np.abs(u), 0.28 - np.abs(v))


@dataclass(frozen=True)
class _Form:
    """A shape's outline, how far it turns (radians either way) and whether it is wide enough for dots."""

    depth: Depth
    turn: float
    solid: bool = True


FORMS = {
    "circle": _Form(_circle, math.pi),
    "square": _Form(_square, 0.3),
    "triangle": _Form(_triangle, 0.3),
    "star": _Form(_star, math.pi / 5),
    "ring": _Form(_ring, math.pi, solid=False),
    "frame": _Form(_frame, 0.3, solid=False),
    "bar": _Form(_bar, math.pi / 2, solid=False),
}


# ---------------------------------------------------------------------------------------------------- Drawing


@dataclass(frozen=True, eq=False)
class _Tile:
    """One object drawn on its own: coverage (h, w) in 0..1, color (h, w, 3) in 0..255."""

    coverage: np.ndarray
    color: np.ndarray


def draw_scene(seed: int | np.random.SeedSequence | np.random.Generator, size: int = 96) -> Scene:
    """Draws one scene of 4 to 8 objects, each with at least one expression.

    Args:
        seed: what `numpy.random.default_rng` takes.
        size: side of the square picture in pixels, 64..512.

    Raises:
        ValueError: if the size is out of range.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"A scene's size must be between {MIN_SIZE} and {MAX_SIZE} pixels, got {size}.")
    rng = np.random.default_rng(seed)
    while True:  # a scene in which some object cannot be told apart in words is drawn anew
        image, objects = _draw_objects(size, rng)
        expressions = write_expressions(objects, rng)
        if len({expression.target for expression in expressions}) == len(objects):
            return Scene(image, objects, expressions)


def _draw_objects(size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[SceneObject]]:
    """Picture (S, S, 3) uint8 and its objects, each sufficiently in sight; starts over where they do not fit."""
    while True:
        drafts = _sample_attributes(rng)
        light = rng.random() * 2 * math.pi
        tiles = [_render(draft, size, light, rng) for draft in drafts]
        corners = _arrange(tiles, size, rng)
        if corners is not None:
            break

    canvas = _background(size, rng)
    order = np.full((size, size), -1, np.int8)  # which object each pixel shows
    full_masks = np.zeros((len(drafts), size, size), bool)
    for i, (tile, (top, left)) in enumerate(zip(tiles, corners, strict=True)):
        window = np.s_[top : top + len(tile.coverage), left : left + len(tile.coverage)]
        canvas[window] += tile.coverage[..., None] * (tile.color - canvas[window])
        full_masks[i][window] = tile.coverage >= 0.5
        order[full_masks[i]] = i

    objects = []
    for i, draft in enumerate(drafts):
        mask = order == i
        rows, columns = np.nonzero(mask)
        center = (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)
        objects.append(
            SceneObject(
                **draft | {"radius": draft["radius"] * size},
                center=center,
                area=len(rows),
                mask=mask,
                full_mask=full_masks[i],
            )
        )
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), objects


def _sample_attributes(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Attributes of 4 to 8 objects, from so few shapes and colors that many are shared. Radius in units of the side."""
    count = int(rng.choice(5, p=(0.45, 0.27, 0.14, 0.08, 0.06))) + 4
    most = 3 if count < 6 else 4
    shapes = rng.permutation(list(FORMS))[: rng.integers(2, most, endpoint=True)].tolist()
    colors = rng.permutation(list(COLORS))[: rng.integers(3, 5, endpoint=True)].tolist()
    drafts = []
    for _ in range(count):
        shape, color = (pool[int(rng.random() * len(pool))] for pool in (shapes, colors))
        size = ("small", "medium", "large")[int(np.searchsorted((0.42, 0.58), rng.random()))]
        texture = TEXTURES[int(np.searchsorted((0.6, 0.82), rng.random()))]
        if texture == "dotted" and not FORMS[shape].solid:
            texture = "striped"
        rgb = np.clip(np.array(COLORS[color]) * rng.uniform(0.92, 1.05) + rng.normal(0, 5, 3), 0, 255).astype(int)
        drafts.append(
            {"shape": shape, "color": color, "size": size, "texture": texture}
            | {"rgb": tuple(rgb.tolist()), "radius": rng.uniform(*RADII[size])}
        )
    return drafts


def _render(draft: dict[str, Any], size: int, light: float, rng: np.random.Generator) -> _Tile:
    """Draws one object with its texture, a soft shade towards the light and a darker rim."""
    form, radius = FORMS[draft["shape"]], draft["radius"] * size
    half = math.ceil(1.2 * radius) + 1
    axis = ((np.arange(2 * half * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - half).astype(np.float32)
    shift_x, shift_y, turn, phase_a, phase_b = rng.uniform(-0.5, 0.5, 5).tolist()
    x, y = (axis - shift_x)[None, :] / radius, (axis - shift_y)[:, None] / radius
    u, v = _rotate(x, y, 2 * turn * form.turn)
    depth = form.depth(u, v)
    coverage = _average(depth > 0)

    middle = np.s_[SUPERSAMPLING // 2 :: SUPERSAMPLING]
    shade = 1 + 0.08 * (x[:, middle] * math.cos(light) + y[middle] * math.sin(light))
    color = np.array(draft["rgb"], np.float32) * shade[..., None]
    lightness = np.dot(draft["rgb"], (0.30, 0.59, 0.11))
    if draft["texture"] != "plain":
        # a bar's stripes run across it
        a, b = (u, v) if draft["shape"] == "bar" else _rotate(u, v, math.pi / 4 * int(rng.random() * 4))
        period = 0.06 * size / radius
        a, b = a / period + phase_a, b / period + phase_b
        a, b = a - np.floor(a), b - np.floor(b)
        marked = a < 0.5 if draft["texture"] == "striped" else _radius(a - 0.5, b - 0.5) < 0.31
        color += 0.6 * _average(marked)[..., None] * ((90 if lightness > 190 else 255) - color)
    rim = _average(depth < min(0.012 * size / radius, 0.08))[..., None]
    color += 0.5 * rim * ((120 if lightness < 60 else 0) - color)  # sets overlapping objects of one color apart
    return _Tile(coverage, color)


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _average(samples: np.ndarray) -> np.ndarray:
    """Share of True in each SUPERSAMPLING x SUPERSAMPLING block of (h, w) bool samples, float32."""
    rows = sum(samples[i::SUPERSAMPLING].view(np.uint8) for i in range(SUPERSAMPLING))
    return sum(rows[:, i::SUPERSAMPLING] for i in range(SUPERSAMPLING)) / np.float32(SUPERSAMPLING**2)


def _arrange(tiles: list[_Tile], size: int, rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """A top left corner for every tile so that all objects stay in sight, or None if that needs too many tries."""
    order = np.full((size, size), len(tiles), np.int8)
    visible, needed, corners = np.zeros(len(tiles) + 1), np.zeros(len(tiles) + 1), []
    for i, tile in enumerate(tiles):
        mask = tile.coverage >= 0.5
        extent, area = len(mask), np.count_nonzero(mask)
        visible[i], needed[i] = area, max(MIN_VISIBLE * area, MIN_PIXELS * size**2)
        if area < needed[i]:
            return None
        for _ in range(20):
            if corners and rng.random() < 0.2:  # seek company, so that objects overlap
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


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A muted gradient with soft blotches, at times a faint pattern, and grain: (S, S, 3) float32 in 0..255."""
    base = rng.uniform(100, 165) + rng.normal(0, 13, (2, 3))
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.random() * 2 * math.pi
    across, along = _rotate(axis[None, :], axis[:, None], angle)
    mix = (0.5 + 0.4 * across)[..., None]
    light = _noise(6, 9, size, rng) + _noise(size // 3, 3, size, rng)
    pattern = rng.random()
    if pattern < 0.25:
        light = light + 5 * np.sin(along * rng.uniform(12, 30))
    elif pattern < 0.5:
        frequency = rng.uniform(8, 20)
        light = light + 5 * np.sign(np.sin(along * frequency) * np.sin(across * frequency))
    return (base[0] + mix * (base[1] - base[0]) + light[..., None]).astype(np.float32)


def _noise(cells: int, amplitude: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of the standard deviation `amplitude`, `cells` blobs to a side: (S, S) float32."""
    coarse = Image.fromarray(amplitude * rng.standard_normal((cells, cells), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


# -------------------------------------------------------------------------------------------------- Data sets


def generate_scenes(
    num_scenes: int, seed: int, image_size: int = 96, *, split: str = "train", num_workers: int = 1
) -> datasets.Dataset:
    """A data set of drawn scenes with the columns REFER_FEATURES: one row per object, a scene's rows adjacent.

    Scene number i of split s is `draw_scene(SeedSequence(seed, spawn_key=(s, i)), image_size)`: a larger data set
    begins with the smaller one, and the number of workers changes nothing. `ref_id` and its annotation are ten times the
    `image_id` plus the object's number; the ids of the splits are disjoint. The pictures are lossless WebP, kept in
    memory: about 60 kB per scene at 96 pixels, as every row holds its scene's.

    Args:
        num_scenes: how many scenes, 1 to 10 million.
        seed: any non-negative integer.
        image_size: side of the pictures in pixels, 64..512.
        split: one of "train", "val", "test"; no scene of one is in another.
        num_workers: processes that draw; above 1, a script needs its `if __name__ == "__main__"` guard.

    Raises:
        ValueError: for an argument out of range.
    """
    _check(seed, image_size, {split: num_scenes})
    starts = range(0, num_scenes, SCENES_PER_CHUNK)
    chunks = [range(start, min(start + SCENES_PER_CHUNK, num_scenes)) for start in starts]
    arguments = (repeat(seed), repeat(split), repeat(image_size), chunks)
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers) as pool:
            parts = [_to_dataset(rows) for rows in pool.map(_draw_rows, *arguments)]
    else:
        parts = [_to_dataset(rows) for rows in map(_draw_rows, *arguments)]
    return datasets.concatenate_datasets(parts)


def build_scenes(
    seed: int,
    *,
    train: int = 6000,
    val: int = 300,
    test: int = 300,
    image_size: int = 96,
    num_workers: int = 1,
) -> datasets.DatasetDict:
    """The splits "train", "val" and "test" of so many scenes each; see `generate_scenes`.

    Raises:
        ValueError: for an argument out of range.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    _check(seed, image_size, counts)
    return datasets.DatasetDict(
        {
            split: generate_scenes(count, seed, image_size, split=split, num_workers=num_workers)
            for split, count in counts.items()
        }
    )


def _check(seed: int, image_size: int, counts: dict[str, int]) -> None:
    if seed < 0:
        raise ValueError(f"The seed must not be negative, got {seed}.")
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise ValueError(f"image_size must be between {MIN_SIZE} and {MAX_SIZE} pixels, got {image_size}.")
    for split, count in counts.items():
        if split not in SPLITS:
            raise ValueError(f"The split must be one of {', '.join(SPLITS)}, got {split!r}.")
        if not 1 <= count <= MAX_SCENES:
            raise ValueError(f"The {split} split must have between 1 and {MAX_SCENES} scenes, got {count}.")


def _to_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=REFER_FEATURES)


def _draw_rows(seed: int, split: str, image_size: int, indices: Iterable[int]) -> list[dict[str, Any]]:
    """The rows of the given scenes of a split."""
    stream = SPLITS.index(split)
    rows = []
    for index in indices:
        scene = draw_scene(np.random.SeedSequence(seed, spawn_key=(stream, index)), image_size)
        picture = io.BytesIO()
        # beside PNG: a quarter smaller, as fast to decode; the fastest of its methods costs little in size
        Image.fromarray(scene.image).save(picture, "WEBP", lossless=True, method=0)
        image = {"bytes": picture.getvalue(), "path": None}
        image_id = stream * MAX_SCENES + index
        for number, item in enumerate(scene.objects):
            ref_id = 10 * image_id + number
            said = [expression for expression in scene.expressions if expression.target == number]
            ys, xs = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
            rows.append(
                {
                    "image": image,
                    "image_id": image_id,
                    "ref_id": ref_id,
                    "ann_ids": [ref_id],
                    "no_target": False,
                    "category": item.shape,
                    "sentences": [expression.text for expression in said],
                    "sentence_ids": [10 * ref_id + KINDS.index(expression.kind) for expression in said],
                    "sentence_kinds": [expression.kind for expression in said],
                    "mask": encode_mask(item.mask),
                    "boxes": [[xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]],
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------- Vocabulary


def train_tokenizer(sentences: Iterable[str], directory: str | Path | None = None) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges are learned from the sentences, instead of CLIP's 49,408 entries.

    As in CLIP, the vocabulary holds the 256 bytes, the same at a word's end ("</w>"), one entry per merge, then
    "<|startoftext|>" and "<|endoftext|>", so that no text is unknown. On the scenes' sentences every word becomes one
    token.

    Args:
        sentences: training text, which is lower-cased first; 1,000 entries at most are kept.
        directory: where to save the tokenizer, if given.

    Raises:
        ValueError: if there is no sentence.
    """
    sentences = list(sentences)
    if not sentences:
        raise ValueError("A tokenizer needs at least one sentence to be trained on.")
    symbols = sorted(ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    pipeline = CLIPTokenizer().backend_tokenizer
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.normalizer, model.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    # The trainer breaks ties by the symbols' numbers. All are given to it beforehand, or it would number them as it meets them,
    # in another order in every process.
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 2, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(sentences, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    vocabulary = [*symbols, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer
