"""What readers of people's own annotations give: images with their annotations, each with its place for messages (ours).

A reader is a function that yields `AnnotatedImage`s, such as `read_coco`. `training.sources.own_rows` checks them and makes rows.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.sources.asked_images import TEXT_COLUMNS

Rle = dict[str, Any]
DEFAULT_TEMPLATE = "{category}"


@dataclass(frozen=True)
class Annotation:
    """One shape or mask with what is said about it, not yet checked.

    Attributes:
        place: Where it stands, as messages name it: "instances.json, annotation 12".
        phrases: What is said about it.
        draw: From the image's height and width in pixels to the mask's code and whether it agrees only roughly with the box and the
            area beside it. A mask that is read from a file has the size of the file. A `ValueError` is the end of a sentence that
            begins with the place.
        category: "" where there is none.
        ann_id: A number of its own in its file, where it has one.
        group: Annotations of one image with the same group are one object. None: an object of its own.
        no_target: Whether its phrases mean nothing in the image.
    """

    place: str
    phrases: Sequence[Any]
    draw: Callable[[int, int], tuple[Rle, bool]]
    category: str = ""
    ann_id: int | None = None
    group: Any = None
    no_target: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its annotations.

    Attributes:
        place: Where it is named, for messages.
        image: {"path": str or None, "bytes": bytes or None} of the encoded image. The path's end is the name that is kept.
        annotations: None of them where nothing is annotated.
        size: Height and width in pixels that the annotations state; None where they state none.
        split: That it belongs to, as the data call it; None where they call none.
    """

    place: str
    image: Mapping[str, Any]
    annotations: Sequence[Annotation]
    size: tuple[int, int] | None = None
    split: str | None = None


@dataclass
class Findings:
    """What cannot be used, and what is worth a note, in the order it was found.

    Attributes:
        problems: A sentence about each annotation or image that cannot be used.
        counts: Names of what was counted, by a sentence's end such as "images have no annotation".
    """

    problems: list[str] = field(default_factory=list)
    counts: dict[str, list[str]] = field(default_factory=dict)

    def count(self, what: str, name: str) -> None:
        """Note something that is left out or worth a look."""
        self.counts.setdefault(what, []).append(name)

    def notes(self) -> list[str]:
        """A sentence about everything that was counted."""
        return [f"{len(names)} {what}; the first is {names[0]}." for what, names in self.counts.items()]


class PhraseMaker:
    """Phrases of annotations: a field of theirs, or a template with their category and attributes."""

    def __init__(self, phrase_field: str | None = None, template: str | None = None):
        """
        Args:
            phrase_field: Field or attribute that holds the phrase, or a list of them; "a.b" is a field in a field.
            template: Text with names in braces, such as "the {color} {category}".

        Raises:
            ValueError: Where both are given, or the template has no name in braces.
        """
        if phrase_field is not None and template is not None:
            raise ValueError(
                "--phrase_field and --template exclude each other: a phrase stands in a field, or is made."
            )
        self.field, self.is_default, self.template = phrase_field, template is None, template or DEFAULT_TEMPLATE
        self._wanted = set(re.findall(r"\{([^{}]*)\}", self.template))
        if not self._wanted:
            raise ValueError(f"--template {self.template!r} names nothing in braces, such as {DEFAULT_TEMPLATE}.")
        self._met: dict[str, None] = {}

    def __call__(self, category: str, fields: Mapping[str, Any]) -> list[Any]:
        """The phrases of an annotation; none where its field is absent or empty.

        Args:
            category: Name of its category, or "".
            fields: Its fields and attributes by their names.
        """
        self._met.update(dict.fromkeys(fields))
        if self.field is None:
            known = {"category": category, **fields}
            made = re.sub(r"\{([^{}]*)\}", lambda name: _word(name[1], known.get(name[1])), self.template)
            return [" ".join(made.split())] if known["category"] or self.template != DEFAULT_TEMPLATE else []
        value: Any = fields
        if self.field in fields:
            value = fields[self.field]
        else:
            for name in self.field.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
        return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

    def check_names(self, name: str) -> None:
        """After the last annotation: refuse names that no annotation has, and phrases that nobody named.

        Raises:
            ValueError: Naming what the annotations have.
        """
        met = ", ".join(self._met) or "none"
        if self.field is None and self.is_default:
            likely = [column for column in TEXT_COLUMNS if column in self._met]
            if likely:
                raise ValueError(
                    f"{name}: its annotations have the field {likely[0]!r}: use it with --phrase_field {likely[0]}, or make "
                    f"phrases of the categories with --template '{DEFAULT_TEMPLATE}'."
                )
        wanted = self._wanted - {"category"} if self.field is None else {self.field, self.field.partition(".")[0]}
        absent = sorted(wanted - set(self._met))
        if self._met and (absent if self.field is None else len(absent) == len(wanted)):
            raise ValueError(f"{name}: no annotation has the field or attribute {absent[0]!r}; they have {met}.")


def _word(name: str, value: Any) -> str:
    """What stands for a name in a template: a text as it is, the name itself for true, nothing for false or an empty value."""
    if isinstance(value, bool) or value in ("true", "false"):
        value = name if value in (True, "true") else ""
    return "" if value is None else str(value).replace("_", " ")


def rectangle(left: float, top: float, right: float, bottom: float, turn: float = 0.0) -> list[float]:
    """A rectangle as a polygon [x0, y0, x1, ...], turned clockwise around its centre by so many degrees."""
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
    return _turned(corners, ((left + right) / 2, (top + bottom) / 2), turn)


def ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0) -> list[float]:
    """An ellipse around (x, y) with these half axes as a polygon of 128 points, turned clockwise by so many degrees."""
    angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    return _turned(np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1), (x, y), turn)


def _turned(points: np.ndarray, centre: tuple[float, float], turn: float) -> list[float]:
    angle = np.deg2rad(turn)  # y points down: this turn is clockwise
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return ((points - centre) @ matrix + centre).ravel().tolist()


def check_inside(what: str, left: int, top: int, wide: int, high: int, height: int, width: int) -> None:
    """`ValueError` where a rectangle of `wide` × `high` pixels does not lie in an image; the end of a sentence about it."""
    if min(left, top) < 0 or min(wide, high) < 1 or left + wide > width or top + high > height:
        raise ValueError(
            f"is malformed: its {what} of {wide}×{high} pixels at {left}, {top} is not in its image of {width}×{height}"
        )


def refuse_twice(seen: dict[str, str], key: str, place: str, what: str) -> None:
    """`ValueError` where a second place names the same thing; `seen` holds the first of each."""
    if (other := seen.setdefault(key, place)) != place:
        raise ValueError(f"{place}: {what} {key}, and so does {other}. Put them together, or remove one.")


def without_images(files: Iterable[Path], used: Collection[Path]) -> list[AnnotatedImage]:
    """Image files that no annotation names, as images without an annotation."""
    return [AnnotatedImage(file.name, {"path": str(file), "bytes": None}, []) for file in files if file not in used]


__all__ = [
    "AnnotatedImage",
    "Annotation",
    "Findings",
    "PhraseMaker",
    "check_inside",
    "ellipse",
    "rectangle",
    "refuse_twice",
    "without_images",
]
