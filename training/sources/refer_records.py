"""The records of REFER's files, refs and instances: read without running code, and checked before they are used.

Every field that is used is checked here, so that no later step meets a value of another type.
"""

import copyreg
import io
import json
import pickle
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from training.sources.masks import MAX_COORDINATE, MAX_PIXELS

# The records of instances.json: "images", "annotations" and "categories", each by id.
Instances = dict[str, dict[int, dict[str, Any]]]

SHOWN = 60  # characters of a wrong value that a message shows

# Pickles


class _PlainUnpickler(pickle.Unpickler):
    """Without names to call, an unpickler builds plain containers, strings, bytes, numbers and None only."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object outside the file, persistent id {pid!r}")


def load_plain_pickle(path: str | PathLike[str]) -> Any:
    """Loads a pickle of plain containers, strings, bytes and numbers; nothing in it is ever called.

    Python 2's byte strings are read as UTF-8 or, when one in the file is not UTF-8, all of them as Latin-1.
    Python 3's bytes below protocol 3 and sets below protocol 4 are written by name and so refused. Raises
    FileNotFoundError, or pickle.UnpicklingError naming the file when it names a class or function (which),
    uses persistent ids or extension codes, is truncated, or is no pickle.
    """
    data = Path(path).read_bytes()
    # An extension code that this process has met before would be served from this cache, past find_class.
    copyreg.clear_extension_cache()
    for encoding in ("utf-8", "latin-1"):
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as error:
            failure: Exception = error
        except Exception as error:  # a damaged stream makes the unpickler raise almost anything
            failure = error
            break
    reason = str(failure) or type(failure).__name__
    raise pickle.UnpicklingError(
        f"{path} is refused: {reason} (accepted: a pickle of plain containers, strings, bytes and numbers)"
    ) from failure


# Values


def is_id(value: Any) -> bool:
    """Whether a value is an integer of 64 bits; True and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: Any, lowest: float = -MAX_COORDINATE) -> bool:
    """Whether a value is a finite number from `lowest` on and small enough to be about pixels."""
    return type(value) in (int, float) and lowest <= value <= MAX_COORDINATE


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not blank and can be written as Unicode."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def shown(value: Any) -> str:
    """A wrong value as a message shows it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


# Files


def load_json(path: Path) -> Any:
    """The content of a JSON file; raises ValueError naming the file, the line and the column where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load_refs(path: Path) -> list[dict[str, Any]]:
    """Reads the refs of either file; raises pickle.UnpicklingError or ValueError naming it when it is something else."""
    refs = load_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    is_refs = isinstance(refs, list) and all(isinstance(ref, dict) for ref in refs)
    if not is_refs or not all(is_text(ref.get("split")) for ref in refs):
        raise ValueError(f"{path} must hold a list of refs, dicts that each name their split")
    return refs


def load_instances(path: Path, optional: Collection[str] = ()) -> Instances:
    """Reads a COCO file such as instances.json; an `optional` list that is not there is empty.

    Raises ValueError naming the file when it is something else, or when two records have one id.
    """
    tables = ("images", "annotations", "categories")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON with lists of images, annotations and categories: {error}") from error
    instances: Instances = {}
    for table in tables:
        absent = [] if table in optional else None
        records = content.get(table, absent) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise ValueError(
                f"{path} is not JSON with lists of images, annotations and categories: there is no list {table}"
            )
        instances[table] = {}
        for place, record in enumerate(records):
            if not isinstance(record, dict) or not is_id(record.get("id")):
                found = record.get("id") if isinstance(record, dict) else record
                raise ValueError(
                    f"{path} is not JSON with lists of images, annotations and categories that have ids: {table}[{place}] must "
                    f"have an integer as id, got {shown(found)}"
                )
            other = instances[table].setdefault(record["id"], record)
            if other != record:  # a record that is written twice says the same
                both = f"{_named(other, table)} and {_named(record, table)}"
                raise ValueError(
                    f"{path}: two of the {table} have the id {record['id']}: {both}. Give each an id of its own."
                )
    return instances


def _named(record: Mapping[str, Any], table: str) -> str:
    """A record as a message names it: an image by its file."""
    key = {"images": "file_name", "annotations": "image_id", "categories": "name"}[table]
    return f"{key} {shown(record.get(key))}"


# Refs


