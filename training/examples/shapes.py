"""Batches of images of one shape, so that images without padding need none in a batch either (ours)."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class ShapeBatches(Sampler[list[int]]):
    """Batches of examples that have one shape.

    Every example comes once. The last batch of a shape may be smaller. It has no `batch_size`, so Accelerate gives whole batches to
    the processes in turns, whatever their sizes.
    """

    def __init__(self, shapes: Callable[[], Sequence[Hashable]], batch_size: int, *, shuffle: bool, seed: int = 0):
        """
        Args:
            shapes: Gives the shape of each example; it is called at the start of every pass.
            batch_size: Examples in a batch.
            shuffle: Whether examples and batches come in a random order, which depends on (seed, epoch) alone.
            seed: Of the random orders.
        """
        self._shapes, self._size, self._shuffle, self._seed = shapes, batch_size, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the random order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, self.epoch))
        shapes = self._shapes()
        by_shape: dict[Hashable, list[int]] = defaultdict(list)
        for number in rng.permutation(len(shapes)).tolist() if self._shuffle else range(len(shapes)):
            by_shape[shapes[number]].append(number)
        batches = [
            members[start : start + self._size]
            for members in by_shape.values()
            for start in range(0, len(members), self._size)
        ]
        return [batches[k] for k in rng.permutation(len(batches))] if self._shuffle else batches


__all__ = ["ShapeBatches"]
