"""CVAT's XML, its format "CVAT for images 1.1": polygons, boxes, ellipses and masks (ours).

The file is read in pieces by the standard library's expat. A document type, which alone can define entities, is refused: entities
that name each other grow without bound.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from training.sources.agreement import draw_checked
from training.sources.annotations import (
    AnnotatedImage,
    Annotation,
    Findings,
    PhraseMaker,
    Rle,
    check_inside,
    ellipse,
    rectangle,
    refuse_twice,
)
from training.sources.images import find_image
from training.sources.masks import MAX_COORDINATE, MAX_PIXELS, encode_mask
from training.sources.refer_records import shown

SHAPES = ("polygon", "box", "ellipse", "mask")
OTHERS = ("polyline", "points", "cuboid", "skeleton")  # which enclose nothing that is known
BLOCK = 1 << 16  # bytes that are read at once


@dataclass
class _Shape:
    kind: str
    line: int
    fields: dict[str, str]
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass
class _Image:
    line: int
    fields: dict[str, str]
    shapes: list[_Shape] = field(default_factory=list)


def read_cvat(
    path: Path, findings: Findings, phrases: PhraseMaker, image_dir: Path | None = None, split_field: str = "subset"
) -> Iterator[AnnotatedImage]:
    """The images of a CVAT file, in its order.

    Args:
        path: XML in CVAT's format "for images 1.1".
        findings: Gets the shapes that cannot be used.
        phrases: Makes a shape's phrases of its label and its attributes.
        image_dir: Folder that the images' names start from. None: the file's folder, or a folder images in it.
        split_field: Attribute of an image that names its split, where there is one. CVAT's "default" names none.

    Raises:
        ValueError: Where the file is something else, has a document type, or two images are one file.
    """
    folders = [image_dir] if image_dir else [path.parent, path.parent / "images"]
    seen: dict[str, str] = {}
    for image in _parse(path):
        place = f"{path}, line {image.line}"
        name = image.fields.get("name", "")
        try:
            file = find_image(name, folders)
            size = int(_number(image.fields, "height")), int(_number(image.fields, "width"))
        except ValueError as error:
            findings.problems.append(f"{place}: {error}")
            continue
        refuse_twice(seen, str(file), place, "it is about")
        annotations = []
        for shape in image.shapes:
            shape_place = f"{path}, line {shape.line}"
            try:
                annotations.append(_annotation(shape_place, shape, phrases))
            except ValueError as error:
                findings.problems.append(f"{shape_place}: {error}")
        split = image.fields.get(split_field) or None
        yield AnnotatedImage(
            place, {"path": str(file), "bytes": None}, annotations, size, None if split == "default" else split
        )
    phrases.check_names(str(path))


class _Parser:
    """Turns expat's events into `_Image`s; all of them of a finished element stand in `done`."""

    def __init__(self, path: Path):
        self.path, self.done = path, list[_Image]()
        self._image: _Image | None = None
        self._shape: _Shape | None = None
        self._attribute, self._text, self._depth = "", list[str](), 0
        self.expat = expat.ParserCreate()
        self.expat.StartDoctypeDeclHandler = self._refuse_doctype
        self.expat.StartElementHandler = self._start
        self.expat.EndElementHandler = self._end
        self.expat.CharacterDataHandler = self._text.append

    def _refuse_doctype(self, *_: Any) -> None:
        raise ValueError(
            f"{self.path}, line {self.expat.CurrentLineNumber}: a document type is refused; CVAT writes none."
        )

    def _start(self, name: str, fields: dict[str, str]) -> None:
        line = self.expat.CurrentLineNumber
        if self._depth == 0 and name != "annotations":
            raise ValueError(f"{self.path}, line {line}: CVAT's file begins with <annotations>, got <{name}>.")
        self._depth += 1
        self._text.clear()
        if name == "track" and self._depth == 2:
            raise ValueError(f'{self.path}, line {line}: this is "CVAT for video"; export it as "CVAT for images 1.1".')
        if name == "image" and self._depth == 2:
            self._image = _Image(line, fields)
        elif self._image is not None and self._depth == 3 and name in (*SHAPES, *OTHERS):
            self._shape = _Shape(name, line, fields)
            self._image.shapes.append(self._shape)
        elif self._shape is not None and name == "attribute" and self._depth == 4:
            self._attribute = fields.get("name", "")

    def _end(self, name: str) -> None:
        if self._shape is not None and name == "attribute" and self._depth == 4:
            self._shape.attributes[self._attribute] = "".join(self._text)
        elif self._depth == 3:
            self._shape = None
        elif self._depth == 2 and self._image is not None:
            self.done.append(self._image)
            self._image = None
        self._depth -= 1
        self._text.clear()


