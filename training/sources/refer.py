"""The REFER datasets: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO.

The layout is REFER's (Kazemzadeh et al., "ReferItGame", 2014;
Yu et al., "Modeling Context in Referring Expressions", 2016) and its extension to any number of targets (Liu et al.,
"GRES: Generalized Referring Expression Segmentation", 2023); the rest is ours.
"""

import copyreg
import io
import json
import math
import pickle
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pycocotools import mask as coco_mask

from training.sources.masks import encode_mask, merge_rles, segmentation_to_rle

# One row is one referred object. Images stay undecoded, so that open_image can name a corrupt one.
REFER_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "image_id": datasets.Value("int64"),
        "ref_id": datasets.Value("int64"),
        "ann_ids": datasets.List(datasets.Value("int64")),  # one; several or none in gRefCOCO
        "no_target": datasets.Value("bool"),  # nothing in the image is meant; the mask is then empty
        "category": datasets.Value("string"),
        "sentences": datasets.List(datasets.Value("string")),
        "sentence_ids": datasets.List(datasets.Value("int64")),
        "sentence_kinds": datasets.List(datasets.Value("string")),
        "mask": {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")},
        "boxes": datasets.List(
            datasets.List(datasets.Value("float32"))
        ),  # [x, y, width, height] in pixels, one per annotation
    }
)

# Where the photographs lie below the root: REFER's own layout first, then plain COCO trees.
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")

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


# REFER

# The records of instances.json: "images", "annotations" and "categories", each by id.
_Instances = dict[str, dict[int, dict[str, Any]]]


def load_refer(
    root: str | PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    image_dir: str | PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
) -> datasets.DatasetDict:
    """Reads `root`/`dataset`/refs(`split_by`).p, or gRefCOCO's grefs(`split_by`).json, and instances.json.

    Gives Datasets of REFER_FEATURES: one row per ref in the order of the file, official split names and ids;
    sentences are REFER's cleaned `sent`. A ref to several annotations has the union of their masks, one to none
    (`no_target`, or the annotation -1) a mask without a pixel. Images are stored as absolute paths: the file name
    of instances.json (not the ref's) in `image_dir` or, without it, in the IMAGE_FOLDERS below `root`. Masks have
    the size that instances.json states. `splits` chooses splits and their order, all by default; the refs of others
    are not looked at.

    Raises FileNotFoundError for a missing folder or file, pickle.UnpicklingError for refs that are not plain
    data, ValueError for an unknown split, an instances.json that is none, or refs that cannot be used: how
    many, which is the first, and why. All are checked before the first mask is drawn; drawing then refuses a
    malformed segmentation and an empty mask of a ref that has a target, naming the ref.
    """
    root = Path(root).expanduser().absolute()
    refs_path, instances_path = _refer_files(root, dataset, split_by)
    folders = _image_folders(root, image_dir)
    refs = _load_refs(refs_path)
    present = list(dict.fromkeys(ref["split"] for ref in refs))
    for split in splits or ():
        if split not in present:
            raise ValueError(f"{refs_path} has no split {split!r}; it has {', '.join(present) or 'none'}")
    names = present if splits is None else splits
    chosen = {name: [ref for ref in refs if ref["split"] == name] for name in names}

    instances = _load_instances(instances_path)
    problems: list[str] = []
    images: dict[int, Path] = {}
    for ref in (ref for split_refs in chosen.values() for ref in split_refs):
        problem = _ref_problem(ref, instances)
        if problem is None:
            image_id, file_name = ref["image_id"], instances["images"][ref["image_id"]]["file_name"]
            paths = (folder / file_name for folder in folders)
            found = images.get(image_id) or next((path for path in paths if path.is_file()), None)
            if found is None:
                problem = f"its image {folders[0] / file_name} does not exist"
            else:
                images[image_id] = found
        if problem is not None:
            problems.append(f"ref {ref.get('ref_id')}: {problem}")
    if problems:
        raise ValueError(f"{refs_path}: {len(problems)} refs cannot be used; the first is {problems[0]}")

    built = {}
    for name, split_refs in chosen.items():
        rows = [_build_row(ref, instances, images[ref["image_id"]], instances_path, dataset) for ref in split_refs]
        columns = {column: [row[column] for row in rows] for column in REFER_FEATURES}
        built[name] = datasets.Dataset.from_dict(columns, features=REFER_FEATURES)
    return datasets.DatasetDict(built)


