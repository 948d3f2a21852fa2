"""Images with the expressions asked about them, from whatever form they lie in, read so that memory stays flat (ours).

Forms: a folder of images, with a table (CSV, TSV, JSON lines) of expressions or one list for all; Parquet files; WebDataset tars;
a data set on the Hub; a folder that `datasets` saved. Tables and saved folders are mapped into memory, the rest is streamed.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.support.files import sha256_of

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# names that a column is found by where none is given, the first of them that is there
IMAGE_COLUMNS = ("image", "file_name", "file", "path", "image_path", "jpg", "jpeg", "png", "webp")
TEXT_COLUMNS = ("expressions", "expression", "phrases", "phrase", "sentences", "sentence", "text", "caption", "txt")
KEY_COLUMNS = ("__key__", "key", "image_id", "file_name", "id")
SAVED_FILES = ("dataset_info.json", "dataset_dict.json")  # what `datasets` writes beside its Arrow files
_TAR_MEMBER = re.compile(
    r"((?:.*/)?[^./][^./]*)\.[^/]*"
)  # of WebDataset: the key, up to the first point of the file's name


@dataclass(frozen=True)
class AskedImage:
    """One input row.

    Attributes:
        key: What the data calls the image.
        image: {"path": str or None, "bytes": bytes or None} of the encoded image; `None` where the row has none.
        expressions: What is asked about it, as given.
    """

    key: str
    image: dict[str, Any] | None
    expressions: list[str]


@dataclass(frozen=True)
class Columns:
    """Names of columns, `None` for one to be found by its name; "column.field" is a field in a column of records."""

    image: str | None = None
    text: str | None = None
    key: str | None = None


FOUND_BY_NAME = Columns()


class AskedImages(ABC):
    """Input rows in shards that can be read each by itself.

    Attributes:
        identity: What tells this input from another, in plain values: names and sizes of its files, say. No path of the machine.
        shards: Number of shards.
    """

    def __init__(self, identity: dict[str, Any], shards: int):
        self.identity, self.shards = identity, shards

    @abstractmethod
    def count(self) -> int | None:
        """Number of rows; `None` where only reading all of them tells."""

    @abstractmethod
    def read(self, shard: int, wanted: Callable[[int], bool]) -> Iterator[AskedImage | None]:
        """All rows of a shard from the first to the last; those whose number is not wanted are `None`, which is fast."""


def open_asked_images(
    data: str,
    *,
    expressions: Sequence[str] | None = None,
    columns: Columns = FOUND_BY_NAME,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> AskedImages:
    """The input rows of a folder, a file, a pattern of files or a data set on the Hub.

    Args:
        data: A folder (of images, Parquet files or tars, or saved by `datasets`), a file (table, Parquet, tar), a pattern such
            as "shards/*.tar", or the id of a data set on the Hub, "owner/name".
        expressions: Asked about every image; `None`: those of the data.
        columns: Where image, expressions and key stand.
        split: Of the data, where it has several.
        subset: Configuration of a data set on the Hub, where it has several.
        limit: Rows to take from the beginning; they are one shard then.

    Raises:
        FileNotFoundError: Where there is nothing of that name.
        ValueError: Where a column or split is missing, or the data has no rows or no expressions.
    """
    place = Path(data).expanduser()
    if place.is_dir():
        if any((place / name).is_file() for name in SAVED_FILES):
            return _Saved(place, expressions, columns, split, limit)
        if next(place.rglob("*.parquet"), None) or next(place.rglob("*.tar"), None):
            return _Streamed(datasets.load_dataset_builder(str(place)), place, expressions, columns, split, limit)
        if expressions is not None:
            return _ImageFolder(place, expressions, limit)
        tables = sorted(path for path in place.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "none"
            raise ValueError(
                f"The folder {data} needs one table of phrases ({', '.join(TABLE_SUFFIXES)}); it has {found}. Name the table as "
                "--data, or give --phrases for every image."
            )
        return _Table(tables[0], columns, limit)
    if place.is_file() and place.suffix.lower() in TABLE_SUFFIXES:
        if expressions is not None:
            raise ValueError(
                f"--phrases and the table {data} exclude each other; name its folder to ask them of every image."
            )
        return _Table(place, columns, limit)
    if place.is_file() or "*" in data:
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(place.suffix.lower())
        if kind is None:
            raise ValueError(f"{data} is no table ({', '.join(TABLE_SUFFIXES)}), no .parquet and no .tar file.")
        files = [str(path) for path in sorted(place.parent.glob(place.name))]
        if not files:
            raise FileNotFoundError(f"No file matches {data}.")
        builder = datasets.load_dataset_builder(kind, data_files={"train": files})
        return _Streamed(builder, place.parent, expressions, columns, None, limit)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data) or place.parent.is_dir():
        raise FileNotFoundError(
            f"{data} is no folder and no file here, and no id of a data set on the Hub, owner/name."
        )
    try:
        builder = datasets.load_dataset_builder(data, subset)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{data} is no folder here and cannot be had from the Hub: {error}") from error
    return _Streamed(builder, None, expressions, columns, split, limit)


class _ImageFolder(AskedImages):
    """Every image file of a folder and of the folders in it, in the order of their names."""

    def __init__(self, folder: Path, expressions: Sequence[str], limit: int | None):
        names: list[bytes] = []  # as bytes: a file's name need not be UTF-8
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            inside = Path(place).relative_to(folder)
            names += [
                os.fsencode((inside / name).as_posix())
                for name in files
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
            ]
        if not names:
            raise ValueError(f"The folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        self.folder, self.expressions = folder, list(expressions)
        names.sort()
        self.names = pa.array(names[:limit])  # a tenth of what the list takes
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.as_py() + b"\n")
        super().__init__({"images": len(self.names), "names": digest.hexdigest()}, shards=1)

    def count(self) -> int:
        return len(self.names)

    def read(self, shard: int, wanted: Callable[[int], bool]) -> Iterator[AskedImage | None]:
        for row in range(len(self.names)):
            if not wanted(row):
                yield None
                continue
            name = self.names[row].as_py()
            image = {"path": str(self.folder / os.fsdecode(name)), "bytes": None}
            yield AskedImage(name.decode("utf-8", "backslashreplace"), image, self.expressions)


class _Table(AskedImages):
    """A table with a row per expression, or per image with a list of them; files of images are named from its folder on."""

    def __init__(self, path: Path, columns: Columns, limit: int | None):
        options: dict[str, Any] = {}
        if path.suffix.lower() != ".jsonl":
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file, delimiter=separator), [])
            # all is text: 007 stays 007, and the phrase "none" is no missing value
            features = datasets.Features({name: datasets.Value("string") for name in header})
            options = {"sep": separator, "encoding": "utf-8-sig", "features": features, "na_filter": False}
        try:
            kind = "csv" if options else "json"
            self.table = datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            reason = "it has no rows" if "corresponds to no data" in str(error) else error.__cause__ or error
            raise ValueError(f"The table {path} cannot be read: {reason}") from error
        names = self.table.column_names
        image = find_column("image", columns.image, IMAGE_COLUMNS, names, str(path))
        self.text = find_column("phrases", columns.text, TEXT_COLUMNS, names, str(path))
        if {image, self.text} - set(names):
            raise ValueError(
                f"{path} has no column {({image, self.text} - set(names)).pop()!r}; it has {', '.join(names)}."
            )
        self.key = columns.key and find_column("key", columns.key, (), names, str(path))
        # rows about one image are brought together; images keep the order of their first row
        encoded = pc.dictionary_encode(self.table.data.column(image), null_encoding="encode").combine_chunks()
        self.files, codes = encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False)
        self.order = np.argsort(codes, kind="stable")
        self.starts = np.append(np.flatnonzero(np.diff(codes[self.order], prepend=-1)), len(codes))
        self.folder = path.parent
        self.length = min(len(self.files), limit or len(self.files))
        super().__init__({"table": sha256_of(path), "images": self.length}, shards=1)

    def count(self) -> int:
        return self.length

    def read(self, shard: int, wanted: Callable[[int], bool]) -> Iterator[AskedImage | None]:
        for row in range(self.length):
            if not wanted(row):
                yield None
                continue
            rows = self.table[self.order[self.starts[row] : self.starts[row + 1]].tolist()]
            name = self.files[row].as_py()
            image = {"path": str(self.folder / name), "bytes": None} if name else None
            key = (name or "") if self.key is None else str(rows[self.key][0])
            yield AskedImage(key, image, [expression for value in rows[self.text] for expression in texts_of(value)])


class _RowReader:
    """Turns rows with columns of `features` into `AskedImage`s; `needed` are the columns that it looks at."""

    def __init__(
        self,
        features: Mapping[str, Any],
        expressions: Sequence[str] | None,
        columns: Columns,
        folder: Path | None,
        name: str,
    ):
        typed = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        names = list(features)
        self.folder, self.expressions = folder, expressions
        self.image = find_column("image", columns.image, (*typed[:1], *IMAGE_COLUMNS), names, name)
        self.text = expressions is None and find_column("phrases", columns.text, TEXT_COLUMNS, names, name)
        self.key = columns.key and find_column("key", columns.key, (), names, name)
        self.key = self.key or next((key for key in KEY_COLUMNS if key in names and key != self.image), None)
        found = (_root(column, names) for column in (self.image, self.text, self.key) if column)
        self.needed = list(dict.fromkeys(found))

    def __call__(self, row: dict[str, Any], number: str) -> AskedImage:
        """
        Args:
            row: The row.
            number: Its image's key where the row has no other.
        """
        image = as_image(field_of(row, self.image), self.folder)
        key = field_of(row, self.key) if self.key else (image or {}).get("path")
        if self.expressions is not None:
            texts = list(self.expressions)
        elif self.text == "txt" or self.text.endswith(".txt"):  # a text file in a tar: one phrase on a line
            texts = [line for line in str(field_of(row, self.text) or "").splitlines() if line.strip()]
        else:
            texts = texts_of(field_of(row, self.text))
        return AskedImage(number if key is None else str(key), image, texts)


class _Saved(AskedImages):
    """A folder that `save_to_disk` of `datasets` wrote."""

    def __init__(
        self,
        folder: Path,
        expressions: Sequence[str] | None,
        columns: Columns,
        split: str | None,
        limit: int | None,
    ):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_find_split(list(saved), split, str(folder))]
        self.read_row = _RowReader(saved.features, expressions, columns, folder, str(folder))
        self.rows = without_decoding(saved.select_columns(self.read_row.needed))
        self.length = min(len(saved), limit or len(saved))
        super().__init__({"fingerprint": saved._fingerprint, "images": self.length}, shards=1)

    def count(self) -> int:
        return self.length

    def read(self, shard: int, wanted: Callable[[int], bool]) -> Iterator[AskedImage | None]:
        for row in range(self.length):
            yield self.read_row(self.rows[row], f"{row}") if wanted(row) else None


class _Streamed(AskedImages):
    """Files that are read from their beginning to their end, each a shard; of the Hub where there is no folder."""

    def __init__(
        self,
        builder: datasets.DatasetBuilder,
        folder: Path | None,
        expressions: Sequence[str] | None,
        columns: Columns,
        split: str | None,
        limit: int | None,
    ):
        name = str(folder) if folder else builder.repo_id or builder.dataset_name
        data_files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
        split = _find_split(list(data_files), split, name)
        files = data_files[split]
        stream = builder.as_streaming_dataset(split=split)
        features = stream.features or dict.fromkeys(next(iter(stream.take(1)), {}))
        self.read_row = _RowReader(features, expressions, columns, folder, name)
        self.stream = without_decoding(stream.select_columns(self.read_row.needed))
        self.limit = limit
        if limit is not None:
            self.stream = self.stream.take(limit)
        if folder is None:
            infos = builder.info.splits or {}
            self.count_known = infos[split].num_examples if split in infos else None
            self.files = []
        else:
            self.count_known, self.files = None, files
            files = [f"{os.path.relpath(file, folder)} {os.path.getsize(file)}" for file in files]
        # names of files on the Hub hold their revision
        identity = {"split": split, "files": hashlib.sha256("\n".join(files).encode()).hexdigest()}
        super().__init__(identity, shards=1 if limit is not None else self.stream.num_shards)

    def count(self) -> int | None:
        counts = [_count_rows(file) for file in self.files] or [self.count_known]
        if None in counts:
            return None
        return sum(counts) if self.limit is None else min(sum(counts), self.limit)

    def read(self, shard: int, wanted: Callable[[int], bool]) -> Iterator[AskedImage | None]:
        rows = self.stream if self.shards == 1 else self.stream.shard(self.shards, shard)
        row = 0
        # `iter`, since plain iteration divides the rows among the workers that read them, which the caller does
        for batch in rows.iter(batch_size=16):
            for values in zip(*batch.values(), strict=True):
                number = f"{shard}:{row}"
                yield self.read_row(dict(zip(batch, values, strict=True)), number) if wanted(row) else None
                row += 1


def _count_rows(file: str) -> int | None:
    """Rows of a Parquet file or samples of a tar, from their heads; `None` of other files."""
    if file.endswith(".parquet"):
        return pq.read_metadata(file).num_rows
    if file.endswith(".tar"):
        with tarfile.open(file) as archive:
            keys = (_TAR_MEMBER.fullmatch(member.name) for member in archive if member.isreg())
            return sum(1 for _ in itertools.groupby(key[1] for key in keys if key))
    return None


def find_column(what: str, given: str | None, known: Sequence[str], names: Sequence[str], data: str) -> str:
    """The name of a column: the given one, or the first of the known ones that is there.

    Args:
        what: What the column holds: "image", "phrases", "key" or "mask".
        given: The name that was asked for.
        known: Names that it is found by.
        names: Of the columns that are there.
        data: What messages call the data.

    Raises:
        ValueError: Where there is no such column.
    """
    if given is not None and _root(given, names) in names:
        return given
    found = None if given is not None else next((name for name in known if name in names), None)
    if found is None:
        asked = f"no column {given!r}" if given is not None else f"no column that is known to hold the {what}"
        option = {"phrases": "--text_column"}.get(what, f"--{what}_column")
        raise ValueError(f"{data} has {asked}; it has {', '.join(names)}. Name one with {option}.")
    return found


def _root(column: str, names: Sequence[str]) -> str:
    """The column that "column.field" is a field of; a tar's columns have points in their own names, too."""
    return column if column in names else column.partition(".")[0]


