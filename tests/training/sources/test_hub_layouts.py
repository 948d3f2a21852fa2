"""Other people's copies of RefCOCO and prepared folders: each is read as the REFER rows that it was made from."""

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from builders import HUB_LAYOUTS, Folder, write_hub_copy

from training.configuration import DataSettings
from training.examples.splits import load_splits
from training.preparation import prepare_refer
from training.sources.hub_layouts import RowFolder
from training.sources.images import content_hash, open_image
from training.sources.masks import decode_mask, encode_mask
from training.sources.refer import REFER_FEATURES

SPLITS = {"train": [31, 7, 19, 2], "val": [4, 3, 5]}
LAYOUTS = list(HUB_LAYOUTS)
# What a copy cannot tell is empty, and is left out of comparisons.
LOST = {
    "lmms_lab": {"ann_ids", "category", "sentence_ids"},
    "jxu124": {"category"},
    "moondream": {"ann_ids", "category", "sentence_ids", "image_id", "ref_id"},
}


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "refer").fill(SPLITS)


def copy_of(folder: Folder, layout: str, **options) -> RowFolder:
    target = folder.root.parent / "RefCopy"
    write_hub_copy(folder, layout, target, {"train": "train", "val": "validation"}, **options)
    return RowFolder(str(target), image_dir=str(folder.root / "images"))


def pixels(row: dict) -> np.ndarray:
    return np.asarray(open_image(row["image"]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_the_rows_that_it_was_made_from(folder, layout, streaming):
    copy, read = copy_of(folder, layout), folder.load()
    assert set(copy.splits) == {"train", "validation"}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = copy.read(name, streaming=streaming)
        assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
        assert rows.features == REFER_FEATURES
        by_sentence = {row["sentences"][0]: row for row in rows}
        assert len(by_sentence) == len(list(rows)) == len(read[split])
        for expected in read[split]:
            row = by_sentence[expected["sentences"][0]]
            for column in set(REFER_FEATURES) - {"image", "sentence_kinds"} - LOST[layout]:
                assert row[column] == expected[column], column
            assert row["sentence_kinds"] == ["RefCopy"] * len(expected["sentences"])
            assert len(row["sentence_ids"]) == len(row["sentences"])
            assert np.array_equal(pixels(row), pixels(expected))


@pytest.mark.parametrize("layout", ["lmms_lab", "jxu124"])
def test_the_images_of_a_copy_are_known_without_its_masks(folder, layout):
    copy = copy_of(folder, layout)
    rows = copy.read("train")
    images = list(copy.images("train"))
    assert [image_id for image_id, _ in images] == rows["image_id"][:]
    for (_, image), row in zip(images, rows, strict=True):
        assert content_hash(image) == content_hash(row["image"])
    assert {image_id for image_id, _ in copy.images("validation")} == set(SPLITS["val"])


def test_images_without_a_coco_id_are_told_apart_by_negative_numbers(folder):
    rows = copy_of(folder, "moondream").read("train")
    files = {row["image_id"]: row["image"]["bytes"] for row in rows}
    assert len(files) == len(SPLITS["train"]) and max(files) < 0
    assert all(row["image"]["bytes"] == files[row["image_id"]] for row in rows)
    assert max(image_id for image_id, _ in RowFolder(str(folder.root.parent / "RefCopy")).images("train")) < 0


def test_a_stream_is_not_copied(folder, datasets_cache):
    copy = copy_of(folder, "lmms_lab", shards=3)
    before = sorted(datasets_cache.rglob("*.arrow"))
    rows = copy.read("train", streaming=True)
    assert rows.num_shards == 3 and len(list(rows)) == len(folder.load()["train"])
    assert sorted(datasets_cache.rglob("*.arrow")) == before == []


def test_reading_one_split_copies_no_other(folder, tmp_path, datasets_cache):
    prepare_refer(folder.root, tmp_path / "prepared")
    RowFolder(str(tmp_path / "prepared")).read("val")
    copied = [path.name for path in datasets_cache.rglob("*.arrow")]
    assert len(copied) == 1 and "val" in copied[0]


def test_that_a_validation_split_is_a_mixture_is_said(folder, caplog):
    target = write_hub_copy(folder, "lmms_lab", folder.root.parent / "copy", {"train": "testA", "val": "val"})
    with caplog.at_level(logging.WARNING):
        RowFolder(str(target)).read("testA")
        assert not caplog.records
        RowFolder(str(target)).read("val")
    assert "those of Google together" in caplog.text


# Rows that someone made


def prepared_with(folder: Folder, **changes) -> RowFolder:
    """A prepared folder whose second row of train is changed."""
    prepare_refer(folder.root, folder.root.parent / "mine")
    file = next((folder.root.parent / "mine" / "data").glob("train*"))
    rows = list(datasets.Dataset.from_parquet(str(file)).cast(REFER_FEATURES))
    rows[1].update(changes)
    datasets.Dataset.from_list(rows, features=REFER_FEATURES).to_parquet(file)
    return RowFolder(str(folder.root.parent / "mine"))


EMPTY = encode_mask(np.zeros((30, 40), bool))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": []}, r"its sentences must be texts, one or more, got \[\]"),
        ({"sentences": ["a", " "]}, "its sentences must be texts"),
        ({"sentence_kinds": []}, r"its sentence_kinds must be as many as its sentences, \d, got \[\]"),
        ({"mask": {"size": [30, 40], "counts": "99"}}, "fill a mask of size"),
        ({"mask": EMPTY}, "its mask has no pixel and no_target is False"),
        ({"no_target": True}, "its mask has pixels and no_target is True"),
        ({"boxes": [[1, 2, 3]]}, r"its boxes must be \[x, y, width, height\] in pixels each"),
        ({"boxes": [[28, 28, 1, 1]]}, "it contradicts itself: its mask has the box .*their IoU is 0.00"),
    ],
)
def test_a_made_row_that_cannot_be_used_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=rf"mine, train: row 1 \(ref_id \d+\) cannot be used: .*{message}"):
        prepared_with(folder, **changes).read("train")