def target_ids(ref: dict[str, Any]) -> list[int]:
    """The annotations that a checked ref means: one, several, or none where gRefCOCO writes -1."""
    given = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
    return [] if list(given) == [-1] else list(dict.fromkeys(given))


def ref_problem(ref: dict[str, Any], instances: Instances) -> str | None:
    """Says why a ref cannot be used, as far as the records tell, or None."""
    for key in ("ref_id", "image_id"):
        if not is_id(ref.get(key)):
            return f"its {key} must be an integer, got {shown(ref.get(key))}"
    given = ref.get("ann_id")
    is_list = isinstance(given, (list, tuple)) and given and all(map(is_id, given))
    if not is_list and not is_id(given):
        return f"its ann_id must be an integer or a list of integers, got {shown(given)}"
    if not isinstance(ref.get("no_target"), (bool, type(None))):
        return f"its no_target must be true or false, got {shown(ref['no_target'])}"
    problem = image_problem(ref["image_id"], instances)
    if problem is not None:
        return problem
    targets = target_ids(ref)
    if targets and ref.get("no_target"):
        return f"it says that it has no target, and names the annotations {targets}"
    problems = (_annotation_problem(ann_id, ref["image_id"], instances) for ann_id in targets)
    return next((problem for problem in problems if problem is not None), _sentence_problem(ref))


def image_problem(image_id: int, instances: Instances, file: str = "instances.json") -> str | None:
    """Says why an image's record in a file of this name cannot be used, or None."""
    image = instances["images"].get(image_id)
    if image is None:
        return f"its image {image_id} is missing in {file}"
    has_size = all(is_id(image.get(side)) and image[side] > 0 for side in ("height", "width"))
    if not has_size or not is_text(image.get("file_name")):
        fields = {key: image.get(key) for key in ("file_name", "height", "width")}
        return f"its image {image_id} needs file_name, height and width in {file}, got {shown(fields)}"
    if image["height"] * image["width"] > MAX_PIXELS:
        return f"its image {image_id} has {image['height']} x {image['width']} pixels, more than {MAX_PIXELS:,}"
    return None


def _annotation_problem(ann_id: int, image_id: int, instances: Instances) -> str | None:
    """Says why an annotation cannot be a target in an image, or None."""
    annotation = instances["annotations"].get(ann_id)
    if annotation is None:
        return f"its annotation {ann_id} is missing in instances.json"
    if not is_id(annotation.get("image_id")) or annotation["image_id"] != image_id:
        return f"it is about image {image_id}, its annotation {ann_id} about {shown(annotation.get('image_id'))}"
    category_id = annotation.get("category_id")
    category = instances["categories"].get(category_id) if is_id(category_id) else None
    if category is None or not is_text(category.get("name")):
        return (
            f"the category {shown(category_id)} of its annotation {ann_id} is missing in instances.json, or has no name"
        )
    return box_problem(annotation, f" of its annotation {ann_id}")


def box_problem(annotation: Mapping[str, Any], whose: str = "") -> str | None:
    """Says what is wrong with an annotation's bbox or area, which messages call "the bbox" and `whose`, or None."""
    box, area = annotation.get("bbox"), annotation.get("area")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    if not is_box or min(box[2:]) < 0:
        return f"the bbox{whose} must be 4 finite numbers [x, y, width, height], got {shown(box)}"
    if area is not None and not is_number(area, lowest=0):
        return f"the area{whose} must be a finite number from 0 on, got {shown(area)}"
    return None


def _sentence_problem(ref: dict[str, Any]) -> str | None:
    """Says what is wrong with a ref's sentences, or None."""
    if not isinstance(ref.get("sentences"), list) or not ref["sentences"]:
        return "it has no sentences"
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict) or not is_id(sentence.get("sent_id")):
            return f"one of its sentences has no sent_id, an integer: {shown(sentence)}"
        text = sentence.get("sent")
        if not isinstance(text, str) or not text.strip():
            return f"its sentence {sentence['sent_id']} is empty or not a text: {shown(text)}"
        if not is_text(text):
            return f"its sentence {sentence['sent_id']} is not valid Unicode: {shown(text)}"
    return None


__all__ = [
    "Instances",
    "box_problem",
    "image_problem",
    "is_id",
    "is_number",
    "is_text",
    "load_instances",
    "load_json",
    "load_plain_pickle",
    "load_refs",
    "ref_problem",
    "shown",
    "target_ids",
]
