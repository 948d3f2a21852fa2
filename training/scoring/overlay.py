"""Masks drawn over an image, and texts that fit beside it (ours)."""

from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from training.scoring.boundary import mask_outline

COLORS = (  # the first is rare in photographs
    (0.60, 0.30, 0.80),
    (0.15, 0.45, 0.90),
    (0.10, 0.65, 0.35),
    (0.95, 0.60, 0.10),
    (0.90, 0.20, 0.20),
    (0.0, 0.65, 0.70),
)


def overlay(image: Image.Image, masks: Iterable[np.ndarray], opacity: float = 0.55) -> Image.Image:
    """The image with each (H, W) boolean mask in its own colour and with a white outline."""
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    for i, mask in enumerate(masks):
        color = np.asarray(COLORS[i % len(COLORS)], dtype=np.float32)
        canvas = np.where(mask[..., None], (1 - opacity) * canvas + opacity * color, canvas)
        canvas = np.where(mask_outline(mask)[..., None], 1.0, canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


def fit_lines(text: str, width: float, measure: Callable[[str], float], max_lines: int = 2) -> str:
    """Wrap a text to lines of at most `width`, measured by `measure`. Text beyond `max_lines` becomes "…".

    Words that are longer than a line are broken. White space is collapsed.
    """
    rest, lines = " ".join(text.split()), []
    while rest and len(lines) < max_lines:
        last = len(lines) == max_lines - 1
        if measure(rest) <= width:
            lines.append(rest)
            break
        mark = "…" if last else ""
        fitting, too_many = 1, len(rest)  # find the longest beginning that fits, by bisection
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if measure(rest[:middle] + mark) <= width else (fitting, middle)
        space = rest.rfind(" ", 1, fitting + 1)
        end = space if space > 0 and not last else fitting
        lines.append(rest[:end].rstrip() + mark)
        rest = rest[end:].lstrip()
    return "\n".join(lines)
