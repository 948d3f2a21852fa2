"""Masks laid over a photograph (ours)."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from training.boundary import mask_outline

COLORS = (
    (0.90, 0.20, 0.20),
    (0.15, 0.45, 0.90),
    (0.10, 0.65, 0.35),
    (0.95, 0.60, 0.10),
    (0.60, 0.30, 0.80),
    (0.0, 0.65, 0.70),
)


def overlay(image: Image.Image, masks: Iterable[np.ndarray], opacity: float = 0.55) -> Image.Image:
    """The picture with each (H, W) boolean mask tinted in a colour of its own and outlined in white."""
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    for i, mask in enumerate(masks):
        color = np.asarray(COLORS[i % len(COLORS)], dtype=np.float32)
        canvas = np.where(mask[..., None], (1 - opacity) * canvas + opacity * color, canvas)
        canvas = np.where(mask_outline(mask)[..., None], 1.0, canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))
