"""Disturbances that make a drawn scene more like a photograph: clutter, shadows, uneven light, tint, blur, sensor noise (ours).

Canvases are (S, S, 3) float32 in 0..255. Lengths are given for images of 112 pixels and grow with the side. A `strength` in
0..1 scales a nuisance; at 1 the named colors can still be told apart.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.sources.scenes.drawing import Tile, smooth_noise, to_image
from training.sources.scenes.shapes import rotate

REFERENCE_SIZE = 112
BLUR = 0.9  # standard deviation in pixels
NOISE = 8.0  # standard deviation in gray levels
GRADIENT = 0.2  # largest relative change of the light, either way
BAND = 0.3  # how much darker it is in the shadow of something outside of the image
CAST = 0.35  # how much darker it is in the shadow of an object
TINT = 0.025  # standard deviation of a channel's gain
CONTRAST = 0.12  # largest relative change
QUALITY = (95, 57)  # of JPEG, at strength 0 and the least at strength 1


def add_clutter(canvas: np.ndarray, pieces: int, rng: np.random.Generator) -> np.ndarray:
    """A canvas with as many faint scribbles and specks, thinner than any object and of the background's own colors."""
    size, scale = len(canvas), len(canvas) / REFERENCE_SIZE
    image = Image.fromarray(to_image(canvas))
    draw = ImageDraw.Draw(image)
    base = canvas.mean((0, 1))
    for _ in range(pieces):
        shade = base + rng.choice((-1, 1)) * rng.uniform(14, 34) + rng.normal(0, 5, 3)
        fill = tuple(np.clip(shade, 40, 215).astype(int).tolist())
        x, y = (rng.random(2) * size).tolist()
        if rng.random() < 0.4:
            radius = rng.uniform(1, 2.2) * scale
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            continue
        angle, points = rng.random() * 2 * math.pi, [(x, y)]
        for _ in range(int(rng.integers(2, 6))):
            angle += rng.normal(0, 0.7)
            step = rng.uniform(5, 13) * scale
            points.append((points[-1][0] + step * math.cos(angle), points[-1][1] + step * math.sin(angle)))
        draw.line(points, fill=fill, width=max(1, round(rng.uniform(0.8, 1.8) * scale)), joint="curve")
    return np.asarray(image, np.float32)


def cast_shadow(canvas: np.ndarray, tile: Tile, corner: tuple[int, int], light: float, strength: float) -> None:
    """Darkens the canvas where a tile's soft shadow falls, away from the light (an angle)."""
    scale = len(canvas) / REFERENCE_SIZE
    margin = math.ceil(4 * scale)
    coverage = Image.fromarray(np.pad((255 * tile.coverage).astype(np.uint8), margin))
    soft = np.asarray(coverage.filter(ImageFilter.GaussianBlur(1.3 * scale)), np.float32) / 255
    top = corner[0] - margin + round(-2.5 * scale * math.sin(light))
    left = corner[1] - margin + round(-2.5 * scale * math.cos(light))
    rows, columns = (slice(max(start, 0), min(start + len(soft), len(canvas))) for start in (top, left))
    inside = soft[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    canvas[rows, columns] *= 1 - strength * CAST * inside[..., None]


def photograph(canvas: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The canvas in uneven, tinted light, out of focus by a little, with the noise of a sensor: (S, S, 3) uint8."""
    size = len(canvas)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    across, _ = rotate(axis[None, :], axis[:, None], rng.random() * 2 * math.pi)
    light = 1 + strength * GRADIENT * np.clip(0.6 * across + smooth_noise(3, 0.4, size, rng), -1, 1)
    if rng.random() < 0.6 * strength:
        band, _ = rotate(axis[None, :], axis[:, None], rng.random() * 2 * math.pi)
        light = light * (1 - BAND * strength / (1 + np.exp(-12 * (band - rng.uniform(-0.5, 0.5)))))
    gain = 1 + strength * np.clip(rng.normal(0, TINT, 3), -2 * TINT, 2 * TINT)
    contrast = 1 + strength * rng.uniform(-CONTRAST, CONTRAST)
    canvas = 128 + contrast * (canvas * light[..., None] * gain - 128)
    blur = rng.uniform(0, BLUR * strength) * size / REFERENCE_SIZE
    image = Image.fromarray(to_image(canvas)).filter(ImageFilter.GaussianBlur(blur))
    noise = rng.uniform(0.3, 1) * NOISE * strength * rng.standard_normal((size, size, 4), np.float32)
    # most of a sensor's noise is common to the channels once the camera has smoothed the colors
    return to_image(np.asarray(image, np.float32) + 0.7 * noise[..., :1] + 0.5 * noise[..., 1:])


def jpeg_quality(strength: float, rng: np.random.Generator) -> int:
    """A quality for the JPEG file of an image."""
    return round(QUALITY[0] - strength * rng.random() * (QUALITY[0] - QUALITY[1]))
