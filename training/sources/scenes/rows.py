"""Drawn scenes as rows of REFER_FEATURES (ours)."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from training.sources.masks import encode_mask
from training.sources.scenes import benchmark
from training.sources.scenes.benchmark import (
    describe_benchmark_scene,
    describe_nothing,
    draw_benchmark_scene,
)
from training.sources.scenes.demo import draw_scene
from training.sources.scenes.semantics import KINDS

MAX_SCENES = 10_000_000  # the ids of a split leave room for as many
SPLITS = {"demo": ("train", "val", "test")} | dict.fromkeys((*KINDS, "mixed"), benchmark.SPLITS)


def draw_rows(
    scene_set: str,
    seed: int,
    split: str,
    image_size: int,
    no_target: bool,
    indices: Iterable[int],
) -> list[dict[str, Any]]:
    """The rows of the given scenes of a split, as `generate_scenes` describes them."""
    if scene_set == "demo":
        return [row for index in indices for row in _demo_rows(seed, split, image_size, index)]
    kinds = KINDS if scene_set == "mixed" else (scene_set,)
    drawn = partial(_benchmark_rows, kinds, seed, split, image_size, no_target)
    return [row for index in indices for row in drawn(index)]


def _demo_rows(seed: int, split: str, image_size: int, index: int) -> list[dict[str, Any]]:
    stream = SPLITS["demo"].index(split)
    scene = draw_scene(np.random.SeedSequence(seed, spawn_key=(stream, index)), image_size)
    # beside PNG: a quarter smaller, as fast to decode; the fastest of its methods costs little in size
    image = _file_of(scene.image, "WEBP", lossless=True, method=0)
    image_id, rows = stream * MAX_SCENES + index, []
    for number, item in enumerate(scene.objects):
        said = [expression for expression in scene.expressions if expression.target == number]
        sentences = [(expression.text, expression.kind, expression.kind) for expression in said]
        rows.append(_row(image, image_id, 10 * image_id + number, item.shape, item.mask, sentences))
    return rows


def _benchmark_rows(
    kinds: tuple[str, ...], seed: int, split: str, image_size: int, no_target: bool, index: int
) -> list[dict[str, Any]]:
    scene = draw_benchmark_scene(seed, split, index, image_size)
    # whole colors: at these sizes JPEG's coarser ones would wash a thin object out
    image = _file_of(scene.image, "JPEG", quality=scene.quality, subsampling=0)
    image_id, rows = benchmark.SPLITS.index(split) * MAX_SCENES + index, []
    labels = {kind: scene.level if len(kinds) == 1 else f"{kind}, {scene.level}" for kind in kinds}
    said = [expression for kind in kinds for expression in describe_benchmark_scene(scene, kind, seed, split, index)]
    for number in scene.targets:
        item = scene.objects[number]
        sentences = [(e.text, e.kind, labels[e.kind]) for e in said if e.target == number]
        if sentences:
            rows.append(_row(image, image_id, 20 * image_id + number, item.shape, item.mask, sentences))
    if no_target:
        absent = [(describe_nothing(scene, kind, seed, split, index), kind, labels[kind]) for kind in kinds]
        sentences = [(text, kind, label) for text, kind, label in absent if text is not None]
        if sentences:
            nothing = np.zeros(scene.image.shape[:2], bool)
            rows.append(_row(image, image_id, 20 * image_id + 19, "", nothing, sentences))
    return rows


def _file_of(image: np.ndarray, file_format: str, **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, file_format, **options)
    return {"bytes": file.getvalue(), "path": None}


def _row(
    image: dict[str, Any],
    image_id: int,
    ref_id: int,
    category: str,
    mask: np.ndarray,
    sentences: list[tuple[str, str, str]],
) -> dict[str, Any]:
    """A row with its sentences as (text, kind, label that it is reported under); one with an empty mask means nothing."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    is_there = len(ys) > 0
    return {
        "image": image,
        "image_id": image_id,
        "ref_id": ref_id,
        "ann_ids": [ref_id] if is_there else [],
        "no_target": not is_there,
        "category": category,
        "sentences": [text for text, _, _ in sentences],
        "sentence_ids": [10 * ref_id + KINDS.index(kind) for _, kind, _ in sentences],
        "sentence_kinds": [label for _, _, label in sentences],
        "mask": encode_mask(mask),
        "boxes": [[xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]] if is_there else [],
    }
