"""Several sets as one: images told apart, none of another split among the training rows, and shares of an epoch (ours)."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from accelerate import PartialState

from training.configuration import DataSettings
from training.examples.absent import with_absent
from training.examples.draws import SET_COLUMN, WEIGHT_COLUMN
from training.examples.held_out import is_held_out
from training.sources.hub_layouts import RowFolder
from training.sources.images import coco_id, content_hash
from training.sources.refer import REFER_FEATURES, load_refer, refer_images

logger = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What tells an image of a mixture from others.

    Attributes:
        image_id: COCO's id; for any other image a negative number made of its set and of its id there.
        content: Hash of its file; None where the file is not there.
    """

    image_id: int
    content: str | None


class HeldOut(NamedTuple):
    """What no training row may show.

    Attributes:
        image_ids: Ids of images of other splits, as `Identity` has them.
        contents: Hashes of their files.
    """

    image_ids: frozenset[int]
    contents: frozenset[str]

    def has(self, image: Identity) -> bool:
        """Whether an image is among them, by its id or by its content."""
        return image.image_id in self.image_ids or image.content in self.contents


class ReferSet:
    """A set below a REFER root, with what [`RowFolder`] offers."""

    is_coco = False  # its file names tell

    def __init__(self, root: str, dataset: str, split_by: str, image_dir: str | None, absent: int = 0):
        """
        Args:
            root: The REFER folder.
            dataset: Name of the set, such as "refcoco+".
            split_by: Whose split, such as "unc".
            image_dir: Folder of the images, where they do not lie under `root`.
            absent: Sentences about absent things for each image, see `with_absent`.

        Raises:
            FileNotFoundError, ValueError, pickle.UnpicklingError: Where its refs cannot be read.
        """
        self.root, self.dataset, self.split_by, self.image_dir, self.absent = root, dataset, split_by, image_dir, absent
        self.name = os.path.join(root, dataset, split_by)
        self._images = refer_images(root, dataset, split_by, image_dir)
        self.splits = list(self._images)

    def check_split(self, split: str) -> None:
        """`ValueError` where there is no such split."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}.")

    def read(self, split: str, streaming: bool = False) -> datasets.Dataset:
        """The rows of a split; they hold paths of images, so that there is nothing to stream."""
        rows = load_refer(self.root, self.dataset, self.split_by, image_dir=self.image_dir, splits=[split])[split]
        return with_absent(rows, self.absent, self.root, self.dataset, self.split_by)

    def images(self, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The image id and the image of every ref of a split, in their order."""
        for image_id, path in self._images[split]:
            yield image_id, {"path": None if path is None else str(path), "bytes": None}


def open_sets(data: DataSettings) -> list[ReferSet | RowFolder]:
    """The sets of a mixture, the settings' own first.

    Raises:
        FileNotFoundError, ValueError, pickle.UnpicklingError: Where one cannot be read, or has no folder.
    """
    if data.root is None:
        raise ValueError("data.root is not set; name the folder that holds the data.")
    opened: list[ReferSet | RowFolder] = []
    for part in (data, *data.mix):
        root = part.root or data.root
        image_dir = part.image_dir or (None if part.root else data.image_dir)
        if part.source == "folder":
            opened.append(RowFolder(root, image_dir))
        else:
            opened.append(ReferSet(root, part.dataset, part.split_by, image_dir, part.absent))
    return opened


