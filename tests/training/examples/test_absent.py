"""Sentences about absent things: in rows without a target, about categories that no annotation of the image has."""

import pytest
from builders import Folder
from PIL import Image

from training.configuration import DataSettings, MixedSet
from training.examples.splits import load_splits, load_training_splits


@pytest.fixture
def root(tmp_path):
    """Three images with two zebras, a zebra and a cup, and a cup; only the first object of each image has sentences."""
    folder = Folder(tmp_path)
    folder.categories = [{"id": 3, "name": "zebra"}, {"id": 4, "name": "cup"}]
    folder.images = [{"id": 10 + i, "file_name": f"COCO_{i}.png", "height": 40, "width": 60} for i in range(3)]
    kinds = [(10, 3), (10, 3), (11, 3), (11, 4), (12, 4)]
    square = {"segmentation": [[4, 4, 14, 4, 14, 14, 4, 14]], "bbox": [4, 4, 10, 10]}
    folder.annotations = [
        {"id": 500 + i, "image_id": image, "category_id": category} | square
        for i, (image, category) in enumerate(kinds)
    ]
    folder.refs = [
        folder.refs[i] | {"ref_id": i, "ann_id": 500 + ann, "image_id": image, "split": "train", "sentences": said}
        for i, (ann, image, said) in enumerate(
            [
                (0, 10, [{"sent_id": 1, "sent": "left zebra"}, {"sent_id": 2, "sent": "the one on the left"}]),
                (2, 11, [{"sent_id": 3, "sent": "striped zebra"}]),
                (4, 12, [{"sent_id": 4, "sent": "white cup"}, {"sent_id": 5, "sent": "the one on the left"}]),
            ]
        )
    ]
    folder.write()
    for image in folder.images:
        Image.new("RGB", (60, 40)).save(folder.image_folder / image["file_name"])
    return tmp_path


def test_each_image_gets_sentences_about_categories_that_it_has_none_of(root):
    (rows,) = load_splits(DataSettings(root=str(root), absent=2), ["train"])
    added = {row["image_id"]: row for row in rows if row["no_target"]}
    assert set(added) == {10, 12}
    # "the one on the left" is said of a zebra too, so it may be true of the first image
    assert set(added[10]["sentences"]) == {"white cup"} and set(added[12]["sentences"]) <= {
        "left zebra",
        "striped zebra",
    }
    for row in added.values():
        assert len(row["sentences"]) == 2 and row["ann_ids"] == [] and row["sentence_kinds"] == ["absent"] * 2
    assert [row["sentences"] for row in rows if not row["no_target"]] == [
        ["left zebra", "the one on the left"],
        ["striped zebra"],
        ["white cup", "the one on the left"],
    ]
    (again,) = load_splits(DataSettings(root=str(root), absent=2), ["train"])
    assert list(again["sentences"]) == list(rows["sentences"])


def test_data_that_do_not_tell_what_else_is_in_an_image_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"data\.absent needs a source refer.*'folder'"):
        load_splits(DataSettings(source="folder", root=str(tmp_path), absent=1), ["train"])
    mixed = DataSettings(root=str(root), mix=[MixedSet(source="folder", root=str(tmp_path), absent=1)])
    with pytest.raises(ValueError, match=r"data\.absent needs a source refer.*'folder'"):
        load_training_splits(mixed)
