"""From annotated images to rows of `REFER_FEATURES`: checked, joined by phrase, divided into splits (ours).

A phrase means everything in its image that has it: the masks of all objects with the same phrase are joined in one row.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from accelerate.utils import tqdm
from pycocotools import mask as coco_mask

from training.configuration import Orientation
from training.sources.annotations import AnnotatedImage, Annotation, Findings, Rle
from training.sources.asked_images import with_bytes
from training.sources.images import check_size, coco_id, is_upright, open_image, open_upright, upright_for
from training.sources.masks import merge_rles
from training.sources.refer import REFER_FEATURES
from training.sources.row_checks import check_sentences, check_target
from training.support.files import sha256_of, write_once

VAL_SHARE = 0.1  # of the images, where nothing says which are for validation
SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
BATCH = 64  # images that are read at once
SHOWN_PROBLEMS = 10  # in a message

# What is counted, as the end of a sentence
EMPTY = "images have no annotation and are left out"
JOINED = "phrases mean several objects of their image, whose masks are joined"
DOUBTFUL = "masks agree only roughly with their own box or area"
TWICE = "images are there under two names"
LEAKED = "images stand in two splits, so that figures on the second are too good"
UNUSABLE = "annotations or images cannot be used and are left out"


@dataclass(frozen=True)
class OwnRows:
    """Rows that were made of annotations.

    Attributes:
        splits: Rows of REFER_FEATURES by split, sorted by `image_id`; images are paths.
        turned: Orientation tags other than 1 by the path of the image.
        division: A sentence that says how the images were divided.
    """

    splits: dict[str, datasets.Dataset]
    turned: dict[str, int]
    division: str


@dataclass
class _Object:
    """What one or several annotations of an image are about. `phrases` are by their form for comparison."""

    place: str
    rle: Rle
    no_target: bool
    phrases: dict[str, str] = field(default_factory=dict)
    categories: dict[str, None] = field(default_factory=dict)
    ann_ids: list[int] = field(default_factory=list)


@dataclass
class _Read:
    """An image that was read, and its annotations, drawn."""

    source: AnnotatedImage
    path: str = ""
    content: str = ""
    tag: int = 1
    drawn: list[tuple[Annotation, Rle]] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class _Image:
    """An image with all that was found about it, in one split or in none."""

    path: str
    content: str
    split: str | None
    objects: dict[Any, _Object] = field(default_factory=dict)


def make_rows(
    images: Iterable[AnnotatedImage],
    findings: Findings,
    name: str,
    scratch: Path,
    *,
    val_share: float | None = None,
    orientation: Orientation = "by_source",
    skip_unusable: bool = False,
) -> OwnRows:
    """Read and check annotated images, and make rows of them.

    Masks have to be of their image's size, `orientation` says on which pixels. Annotations of one group and annotations with the
    same mask are one object. Objects of an image with the same phrase are joined in a row, whatever its upper case and its spaces.
    The box of each object is measured on its mask.

    Args:
        images: What a reader yields. Each image is decoded once, some at a time.
        findings: That the reader writes to.
        name: Stands in `sentence_kinds`.
        scratch: Folder for images that come without a file; the rows name files in it.
        val_share: Share of the images for the split val, in [0, 1); they are chosen by their content, so the same images give the
            same split. None: the splits that the data name or, without, VAL_SHARE.
        orientation: As `data.orientation` has it.
        skip_unusable: Leave out what cannot be used, instead of refusing all.

    Raises:
        ValueError: Where something cannot be used, or nothing can.
    """
    upright = upright_for(orientation)
    found: dict[tuple[str, str | None], _Image] = {}
    turned: dict[str, int] = {}
    for read in _read_all(images, scratch, upright):
        findings.problems += read.problems
        for place in read.doubtful:
            findings.count(DOUBTFUL, place)
        if not read.source.annotations:
            findings.count(EMPTY, os.path.basename(read.source.image["path"] or read.source.place))
        if read.tag != 1:
            turned[read.path] = read.tag
        if read.drawn:
            split = None if val_share is not None else _split_name(read.source)
            is_file = read.source.image["bytes"] is None
            key = (read.path if is_file else read.content, split)
            image = found.setdefault(key, _Image(read.path, read.content, split))
            _add_objects(image, read)
    rows = {id(image): _make_image_rows(image, name, findings) for image in found.values()}
    _judge(findings, skip_unusable)
    kept = [image for image in found.values() if rows[id(image)]]
    if not kept:
        raise ValueError(f"{name}: there is no annotation that can be used.")
    _count_copies(kept, findings)
    divided = _divide(kept, VAL_SHARE if val_share is None else val_share)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in divided}
    ids, number, sentence = _image_ids(kept), 0, 0
    for split, members in divided.items():
        for image in members:
            for row in rows[id(image)]:
                number, first, sentence = number + 1, sentence + 1, sentence + len(row["sentences"])
                row |= {"image_id": ids[id(image)], "ref_id": number, "sentence_ids": list(range(first, sentence + 1))}
                splits[split].append(row)
        splits[split].sort(key=lambda row: row["image_id"])
    tables = {
        split: datasets.Dataset.from_dict(
            {column: [row[column] for row in members] for column in REFER_FEATURES}, features=REFER_FEATURES
        )
        for split, members in splits.items()
    }
    counts = " and ".join(f"{len(members)} images for {split}" for split, members in divided.items())
    chosen = "as the data say" if kept[0].split is not None else "chosen by their content"
    return OwnRows(tables, turned, f"There are {counts}, {chosen}.")


def _read_all(images: Iterable[AnnotatedImage], scratch: Path, upright: bool | None) -> Iterator[_Read]:
    """Every image decoded once, in threads, in the order of the images."""
    images = iter(images)
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(desc="reading images", unit=" images", leave=False) as bar:
        while batch := list(islice(images, BATCH)):
            for read in pool.map(lambda image: _read_one(image, scratch, upright), batch):
                bar.update()
                yield read


def _read_one(source: AnnotatedImage, scratch: Path, upright: bool | None) -> _Read:
    read = _Read(source)
    if not source.annotations:
        return read
    try:
        path, read.content = _kept_file(with_bytes(dict(source.image)), scratch)
        read.path = str(path)
        is_turned = is_upright(read.path, upright)
        image, read.tag = open_upright({"path": read.path, "bytes": None}, is_turned)
        size = image.height, image.width
        if source.size is not None:
            check_size(read.path, size, source.size, read.tag, is_turned, "annotation")
    except ValueError as error:
        read.problems.append(f"{source.place}: {error}")
        return read
    for annotation in source.annotations:
        try:
            check_sentences(annotation.phrases)
            try:
                rle, is_doubtful = annotation.draw(*size)
            except ValueError as error:
                read.problems.append(f"{annotation.place} {error}")
                continue
            height, width = rle["size"]
            check_size(read.path, size, (height, width), read.tag, is_turned)
            check_target(rle, annotation.no_target)
        except ValueError as error:
            read.problems.append(f"{annotation.place}: {error}")
            continue
        read.drawn.append((annotation, rle))
        if is_doubtful:
            read.doubtful.append(annotation.place)
    return read


def _kept_file(image: Mapping[str, Any], scratch: Path) -> tuple[Path, str]:
    """The file of an image, and the SHA-256 of its content; an image without a file gets one, under the name that it has."""
    if image["bytes"] is None:
        path = Path(os.path.abspath(image["path"] or ""))
        if not path.is_file():
            raise ValueError(f"the image {image['path']} does not exist")
        return path, sha256_of(path)
    content = hashlib.sha256(image["bytes"]).hexdigest()
    name = PurePosixPath((image["path"] or "").replace("\\", "/")).name
    if not name:
        name = f"{content[:16]}.{(open_image(image, decode=False).format or 'image').lower()}"
    file = scratch / content / name
    if not file.is_file():
        write_once(file, lambda partial: partial.write_bytes(image["bytes"]))
    return file, content


def _add_objects(image: _Image, read: _Read) -> None:
    for annotation, rle in read.drawn:
        if annotation.no_target:
            key: Any = "nothing"
        elif annotation.group is not None:
            key = "group", annotation.group
        else:
            key = "mask", rle["counts"]
        thing = image.objects.setdefault(key, _Object(annotation.place, rle, annotation.no_target))
        thing.rle = rle if thing.rle == rle else merge_rles([thing.rle, rle])
        for phrase in annotation.phrases:
            words = " ".join(phrase.split())
            thing.phrases.setdefault(words.casefold(), words)
        if annotation.category:
            thing.categories[annotation.category] = None
        if annotation.ann_id is not None:
            thing.ann_ids.append(annotation.ann_id)


def _make_image_rows(image: _Image, name: str, findings: Findings) -> list[dict[str, Any]]:
    """A row for each set of objects that phrases mean; without ids."""
    meant: dict[str, list[_Object]] = {}
    for thing in image.objects.values():
        for phrase in thing.phrases:
            meant.setdefault(phrase, []).append(thing)
    by_objects: dict[tuple[int, ...], tuple[list[_Object], list[str]]] = {}
    for phrase, things in meant.items():
        words = things[0].phrases[phrase]
        if len(things) > 1 and any(thing.no_target for thing in things):
            findings.problems.append(
                f"{things[-1].place}: the phrase {words!r} means nothing in the image, and it means something in {things[0].place}"
            )
            continue
        if len(things) > 1:
            findings.count(JOINED, f"{words!r} in {os.path.basename(image.path)}")
        by_objects.setdefault(tuple(map(id, things)), (things, []))[1].append(words)
    return [
        {
            "image": {"path": image.path, "bytes": None},
            "ann_ids": [ann_id for thing in things for ann_id in thing.ann_ids],
            "no_target": things[0].no_target,
            "category": ", ".join(dict.fromkeys(category for thing in things for category in thing.categories)),
            "sentences": sentences,
            "sentence_kinds": [name] * len(sentences),
            "mask": merge_rles([thing.rle for thing in things]),
            "boxes": [] if things[0].no_target else [coco_mask.toBbox(thing.rle).tolist() for thing in things],
        }
        for things, sentences in by_objects.values()
    ]


def _judge(findings: Findings, skip_unusable: bool) -> None:
    """`ValueError` with the first problems where there are any; or a note about them."""
    if not findings.problems:
        return
    if not skip_unusable:
        shown = "".join(f"\n  {problem}" for problem in findings.problems[:SHOWN_PROBLEMS])
        more = f"\n  and {rest} more" if (rest := len(findings.problems) - SHOWN_PROBLEMS) > 0 else ""
        raise ValueError(
            f"{len(findings.problems)} annotations or images cannot be used. Correct them, or leave them out with --skip_unusable."
            f"{shown}{more}"
        )
    for problem in findings.problems:
        findings.count(UNUSABLE, problem)


def _count_copies(images: list[_Image], findings: Findings) -> None:
    first: dict[str, _Image] = {}
    for image in images:
        other = first.setdefault(image.content, image)
        names = f"{os.path.basename(image.path)} and {os.path.basename(other.path)}"
        if other.split != image.split:
            findings.count(LEAKED, f"{names} in {other.split} and {image.split}")
        elif other is not image:
            findings.count(TWICE, names)


def _split_name(source: AnnotatedImage) -> str | None:
    if source.split is None:
        return None
    split = SPLIT_NAMES.get(source.split.lower(), source.split)
    split = split.lower() if split.lower() in ("train", "val", "test") else split
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"{source.place}: the split {split!r} has a name other than letters and digits.")
    return split


def _divide(images: list[_Image], val_share: float) -> dict[str, list[_Image]]:
    """The images by split; images of one content fall into one."""
    named = [image.split for image in images if image.split is not None]
    if named and len(named) < len(images):
        image = next(image for image in images if image.split is None)
        raise ValueError(f"{image.path} has no split, and other images have one: name one for every image or for none.")
    if named:
        order = [split for split in ("train", "val", "test") if split in named]
        return {split: [image for image in images if image.split == split] for split in dict.fromkeys([*order, *named])}
    contents = sorted({image.content for image in images})
    number = min(max(round(val_share * len(contents)), 1), len(contents) - 1) if val_share else 0
    held_out = set(contents[:number])
    divided = {
        "train": [image for image in images if image.content not in held_out],
        "val": [image for image in images if image.content in held_out],
    }
    return {split: members for split, members in divided.items() if members}


def _image_ids(images: list[_Image]) -> dict[int, int]:
    """COCO's ids where all files have COCO's names, for mixtures; otherwise numbers from 1 on."""
    ids = [coco_id(image.path) for image in images]
    if None in ids or len(set(ids)) < len(ids):
        ids = list(range(1, len(images) + 1))
    return {id(image): number for image, number in zip(images, ids, strict=True) if number is not None}


__all__ = ["VAL_SHARE", "OwnRows", "make_rows"]
