"""Images, masks as image files, and a table (CSV, TSV, JSON lines) with a phrase in each line (ours)."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.sources.annotations import AnnotatedImage, Annotation, Findings, Rle, without_images
from training.sources.asked_images import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_COLUMNS,
    find_column,
    texts_of,
)
from training.sources.images import find_image
from training.sources.mask_files import MaskFile
from training.sources.masks import encode_mask
from training.sources.refer_records import shown

MASK_COLUMNS = ("mask", "mask_file", "mask_path", "label", "segmentation")
YES, NO = ("1", "true", "yes"), ("", "0", "false", "no")  # in the column no_target


@dataclass(frozen=True)
class TableColumns:
    """Names of the columns. An image, a phrase or a mask that is `None` is found by its usual names.

    Attributes:
        image: File of the image.
        mask: File of the mask. Without such a column the mask has the image's name.
        text: The phrase.
        thing: Number or colour of the object in its mask, where there is such a column.
        split: Split of the image, where there is such a column.
    """

    image: str | None = None
    mask: str | None = None
    text: str | None = None
    thing: str = "object"
    split: str = "split"


def read_mask_folder(
    data: Path,
    findings: Findings,
    columns: TableColumns,
    image_dir: Path | None = None,
    mask_dir: Path | None = None,
    cut_grey: bool = False,
) -> Iterator[AnnotatedImage]:
    """The images of a table, in its order, then images without a line.

    Args:
        data: The table, or a folder with one table.
        findings: Gets the lines that cannot be used.
        columns: Names of the columns. A column `category` and a column `no_target` (1 or true where the phrase means nothing in the
            image; the mask is then empty) are read where they are there.
        image_dir: Folder that names of images start from. None: that of the table, or the folder images in it.
        mask_dir: Folder of the masks. None: that of the table, or the folder masks in it.
        cut_grey: Cut grey masks at half, instead of refusing them.

    Raises:
        ValueError: Where there is no such table or column, or the table cannot be read.
    """
    table = _find_table(data)
    image_dirs = [image_dir] if image_dir else [table.parent, table.parent / "images"]
    mask_dirs = [mask_dir] if mask_dir else [table.parent, table.parent / "masks"]
    names, lines = _read_table(table, findings)
    image_column = find_column("image", columns.image, IMAGE_COLUMNS, names, str(table))
    text_column = find_column("phrases", columns.text, TEXT_COLUMNS, names, str(table))
    mask_column = columns.mask or next((name for name in MASK_COLUMNS if name in names), None)
    if mask_column is not None:
        mask_column = find_column("mask", mask_column, (), names, str(table))
    images: dict[Path, list[tuple[int, Mapping[str, Any], Annotation]]] = {}
    owners: dict[Path, Path] = {}
    given_names: dict[Path, str] = {}
    for line, cells in lines:
        place = f"{table}, line {line}"
        try:
            image = find_image(given := _text(cells.get(image_column)), image_dirs)
            if (other := given_names.setdefault(image, given)) != given:
                raise ValueError(f"its image {given} is the file {image}, and so is {other}")
            no_target, name = _no_target(cells), None if mask_column is None else _text(cells.get(mask_column))
            mask = None if no_target and not name else _find_mask(image, name, mask_dirs)
            if mask is not None and (owner := owners.setdefault(mask, image)) != image:
                raise ValueError(f"its mask {mask} is also that of the image {owner}")
            thing = _text(cells.get(columns.thing)) or None
            annotation = Annotation(
                place=place,
                phrases=texts_of(cells.get(text_column)),
                draw=_draw_nothing if mask is None else MaskFile({"path": str(mask), "bytes": None}, thing, cut_grey),
                category=_text(cells.get("category")),
                no_target=no_target,
            )
        except ValueError as error:
            findings.problems.append(f"{place}: {error}")
            continue
        images.setdefault(image, []).append((line, cells, annotation))
    for image, entries in images.items():
        splits = {_text(cells.get(columns.split)): line for line, cells, _ in entries}
        if len(splits) > 1:
            (one, first), (other, second) = list(splits.items())[:2]
            findings.problems.append(
                f"{table}, line {second}: the image {image} has the split {other!r}, in line {first} it has {one!r}"
            )
            continue
        place, (split,) = f"{table}, line {entries[0][0]}", splits
        annotations = [annotation for _, _, annotation in entries]
        yield AnnotatedImage(place, {"path": str(image), "bytes": None}, annotations, split=split or None)
    folders = {image.parent for image in images} - {mask.parent for mask in owners}
    yield from without_images(_image_files(folders), images)
    for mask in _image_files({mask.parent for mask in owners} - {image.parent for image in images}):
        if mask not in owners:
            findings.count("masks are named in no line", mask.name)


def _find_table(data: Path) -> Path:
    if data.is_dir():
        tables = sorted(path for path in data.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "none"
            raise ValueError(
                f"The folder {data} needs one table of phrases ({', '.join(TABLE_SUFFIXES)}); it has {found}."
            )
        return tables[0]
    if data.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{data} is no table of phrases ({', '.join(TABLE_SUFFIXES)}).")
    return data


def _read_table(table: Path, findings: Findings) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
    """The names of the columns, and the lines with their numbers, counted from 1. A line with other cells is a finding."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{table} is no UTF-8 text: save it as UTF-8 ({error.reason} at byte {error.start})."
        ) from error
    if table.suffix.lower() == ".jsonl":
        return _read_json_lines(table, text)
    header = text.partition("\n")[0]
    separator = "\t" if table.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True)
    lines: list[tuple[int, Mapping[str, Any]]] = []
    names: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            number, before = before + 1, reader.line_num
            if names is None:
                names = [name.strip() for name in cells]
                if len(set(names)) != len(names):
                    raise ValueError(f"{table}, line {number}: two columns have one name, {', '.join(names)}.")
            elif not any(cell.strip() for cell in cells):
                continue
            elif len(cells) != len(names):
                findings.problems.append(
                    f"{table}, line {number}: it has {len(cells)} cells, the first line {len(names)}; a phrase with {separator!r} "
                    "in it stands in double quotes"
                )
            else:
                lines.append((number, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{table}, line {reader.line_num}: {error}.") from error
    if names is None:
        raise ValueError(f"{table} is empty.")
    return names, lines


def _read_json_lines(table: Path, text: str) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{table}, line {number} is not JSON: {error}") from error
            if not isinstance(cells, dict):
                raise ValueError(f"{table}, line {number} must be names with values, got {shown(cells)}.")
            lines.append((number, cells))
    return list(dict.fromkeys(name for _, cells in lines for name in cells)), lines


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _no_target(cells: Mapping[str, Any]) -> bool:
    value = _text(cells.get("no_target")).lower()
    if value not in (*YES, *NO):
        raise ValueError(
            f"its no_target must be {', '.join(YES)} or {', '.join(NO[1:])}, got {shown(cells['no_target'])}"
        )
    return value in YES


def _find_mask(image: Path, name: str | None, folders: Sequence[Path]) -> Path:
    """The file of a mask: of this name or, without a column of names, of the image's."""
    if name == "":
        raise ValueError("it names no mask; a phrase that means nothing in the image has 1 in a column no_target")
    if name is not None:
        return find_image(name, folders, "mask")
    for folder in folders:
        for suffix in sorted(IMAGE_SUFFIXES):
            file = folder / f"{image.stem}{suffix}"
            if file.is_file() and file != image:
                return file
    raise ValueError(f"the image {image} has no mask: no file {image.stem}.png is in {', '.join(map(str, folders))}")


def _draw_nothing(height: int, width: int) -> tuple[Rle, bool]:
    return encode_mask(np.zeros((height, width), dtype=bool)), False


def _image_files(folders: set[Path]) -> list[Path]:
    return [
        path for folder in sorted(folders) for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES
    ]


__all__ = ["MASK_COLUMNS", "TableColumns", "read_mask_folder"]