def test_made_rows_without_boxes_are_taken(folder):
    assert prepared_with(folder, boxes=[]).read("train")[1]["boxes"] == []
    assert prepared_with(Folder(folder.root.parent / "b" / "r").fill(SPLITS), mask=EMPTY, no_target=True).read("train")


# By the settings


@pytest.mark.parametrize("layout", ["prepared", *LAYOUTS])
def test_the_settings_read_every_layout(folder, tmp_path, layout):
    root = tmp_path / "copy"
    if layout == "prepared":
        prepare_refer(folder.root, root)
    else:
        write_hub_copy(folder, layout, root, {"train": "train", "val": "val"})
    data = DataSettings(source="folder", root=str(root), image_dir=str(folder.root / "images"))
    val, train = load_splits(data, ["val", "train"])
    read = folder.load()
    assert sorted(map(tuple, val["sentences"])) == sorted(map(tuple, read["val"]["sentences"]))
    assert sorted(map(tuple, train["sentences"])) == sorted(map(tuple, read["train"]["sentences"]))
    with pytest.raises(ValueError, match=r"copy has no split 'test'; it has (train, val|val, train)\."):
        load_splits(data, ["val", "test"])


# Bad input


def write_rows(root: Path, **columns: list) -> Path:
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(columns).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    return root


def test_an_unknown_layout_names_its_columns(tmp_path):
    root = write_rows(tmp_path / "odd", image=["a"], caption=["b"])
    with pytest.raises(
        ValueError, match=r"odd has the columns caption, image, no layout known here.*lmms-lab \(answer"
    ):
        RowFolder(str(root))


def test_paths_of_images_need_their_folder(folder):
    target = write_hub_copy(folder, "jxu124", folder.root.parent / "copy", {"train": "train"})
    with pytest.raises(ValueError, match=r"copy holds paths of images.*data\.image_dir"):
        RowFolder(str(target))
    with pytest.raises(
        ValueError, match=r"copy: row 0 cannot be used: the image .*nowhere/coco/.*\.png does not exist"
    ):
        RowFolder(str(target), image_dir="nowhere").read("train")


@pytest.mark.parametrize("name", ["gone", "./gone", "prepared/gone", "/gone/gone", "a/b/c", "owner name/set"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "prepared").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"^{name} is not a folder, and not the id"):
        RowFolder(name)


def test_an_id_on_the_hub_is_asked_for_and_its_absence_said(tmp_path, monkeypatch):
    def absent(path):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", absent)
    with pytest.raises(FileNotFoundError, match=r"owner/set gives no dataset: Dataset 'owner/set' doesn't exist"):
        RowFolder("owner/set")


