"""The splits that a run's settings name."""

import logging
import os
from dataclasses import replace

import datasets
import numpy as np
from accelerate import PartialState

from training.configuration import DataSettings
from training.sources.hub_layouts import RowFolder
from training.sources.refer import load_refer, refer_image_ids
from training.sources.scenes.dataset import check_scenes, generate_scenes, load_scenes

logger = logging.getLogger(__name__)


HIDDEN = "something"  # every sentence, where they are hidden


def load_splits(data: DataSettings, splits: list[str]) -> list[datasets.Dataset]:
    """The named splits, one referred object per row (`training.data.REFER_FEATURES`). All names are checked before any is read.

    `data.mix` and `data.streaming` change nothing here: they are about training, see [`load_training_splits`].

    Raises:
        FileNotFoundError: Where there are no such data.
        ValueError: Where there is no such split.
    """
    if data.hide_sentences:
        return [_hide_sentences(rows) for rows in load_splits(replace(data, hide_sentences=False), splits)]
    if data.source == "scenes":
        for split in splits:
            check_split(data, split)
        sizes = dict(zip(("train", "val", "test"), data.num_scenes, strict=True)) | {"test_seen": data.num_scenes[2]}
        return [_scenes(data, split, sizes[split]) for split in splits]
    root = _root(data)
    if data.source == "folder":
        folder = RowFolder(root, data.image_dir)
        for split in splits:
            folder.check_split(split)
        return [folder.read(split) for split in splits]
    loaded = load_refer(root, data.dataset, data.split_by, image_dir=data.image_dir, splits=splits)
    return [loaded[split] for split in splits]


def check_split(data: DataSettings, split: str) -> None:
    """What [`load_splits`] would raise for the name of a split, without the cost of reading it."""
    if data.source == "scenes":
        check_scenes(data.scene_set, split, data.scene_no_target)
    elif data.source == "folder":
        RowFolder(_root(data), data.image_dir).check_split(split)
    else:
        ReferSet(_root(data), f"{data.dataset}/{data.split_by}", data.image_dir).check_split(split)


def _root(data: DataSettings) -> str:
    if data.root is None:
        raise ValueError("data.root is not set; name the folder that holds the data.")
    return data.root


def _scenes(data: DataSettings, split: str, number: int) -> datasets.Dataset:
    cores = os.cpu_count() or 1
    if data.scene_set == "demo":
        workers = max(cores // PartialState().num_processes, 1)  # every process draws its own
        return generate_scenes(number, data.scene_seed, data.scene_size, split=split, num_workers=workers)
    return load_scenes(
        number,
        data.scene_seed,
        data.scene_size,
        split=split,
        scene_set=data.scene_set,
        no_target=data.scene_no_target,
        num_workers=cores,
    )


def load_training_splits(data: DataSettings) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset]:
    """The rows to train on and those of the validation split, as the settings say.

    With `data.mix` the training rows of all sets stand one set after the other, without those of any image that stands in
    another split of any of the sets: a COCO photograph has one `image_id` in all of them. With `data.streaming` the training rows
    are an IterableDataset. `ref_id`s are each set's own, so two rows of a mixture may have the same.

    Raises:
        FileNotFoundError: Where there are no such data.
        ValueError: Where there is no such split, settings do not go together, or a set in a mixture has no COCO image ids.
    """
    if data.hide_sentences:
        if data.streaming:
            raise ValueError("data.hide_sentences does not go together with data.streaming.")
        train, val = load_training_splits(replace(data, hide_sentences=False))
        return _hide_sentences(train), _hide_sentences(val)
    if data.source == "scenes" and data.mix:
        raise ValueError("data.mix takes REFER sets or folders; set data.source to refer or folder.")
    if data.source != "folder" and data.streaming:
        raise ValueError(f"data.streaming takes data.source folder, not {data.source}; prepare the data first.")
    if data.source == "scenes" or not (data.mix or data.streaming):
        train, val = load_splits(data, [data.train_split, data.val_split])
        return train, val
    root = _root(data)
    if data.source == "refer":
        names = [f"{data.dataset}/{data.split_by}", *data.mix]
        sets: list[ReferSet | RowFolder] = [ReferSet(root, name, data.image_dir) for name in names]
    else:
        sets = [RowFolder(name, data.image_dir) for name in [root, *data.mix]]
    for member in sets:
        member.check_split(data.train_split)
    sets[0].check_split(data.val_split)

    train = [member.read(data.train_split, streaming=data.streaming) for member in sets]
    if data.mix:
        others = [member.image_ids(split) for member in sets for split in member.splits if split != data.train_split]
        held_out = frozenset().union(*others)
        train = [_leave_out(rows, held_out, member, data.train_split) for rows, member in zip(train, sets, strict=True)]
    return datasets.concatenate_datasets(train), sets[0].read(data.val_split)


def _hide_sentences(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with as many sentences, all of them the same."""
    hidden = [[HIDDEN] * len(sentences) for sentences in rows["sentences"]]
    names, feature = rows.column_names, rows.features["sentences"]
    return rows.remove_columns("sentences").add_column("sentences", hidden, feature=feature).select_columns(names)


class ReferSet:
    """One set below a REFER root, with what [`RowFolder`] offers."""

    def __init__(self, root: str, name: str, image_dir: str | None):
        """
        Args:
            root: The REFER folder.
            name: "dataset/split_by", such as "refcoco+/unc".
            image_dir: Folder of the images, where they do not lie under `root`.

        Raises:
            FileNotFoundError, ValueError, pickle.UnpicklingError: Where its refs cannot be read.
        """
        self.root, self.name, self.image_dir = root, name, image_dir
        self.dataset, _, self.split_by = name.partition("/")
        if not self.dataset or not self.split_by:
            raise ValueError(f"data.mix names REFER sets as dataset/split_by, such as refcoco+/unc, got {name!r}.")
        self._images = refer_image_ids(root, self.dataset, self.split_by)
        self.splits = list(self._images)

    def check_split(self, split: str) -> None:
        """`ValueError` where there is no such split."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}.")

    def read(self, split: str, streaming: bool = False) -> datasets.Dataset:
        """The rows of a split; they hold paths of images, so that there is nothing to stream."""
        return load_refer(self.root, self.dataset, self.split_by, image_dir=self.image_dir, splits=[split])[split]

    def image_ids(self, split: str) -> list[int]:
        """The COCO image id of every ref of a split, in their order."""
        return self._images[split]


def _leave_out(
    rows: datasets.Dataset | datasets.IterableDataset,
    held_out: frozenset[int],
    member: ReferSet | RowFolder,
    split: str,
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a split but for those of held-out images; says how many were left out."""
    ids = member.image_ids(split)
    if min([*ids, *held_out]) < 0:
        raise ValueError(f"data.mix: {member.name}, or a set beside it, does not tell its images' COCO image ids.")
    removed = [image_id for image_id in ids if image_id in held_out]
    message = "%s %s: left out %d of %d images, %d of %d rows, since they stand in another split of the mixture"
    if PartialState().is_main_process:
        logger.info(message, member.name, split, len(set(removed)), len(set(ids)), len(removed), len(ids))
    if len(removed) == len(ids):
        raise ValueError(f"data.mix: every image of {member.name} {split} stands in another split of the mixture.")
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(_is_kept, input_columns="image_id", fn_kwargs={"held_out": held_out})
    kept = np.isin(rows["image_id"], list(held_out), invert=True)
    return rows.select(np.flatnonzero(kept))


def _is_kept(image_id: int, held_out: frozenset[int]) -> bool:
    return image_id not in held_out
