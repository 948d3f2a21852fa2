"""The leakage guard: which images of a split a model was trained on (ours).

An image is known by its COCO id, where its file's name tells it, and by the content of its file. An image that was saved again
under another name is not found.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.configuration import DataSettings
from training.examples.mixtures import ReferSet, open_sets
from training.sources.hub_layouts import RowFolder
from training.sources.images import coco_id, content_hash

SCENES = "the embedded scenes"


@dataclass(frozen=True)
class TrainingImages:
    """The images that a model was trained on.

    Attributes:
        sets: Names of the sets, such as "refcoco".
        names: COCO's ids and, for other images, the hashes of their files. An image may have both.
    """

    sets: frozenset[str]
    names: frozenset[int | str]

    def has(self, image_id: int, image: Mapping[str, Any]) -> bool:
        """Whether an image is among them.

        Args:
            image_id: Its id in its set.
            image: {"path": str or None, "bytes": bytes or None}.
        """
        return bool(self.names) and not self.names.isdisjoint(image_names(image_id, image))


def training_images(data: DataSettings, root: str | None = None) -> TrainingImages:
    """The images of the training split of a run's settings; of a mixture without those that it leaves out.

    Args:
        data: The run's data.
        root: REFER folder that takes the place of one that is no longer there.

    Raises:
        FileNotFoundError: Where the data are not there.
        ValueError, pickle.UnpicklingError: Where they cannot be read.
    """
    if data.source == "scenes":
        return TrainingImages(frozenset({SCENES}), frozenset())
    if root is not None and not (data.root and Path(data.root).expanduser().is_dir()) and data.source == "refer":
        data = replace(data, root=root, image_dir=None)
    members = open_sets(data)
    trained: set[int | str] = set()
    held_out: set[int | str] = set()
    for member in members:
        member.check_split(data.train_split)
        for split in member.splits:
            if split == data.train_split:
                trained.update(_all_names(member, split))
            elif data.mix:
                held_out.update(_all_names(member, split))
    sets = frozenset(_set_name(member, data.train_split) for member in members)
    return TrainingImages(sets, frozenset(trained - held_out))


def image_names(image_id: int, image: Mapping[str, Any], is_coco: bool = False) -> Iterator[int | str]:
    """What tells an image from all others: its COCO id where it is known, and the hash of its file where it is there.

    Args:
        image_id: Its id in its set.
        image: {"path": str or None, "bytes": bytes or None}.
        is_coco: Whether all images of its set are COCO's, so that a positive id is COCO's.
    """
    if (is_coco and image_id >= 0) or coco_id(image["path"]) == image_id:
        yield image_id
    if image["bytes"] is not None or (image["path"] and Path(image["path"]).is_file()):
        yield content_hash(image)


def _all_names(member: ReferSet | RowFolder, split: str) -> Iterator[int | str]:
    images: Iterable[tuple[int, Mapping[str, Any]]] = member.images(split)
    seen: set[int] = set()
    for image_id, image in images:
        if image_id not in seen:
            seen.add(image_id)
            yield from image_names(image_id, image, member.is_coco)


def _set_name(member: ReferSet | RowFolder, split: str) -> str:
    """The name of a set, such as "refcoco". A prepared folder keeps it as the kind of its sentences."""
    if isinstance(member, ReferSet):
        return member.dataset
    return next(iter(member.read(split, streaming=True)))["sentence_kinds"][0]


__all__ = ["SCENES", "TrainingImages", "image_names", "training_images"]