def _parse(path: Path) -> Iterator[_Image]:
    parser = _Parser(path)
    with path.open("rb") as file:
        try:
            while block := file.read(BLOCK):
                parser.expat.Parse(block, False)
                yield from parser.done
                parser.done.clear()
            parser.expat.Parse(b"", True)
        except expat.ExpatError as error:
            raise ValueError(f"{path} is not XML: {error}") from error
    yield from parser.done


def _annotation(place: str, shape: _Shape, phrases: PhraseMaker) -> Annotation:
    if shape.kind in OTHERS:
        raise ValueError(f"a {shape.kind} encloses nothing; {', '.join(SHAPES)} are accepted")
    label, group = shape.fields.get("label", ""), shape.fields.get("group_id")
    return Annotation(
        place=place,
        phrases=phrases(label, shape.attributes),
        draw=_CroppedMask(shape.fields) if shape.kind == "mask" else partial(draw_checked, [_polygon(shape)]),
        category=label,
        group=(label, group) if group and group != "0" else None,
    )


def _polygon(shape: _Shape) -> list[float]:
    fields = shape.fields
    turn = _number(fields, "rotation", 0.0)
    if shape.kind == "box":
        return rectangle(*(_number(fields, name) for name in ("xtl", "ytl", "xbr", "ybr")), turn)
    if shape.kind == "ellipse":
        return ellipse(*(_number(fields, name) for name in ("cx", "cy", "rx", "ry")), turn)
    points = [part.split(",") for part in fields.get("points", "").split(";")]
    try:
        return [float(value) for x, y in points for value in (x, y)]
    except ValueError as error:
        raise ValueError(f"its points must be x,y in pixels each, got {shown(fields.get('points'))}") from error


def _number(fields: Mapping[str, str], name: str, default: float | None = None) -> float:
    """A field as a number; `ValueError` naming it where it is none."""
    if name not in fields and default is not None:
        return default
    try:
        number = float(fields[name])
        if abs(number) <= MAX_COORDINATE:
            return number
    except (KeyError, ValueError):
        pass
    raise ValueError(f"its {name} must be a number, got {shown(fields.get(name))}")


class _CroppedMask:
    """`Annotation.draw` of CVAT's mask: runs row by row, zeros first, within a box of the image."""

    def __init__(self, fields: Mapping[str, str]):
        self.box = [int(_number(fields, name)) for name in ("left", "top", "width", "height")]
        try:
            self.runs = [int(run) for run in fields.get("rle", "").split(",")]
        except ValueError as error:
            raise ValueError(f"its rle must be whole numbers, got {shown(fields.get('rle'))}") from error

    def __call__(self, height: int, width: int) -> tuple[Rle, bool]:
        left, top, wide, high = self.box
        check_inside("box", *self.box, height, width)
        if min(self.runs) < 0 or sum(self.runs) != wide * high or wide * high > MAX_PIXELS:
            raise ValueError(
                f"is malformed: its runs must be >= 0 and fill its box of {wide}×{high} pixels, they add up to {sum(self.runs)}"
            )
        mask = np.zeros((height, width), dtype=bool)
        cut = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs).reshape(high, wide)
        mask[top : top + high, left : left + wide] = cut
        return encode_mask(mask), False


__all__ = ["read_cvat"]
