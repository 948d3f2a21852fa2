"""Rows of images with coloured squares."""

import io

import datasets
import numpy as np
from PIL import Image

from training.sources.masks import encode_mask
from training.sources.refer import REFER_FEATURES

COLORS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "yellow": (230, 230, 20)}


def png(image: Image.Image, **options) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def make_rows(images: list[dict[str, list[str]]], seed: int = 0) -> datasets.Dataset:
    """Images of coloured squares on grey, one row per square: per image, {colour: sentences}, from left to right."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, objects in enumerate(images):
        height, step = int(rng.integers(40, 90)), int(rng.integers(24, 40))
        pixels = np.full((height, step * len(objects), 3), 128, np.uint8)
        masks = []
        for i, color in enumerate(objects):
            side = int(rng.integers(12, 20))
            top, left = int(rng.integers(0, height - side + 1)), i * step + int(rng.integers(0, step - side + 1))
            masks.append(np.zeros(pixels.shape[:2], bool))
            masks[-1][top : top + side, left : left + side] = True
            pixels[masks[-1]] = COLORS[color]
        encoded = png(Image.fromarray(pixels))
        for i, ((color, sentences), mask) in enumerate(zip(objects.items(), masks, strict=True)):
            rows.append(
                {
                    "image": {"path": None, "bytes": encoded},
                    "image_id": 7 * number + 1,
                    "ref_id": 10 * number + i,
                    "ann_ids": [10 * number + i],
                    "no_target": False,
                    "category": color,
                    "sentences": sentences,
                    "sentence_ids": list(range(len(sentences))),
                    "sentence_kinds": ["colour"] * len(sentences),
                    "mask": encode_mask(mask),
                    "boxes": [[0.0, 0.0, 1.0, 1.0]],
                }
            )
    return datasets.Dataset.from_list(rows, features=REFER_FEATURES)
