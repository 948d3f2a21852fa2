"""Folders of Parquet files and datasets on the Hub, read as rows of `REFER_FEATURES`: prepared ones and other people's copies.

A layout is recognised by its columns. Three are common on the Hub beside our own (`training/preparation.py`): lmms-lab/RefCOCO and
its siblings, jxu124/refcoco and its siblings, moondream/refcoco-m.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from training.sources.agreement import compare_mask, describe_contradiction
from training.sources.images import coco_id, find_image, open_image
from training.sources.masks import decode_mask, merge_rles, segmentation_to_rle
from training.sources.refer import REFER_FEATURES
from training.sources.row_checks import check_rows, check_sentences

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Converted rows are cached by the names of functions, not by their code. Raise this with every change of the converted rows.
_CONVERSION = 2


@dataclass(frozen=True)
class Layout:
    """How one layout becomes rows of REFER_FEATURES.

    Attributes:
        name: What it is called in messages.
        columns: A folder has this layout when it has all of these columns.
        convert: From a row, its number and the folder of its images to rows of REFER_FEATURES without `sentence_kinds`.
            None: rows are of REFER_FEATURES as they are.
        image_id: From a row's `id_columns` and its number to its COCO image id, or a negative number where it tells none.
        id_columns: The columns that `image_id` looks at, of those that are there.
    """

    name: str
    columns: frozenset[str]
    convert: Callable[[Row, int, str | None], list[Row]] | None
    image_id: Callable[[Row, int], int]
    id_columns: tuple[str, ...]


class RowFolder:
    """A folder of Parquet files `data/<split>-*.parquet`, or a dataset on the Hub, in any layout known here.

    What a layout does not hold is empty in its rows: `ann_ids`, `category`, and `sentence_ids`, which then count from 0.
    """

    def __init__(self, root: str, image_dir: str | None = None):
        """
        Args:
            root: The folder, or an id on the Hub, "owner/name", which is asked for only if no such folder can be meant.
            image_dir: Folder that the image paths of jxu124's layout start from.

        Raises:
            FileNotFoundError: Where there is no such folder or dataset.
            ValueError: Where it has no Parquet files, or a layout that is not known.
        """
        self.name, self.image_dir = root, image_dir
        self._files = _find_files(root)
        self.splits = list(self._files)
        first = self._load(self.splits[0], streaming=True)
        self.layout = _recognize(set(first.features), root)
        if self.layout.name == "jxu124" and image_dir is None:
            raise ValueError(f"{root} holds paths of images, not the images: name their folder in data.image_dir.")

    def check_split(self, split: str) -> None:
        """`ValueError` where there is no such split."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}.")

    def read(self, split: str, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of a split, REFER_FEATURES; with `streaming` nothing is copied, and the shards are read as they are needed.

        Raises:
            ValueError: Where there is no such split, or for rows that cannot be used, by their number. With `streaming` copies are
                checked as they are read, and prepared rows are taken as they are.
        """
        self.check_split(split)
        rows = self._load(split, streaming)
        if self.layout.convert is None:
            rows = rows if rows.features == REFER_FEATURES else rows.cast(REFER_FEATURES)
            if not streaming:
                check_rows(rows, f"{self.name}, {split}")
            return rows
        if self.layout.name == "lmms-lab" and split == "val":
            logger.warning(
                "%s: the split val of this layout holds, for RefCOCO and RefCOCOg, the validation refs of UNC or UMD and "
                "those of Google together; figures on it compare with no published ones.",
                self.name,
            )
        if "image" in rows.features:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        return rows.map(
            _convert_batch,
            batched=True,
            batch_size=64,
            with_indices=True,
            remove_columns=list(rows.features),
            features=REFER_FEATURES,
            fn_kwargs={
                "layout": self.layout.name,
                "root": self.name,
                "image_dir": self.image_dir,
                "version": _CONVERSION,
            },
        )

    @property
    def is_coco(self) -> bool:
        """Whether all images are COCO's: true of the copies of RefCOCO."""
        return self.layout.convert is not None

    def images(self, split: str) -> Iterator[tuple[int, Row]]:
        """The image id and the image of every row as stored, in their order, read from no other column.

        The id is negative where a copy tells none. An image that is not there has a path alone.

        Raises:
            ValueError: Where there is no such split.
        """
        self.check_split(split)
        present = self._load(split, streaming=True).features
        columns = [column for column in (*self.layout.id_columns, "image", "image_path") if column in present]
        rows = self._load(split, streaming=True, columns=columns)
        if "image" in present:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        for number, row in enumerate(rows):
            image = row.get("image") or {"path": self._path_of(row["image_path"]), "bytes": None}
            yield self.layout.image_id(row, number), image

    def _path_of(self, path: str) -> str:
        folder = Path(str(self.image_dir)).expanduser().absolute()
        try:
            return str(find_image(path, [folder]))
        except ValueError:
            return str(folder / path)

    def _load(self, split: str, streaming: bool, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
        # By its files, so that no other split is copied to the cache.
        files = {split: self._files[split]}
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming, **options)


def _find_files(root: str) -> dict[str, list[str]]:
    """The Parquet files of each split."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        source = str(folder.absolute())
        if refs := next(
            (path for pattern in ("*/refs(*).p", "*/grefs(*).json") for path in folder.glob(pattern)), None
        ):
            raise ValueError(
                f"{root} is a REFER folder, with {refs.relative_to(folder)}: set data.source to refer, or prepare it first."
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", root) and not folder.parent.is_dir():
        source = root
        logger.info("%s is no folder here; asking the Hub for it", root)
    else:
        raise FileNotFoundError(f"{root} is not a folder, and not the id of a dataset on the Hub, owner/name.")
    try:
        builder = datasets.load_dataset_builder(source)
    except (datasets.exceptions.DatasetNotFoundError, datasets.data_files.EmptyDatasetError, ConnectionError) as error:
        raise FileNotFoundError(f"{root} gives no dataset: {error}") from error
    if builder.name != "parquet":
        raise ValueError(f"{root} must hold Parquet files, data/<split>-*.parquet; it looks like {builder.name}.")
    return {str(split): list(files) for split, files in builder.config.data_files.items()}


def _recognize(columns: set[str], root: str) -> Layout:
    for layout in LAYOUTS:
        if layout.columns <= columns:
            return layout
    known = "; ".join(f"{layout.name} ({', '.join(sorted(layout.columns))})" for layout in LAYOUTS)
    raise ValueError(f"{root} has the columns {', '.join(sorted(columns))}, no layout known here. Known are {known}.")


def _convert_batch(
    batch: Mapping[str, list], numbers: list[int], layout: str, root: str, image_dir: str | None, version: int
) -> dict[str, list]:
    """A batch of a layout's rows, by columns, to one of REFER_FEATURES."""
    convert = next(known.convert for known in LAYOUTS if known.name == layout)
    converted: list[Row] = []
    for i, number in enumerate(numbers):
        try:
            converted += convert({column: values[i] for column, values in batch.items()}, number, image_dir)
        except (ValueError, KeyError, TypeError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{root}: row {number} cannot be used: {reason}") from error
    for row in converted:
        row["sentence_kinds"] = [Path(root).name] * len(row["sentences"])
    return {column: [row[column] for row in converted] for column in REFER_FEATURES}


def _make_row(image: Row, image_id: int, ref_id: int, sentences: Any, mask: Row, box: list[float], **known: Any) -> Row:
    """A row of REFER_FEATURES but for its `sentence_kinds`; `known` replaces what most layouts do not hold."""
    sentences = [sentences] if isinstance(sentences, str) else sentences
    check_sentences(sentences)
    row = {
        "image": image,
        "image_id": image_id,
        "ref_id": ref_id,
        "ann_ids": [],
        "no_target": False,
        "category": "",
        "sentences": [sentence.strip() for sentence in sentences],
        "sentence_ids": list(range(len(sentences))),
        "mask": mask,
        "boxes": [box],
    }
    if not decode_mask(mask).any():
        raise ValueError("its mask has no pixel")
    agreement = compare_mask(mask, box)
    if agreement.is_contradiction:
        raise ValueError(f"its mask {describe_contradiction(agreement, mask, box)}")
    return row | known


def _size(image: Row) -> tuple[int, int]:
    """Height and width of an image in pixels, from its head."""
    width, height = open_image(image, decode=False).size
    return height, width


def _coco_id(file_name: str) -> int:
    found = coco_id(file_name)
    if found is None:
        raise ValueError(f"the file name {file_name!r} is none of COCO's, COCO_train2014_000000000000.jpg")
    return found


def _from_lmms_lab(row: Row, number: int, image_dir: str | None) -> list[Row]:
    """lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: one object; `answer` its sentences, `segmentation` one flat polygon."""
    if row.get("iscrowd"):
        raise ValueError("it is a crowd, whose run-length code a flat polygon cannot hold")
    question_id = str(row["question_id"])
    image = row["image"] | {"path": row["image"]["path"] or row["file_name"]}
    return [
        _make_row(
            image=image,
            image_id=_coco_id(row["file_name"]),
            ref_id=int(question_id) if question_id.isdecimal() else number,
            sentences=row["answer"],
            mask=segmentation_to_rle([row["segmentation"]], *_size(image)),
            box=row["bbox"],
        )
    ]


def _from_jxu124(row: Row, number: int, image_dir: str | None) -> list[Row]:
    """jxu124/refcoco and the like: one ref; `raw_anns` or `anns` its annotation in COCO's form, `bbox` by two corners."""
    folder = Path(str(image_dir)).expanduser().absolute()
    image = {"path": str(find_image(row["image_path"], [folder])), "bytes": None}
    annotations = _parsed(row, "raw_anns", "anns")
    annotations = [annotations] if isinstance(annotations, Mapping) else annotations
    sentences = _parsed(row, "raw_sentences", "sentences")
    records = [{"sent": sentence} if isinstance(sentence, str) else sentence for sentence in sentences]
    left, top, right, bottom = row["bbox"]
    size = _size(image)
    known: Row = {"ann_ids": [annotation["id"] for annotation in annotations if "id" in annotation]}
    if all("sent_id" in record for record in records):
        known["sentence_ids"] = [record["sent_id"] for record in records]
    return [
        _make_row(
            image=image,
            image_id=int(row["image_id"]),
            ref_id=int(row["ref_id"]),
            sentences=[record["sent"] for record in records],
            mask=merge_rles([segmentation_to_rle(annotation["segmentation"], *size) for annotation in annotations]),
            box=[left, top, right - left, bottom - top],
            **known,
        )
    ]


def _parsed(row: Row, *columns: str) -> Any:
    """The first of these columns that is there; a text in it is JSON."""
    value = next((row[column] for column in columns if row.get(column) is not None), None)
    if value is None:
        raise ValueError(f"it has no {' or '.join(columns)}")
    return json.loads(value) if isinstance(value, str) else value


def _from_moondream(row: Row, number: int, image_dir: str | None) -> list[Row]:
    """moondream/refcoco-m: one image with `samples` of sentences, a box and a run-length code each.

    Boxes are measured on the masks: what units they have in this layout nothing says.
    """
    rows = []
    for i, sample in enumerate(row["samples"]):
        mask = segmentation_to_rle(_parsed(sample, "mask"), *_size(row["image"]))
        ys, xs = (np.flatnonzero(decode_mask(mask).any(axis)) for axis in (1, 0))
        if not xs.size:
            raise ValueError(f"the mask of its sample {i} has no pixel")
        box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        image_id, ref_id = _moondream_id(row, number), 1000 * number + i
        rows.append(_make_row(row["image"], image_id, ref_id, sample["sentences"], mask, box))
    return rows


def _moondream_id(row: Row, number: int) -> int:
    return int(row["image_id"]) if row.get("image_id") is not None else -1 - number


LAYOUTS = (
    Layout(
        name="prepared",
        columns=frozenset(REFER_FEATURES),
        convert=None,
        image_id=lambda row, number: row["image_id"],
        id_columns=("image_id",),
    ),
    Layout(
        name="lmms-lab",
        columns=frozenset({"question_id", "image", "answer", "segmentation", "bbox", "file_name"}),
        convert=_from_lmms_lab,
        image_id=lambda row, number: _coco_id(row["file_name"]),
        id_columns=("file_name",),
    ),
    Layout(
        name="jxu124",
        columns=frozenset({"image_path", "sentences", "bbox", "ref_id", "image_id"}),
        convert=_from_jxu124,
        image_id=lambda row, number: int(row["image_id"]),
        id_columns=("image_id",),
    ),
    Layout(
        name="moondream",
        columns=frozenset({"image", "samples"}),
        convert=_from_moondream,
        image_id=_moondream_id,
        id_columns=("image_id",),
    ),
)
