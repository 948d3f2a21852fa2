"""Folders of labelme's JSON files (ours; the files are as labelme 4 and 5 write them)."""

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.sources.agreement import draw_checked
from training.sources.annotations import (
    AnnotatedImage,
    Annotation,
    Findings,
    Rle,
    check_inside,
    ellipse,
    rectangle,
    refuse_twice,
    without_images,
)
from training.sources.asked_images import IMAGE_SUFFIXES
from training.sources.images import find_image, open_image
from training.sources.masks import encode_mask
from training.sources.refer_records import is_id, is_number, is_text, load_json, shown

SHAPES = ("polygon", "rectangle", "circle", "mask")


def read_labelme(
    folder: Path, findings: Findings, phrase_field: str | None = None, image_dir: Path | None = None
) -> Iterator[AnnotatedImage]:
    """The images of labelme's files in a folder and in those below it, in the order of their names, then images without a file.

    Args:
        folder: Of the JSON files.
        findings: Gets the shapes that cannot be used.
        phrase_field: "label" or "description". None: the description, and the label where it is blank.
        image_dir: Folder that `imagePath` starts from. None: that of each JSON file.

    Raises:
        ValueError: Where there are none, one is no file of labelme's, or two are about one image.
    """
    files = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if not files:
        raise ValueError(f"The folder {folder} holds no JSON file of labelme's.")
    used: set[Path] = set()
    seen: dict[str, str] = {}
    for path in files:
        content = load_json(path)
        if not isinstance(content, Mapping) or not isinstance(content.get("shapes"), list):
            raise ValueError(f"{path} is no file of labelme's: it must hold a list of shapes.")
        try:
            image = _image(path, content, image_dir)
        except ValueError as error:
            findings.problems.append(f"{path}: {error}")
            continue
        if image["bytes"] is None:
            used.add(Path(os.path.abspath(image["path"])))
            refuse_twice(seen, os.path.abspath(image["path"]), str(path), "it is about")
        height, width = content.get("imageHeight"), content.get("imageWidth")
        size = (height, width) if is_id(height) and is_id(width) else None
        annotations = []
        for number, shape in enumerate(content["shapes"], start=1):
            place = f"{path}, shape {number}"
            try:
                annotations.append(_annotation(place, shape, phrase_field))
            except ValueError as error:
                findings.problems.append(f"{place}: {error}")
        yield AnnotatedImage(str(path), image, annotations, size)
    there = sorted(path for path in (image_dir or folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    yield from without_images([Path(os.path.abspath(path)) for path in there], used)


def _image(path: Path, content: Mapping[str, Any], image_dir: Path | None) -> dict[str, Any]:
    """The image's file, or the copy of it in the JSON file."""
    name, data = content.get("imagePath"), content.get("imageData")
    if not is_text(name):
        raise ValueError(f"its imagePath must be the name of a file, got {shown(name)}")
    try:
        return {"path": str(find_image(name, [image_dir or path.parent])), "bytes": None}
    except ValueError:
        if not isinstance(data, str):
            raise
    return {"path": name.replace("\\", "/").rpartition("/")[2], "bytes": _decoded(data, "imageData")}


def _decoded(data: Any, what: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"its {what} is no base64 text: {error}") from error


def _annotation(place: str, shape: Any, phrase_field: str | None) -> Annotation:
    if not isinstance(shape, Mapping):
        raise ValueError(f"a shape has fields, got {shown(shape)}")
    label, description = shape.get("label"), shape.get("description")
    chosen = shape.get(phrase_field) if phrase_field else description if is_text(description) else label
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    is_points = isinstance(points, list) and all(
        isinstance(point, (list, tuple)) and len(point) == 2 for point in points
    )
    if not is_points or not all(is_number(value) for point in points for value in point):
        raise ValueError(f"its points must be [x, y] in pixels each, got {shown(points)}")
    if kind not in SHAPES:
        raise ValueError(f"its shape_type {shown(kind)} encloses nothing; {', '.join(SHAPES)} are accepted")
    if kind != "polygon" and len(points) != (needed := 4 if kind == "rectangle" and len(points) == 4 else 2):
        raise ValueError(f"a {kind} has {needed} points, got {len(points)}")
    if kind == "mask":
        draw = _PastedMask(_decoded(shape.get("mask"), "mask"), points)
    else:
        draw = partial(draw_checked, [_polygon(kind, points)])
    return Annotation(
        place=place,
        phrases=[chosen],
        draw=draw,
        category=label if isinstance(label, str) else "",
        group=None if shape.get("group_id") is None else (label, str(shape["group_id"])),
    )


def _polygon(kind: str, points: list[list[float]]) -> list[float]:
    if kind == "rectangle" and len(points) == 2:
        xs, ys = zip(*points, strict=True)
        return rectangle(min(xs), min(ys), max(xs), max(ys))
    if kind == "circle":  # its centre and a point on it
        (x, y), (on_x, on_y) = points
        radius = float(np.hypot(on_x - x, on_y - y))
        return ellipse(x, y, radius, radius)
    return [float(value) for point in points for value in point]


class _PastedMask:
    """`Annotation.draw` of a mask that is cut out: a PNG file and the corners where it lies in the image, both of them in it."""

    def __init__(self, data: bytes, points: list[list[float]]):
        self.data, self.left, self.top = data, *(round(min(point[axis] for point in points)) for axis in (0, 1))

    def __call__(self, height: int, width: int) -> tuple[Rle, bool]:
        try:
            cut = np.asarray(open_image({"path": "in mask", "bytes": self.data}).convert("L")) > 0
        except ValueError as error:
            raise ValueError(f"is malformed: {error}") from error
        high, wide = cut.shape
        check_inside("mask", self.left, self.top, wide, high, height, width)
        mask = np.zeros((height, width), dtype=bool)
        mask[self.top : self.top + high, self.left : self.left + wide] = cut
        return encode_mask(mask), False


__all__ = ["read_labelme"]
