"""The leakage guard knows the images of a training by COCO's ids and by their content."""

import shutil
from pathlib import Path

import pytest
from builders import image_bytes
from papers import write_sets

from training.configuration import DataSettings, MixedSet
from training.preparation import prepare_refer
from training.scoring.leakage import SCENES, TrainingImages, training_images

SETS = {
    ("refcoco", "unc"): {"train": [1, 2, 3], "val": [4]},
    ("refcocog", "umd"): {"train": [2, 4, 5], "val": [3]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_sets(tmp_path_factory.mktemp("refer"), SETS)


def image_of(root: Path, image_id: int) -> tuple[int, dict]:
    path = root / "images" / "train2014" / f"COCO_train2014_{image_id:012d}.png"
    return image_id, {"path": str(path), "bytes": None}


def known(trained: TrainingImages, root: Path) -> set[int]:
    return {image_id for image_id in range(1, 6) if trained.has(*image_of(root, image_id))}


def test_images_of_the_training_split_are_known(root):
    trained = training_images(DataSettings(root=str(root)))
    assert known(trained, root) == {1, 2, 3} and trained.sets == {"refcoco"}


def test_a_mixture_was_not_trained_on_what_it_holds_out(root):
    trained = training_images(DataSettings(root=str(root), mix=[MixedSet(dataset="refcocog", split_by="umd")]))
    assert known(trained, root) == {1, 2, 5} and trained.sets == {"refcoco", "refcocog"}


def test_a_copy_under_another_name_is_known_by_its_content(root, tmp_path):
    trained = training_images(DataSettings(root=str(root)))
    copy = shutil.copy(image_of(root, 2)[1]["path"], tmp_path / "photo.png")
    assert trained.has(77, {"path": str(copy), "bytes": None})
    assert trained.has(77, {"path": None, "bytes": Path(copy).read_bytes()})
    assert not trained.has(2, {"path": None, "bytes": image_bytes("PNG")})  # ids that are not COCO's say nothing


def test_a_prepared_folder_says_its_set(root, tmp_path):
    prepare_refer(root, tmp_path / "made", "refcocog", "umd")
    trained = training_images(DataSettings(source="folder", root=str(tmp_path / "made")))
    assert known(trained, root) == {2, 4, 5} and trained.sets == {"refcocog"}


def test_another_root_takes_the_place_of_one_that_is_gone(root, tmp_path):
    trained = training_images(DataSettings(root=str(tmp_path / "gone")), str(root))
    assert known(trained, root) == {1, 2, 3}
    with pytest.raises(FileNotFoundError):
        training_images(DataSettings(root=str(tmp_path / "gone")), str(tmp_path))


def test_scenes_are_no_photographs(root):
    trained = training_images(DataSettings(source="scenes"))
    assert known(trained, root) == set() and trained.sets == {SCENES}
