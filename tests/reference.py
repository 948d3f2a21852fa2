"""Reference arithmetic for the tests in plain numpy, written from the definitions."""

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exponent = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weight + bias


def conv2d(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, groups: int = 1) -> np.ndarray:
    """Cross-correlation of (B, C, H, W) with (O, C / groups, K, K), zeros around, size kept."""
    radius, out_channels = weight.shape[-1] // 2, weight.shape[0]
    padded = np.pad(x, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    inputs = windows.reshape(len(x), groups, x.shape[1] // groups, *windows.shape[2:])
    kernels = weight.reshape(groups, out_channels // groups, *weight.shape[1:])
    result = np.einsum("bgchwij,gocij->bgohw", inputs, kernels).reshape(len(x), out_channels, *x.shape[2:])
    return result if bias is None else result + bias[:, None, None]


def fill_even_odd(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """The union of polygons; inside is where a ray from the pixel centre crosses an odd number of edges."""
    union = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        crossings = np.zeros((height, width + 1), dtype=np.int64)
        for (x0, y0), (x1, y1) in zip(np.roll(corners, 1, axis=0), corners, strict=True):
            first, last = np.clip(np.ceil(np.sort([y0, y1]) - 0.5), 0, height).astype(int)
            if y0 == y1 or first == last:
                continue
            rows = np.arange(first, last)
            x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            np.add.at(crossings, (rows, np.clip(np.ceil(x - 0.5), 0, width).astype(int)), 1)
        union |= np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
    return union


def distance_to_outline(points: np.ndarray, polygons: list[list[float]]) -> np.ndarray:
    """The distance of each of the points (N, 2) to the nearest edge, in pixels."""
    nearest = np.full(len(points), np.inf)
    for polygon in polygons:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        for start, end in zip(np.roll(corners, 1, axis=0), corners, strict=True):
            along = np.clip((points - start) @ (end - start) / np.sum((end - start) ** 2), 0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(points - start - along[:, None] * (end - start), axis=1))
    return nearest
