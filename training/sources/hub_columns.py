"""Data of `datasets`, in a folder or on the Hub, with columns of images, masks and texts under any names (ours)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from training.sources.agreement import draw_checked
from training.sources.annotations import AnnotatedImage, Annotation, Findings, Rle
from training.sources.asked_images import (
    IMAGE_COLUMNS,
    SAVED_FILES,
    TEXT_COLUMNS,
    as_image,
    field_of,
    find_column,
    texts_of,
    without_decoding,
)
from training.sources.mask_files import MaskFile
from training.sources.mask_folder import MASK_COLUMNS
from training.sources.masks import encode_mask
from training.sources.refer_records import shown
from training.support.hub_ids import folder_or_id


@dataclass(frozen=True)
class HubColumns:
    """Names of the columns, "column.field" for a field in one. One that is `None` is found by its usual names.

    Attributes:
        image: The image.
        mask: The mask as an image file, a run-length code, polygons or a table of numbers; or a list of them, one for each text.
        text: The phrase, or a list of phrases.
        category: Name of the object's category, where there is such a column.
    """

    image: str | None = None
    mask: str | None = None
    text: str | None = None
    category: str | None = None


def read_hub(
    source: str, findings: Findings, columns: HubColumns, subset: str | None = None, cut_grey: bool = False
) -> Iterator[AnnotatedImage]:
    """The rows of all splits, in their order, read as they are needed.

    Args:
        source: A folder, or an id on the Hub.
        findings: Gets the rows that cannot be used.
        columns: Names of the columns.
        subset: Configuration of a data set on the Hub, where it has several.
        cut_grey: Cut grey masks at half, instead of refusing them.

    Raises:
        FileNotFoundError: Where there are no such data.
        ValueError: Where a column is missing.
    """
    source = folder_or_id(source)
    folder = Path(source) if Path(source).is_dir() else None
    splits = _open_splits(source, folder, subset)
    for split, rows in splits.items():
        features = rows.features or dict.fromkeys(next(iter(rows.take(1)), {}))
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        names = list(features)
        # images and masks are both images to `datasets`: a mask is not taken for the image
        known = (*IMAGE_COLUMNS, *(name for name in typed if name not in MASK_COLUMNS))
        image_column = find_column("image", columns.image, known, names, source)
        mask_column = find_column("mask", columns.mask, MASK_COLUMNS, names, source)
        text_column = find_column("phrases", columns.text, TEXT_COLUMNS, names, source)
        for number, row in enumerate(without_decoding(rows)):
            place = f"{source}, {split}, row {number}"
            image = as_image(field_of(row, image_column), folder)
            if image is None:
                findings.problems.append(f"{place}: it has no image in {image_column!r}")
                continue
            category = field_of(row, columns.category) if columns.category else None
            texts = texts_of(field_of(row, text_column))
            try:
                pairs = _paired(field_of(row, mask_column), texts, folder, cut_grey)
            except ValueError as error:
                findings.problems.append(f"{place}: {error}")
                continue
            annotations = [Annotation(place, phrases, draw, str(category or "")) for phrases, draw in pairs]
            yield AnnotatedImage(place, image, annotations, split=split if len(splits) > 1 else None)


def _open_splits(source: str, folder: Path | None, subset: str | None) -> Mapping[str, Any]:
    if folder is not None and any((folder / name).is_file() for name in SAVED_FILES):
        saved = datasets.load_from_disk(source)
        return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    try:
        return datasets.load_dataset(source, subset, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, datasets.data_files.EmptyDatasetError, ConnectionError) as error:
        raise FileNotFoundError(f"{source} gives no data set: {error}") from error


def _paired(value: Any, texts: list[str], folder: Path | None, cut_grey: bool) -> list[tuple[list[str], Any]]:
    """The texts of each mask, and how it is drawn."""
    is_list = isinstance(value, (list, tuple)) and value and isinstance(value[0], (Mapping, bytes, str))
    if not is_list:
        return [(texts, _drawn(value, folder, cut_grey))]
    if len(value) != len(texts):
        raise ValueError(f"it has {len(value)} masks and {len(texts)} texts; a list of masks has a text for each")
    return [([text], _drawn(each, folder, cut_grey)) for text, each in zip(texts, value, strict=True)]


def _drawn(value: Any, folder: Path | None, cut_grey: bool) -> Any:
    """`Annotation.draw` of the mask in a cell."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its mask is not JSON: {error}") from error
    if isinstance(value, Mapping) and "counts" in value:
        return partial(draw_checked, value)
    image = as_image(value, folder)
    if image is not None:
        return MaskFile(image, None, cut_grey)
    if isinstance(value, (list, tuple, np.ndarray)):
        return partial(_draw_numbers, value)
    raise ValueError(
        f"its mask must be an image file, a run-length code, polygons or a table of numbers, got {shown(value)}"
    )


def _draw_numbers(value: Any, height: int, width: int) -> tuple[Rle, bool]:
    """A table of numbers with as many rows as the image is high, or a list of polygons."""
    try:
        table = np.asarray(value)
    except ValueError:  # lines of several lengths: polygons
        table = np.empty(0)
    if (
        table.ndim == 2
        and table.dtype.kind in "bui"
        and (table.shape in ((height, width), (width, height)) or table.max() <= 1)
    ):
        try:
            return encode_mask(table), False
        except ValueError as error:
            raise ValueError(f"has no mask: {error}") from error
    return draw_checked(value if isinstance(value, list) else table.tolist(), height, width)


__all__ = ["HubColumns", "read_hub"]