def refer_image_ids(root: str | PathLike[str], dataset: str, split_by: str) -> dict[str, list[int]]:
    """The `image_id` of every ref of each split of a REFER dataset, from its refs alone: nothing else is read.

    Raises as load_refer does; ValueError also for a ref whose image_id is no integer.
    """
    refs_path, _ = _refer_files(Path(root).expanduser().absolute(), dataset, split_by)
    images: dict[str, list[int]] = {}
    for ref in _load_refs(refs_path):
        if not isinstance(ref.get("image_id"), int):
            raise ValueError(
                f"{refs_path}: ref {ref.get('ref_id')}: its image_id must be an integer, got {ref.get('image_id')!r}"
            )
        images.setdefault(ref["split"], []).append(ref["image_id"])
    return images


def _refer_files(root: Path, dataset: str, split_by: str) -> tuple[Path, Path]:
    """Returns the paths of refs and instances; a FileNotFoundError says which refs there are instead."""
    if not root.is_dir():
        raise FileNotFoundError(f"the REFER root {root} is not a folder")
    refs, generalized = root / dataset / f"refs({split_by}).p", root / dataset / f"grefs({split_by}).json"
    paths = generalized if generalized.is_file() and not refs.is_file() else refs, root / dataset / "instances.json"
    for path in paths:
        if not path.is_file():
            files = [path for pattern in ("*/refs(*).p", "*/grefs(*).json") for path in root.glob(pattern)]
            found = sorted(str(refs.relative_to(root)) for refs in files)
            raise FileNotFoundError(
                f"{path} does not exist (needed: <root>/<dataset>/refs(<split_by>).p, or grefs(<split_by>).json, "
                f"and instances.json); refs found below {root}: {', '.join(found) or 'none'}"
            )
    return paths


def _load_refs(path: Path) -> list[dict[str, Any]]:
    """Reads the refs of either file; raises pickle.UnpicklingError or ValueError naming it when it is something else."""
    if path.suffix == ".json":
        try:
            refs = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    else:
        refs = load_plain_pickle(path)
    is_refs = isinstance(refs, list) and all(isinstance(ref, dict) for ref in refs)
    if not is_refs or not all(isinstance(ref.get("split"), str) for ref in refs):
        raise ValueError(f"{path} must hold a list of refs, dicts that each name their split")
    return refs


def _image_folders(root: Path, image_dir: str | PathLike[str] | None) -> list[Path]:
    """Returns the existing folders to look for images in; raises FileNotFoundError when there is none."""
    folders = [root / name for name in IMAGE_FOLDERS]
    if image_dir is not None:
        folders = [Path(image_dir).expanduser().absolute()]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        raise FileNotFoundError(f"no folder of images, looked for {', '.join(map(str, folders))}")
    return existing


def _load_instances(path: Path) -> _Instances:
    """Reads instances.json; raises ValueError naming the file when it is something else."""
    try:
        content = json.loads(path.read_bytes())
        tables = ("images", "annotations", "categories")
        return {table: {record["id"]: record for record in content[table]} for table in tables}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON with lists of images, annotations and categories that have ids: {error!r}"
        ) from error


def _target_ids(ref: dict[str, Any]) -> list[int]:
    """The annotations that a checked ref means: one, several, or none where gRefCOCO writes -1."""
    given = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
    return [] if list(given) == [-1] else list(dict.fromkeys(given))