def _find_split(names: list[str], split: str | None, data: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        said = "no split is named" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{data} has the splits {', '.join(names)}, but {said}: use --split.")
    return split


def without_decoding(rows: Any) -> Any:
    """The rows with images as they are stored: what does not decode is told of one image, not of all."""
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def field_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or, of "column.field", of a field in it."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def texts_of(value: Any) -> list[str]:
    """The expressions in a cell: a text, a number, a list of them; none in an empty cell."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, np.ndarray)):
        return [text for item in value for text in texts_of(item)]
    return [str(value)]


def as_image(value: Any, folder: Path | None) -> dict[str, Any] | None:
    """What a cell says of an image, as {"path", "bytes"}; paths start from the folder of the data."""
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    if not isinstance(value, Mapping):
        return None
    path, data = value.get("path"), value.get("bytes")
    if data is None and path and folder is not None and "://" not in path:
        path = str(folder / path)
    return {"path": path, "bytes": data}


def with_bytes(image: dict[str, Any]) -> dict[str, Any]:
    """An image as `open_image` takes it: one at an address, such as a file of a data set on the Hub, is fetched.

    Raises:
        ValueError: Where that fails.
    """
    if image["bytes"] is not None or "://" not in (image["path"] or ""):
        return image
    try:
        with fsspec.open(image["path"], "rb") as file:
            return image | {"bytes": file.read()}
    except Exception as error:  # file systems raise errors of their own
        raise ValueError(f"the image {image['path']} cannot be fetched: {error}") from error


__all__ = [
    "FOUND_BY_NAME",
    "SAVED_FILES",
    "AskedImage",
    "AskedImages",
    "Columns",
    "as_image",
    "field_of",
    "find_column",
    "open_asked_images",
    "texts_of",
    "with_bytes",
    "without_decoding",
]
