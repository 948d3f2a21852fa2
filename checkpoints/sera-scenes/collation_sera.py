"""Rows of processor outputs to batches, where images have several expressions each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image_processing_sera import centred_on_patches

IMAGE_NAMES = ("pixel_values", "original_sizes")  # one entry per image
TEXT_NAMES = ("input_ids", "attention_mask", "labels")  # one entry per expression
NUM_AXES = {"pixel_values": 4, "original_sizes": 2, "input_ids": 2, "attention_mask": 2, "labels": 3}


class SeraDataCollator:
    """Batch outputs of `SeraProcessor` that were kept row by row, with an `image_index` for the new batch.

    A row is what the processor gave for one image or for several, with any number of expressions, for example a row of
    `dataset.map(lambda row: processor(images=row["image"], text=[row["sentences"]]))`. An `image_index` holds numbers of images
    in its own batch. So it is computed again, and rows may come in any order.

        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=SeraDataCollator(processor))

    Where every image of a data set has one expression, transformers' `default_data_collator` does as well: then the processor gives
    no `image_index`. It needs rows of equal length (`padding="max_length"`) without an axis for the batch
    (`dataset.map(…, batched=True)`). (Ours.)

    Args:
        processor: the `SeraProcessor` that made the rows; its tokenizer knows the padding token.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch rows.

        Args:
            rows: dictionaries of lists, arrays or tensors: `pixel_values` (B, 3, H, W), `input_ids` (n, L) and, where present,
                `attention_mask` (n, L), `labels` (n, H, W), `original_sizes` (B, 2), `image_index` (n,). Rows about one image
                may lack the first axis of any of them. Other columns are left out.

        Returns:
            The same names for all images and expressions together, tensors; expressions padded on the right to the longest,
            images without padding (`do_pad: false`) to the frame that they share, as `SeraImageProcessor` does.
            `image_index` is there unless every image has exactly one expression.

        Raises:
            ValueError: no row; a row without images or expressions; expressions that no `image_index` assigns to images.
        """
        batch = join_rows(rows, self.processor)
        index = batch["image_index"]
        if len(index) == len(batch["pixel_values"]) and torch.equal(index, torch.arange(len(index))):
            del batch["image_index"]
        return batch


def join_rows(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Tensor]:
    """The rows of `SeraDataCollator` as one batch, always with `image_index`."""
    if not rows:
        raise ValueError("There are no rows to batch.")
    rows = [_tensors_of(row, i) for i, row in enumerate(rows)]
    pad_token_id, patch = processor.tokenizer.pad_token_id, processor.image_processor.patch_size
    frame = [max(row["pixel_values"].shape[axis] for row in rows) for axis in (-2, -1)]
    for row in rows:
        for name in {"pixel_values", "labels"} & set(row):
            row[name] = _in_frame(row[name], frame, patch)
    longest = max(row["input_ids"].shape[1] for row in rows)
    for row in rows:
        missing = (0, longest - row["input_ids"].shape[1])
        row["input_ids"] = torch.nn.functional.pad(row["input_ids"], missing, value=pad_token_id)
        row["attention_mask"] = torch.nn.functional.pad(row["attention_mask"], missing, value=0)
    batch = {}
    for name in (*IMAGE_NAMES, *TEXT_NAMES):
        if all(name in row for row in rows):
            batch[name] = torch.cat([row[name] for row in rows])
    starts = np.cumsum([0, *(len(row["pixel_values"]) for row in rows)]).tolist()
    batch["image_index"] = torch.cat([row["image_index"] + start for row, start in zip(rows, starts, strict=False)])
    return batch


def _in_frame(values: Tensor, frame: Sequence[int], patch: int) -> Tensor:
    """Values (…, h, w) in a larger frame, where `SeraImageProcessor.box` puts images without padding. The rest is 0."""
    missing = []
    for own, whole in zip(values.shape[:-3:-1], frame[::-1], strict=True):  # the last axis first, as `pad` wants it
        before = centred_on_patches(own, whole, patch)
        missing += [before, whole - own - before]
    return torch.nn.functional.pad(values, missing) if any(missing) else values


def _tensors_of(row: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """A row's tensors, each with its first axis, with `attention_mask` and with `image_index`, which counts from 0."""
    found = {}
    for name, num_axes in NUM_AXES.items():
        if row.get(name) is None:
            continue
        values = row[name] if isinstance(row[name], Tensor) else torch.from_numpy(np.array(row[name]))
        if values.dtype == torch.float64:  # what lists of Python's numbers become
            values = values.float()
        found[name] = values[None] if values.ndim == num_axes - 1 else values
    missing = [name for name in ("pixel_values", "input_ids") if name not in found]
    if missing:
        raise ValueError(f"rows[{number}] has no {missing[0]}; it has {', '.join(row) or 'nothing'}.")
    found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
    images, expressions = len(found["pixel_values"]), len(found["input_ids"])
    if images == 1:  # whatever the row says: it may come from a larger batch
        index = torch.zeros(expressions, dtype=torch.int64)
    elif row.get("image_index") is not None:
        index = torch.as_tensor(row["image_index"], dtype=torch.int64)
    else:
        index = torch.arange(images)
    if index.shape != (expressions,) or not bool(((index >= 0) & (index < images)).all()):
        raise ValueError(
            f"rows[{number}] has {expressions} expressions about {images} images and the image_index {index.tolist()}; "
            "it must name one of its images for each expression."
        )
    found["image_index"] = index
    return found


__all__ = ["SeraDataCollator", "join_rows"]
