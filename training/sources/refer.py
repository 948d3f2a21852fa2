"""The REFER datasets: RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO.

The layout is REFER's (Kazemzadeh et al., "ReferItGame", 2014;
Yu et al., "Modeling Context in Referring Expressions", 2016) and its extension to any number of targets (Liu et al.,
"GRES: Generalized Referring Expression Segmentation", 2023); the rest is ours.
"""

import logging
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pycocotools import mask as coco_mask

from training.sources.agreement import draw_checked
from training.sources.masks import encode_mask, merge_rles
from training.sources.refer_records import (
    Instances,
    is_id,
    is_text,
    load_instances,
    load_refs,
    ref_problem,
    shown,
    target_ids,
)

logger = logging.getLogger(__name__)

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
    data, ValueError for an unknown split, an instances.json that is none or has two records of one id, or refs
    cannot be used: how many, which is the first, and why. All are checked before the first mask is drawn.
    Drawing then refuses a malformed segmentation, an empty mask of a ref that has a target, and a mask that
    contradicts the bbox beside it (see `compare_mask`), naming the ref. Masks that agree only roughly with
    their bbox or area are counted in one warning.
    """
    root = Path(root).expanduser().absolute()
    refs_path, instances_path = _refer_files(root, dataset, split_by)
    folders = _image_folders(root, image_dir)
    refs = load_refs(refs_path)
    present = list(dict.fromkeys(ref["split"] for ref in refs))
    for split in splits or ():
        if split not in present:
            raise ValueError(f"{refs_path} has no split {split!r}; it has {', '.join(present) or 'none'}")
    names = present if splits is None else splits
    chosen = {name: [ref for ref in refs if ref["split"] == name] for name in names}

    instances = load_instances(instances_path)
    problems: list[str] = []
    images: dict[int, Path] = {}
    for ref in (ref for split_refs in chosen.values() for ref in split_refs):
        problem = ref_problem(ref, instances)
        if problem is None and ref["image_id"] not in images:
            file_name = instances["images"][ref["image_id"]]["file_name"]
            found = _find_image(folders, file_name)
            if found is None:
                problem = f"its image {folders[0] / file_name} does not exist"
            else:
                images[ref["image_id"]] = found
        if problem is not None:
            problems.append(f"ref {shown(ref.get('ref_id'))}: {problem}")
    if problems:
        raise ValueError(f"{refs_path}: {len(problems)} refs cannot be used; the first is {problems[0]}")

    built, doubtful = {}, {}
    for name, split_refs in chosen.items():
        rows = []
        for ref in split_refs:
            try:
                rows.append(_build_row(ref, instances, images[ref["image_id"]], dataset, doubtful))
            except ValueError as error:
                raise ValueError(f"{refs_path}: ref {ref['ref_id']}: {error} (see {instances_path})") from error
        columns = {column: [row[column] for row in rows] for column in REFER_FEATURES}
        built[name] = datasets.Dataset.from_dict(columns, features=REFER_FEATURES)
    if doubtful:
        logger.warning(
            "%s: %d masks agree only roughly with their own bbox or area; the first is annotation %d. They are used as they are.",
            instances_path,
            len(doubtful),
            next(iter(doubtful)),
        )
    return datasets.DatasetDict(built)


def refer_images(
    root: str | PathLike[str], dataset: str, split_by: str, image_dir: str | PathLike[str] | None = None
) -> dict[str, list[tuple[int, Path | None]]]:
    """Image id and file of every ref of each split of a REFER dataset; no mask is drawn and no image opened.

    A file is None where instances.json does not tell it. One that does not exist is named all the same.

    Raises as load_refer does; ValueError also for a ref whose image_id is no integer.
    """
    root = Path(root).expanduser().absolute()
    refs_path, instances_path = _refer_files(root, dataset, split_by)
    folders, records = _image_folders(root, image_dir), load_instances(instances_path)["images"]
    files: dict[int, Path | None] = {}
    images: dict[str, list[tuple[int, Path | None]]] = {}
    for ref in load_refs(refs_path):
        image_id = ref.get("image_id")
        if not is_id(image_id):
            where = f"{refs_path}: ref {shown(ref.get('ref_id'))}"
            raise ValueError(f"{where}: its image_id must be an integer, got {shown(image_id)}")
        if image_id not in files:
            file_name = records.get(image_id, {}).get("file_name")
            files[image_id] = _find_image(folders, file_name) or folders[0] / file_name if is_text(file_name) else None
        images.setdefault(ref["split"], []).append((image_id, files[image_id]))
    return images


def refer_categories(root: str | PathLike[str], dataset: str, split_by: str) -> dict[int, set[str]]:
    """Names of the categories of all annotations of each image of instances.json, referred to or not; raises as load_refer does."""
    instances = load_instances(_refer_files(Path(root).expanduser().absolute(), dataset, split_by)[1])
    found: dict[int, set[str]] = {image_id: set() for image_id in instances["images"]}
    for annotation in instances["annotations"].values():
        category = instances["categories"].get(annotation.get("category_id"), {}).get("name")
        if annotation.get("image_id") in found and is_text(category):
            found[annotation["image_id"]].add(category)
    return found


def find_refs(root: Path, dataset: str, split_by: str) -> Path | None:
    """The file of a set's refs, REFER's or gRefCOCO's; None where there is none."""
    folder = root / dataset
    files = (folder / f"refs({split_by}).p", folder / f"grefs({split_by}).json")
    return next((path for path in files if path.is_file()), None)


