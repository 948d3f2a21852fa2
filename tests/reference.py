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
