"""The shapes of the embedded scenes, as depths below a rim. The design is ours.

A depth is positive inside of the shape, in units of the radius, at (u, v) in the same units from the middle; v points down.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance from the middle; several times as fast as np.hypot."""
    return np.sqrt(u * u + v * v)


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (x, y) in axes that are turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.95 - distance(u, v)


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
    r = distance(u, v)
    return tip * n_x - r * (n_x * np.cos(angle) + n_y * np.sin(angle))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    half, v = 0.82, v - 0.08  # a square on its corner, half its diagonal, and half a disc on either upper edge
    u = np.abs(u)
    lobe = half / math.sqrt(2) - distance(u - half / 2, v + half / 2)
    return np.maximum(lobe, (half - u - np.abs(v)) / math.sqrt(2))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(1 - u, 0.31 - v), np.minimum(0.31 - u, 1 - v))


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(1 - distance(u + 0.15, v), distance(u - 0.4, v) - 0.72)


def _hourglass(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(0.95 - v, (0.8 * v + 0.1 - u) / math.hypot(1, 0.8))


def _ring(u: np.ndarray, v: np.ndarray, inner: float) -> np.ndarray:
    r = distance(u, v)
    return np.minimum(1 - r, r - inner)


def _frame(u: np.ndarray, v: np.ndarray, inner: float) -> np.ndarray:
    m = np.maximum(np.abs(u), np.abs(v))
    return np.minimum(0.88 - m, m - inner)


def _bar(u: np.ndarray, v: np.ndarray, half: float) -> np.ndarray:
    return np.minimum(1.2 - np.abs(u), half - np.abs(v))


def _arch(u: np.ndarray, v: np.ndarray, inner: float) -> np.ndarray:
    v = v - 0.4
    r = distance(u, v)
    return np.minimum(np.minimum(1 - r, r - inner), 0.1 - v)


@dataclass(frozen=True)
class Form:
    """A shape.

    Attributes:
        depth: Depth at (u, v); of a hollow or thin shape at (u, v, stroke).
        turn: How far it may turn, in radians either way.
        strokes: Of a hollow or thin shape what `depth` takes for the thickest and for the thinnest stroke. A shape without is
            wide enough for dots and checks.
    """

    depth: Callable[..., np.ndarray]
    turn: float
    strokes: tuple[float, float] | None = None

    @property
    def solid(self) -> bool:
        """Neither hollow nor thin."""
        return self.strokes is None

    def depth_at(self, u: np.ndarray, v: np.ndarray, thinness: float = 0.0) -> np.ndarray:
        """The depth; `thinness` 0..1 goes from the thickest stroke to the thinnest."""
        if self.strokes is None:
            return self.depth(u, v)
        thick, thin = self.strokes
        return self.depth(u, v, thick + thinness * (thin - thick))


# The order counts: it numbers the shapes, and the rule for held-out compositions uses the numbers.
FORMS = {
    "circle": Form(_circle, math.pi),
    "square": Form(_square, 0.3),
    "triangle": Form(_triangle, 0.3),
    "star": Form(_star, math.pi / 5),
    "heart": Form(_heart, 0.4),
    "cross": Form(_cross, 0.3),
    "moon": Form(_moon, math.pi),
    "hourglass": Form(_hourglass, 0.4),
    "ring": Form(_ring, math.pi, strokes=(0.5, 0.66)),
    "frame": Form(_frame, 0.3, strokes=(0.42, 0.57)),
    "bar": Form(_bar, math.pi / 2, strokes=(0.28, 0.19)),
    "arch": Form(_arch, math.pi, strokes=(0.5, 0.62)),
}