def _refer_files(root: Path, dataset: str, split_by: str) -> tuple[Path, Path]:
    """Returns the paths of refs and instances; a FileNotFoundError says which refs there are instead."""
    if not root.is_dir():
        raise FileNotFoundError(f"the REFER root {root} is not a folder")
    refs = find_refs(root, dataset, split_by) or root / dataset / f"refs({split_by}).p"
    paths = refs, root / dataset / "instances.json"
    for path in paths:
        if not path.is_file():
            files = [path for pattern in ("*/refs(*).p", "*/grefs(*).json") for path in root.glob(pattern)]
            found = sorted(str(refs.relative_to(root)) for refs in files)
            raise FileNotFoundError(
                f"{path} does not exist (needed: <root>/<dataset>/refs(<split_by>).p, or grefs(<split_by>).json, "
                f"and instances.json); refs found below {root}: {', '.join(found) or 'none'}"
            )
    return paths


def _image_folders(root: Path, image_dir: str | PathLike[str] | None) -> list[Path]:
    """Returns the existing folders to look for images in; raises FileNotFoundError when there is none."""
    folders = [root / name for name in IMAGE_FOLDERS]
    if image_dir is not None:
        folders = [Path(image_dir).expanduser().absolute()]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        raise FileNotFoundError(f"no folder of images, looked for {', '.join(map(str, folders))}")
    return existing


def _find_image(folders: Sequence[Path], file_name: str) -> Path | None:
    """Returns the first of the folders' files of this name, or None."""
    return next((folder / file_name for folder in folders if os.path.isfile(folder / file_name)), None)


def _build_row(
    ref: dict[str, Any], instances: Instances, image_path: Path, dataset: str, doubtful: dict[int, None]
) -> dict[str, Any]:
    """Joins a checked ref with its records and draws its mask; raises ValueError naming the annotation.

    Notes in `doubtful` the annotations whose mask agrees only roughly with their box or area.
    """
    image, targets = instances["images"][ref["image_id"]], target_ids(ref)
    height, width = image["height"], image["width"]
    annotations = [instances["annotations"][ann_id] for ann_id in targets]
    rles = [] if targets else [encode_mask(np.zeros((height, width), dtype=bool))]
    for annotation in annotations:
        shape, box, area = annotation.get("segmentation"), annotation["bbox"], annotation.get("area")
        try:
            rle, is_doubtful = draw_checked(shape, height, width, box, area)
        except ValueError as error:
            raise ValueError(f"its annotation {annotation['id']} {error}") from error
        if is_doubtful:
            doubtful[annotation["id"]] = None
        rles.append(rle)
    mask = merge_rles(rles)
    if targets and coco_mask.area(mask) == 0:
        raise ValueError(
            f"its annotation {', '.join(map(str, targets))} has no pixel in its image of {height} x {width}"
        )
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
        "boxes": [list(map(float, annotation["bbox"])) for annotation in annotations],
    }
