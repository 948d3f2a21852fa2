"""Kept predictions: Parquet files with a row per expression, written in parts and read again by whoever scores them (ours).

A folder of predictions holds `parts/part-SSSSS-FIRST-STOP.parquet`. A part has the answers to the input rows FIRST ≤ row < STOP of
one shard (SSSSS: a file of a streamed data set; 00000 for everything else). A part is written under another name and then renamed,
so it is whole or absent. The last part of a shard is shorter than the others, or empty where nothing is left: that says where the
shard ends. Any Parquet reader reads the folder: `datasets.load_dataset("parquet", data_dir="DIR/parts")`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from training.sources.masks import encode_mask
from training.support.files import write_once

PARTS = "parts"
_PART_NAME = re.compile(r"part-(\d{5,})-(\d{9,})-(\d{9,})\.parquet")

SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("expression", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("no_target", pa.float32()),
        pa.field("rle", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
        pa.field("box", pa.list_(pa.float32())),
        pa.field("area", pa.int64()),
        pa.field("mask_file", pa.string()),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Prediction:
    """The answer to one expression about one image: a row of SCHEMA.

    (shard, row, index) is different for every row; (image, index) is, too, where the input's image keys are.

    Attributes:
        image: Key of the image: its file name, its id, or what else the data calls it.
        shard: Number of the input file that the image is from; 0 where the input is no set of files.
        row: Number of the input row in its shard, from 0.
        index: Number of the expression among those of its row, from 0.
        expression: The expression as it was given. `None` where the image came without one.
        score: In [0, 1]; see `post_process_referring_segmentation`. `None` beside an error.
        no_target: Probability in [0, 1] that nothing in the image is meant; `None` where the model does not predict it.
        rle: The mask at the image's own size, upright: COCO's compressed run lengths {"size": [height, width], "counts": str}.
        box: [left, top, width, height] of the mask in pixels; `None` of an empty one.
        area: Pixels of the mask.
        mask_file: The mask as a PNG file, below the folder of predictions; `None` where none was written.
        error: Why there is no mask, in a sentence; `None` where there is one.
    """

    image: str
    shard: int
    row: int
    index: int
    expression: str | None
    score: float | None = None
    no_target: float | None = None
    rle: dict[str, Any] | None = None
    box: list[float] | None = None
    area: int | None = None
    mask_file: str | None = None
    error: str | None = None


assert [field.name for field in fields(Prediction)] == SCHEMA.names


def describe_mask(mask: np.ndarray) -> dict[str, Any]:
    """The fields "rle", "box" and "area" of a bool mask (H, W)."""
    rle = encode_mask(mask)
    compressed = {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
    area = int(coco_mask.area(compressed))
    return {"rle": rle, "box": coco_mask.toBbox(compressed).tolist() if area else None, "area": area}


class Part(NamedTuple):
    """Which input rows a part has: `first` ≤ row < `stop` of a shard."""

    shard: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """The part's file name, without its suffix."""
        return f"part-{self.shard:05d}-{self.first:09d}-{self.stop:09d}"


def write_part(folder: Path, part: Part, predictions: Iterable[Prediction]) -> None:
    """Write a part of a folder of predictions, whole or not at all, however many processes write it at once.

    Args:
        folder: The folder of predictions, made where absent.
        part: Which rows it has.
        predictions: The answers, in the order of (row, index).
    """
    table = pa.Table.from_pylist([asdict(prediction) for prediction in predictions], schema=SCHEMA)

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            if len(table):  # an empty row group is one that `datasets` does not read
                writer.write_table(table)

    write_once(folder / PARTS / f"{part.name}.parquet", write)


def list_parts(folder: Path) -> list[Part]:
    """The whole parts of a folder of predictions, in order.

    Raises:
        ValueError: Where two parts hold the same row.
    """
    names = (_PART_NAME.fullmatch(path.name) for path in (folder / PARTS).glob("part-*.parquet"))
    parts = sorted(Part(*map(int, name.groups())) for name in names if name)
    for before, after in pairwise(parts):
        if before.shard == after.shard and before.stop > after.first:
            raise ValueError(f"{folder} holds rows twice: in {before.name} and in {after.name}.")
    return parts


def read_predictions(folder: Path) -> Iterator[Prediction]:
    """The predictions of a folder in the order of the input, one part in memory at a time.

    Raises:
        FileNotFoundError: Where there are none.
        ValueError: Where a part is not of SCHEMA.
    """
    parts = list_parts(folder)
    if not parts:
        raise FileNotFoundError(f"{folder} holds no predictions: there is no {PARTS}/part-*.parquet in it.")
    for part in parts:
        path = folder / PARTS / f"{part.name}.parquet"
        table = pq.read_table(path)
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"{path} has other columns than predictions have: {', '.join(table.schema.names)}.")
        for row in table.to_pylist():
            yield Prediction(**row)


__all__ = ["SCHEMA", "Part", "Prediction", "describe_mask", "list_parts", "read_predictions", "write_part"]