def mix_training_rows(
    data: DataSettings, sets: Sequence[ReferSet | RowFolder]
) -> datasets.Dataset | datasets.IterableDataset:
    """The training rows of all sets, one set after the other, without those of any image of another split of any of the sets and
    without those of the first set's images that are held out.

    Their `image_id`s are COCO's where the file's name tells it, and numbers of their own otherwise, so that equal ids of two sets
    never mean two images. Where the settings have weights, each row says its set and the weight of it.

    Raises:
        ValueError: Where nothing of a set is left, or some sets have weights and others have none.
    """
    weights = [part.weight for part in (data, *data.mix)]
    if any(weights) and not all(weights):
        raise ValueError(
            f"data.weight and data.mix: give a weight to every set, or to none; the weights are {weights}."
        )
    if any(weights) and data.streaming:
        raise ValueError(
            "data.streaming draws every object once; leave out the weights, or set data.streaming to false."
        )
    others = [
        image
        for number, member in enumerate(sets)
        for split in member.splits
        if split != data.train_split
        for image in _identities(member, number, member.images(split))
    ]
    own = (
        (image_id, image)
        for image_id, image in sets[0].images(data.train_split)
        if is_held_out(image_id, data.held_out)
    )
    others += _identities(sets[0], 0, own)
    held_out = HeldOut(
        frozenset(image.image_id for image in others), frozenset(image.content for image in others if image.content)
    )
    parts, contents = [], {}
    for number, member in enumerate(sets):
        rows = member.read(data.train_split, streaming=data.streaming)
        if isinstance(rows, datasets.IterableDataset):
            _say_left_out(list(_identities(member, number, member.images(data.train_split))), held_out, member, data)
            parts.append(_stream_kept(rows, held_out, member, number))
            continue
        images = list(_identities(member, number, zip(rows["image_id"], rows["image"], strict=True)))
        _say_left_out(images, held_out, member, data)
        # one photograph of COCO may come in two files, of two sizes: rows of one example share a file
        ids = []
        for image in images:
            is_same_file = held_out.has(image) or contents.setdefault(image.image_id, image.content) == image.content
            ids.append(image.image_id if is_same_file else _apart(number, image.image_id))
        # columns are replaced before rows are chosen: afterwards the images would be copied
        part = _replaced(rows, "image_id", ids)
        if any(weights):
            part = part.add_column(SET_COLUMN, [number] * len(part)).add_column(
                WEIGHT_COLUMN, [float(weights[number])] * len(part)
            )
        parts.append(part.select([row for row, image in enumerate(images) if not held_out.has(image)]))
    return datasets.concatenate_datasets(parts)


def _identities(
    member: ReferSet | RowFolder, number: int, images: Iterator[tuple[int, Mapping[str, Any]]]
) -> Iterator[Identity]:
    """Who the images of a set are; each is hashed once."""
    known: dict[int, Identity] = {}
    for image_id, image in images:
        if image_id not in known:
            known[image_id] = _identify(image_id, image, number, member.is_coco, member.name)
        yield known[image_id]


def _identify(image_id: int, image: Mapping[str, Any], number: int, is_coco: bool, name: str) -> Identity:
    if is_coco and image_id < 0:
        raise ValueError(f"data.mix: {name} does not tell its images' COCO image ids.")
    is_there = image["bytes"] is not None or os.path.isfile(image["path"] or "")
    return Identity(_own_id(image_id, image, number, is_coco), content_hash(image) if is_there else None)


def _own_id(image_id: int, image: Mapping[str, Any], number: int, is_coco: bool) -> int:
    """The id of an image among all sets: COCO's own, where it is one of COCO's."""
    return image_id if is_coco or coco_id(image["path"]) == image_id else _apart(number, image_id)


def _apart(number: int, image_id: int) -> int:
    """A negative id that no image of another set has."""
    digest = hashlib.sha256(f"{number} {image_id}".encode()).digest()
    return -1 - (int.from_bytes(digest[:8], "big") >> 1)


def _say_left_out(images: list[Identity], held_out: HeldOut, member: ReferSet | RowFolder, data: DataSettings) -> None:
    """Logs how many were left out; `ValueError` where all were."""
    removed = [image for image in images if held_out.has(image)]
    message = "%s %s: left out %d of %d images, %d of %d rows, since they stand in another split of the mixture"
    if PartialState().is_main_process:
        counts = (len(set(removed)), len(set(images)), len(removed), len(images))
        logger.info(message, member.name, data.train_split, *counts)
    if len(removed) == len(images):
        raise ValueError(
            f"data.mix: every image of {member.name} {data.train_split} stands in another split of the mixture."
        )


def _stream_kept(
    rows: datasets.IterableDataset, held_out: HeldOut, member: RowFolder, number: int
) -> datasets.IterableDataset:
    columns, options = ["image_id", "image"], {"number": number, "is_coco": member.is_coco}
    filtering = options | {"name": member.name, "held_out": tuple(held_out)}
    kept = rows.filter(_is_kept, input_columns=columns, fn_kwargs=filtering)
    return kept.map(_with_own_id, input_columns=columns, fn_kwargs=options, features=REFER_FEATURES)


def _is_kept(image_id: int, image: Mapping[str, Any], held_out: tuple, **options: Any) -> bool:
    return not HeldOut(*held_out).has(_identify(image_id, image, **options))


def _with_own_id(image_id: int, image: Mapping[str, Any], **options: Any) -> dict[str, int]:
    return {"image_id": _own_id(image_id, image, **options)}


def _replaced(rows: datasets.Dataset, column: str, values: list) -> datasets.Dataset:
    """The rows with other values in one column."""
    names, feature = rows.column_names, rows.features[column]
    return rows.remove_columns(column).add_column(column, values, feature=feature).select_columns(names)


__all__ = ["HeldOut", "Identity", "ReferSet", "mix_training_rows", "open_sets"]