def _ref_problem(ref: dict[str, Any], instances: _Instances) -> str | None:
    """Says why a ref cannot be used, as far as the records tell, or None."""
    for key in ("ref_id", "image_id"):
        if not isinstance(ref.get(key), int):
            return f"its {key} must be an integer, got {ref.get(key)!r}"
    given = ref.get("ann_id")
    is_list = isinstance(given, (list, tuple)) and given and all(isinstance(ann_id, int) for ann_id in given)
    if not is_list and not isinstance(given, int):
        return f"its ann_id must be an integer or a list of integers, got {given!r}"
    image = instances["images"].get(ref["image_id"])
    if image is None:
        return f"its image {ref['image_id']} is missing in instances.json"
    has_size = all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width"))
    if not has_size or not isinstance(image.get("file_name"), str):
        return f"its image {ref['image_id']} needs file_name, height and width in instances.json, got {image}"
    targets = _target_ids(ref)
    if targets and ref.get("no_target"):
        return f"it says that it has no target, and names the annotations {targets}"
    problems = (_annotation_problem(ann_id, ref["image_id"], instances) for ann_id in targets)
    return next((problem for problem in problems if problem is not None), _sentence_problem(ref))


def _annotation_problem(ann_id: int, image_id: int, instances: _Instances) -> str | None:
    """Says why an annotation cannot be a target in an image, or None."""
    annotation = instances["annotations"].get(ann_id)
    if annotation is None:
        return f"its annotation {ann_id} is missing in instances.json"
    if annotation.get("image_id") != image_id:
        return f"it is about image {image_id}, its annotation {ann_id} about {annotation.get('image_id')}"
    category_id, bbox = annotation.get("category_id"), annotation.get("bbox")
    if not isinstance(instances["categories"].get(category_id, {}).get("name"), str):
        return f"the category {category_id} of its annotation {ann_id} is missing in instances.json"
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if not is_box or not all(isinstance(number, Real) and math.isfinite(number) for number in bbox):
        return f"the bbox of its annotation {ann_id} must be 4 finite numbers, got {bbox}"
    return None


def _sentence_problem(ref: dict[str, Any]) -> str | None:
    """Says what is wrong with a ref's sentences, or None."""
    if not isinstance(ref.get("sentences"), list) or not ref["sentences"]:
        return "it has no sentences"
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict) or not isinstance(sentence.get("sent_id"), int):
            return f"one of its sentences has no sent_id: {sentence!r}"
        text = sentence.get("sent")
        if not isinstance(text, str) or not text.strip():
            return f"its sentence {sentence['sent_id']} is empty or not a text: {text!r}"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return f"its sentence {sentence['sent_id']} is not valid Unicode: {text!r}"
    return None


def _build_row(
    ref: dict[str, Any], instances: _Instances, image_path: Path, source: Path, dataset: str
) -> dict[str, Any]:
    """Joins a checked ref with its records and draws its mask; raises ValueError naming the ref."""
    image, targets = instances["images"][ref["image_id"]], _target_ids(ref)
    annotations = [instances["annotations"][ann_id] for ann_id in targets]
    rles = [encode_mask(np.zeros((image["height"], image["width"]), dtype=bool))]
    for annotation in annotations:
        try:
            rles.append(segmentation_to_rle(annotation.get("segmentation"), image["height"], image["width"]))
        except ValueError as error:
            where = f"ref {ref['ref_id']}: its annotation {annotation['id']} in {source}"
            raise ValueError(f"{where} is malformed: {error}") from error
    mask = merge_rles(rles)
    if targets and coco_mask.area(mask) == 0:
        where = f"ref {ref['ref_id']}: its annotation {', '.join(map(str, targets))} in {source}"
        raise ValueError(f"{where} has no pixel in its image of {image['height']} x {image['width']}")
    names = (instances["categories"][annotation["category_id"]]["name"] for annotation in annotations)
    return {
        "image": {"path": str(image_path), "bytes": None},
        "image_id": ref["image_id"],
        "ref_id": ref["ref_id"],
        "ann_ids": targets,
        "no_target": not targets,
        "category": ", ".join(dict.fromkeys(names)),
        "sentences": [sentence["sent"].strip() for sentence in ref["sentences"]],
        "sentence_ids": [sentence["sent_id"] for sentence in ref["sentences"]],
        "sentence_kinds": [dataset] * len(ref["sentences"]),
        "mask": mask,
        "boxes": [annotation["bbox"] for annotation in annotations],
    }
