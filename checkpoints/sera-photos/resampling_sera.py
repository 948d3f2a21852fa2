"""From the logits' grid to the pixels of an image: bilinear interpolation in bands of rows, so that memory stays small."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BAND_PIXELS = 2**20  # pixels that are interpolated at once


class Axis(NamedTuple):
    """How one axis of an image is interpolated between two cells of the grid for each sample.

    Attributes:
        cells: The cells that the image's pixels are interpolated from. Cells that cover padding are not among them.
        before: (S,) number of the cell before each sample, counted from the first of `cells`.
        after: (S,) number of the cell after it.
        share: (S,) weight of the cell after it, in [0, 1].
        samples: Samples whose average is a pixel. An image that is smaller than its part of the grid has several.
    """

    cells: slice
    before: np.ndarray
    after: np.ndarray
    share: np.ndarray
    samples: int

    def part(self, pixels: slice) -> "Axis":
        """The same for some of the pixels."""
        taken = slice(pixels.start * self.samples, pixels.stop * self.samples)
        return self._replace(before=self.before[taken], after=self.after[taken], share=self.share[taken])


def image_axis(cells: int, length: int, start: float, extent: float) -> Axis:
    """Place the pixels of an image on an axis of the grid.

    Pixels at the image's border take the nearest cell that lies completely inside the image. The next cell covers padding too.

    Args:
        cells: Number of cells of the whole axis.
        length: Pixels of the image.
        start: Where the image begins, as a share of the axis.
        extent: How long the image is, as a share of the axis.
    """
    samples = max(1, round(cells * extent / length))
    position = (start + (np.arange(length * samples) + 0.5) / (length * samples) * extent) * cells - 0.5
    first, last = np.ceil(start * cells - 1e-6), np.floor((start + extent) * cells + 1e-6) - 1
    position = position.clip(first, last) if first <= last else position.clip(0, cells - 1)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, int(np.ceil(position.max())))
    origin = int(before.min())
    return Axis(slice(origin, int(after.max()) + 1), before - origin, after - origin, position - before, samples)


def resampled_bands(values: Tensor, rows: Axis, columns: Axis) -> Iterator[tuple[slice, Tensor]]:
    """Interpolate bilinearly to the pixels of an image, a band of rows at a time. The bands follow from the size of the image.

    Args:
        values: (h, w), the cells of both axes.
        rows: From `image_axis`.
        columns: The same for the other axis.

    Yields:
        The rows of a band, and its values (rows, W).
    """
    height = len(rows.before) // rows.samples
    step = max(1, BAND_PIXELS // (len(columns.before) * rows.samples))
    for top in range(0, height, step):
        band = slice(top, min(top + step, height))
        yield band, _interpolate(_interpolate(values, 0, rows.part(band)), 1, columns)


def _interpolate(values: Tensor, dim: int, axis: Axis) -> Tensor:
    share = torch.as_tensor(axis.share, dtype=values.dtype, device=values.device)
    found = torch.lerp(
        values.index_select(dim, torch.as_tensor(axis.before, device=values.device)),
        values.index_select(dim, torch.as_tensor(axis.after, device=values.device)),
        share[:, None] if dim == 0 else share,
    )
    return found.unflatten(dim, (-1, axis.samples)).mean(dim + 1) if axis.samples > 1 else found


__all__ = ["Axis", "image_axis", "resampled_bands"]
