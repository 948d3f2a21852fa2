"""Held-out images: never trained on, in no set of a mixture, the same for every share that is larger."""

from dataclasses import replace

import pytest
from builders import Folder

from training.configuration import DataSettings, MixedSet
from training.examples.held_out import is_held_out
from training.examples.splits import load_splits, load_training_splits


@pytest.fixture
def data(tmp_path) -> DataSettings:
    for name in ("refcoco", "refcoco+"):
        Folder(tmp_path, dataset=name, image_dir="images").fill({"train": list(range(1, 31)), "val": [40]})
    return DataSettings(root=str(tmp_path), held_out=0.3)


def test_training_and_held_out_rows_share_no_image_and_are_all_rows(data):
    train, held_out, val = load_splits(data, ["train", "held_out", "val"])
    kept, apart = set(train["image_id"]), set(held_out["image_id"])
    assert apart and kept and not kept & apart
    assert kept | apart == set(range(1, 31)) and set(val["image_id"]) == {40}
    (more,) = load_splits(replace(data, held_out=0.6), ["held_out"])
    assert apart < set(more["image_id"])
    assert apart == {number for number in range(1, 31) if is_held_out(number, 0.3)}


def test_a_mixture_trains_on_no_held_out_image(data):
    mixed = replace(data, mix=[MixedSet(dataset="refcoco+")], val_split="held_out")
    train, val = load_training_splits(mixed)
    apart = {number for number in range(1, 31) if is_held_out(number, 0.3)}
    assert set(val["image_id"]) == apart and not set(train["image_id"]) & apart
    assert {kinds[0] for kinds in train["sentence_kinds"]} == {"refcoco", "refcoco+"}


def test_a_held_out_split_without_a_share_is_refused(data):
    with pytest.raises(ValueError, match=r"data\.held_out is 0"):
        load_splits(replace(data, held_out=0.0), ["held_out"])
