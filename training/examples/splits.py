"""The splits that a run's settings name."""

import os
from dataclasses import replace
from typing import Any

import datasets
from accelerate import PartialState

from training.configuration import DataSettings
from training.examples import held_out
from training.examples.absent import check_absent, with_absent
from training.examples.mixtures import ReferSet, mix_training_rows, open_sets
from training.sources.hub_layouts import RowFolder
from training.sources.images import upright_for
from training.sources.refer import load_refer
from training.sources.scenes.dataset import check_scenes, generate_scenes, load_scenes

HIDDEN = "something"  # every sentence, where they are hidden


def load_splits(data: DataSettings, splits: list[str]) -> list[datasets.Dataset]:
    """The named splits, one referred object per row (`training.sources.refer.REFER_FEATURES`).

    "held_out" names the images of the training split that no run trains on, see `data.held_out`; the training split is without
    them. All names are checked before any split is read. `data.mix` and `data.streaming` change nothing here: they are about
    training, see [`load_training_splits`]. With a `data.orientation` that is chosen, rows have a column `upright` more.

    Raises:
        FileNotFoundError: Where there are no such data.
        ValueError: Where there is no such split.
    """
    check_absent(data)
    if data.hide_sentences:
        return [_hide_sentences(rows) for rows in load_splits(replace(data, hide_sentences=False), splits)]
    if held_out.SPLIT in splits and not data.held_out:
        raise ValueError(
            f"data.held_out is 0, so there is no split {held_out.SPLIT!r}; set it to a share of the training images."
        )
    if data.held_out:
        stored = [_stored(data, split) for split in splits]
        divided = []
        for split, name, rows in zip(splits, stored, load_splits(replace(data, held_out=0.0), stored), strict=True):
            is_train = name == data.train_split
            divided.append(held_out.divide(rows, data.held_out, held_out=split == held_out.SPLIT) if is_train else rows)
        return divided
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
        return [_oriented(folder.read(split), data) for split in splits]
    loaded = load_refer(root, data.dataset, data.split_by, image_dir=data.image_dir, splits=splits)
    named = (root, data.dataset, data.split_by)
    return [_oriented(with_absent(loaded[split], data.absent, *named), data) for split in splits]


def _stored(data: DataSettings, split: str) -> str:
    """The split that holds a split's rows."""
    return data.train_split if split == held_out.SPLIT else split


def check_split(data: DataSettings, split: str) -> None:
    """What [`load_splits`] would raise for the name of a split, without the cost of reading it."""
    split = _stored(data, split)
    if data.source == "scenes":
        check_scenes(data.scene_set, split, data.scene_no_target)
    elif data.source == "folder":
        RowFolder(_root(data), data.image_dir).check_split(split)
    else:
        ReferSet(_root(data), data.dataset, data.split_by, data.image_dir).check_split(split)


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

    With `data.mix` the training rows are those of [`mix_training_rows`], and the validation rows are the first set's. With
    `data.streaming` the training rows are an IterableDataset. `ref_id`s are each set's own, so two rows of a mixture may have the
    same.

    Raises:
        FileNotFoundError: Where there are no such data.
        ValueError: Where there is no such split, settings do not go together, or a set cannot be mixed.
    """
    if data.hide_sentences:
        if data.streaming:
            raise ValueError("data.hide_sentences does not go together with data.streaming.")
        train, val = load_training_splits(replace(data, hide_sentences=False))
        return _hide_sentences(train), _hide_sentences(val)
    if data.source == "scenes" and data.mix:
        raise ValueError("data.mix takes REFER sets or folders; set data.source to refer or folder.")
    if data.weight and not data.mix:
        raise ValueError(
            "data.weight is the share of a set in a mixture; name further sets in data.mix, or leave it out."
        )
    for part in (data, *data.mix):
        check_absent(part)
    sources = [data.source, *(part.source for part in data.mix)]
    if data.streaming and set(sources) != {"folder"}:
        other = next(source for source in sources if source != "folder")
        raise ValueError(f"data.streaming takes data.source folder, not {other}; prepare the data first.")
    if data.streaming and data.held_out:
        raise ValueError("data.held_out does not go together with data.streaming.")
    if data.source == "scenes" or not (data.mix or data.streaming):
        train, val = load_splits(data, [data.train_split, data.val_split])
        return train, val
    sets = open_sets(data)
    for member in sets:
        member.check_split(data.train_split)
    sets[0].check_split(_stored(data, data.val_split))
    train = mix_training_rows(data, sets) if data.mix else sets[0].read(data.train_split, streaming=True)
    (val,) = load_splits(data, [data.val_split])
    return _oriented(train, data), val


def _oriented(rows: datasets.Dataset | datasets.IterableDataset, data: DataSettings) -> Any:
    """The rows, which say where the settings do which pixels their masks are drawn on."""
    upright = upright_for(data.orientation)
    if upright is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        features = rows.features.copy() | {"upright": datasets.Value("bool")}
        return rows.map(_marked, fn_kwargs={"upright": upright}, features=datasets.Features(features))
    return rows.add_column("upright", [upright] * len(rows))


def _marked(row: dict, upright: bool) -> dict:
    return {"upright": upright}


def _hide_sentences(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with as many sentences, all of them the same."""
    hidden = [[HIDDEN] * len(sentences) for sentences in rows["sentences"]]
    names, feature = rows.column_names, rows.features["sentences"]
    return rows.remove_columns("sentences").add_column("sentences", hidden, feature=feature).select_columns(names)