def test_other_folders_are_refused_with_what_they_are(folder, tmp_path):
    with pytest.raises(ValueError, match=r"is a REFER folder, with refcoco/refs\(unc\)\.p: set data\.source to refer"):
        RowFolder(str(folder.root))
    with pytest.raises(ValueError, match=r"must hold Parquet files.*imagefolder"):
        RowFolder(str(folder.image_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty gives no dataset"):
        RowFolder(str(tmp_path / "empty"))


def changed(folder: Folder, layout: str, change, which: slice = slice(None)) -> RowFolder:
    """A copy with rows changed."""
    target = write_hub_copy(folder, layout, folder.root.parent / "sound", {"val": "train"})
    rows = datasets.Dataset.from_parquet(str(next(target.rglob("*.parquet"))))
    rows = list(rows.cast_column("image", datasets.Image(decode=False)) if "image" in rows.features else rows)
    for row in rows[which]:
        change(row)
    (folder.root.parent / "copy" / "data").mkdir(parents=True)
    copy = datasets.Dataset.from_list(rows)
    copy.to_parquet(folder.root.parent / "copy" / "data" / "train-00000-of-00001.parquet")
    return RowFolder(str(folder.root.parent / "copy"), image_dir=str(folder.root / "images"))


def without_last(row: dict) -> None:
    row["segmentation"] = row["segmentation"][:-1]


def with_a_damaged_polygon(row: dict) -> None:
    row["raw_anns"] = json.dumps(json.loads(row["raw_anns"]) | {"segmentation": [[1, 2]]})


def with_a_larger_mask(row: dict) -> None:
    row["samples"][0]["mask"]["size"] = [400, 400]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("lmms_lab", without_last, "even number of coordinates"),
        ("lmms_lab", lambda row: row.update(answer=[]), "its sentences must be texts"),
        ("lmms_lab", lambda row: row.update(answer=["zebra", " "]), "its sentences must be texts"),
        ("lmms_lab", lambda row: row.update(iscrowd=1), "it is a crowd"),
        ("lmms_lab", lambda row: row.update(file_name="cat.jpg"), "the file name 'cat.jpg' is none of COCO's"),
        ("lmms_lab", lambda row: row.update(segmentation=[900.0, 900.0, 950.0, 900.0, 950.0, 950.0]), "no pixel"),
        ("lmms_lab", lambda row: row.update(bbox=[1.0, 1.0, 2.0, 2.0]), "its mask has the box .*their IoU is 0.00"),
        ("lmms_lab", lambda row: row["image"].update(bytes=b"<html>"), "damaged, or not an image"),
        ("jxu124", lambda row: row.update(sentences="{"), "Expecting property name"),
        ("jxu124", lambda row: row.update(sentences=None), "it has no raw_sentences or sentences"),
        ("jxu124", lambda row: row.update(raw_anns="{}"), "KeyError.*segmentation"),
        ("jxu124", with_a_damaged_polygon, "no polygon of at least 3 points"),
        ("moondream", with_a_larger_mask, "they add up to|has the size"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, layout, change, message):
    copy = changed(folder, layout, change, slice(1, 2))
    with pytest.raises(ValueError, match=f"copy: row 1 cannot be used: .*({message})"):
        copy.read("train")
    with pytest.raises(ValueError, match=f"copy: row 1 cannot be used: .*({message})"):
        list(copy.read("train", streaming=True))


@pytest.mark.parametrize("form", ["a dict", "a list of dicts", "under the name anns", "sentences as plain texts"])
def test_the_forms_of_json_that_copies_use(folder, form):
    def change(row: dict) -> None:
        if form == "a list of dicts":
            row["raw_anns"] = f"[{row['raw_anns']}]"
        elif form == "under the name anns":
            row["anns"] = row.pop("raw_anns")
        elif form == "sentences as plain texts":
            row["sentences"] = json.dumps([sentence["sent"] for sentence in json.loads(row["sentences"])])

    rows, read = changed(folder, "jxu124", change).read("train"), folder.load()["val"]
    assert rows["sentences"][:] == read["sentences"][:]
    masks = zip(rows["mask"], read["mask"], strict=True)
    assert all(np.array_equal(decode_mask(ours), decode_mask(theirs)) for ours, theirs in masks)
