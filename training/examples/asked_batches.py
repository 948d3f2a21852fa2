"""From images with expressions to batches, in parts that do not depend on how many processes share the work (ours).

The rows of every shard are cut into parts of equal size, by their numbers. A batch lies in one part, and what a part's batches
are hangs on the part alone. So whoever works on a part gets the same batches, and any number of processes, with any number of
workers each, can take the parts that are missing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec.asyn
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from processing_sera import SeraProcessor
from processing_sera.image_processing_sera import to_rgb_image
from processing_sera.processing_sera import clean_expression
from training.sources.asked_images import AskedImage, AskedImages, with_bytes
from training.sources.images import open_image

EXPRESSIONS_IN_BATCH = 256  # a batch takes no further image then; so many logits are in memory together


@dataclass(frozen=True)
class Question:
    """One expression about one image.

    Attributes:
        row: Number of the input row in its shard.
        index: Number of the expression among those of its row.
        key: What the data calls the image.
        expression: As given; `None` where the row has none.
        image: Number of the image in its batch; `None` beside an error.
        error: Why the model cannot be asked; `None` where it can.
    """

    row: int
    index: int
    key: str
    expression: str | None
    image: int | None = None
    error: str | None = None


@dataclass
class ShapeInputs:
    """Inputs of the model for the images of one shape.

    Attributes:
        questions: The questions, one per expression, in the order of the inputs.
        inputs: As the processor returns them, always with `image_index`.
    """

    questions: list[Question]
    inputs: dict[str, Any]


@dataclass
class Batch:
    """Questions of one part.

    Attributes:
        shard: Of the part.
        first: The part's first row.
        stop: Where the batch is the part's last: the row behind the part's last.
        rows: Number of input rows in the batch.
        questions: In the order of the input.
        inputs: Of the model, for the questions without an error. Images of one shape are together, so that none is padded for
            the sake of others.
        images: The images, where they were asked for.
    """

    shard: int
    first: int
    stop: int | None = None
    rows: int = 0
    questions: list[Question] = field(default_factory=list)
    inputs: list[ShapeInputs] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


class AskedBatches(IterableDataset):
    """The batches of the parts that are not done, of this process's and this worker's share.

    Args:
        asked: The input.
        processor: Makes the model's inputs.
        done: (shard, first row, row behind the last) of the parts that are done. A part that is shorter than `part_size` is
            the last of its shard.
        part_size: Rows of a part.
        batch_size: Images of a batch at most. Rows in sequence that hold the same image count as one.
        process: This process's number.
        processes: Their number.
        keep_images: Whether batches come with their images.
    """

    def __init__(
        self,
        asked: AskedImages,
        processor: SeraProcessor,
        done: Iterable[tuple[int, int, int]] = (),
        *,
        part_size: int,
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        keep_images: bool = False,
    ):
        self.asked, self.processor = asked, processor
        self.part_size, self.batch_size = part_size, batch_size
        self.process, self.processes, self.keep_images = process, processes, keep_images
        self.done: dict[int, list[int]] = {shard: [] for shard in range(asked.shards)}  # numbers of parts
        for shard, first, _ in sorted(done):
            self.done[shard].append(first // part_size)
        whole = whole_shards(done, part_size)
        self.open = [shard for shard in range(asked.shards) if shard not in whole]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        if worker:
            fsspec.asyn.reset_lock()  # a forked lock of a file system on the network might never be released
        sharers, share = self.processes * workers, self.process * workers + number
        # as many whole shards for each as go; the rest is shared part by part, which makes each sharer read through it
        undivided = len(self.open) - len(self.open) % sharers
        for place, shard in enumerate(self.open):
            if place >= undivided:
                yield from self._batches(shard, sharers, (share - place) % sharers)
            elif place % sharers == share:
                yield from self._batches(shard, 1, 0)

    def _batches(self, shard: int, sharers: int, share: int) -> Iterator[Batch]:
        """The batches of every `sharers`-th missing part of a shard, beginning with number `share`."""
        size, done = self.part_size, self.done[shard]

        def wanted(part: int) -> bool:
            before = bisect_left(done, part)
            is_done = before < len(done) and done[before] == part
            return not is_done and (part - before) % sharers == share

        length, batch = 0, _Collected(shard, 0)
        for row, asked in enumerate(self.asked.read(shard, lambda row: wanted(row // size))):
            length = row + 1
            if row % size == 0:
                batch = _Collected(shard, row)
            if asked is None:
                continue
            if batch.is_full(self.batch_size) and not batch.ends_with(asked.image):
                yield self._made(batch)
                batch = _Collected(shard, batch.first)
            batch.add(row, asked)
            if length % size == 0:
                yield self._made(batch, stop=length)
        last = length // size
        if wanted(last):
            # shorter than the others, or empty, which says that the shard ends here
            yield self._made(batch if length % size else _Collected(shard, last * size), stop=length)

    def _made(self, collected: _Collected, stop: int | None = None) -> Batch:
        batch = Batch(collected.shard, collected.first, stop, collected.rows, collected.questions)
        by_frame: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, image in enumerate(collected.images):
            by_frame[self.processor.image_processor.frame_of([image.size[::-1]])].append(number)
        for numbers in by_frame.values():
            images, texts = ([values[number] for number in numbers] for values in (collected.images, collected.texts))
            try:
                inputs = self.processor(images=images, text=texts, return_tensors="pt")
            except ValueError as error:
                raise ValueError(f"row {collected.questions[0].row} and those after it: {error}") from error
            # the processor leaves it out where every image has one expression
            inputs.setdefault("image_index", torch.arange(len(inputs["input_ids"])))
            questions = [question for question in collected.questions if question.image in numbers]
            batch.inputs.append(ShapeInputs(questions, dict(inputs)))
        if self.keep_images:
            batch.images = collected.images
        return batch


class _Collected:
    """A batch as it fills."""

    def __init__(self, shard: int, first: int):
        self.shard, self.first, self.rows = shard, first, 0
        self.questions: list[Question] = []
        self.images: list[Image.Image] = []
        self.texts: list[list[str]] = []  # per image
        self._last: dict[str, Any] | None = None  # the encoded image that the last row had

    def is_full(self, batch_size: int) -> bool:
        return len(self.images) >= batch_size or len(self.questions) >= EXPRESSIONS_IN_BATCH

    def ends_with(self, encoded: dict[str, Any] | None) -> bool:
        """Whether this image is the one that was taken last."""
        return encoded is not None and encoded == self._last

    def add(self, row: int, asked: AskedImage) -> None:
        """Take the questions of a row; an image that cannot be read, or a text that says nothing, becomes their error."""
        self.rows += 1
        expressions: list[str | None] = list(asked.expressions) or [None]
        errors = [None if clean_expression(expression or "") else _empty(expression) for expression in expressions]
        fault = self._take_image(asked.image) if None in errors else None
        for index, (expression, error) in enumerate(zip(expressions, errors, strict=True)):
            error = error or fault
            if error is None:
                self.texts[-1].append(expression)
            image = len(self.images) - 1 if error is None else None
            self.questions.append(Question(row, index, asked.key, expression, image, error))

    def _take_image(self, encoded: dict[str, Any] | None) -> str | None:
        """Make an image the last of the batch, if it is not so already; returns what is wrong with it."""
        if encoded is None:
            return "the row has no image"
        if self.ends_with(encoded):
            return None
        try:
            image = to_rgb_image(open_image(with_bytes(encoded)))
        except (ValueError, TypeError) as error:
            return _without_folder(str(error), encoded)
        self.images.append(image)
        self.texts.append([])
        self._last = encoded
        return None


def _empty(expression: str | None) -> str:
    return "the image came without an expression" if expression is None else f"the expression {expression!r} is empty"


def _without_folder(error: str, encoded: dict[str, Any]) -> str:
    """The error without the folder of the file: that is the machine's, and the key tells the image."""
    path = encoded["path"] or ""
    return error.replace(path, path.rpartition("/")[2]) if path else error


def whole_shards(done: Iterable[tuple[int, int, int]], part_size: int) -> set[int]:
    """The shards of which every part is done: all from the first row to one that is shorter than `part_size`."""
    parts: dict[int, list[tuple[int, int]]] = {}
    for shard, first, stop in sorted(done):
        parts.setdefault(shard, []).append((first, stop))
    return {
        shard
        for shard, found in parts.items()
        if found[-1][1] - found[-1][0] < part_size and len(found) == found[-1][0] // part_size + 1
    }


__all__ = ["AskedBatches", "Batch", "Question", "ShapeInputs", "whole_shards"]
