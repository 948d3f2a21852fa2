"""Training examples from a stream of rows, for data that should not be copied to the disk (ours)."""

from collections.abc import Callable, Iterator
from itertools import groupby

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.configuration import AugmentationSettings
from training.examples.batches import ImageExample, draw_example, refuse_one_id
from training.sources.images import is_same_image
from training.support.workers import end_with_parent

SHUFFLED_GROUPS = 4096  # the next example is drawn from this many groups of the stream


class StreamedExamples(IterableDataset):
    """Images of a stream of rows in an order of the epoch's own, with freshly drawn sentences and variations.

    The shards come in random order, and a buffer shuffles the images. The order depends on (seed, epoch) alone. What is drawn for
    an image depends on (seed, epoch, image_id, number of the group in its image) alone. The number of processes and of workers
    changes neither. Batches are dealt to the processes in turn. All processes take the same number of steps: what is left over at
    the end, less than one batch for every process, is not used in that epoch.

    Every worker of every process reads the whole stream, but decodes only its own images. Reading is cheap beside decoding. On a
    slow network, download or prepare the data first. [`streamed_loader`] makes batches of the examples.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *,
        batch_size: int,
        objects_per_image: int,
        sentences_per_object: int,
        augmentation: AugmentationSettings,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        """
        Args:
            rows: Rows of REFER_FEATURES. Only adjacent rows of an image within a shard are grouped. They are read once to count the
                groups.
            batch_size: Examples in a batch of one process.
            objects_per_image: Most rows in an example.
            sentences_per_object: Sentences drawn for a row in an epoch.
            augmentation: How examples are varied.
            seed: Seed of everything random.
            process_index: Which process this is.
            num_processes: Number of processes that train together.

        Raises:
            ValueError: Where the stream has less than one batch for each process.
        """
        self.rows = rows
        self.batch_size = batch_size
        self.objects_per_image = objects_per_image
        self.sentences_per_object = sentences_per_object
        self.augmentation = augmentation
        self.seed = seed
        self.process_index, self.num_processes = process_index, num_processes
        self.epoch, self.first_batch = 0, 0
        self.num_groups = sum(1 for _ in self._groups(rows.select_columns("image_id"), range(rows.num_shards)))
        self.num_batches = self.num_groups // (batch_size * num_processes)
        if not self.num_batches:
            raise ValueError(
                f"The stream gives {self.num_groups} examples, fewer than one batch of {batch_size} for each of {num_processes} "
                "processes: lower optimization.batch_size, or set data.streaming to false."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order, sentences and variations are drawn. Another epoch than before starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.first_batch = epoch, 0

    def start_at(self, epoch: int, batch: int) -> None:
        """Start an epoch at this batch of each process, without decoding earlier ones. Later epochs start at their first batch."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[ImageExample]:
        worker = get_worker_info()
        worker_index, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng((self.seed, self.epoch))
        shards = rng.permutation(self.rows.num_shards).tolist()
        # A group's place is its number in the stream plus a delay, which is shorter than the buffer.
        order = np.argsort(np.arange(self.num_groups) + rng.uniform(0, SHUFFLED_GROUPS, self.num_groups)).tolist()
        mine: list[int] = []
        # the loader takes the first batch from its first worker, the second from its second and so on
        for batch in range(self.first_batch + worker_index, self.num_batches, num_workers):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            mine += order[start : start + self.batch_size]

        wanted, held = set(mine), {}
        groups = enumerate(self._groups(self.rows, shards))
        for number in mine:
            while number not in held:
                passing, (part, rows) = next(groups)
                if passing in wanted:
                    held[passing] = part, rows
            part, rows = held.pop(number)
            yield self._draw(part, rows)

    def _groups(self, rows: datasets.IterableDataset, shards: range | list[int]) -> Iterator[tuple[int, list[dict]]]:
        """Groups of an image's rows, with their number in the image, through the shards in this order."""
        for shard in shards:
            # iter() by batches: the other way of iterating deals the shards out to the workers
            batches = rows.shard(rows.num_shards, shard).iter(batch_size=32)
            passing = (
                dict(zip(batch, values, strict=True))
                for batch in batches
                for values in zip(*batch.values(), strict=True)
            )
            for _, image in groupby(passing, key=lambda row: row["image_id"]):
                yield from enumerate(_chunks(image, self.objects_per_image))

    def _draw(self, part: int, rows: list[dict]) -> ImageExample:
        for row in rows[1:]:
            if not is_same_image(rows[0]["image"], row["image"]):
                refuse_one_id(rows[0], row)
        image = rows[0]["image_id"] % 2**63  # a seed is not negative
        rng = np.random.default_rng((self.seed, self.epoch, image, part))
        numbers = [row["ref_id"] for row in rows]
        return draw_example(rows, numbers, self.sentences_per_object, self.augmentation, rng)


def streamed_loader(
    examples: StreamedExamples, collate_fn: Callable, num_workers: int, accelerator: Accelerator
) -> DataLoader:
    """Batches of this process on its device.

    `Accelerator.prepare` would deal the batches to the processes a second time. The loader's `set_epoch` sets the examples' epoch.
    """
    loader = DataLoader(
        examples,
        examples.batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # its own, or going on in an epoch's midst would take from dropout's numbers
    )
    alone = {"num_processes": 1, "process_index": 0, "dispatch_batches": False}
    return prepare_data_loader(loader, device=accelerator.device, put_on_device=True, **alone)


def _chunks(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` rows; the last one holds the rest. No list is kept after it was passed on."""
    chunk: list[dict] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
