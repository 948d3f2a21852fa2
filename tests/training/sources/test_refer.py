"""REFER datasets: the loader on real, made-up and spoilt folders."""

import collections
import json
import logging
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from builders import Folder, spoil
from conftest import REFER_MINI, needs_refer_mini
from reference import fill_even_odd

from training.sources.images import open_image
from training.sources.masks import decode_mask, encode_mask
from training.sources.refer import REFER_FEATURES, load_refer, refer_images

# REFER, real


@pytest.fixture(scope="module")
def refer_mini() -> datasets.DatasetDict:
    return load_refer(REFER_MINI)


@pytest.fixture(scope="module")
def refer_mini_files() -> tuple[list, dict]:
    refs = pickle.loads((REFER_MINI / "refcoco" / "refs(unc).p").read_bytes())
    return refs, json.loads((REFER_MINI / "refcoco" / "instances.json").read_text())


@needs_refer_mini
def test_refer_mini_joins_exactly(refer_mini, refer_mini_files):
    counts = {split: (len(rows), sum(map(len, rows["sentences"]))) for split, rows in refer_mini.items()}
    assert counts == {"train": (858, 2418), "val": (84, 241)}
    refs, instances = refer_mini_files
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    names = {category["id"]: category["name"] for category in instances["categories"]}
    for split, rows in refer_mini.items():
        assert rows.features == REFER_FEATURES
        own = [ref for ref in refs if ref["split"] == split]
        for row, ref in zip(rows, own, strict=True):
            assert (row["ref_id"], *row["ann_ids"], row["image_id"]) == tuple(
                ref[key] for key in ("ref_id", "ann_id", "image_id")
            )
            assert row["sentence_ids"] == ref["sent_ids"]
            assert row["sentences"] == [sentence["sent"] for sentence in ref["sentences"]]
            assert row["sentence_kinds"] == ["refcoco"] * len(ref["sentences"])
            assert row["category"] == names[ref["category_id"]]
            assert row["boxes"] == [pytest.approx(annotations[ref["ann_id"]]["bbox"])]
            image = images[ref["image_id"]]
            assert Path(row["image"]["path"]) == REFER_MINI / "images" / "train2014" / image["file_name"]
            assert row["image"]["bytes"] is None
            assert row["mask"]["size"] == [image["height"], image["width"]]


@needs_refer_mini
def test_refer_mini_plus_has_its_own_sentences(refer_mini):
    plus = load_refer(REFER_MINI, dataset="refcoco+")
    assert list(plus) == ["val"]
    assert (len(plus["val"]), sum(map(len, plus["val"]["sentences"]))) == (84, 244)
    assert plus["val"]["sentences"] != refer_mini["val"]["sentences"]
    assert {row["path"] for row in plus["val"]["image"]} == {row["path"] for row in refer_mini["val"]["image"]}


@needs_refer_mini
def test_refer_mini_masks_agree_with_area_box_and_outline(refer_mini, refer_mini_files):
    annotations = {annotation["id"]: annotation for annotation in refer_mini_files[1]["annotations"]}
    overlaps = []
    for row in (row for rows in refer_mini.values() for row in rows):
        mask, annotation = decode_mask(row["mask"]), annotations[row["ann_ids"][0]]
        assert mask.any()
        ys, xs = np.nonzero(mask)
        x, y, width, height = row["boxes"][0]
        assert x - 1.5 <= xs.min() and xs.max() + 1 <= x + width + 1.5
        assert y - 1.5 <= ys.min() and ys.max() + 1 <= y + height + 1.5
        outline = 2 * (width + height) * len(annotation["segmentation"])
        assert abs(mask.sum() - annotation["area"]) <= 0.5 * outline
        filled = fill_even_odd(annotation["segmentation"], *mask.shape)
        assert (mask != filled).sum() <= 0.5 * outline
        overlaps.append((mask & filled).sum() / (mask | filled).sum())
    assert min(overlaps) > 0.85 and np.mean(overlaps) > 0.985


@needs_refer_mini
def test_refer_mini_images_open_at_the_stated_size(refer_mini):
    for row in refer_mini["val"].select(range(0, 84, 6)):
        assert open_image(row["image"]).size == (row["mask"]["size"][1], row["mask"]["size"][0])


# REFER, made up


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_split_names_and_the_order_of_refs_are_kept(folder):
    loaded = folder.load()
    assert list(loaded) == ["train", "val", "testA", "testB"]
    assert loaded["train"]["ref_id"] == [100, 104] and loaded["testA"]["ref_id"] == [102]
    assert loaded["testB"][0]["sentences"] == ["the zebra 3", "striped one 3"]
    assert loaded["testB"][0]["category"] == "zebra"
    assert decode_mask(loaded["testA"][0]["mask"]).sum() == 7
    assert list(folder.load(splits=["testB", "val"])) == ["testB", "val"]


def test_the_refs_of_other_splits_need_nothing(folder):
    (folder.image_folder / "COCO_1.png").unlink()
    assert list(folder.load(splits=["train", "testA"])) == ["train", "testA"]


@pytest.mark.parametrize(
    "images", ["images/mscoco/images/train2014", "images/train2014", "train2014", "images"], ids=lambda name: name
)
def test_images_are_found_in_every_usual_place(tmp_path, images):
    path = Path(Folder(tmp_path, image_dir=images).load()["val"][0]["image"]["path"])
    assert path == tmp_path / images / "COCO_1.png"


def test_image_dir_comes_before_the_usual_places(folder, tmp_path):
    other = tmp_path / "elsewhere"
    folder.image_folder.rename(other)
    assert Path(folder.load(image_dir=other)["val"][0]["image"]["path"]) == other / "COCO_1.png"


def test_other_datasets_and_split_authors_are_read(tmp_path):
    loaded = Folder(tmp_path, dataset="refcocog", split_by="umd").load(splits=["val"])
    assert loaded["val"]["ref_id"] == [101]


def test_a_relative_root_gives_paths_that_hold_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.root = Path(".")
    path = folder.load()["val"][0]["image"]["path"]
    monkeypatch.chdir("/")
    assert open_image({"path": path, "bytes": None}).size == (60, 40)


def test_a_dataset_survives_saving(folder, tmp_path):
    loaded = folder.load()["train"]
    loaded.save_to_disk(tmp_path / "saved")
    again = datasets.load_from_disk(tmp_path / "saved")
    assert again.features == REFER_FEATURES
    assert again.remove_columns("image")[:] == loaded.remove_columns("image")[:]
    for before, after in zip(loaded["image"], again["image"], strict=True):  # saving put the bytes in the path's place
        assert np.array_equal(np.asarray(open_image(before)), np.asarray(open_image(after)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil(annotations_1={"id": 999}), "ref 101: its annotation 501 is missing in instances.json"),
        (spoil(images_1={"id": 999}), "ref 101: its image 11 is missing in instances.json"),
        (spoil(images_1={"file_name": "gone.png"}), r"ref 101: its image .*/gone\.png does not exist"),
        (spoil(refs_1={"ann_id": [501, 502]}), "ref 101: it is about image 11, its annotation 502 about 10"),
        (spoil(refs_1={"ann_id": [501, -1]}), "ref 101: its annotation -1 is missing in instances.json"),
        (spoil(refs_1={"ann_id": []}), r"ref 101: its ann_id must be an integer or a list of integers, got \[\]"),
        (spoil(refs_1={"ann_id": ["501"]}), r"ref 101: its ann_id must be an integer or a list .*, got \['501'\]"),
        (spoil(refs_1={"ann_id": None}), "ref 101: its ann_id must be an integer or a list of integers, got None"),
        (spoil(refs_1={"ann_id": "501"}), "ref 101: its ann_id must be an integer or a list of integers, got '501'"),
        (spoil(refs_1={"no_target": True}), r"ref 101: it says that it has no target, and names .* \[501\]"),
        (spoil(refs_1={"image_id": [11]}), r"ref 101: its image_id must be an integer, got \[11\]"),
        (spoil(refs_1={"image_id": 10}), "ref 101: it is about image 10, its annotation 501 about 11"),
        (spoil(refs_1={"sentences": []}), "ref 101: it has no sentences"),
        (spoil(refs_1={"sentences": None}), "ref 101: it has no sentences"),
        (spoil(refs_1={"sentences": [{"sent_id": 5, "sent": " \n"}]}), "ref 101: its sentence 5 is empty"),
        (spoil(refs_1={"sentences": [{"sent_id": 5, "sent": 7}]}), "ref 101: its sentence 5 is empty or not"),
        (spoil(refs_1={"sentences": [{"sent_id": 5, "sent": "a \ud83e"}]}), "ref 101: its sentence 5 is not"),
        (spoil(refs_1={"sentences": [{"sent": "zebra"}]}), "ref 101: one of its sentences has no sent_id"),
        (spoil(annotations_1={"category_id": 77}), "ref 101: the category 77 of its annotation 501 is missing"),
        (spoil(annotations_1={"bbox": [1, 2, 3]}), "ref 101: the bbox of its annotation 501"),
        (spoil(annotations_1={"bbox": [1, 2, 3, float("nan")]}), "ref 101: the bbox of its annotation 501"),
        (spoil(images_1={"height": 0}), "ref 101: its image 11 needs file_name, height and width"),
        (spoil(images_1={"width": None}), "ref 101: its image 11 needs file_name, height and width"),
        (spoil(images_1={"file_name": None}), "ref 101: its image 11 needs file_name, height and width"),
        (spoil(annotations_1={"segmentation": [[1, 1, 9, 1, 9, 9, 4]]}), "ref 101.*501.*malformed.*got 7"),
        (spoil(annotations_1={"segmentation": None}), "ref 101.*501.*malformed.*NoneType"),
        (
            spoil(annotations_1={"segmentation": {"size": [60, 40], "counts": [2400]}}),
            r"ref 101.*501.*malformed.*size \[60, 40\]",
        ),
        (
            spoil(annotations_1={"segmentation": [[100, 100, 120, 100, 120, 120]]}),
            "ref 101.*501.*no pixel in its image of 40 x 60",
        ),
        (spoil(annotations_1={"segmentation": {"size": [40, 60], "counts": [2400]}}), "ref 101.*501.*no pixel"),
    ],
)
def test_a_ref_that_cannot_be_used_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        folder.load(splits=["val"])


def test_all_refs_are_checked_before_the_first_mask_is_drawn(folder):
    spoil(annotations_0={"segmentation": [[1, 1, 2]]}, refs_2={"sentences": []}, refs_3={"ann_id": 9})(folder)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: 2 refs cannot be used; the first is ref 102"):
        folder.load()


def test_an_unknown_split_names_those_there_are(folder):
    with pytest.raises(ValueError, match="no split 'test'; it has train, val, testA, testB"):
        folder.load(splits=["train", "test"])


def test_missing_folders_and_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_refer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.p does not exist.*: none"):
        load_refer(tmp_path)
    folder.load()
    with pytest.raises(FileNotFoundError, match=r"refs\(google\)\.p does not exist.*refcoco/refs\(unc\)\.p"):
        load_refer(tmp_path, split_by="google")
    with pytest.raises(FileNotFoundError, match=r"refcoco\+/refs\(unc\)\.p does not exist.*refcoco/refs"):
        load_refer(tmp_path, dataset="refcoco+")
    with pytest.raises(FileNotFoundError, match=r"no folder of images, looked for .*elsewhere"):
        folder.load(image_dir=tmp_path / "elsewhere")
    (folder.folder / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist"):
        load_refer(tmp_path)


def test_no_folder_of_images_names_where_they_were_looked_for(folder):
    folder.image_folder.parent.rename(folder.root / "photographs")
    with pytest.raises(FileNotFoundError, match=r"no folder of images, looked for .*mscoco/images/train2014"):
        folder.load()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}']
)
def test_instances_that_are_none_name_the_file(folder, content):
    folder.load()
    (folder.folder / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=r"refcoco/instances\.json is not JSON with"):
        load_refer(folder.root)


@pytest.mark.parametrize("refs", [{}, ["ref"], [{"ref_id": 1}], [{"split": 3}], None])
def test_refs_that_are_none_name_the_file(folder, refs):
    folder.refs = refs
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p must hold a list of refs"):
        folder.load()


def test_refs_that_name_a_class_are_refused(folder):
    folder.refs[0]["extra"] = collections.OrderedDict()
    with pytest.raises(pickle.UnpicklingError, match=r"refs\(unc\)\.p.*collections\.OrderedDict"):
        folder.load()


def test_the_images_of_each_split_are_known_without_masks(folder):
    spoil(annotations_0={"segmentation": None})(folder)
    (folder.image_folder / "COCO_1.png").unlink()
    with pytest.raises(ValueError, match="cannot be used"):
        folder.load()
    first = folder.image_folder / "COCO_0.png"
    assert refer_images(folder.root, "refcoco", "unc") == {
        "train": [(10, first), (10, first)],
        "val": [(11, folder.image_folder / "COCO_1.png")],
        "testA": [(10, first)],
        "testB": [(11, folder.image_folder / "COCO_1.png")],
    }


# Ids that come twice


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("images", r"two of the images have the id 10: file_name 'COCO_0.png' and file_name 'COCO_9.png'"),
        ("annotations", r"two of the annotations have the id 500: image_id 10 and image_id 11"),
        ("categories", r"two of the categories have the id 3: name 'zebra' and name 'cup'"),
    ],
)
def test_an_id_of_two_records_is_refused(folder, table, message):
    records = getattr(folder, table)
    changed = {"images": {"file_name": "COCO_9.png"}, "annotations": {"image_id": 11}, "categories": {"name": "cup"}}
    records.append(records[0] | changed[table])
    with pytest.raises(ValueError, match=rf"instances\.json: {message}"):
        folder.load()


def test_a_record_that_is_written_twice_is_taken(folder):
    folder.images.append(dict(folder.images[0]))
    assert len(folder.load()["train"]) == 2


# Masks that contradict their box


def marked(folder: Folder, segmentation, box: list[float], area: float | None = None) -> None:
    """Gives the annotation of the val ref this segmentation; its image has 40 x 60 pixels."""
    folder.annotations[1].update(segmentation=segmentation, bbox=box, area=area)


BOX = [6, 10, 20, 8]  # of the object that is meant, x first
OBJECT = np.zeros((40, 60), dtype=bool)
OBJECT[10:18, 6:26] = True
CORNERS = np.array([[6, 10], [26, 10], [26, 18], [6, 18]])


def by_rows(mask: np.ndarray) -> dict:
    runs = np.diff(np.flatnonzero(np.diff(mask.ravel().astype(int), prepend=0, append=0)), prepend=0)
    return {"size": list(mask.shape), "counts": [*runs.tolist(), int(mask.size - runs.sum())]}


@pytest.mark.parametrize(
    ("segmentation", "box", "mistake"),
    [
        (by_rows(OBJECT), BOX, "run lengths look as if they were counted row by row"),
        ([CORNERS[:, ::-1].ravel().tolist()], BOX, "Its x and y look swapped"),
        (encode_mask(OBJECT), [10, 6, 8, 20], "Its x and y look swapped"),
        ([(2 * CORNERS).ravel().tolist()], BOX, "before it was resized, 2 times as large"),
        ([(CORNERS / 1.5).ravel().tolist()], BOX, r"before it was resized, 0\.667 times as large"),
        (encode_mask(OBJECT), [6, 10, 26, 18], None),  # IoU 0.34, but of the box cut at the image's sides
        ([[40, 2, 59, 2, 59, 38, 40, 38]], BOX, None),
    ],
)
def test_a_mask_that_contradicts_its_box_is_refused_with_the_mistake(folder, segmentation, box, mistake):
    marked(folder, segmentation, box)
    said = r"refs\(unc\)\.p: ref 101: its annotation 501 contradicts itself: its mask has .*instances\.json"
    with pytest.raises(ValueError, match=said) as error:
        folder.load(splits=["val"])
    assert re.search(mistake or "looks? like two corners|or more is accepted", str(error.value))


@pytest.mark.parametrize(
    ("segmentation", "box", "area"),
    [
        (encode_mask(OBJECT), BOX, 160),
        ([CORNERS.ravel().tolist()], BOX, 160.0),
        ([CORNERS.ravel().tolist()], [6.4, 10.4, 19.3, 7.3], None),
        ([[5, 5, 6.2, 5, 6.2, 6.2, 5, 6.2]], [5, 5, 1.2, 1.2], 1.44),  # a pixel or four: the edges are near
        ([[50, 30, 80, 30, 80, 60, 50, 60]], [50, 30, 30, 30], None),  # reaches out of the image
    ],
)
def test_a_mask_that_agrees_is_taken_without_a_word(folder, segmentation, box, area, caplog):
    marked(folder, segmentation, box, area)
    folder.load(splits=["val"])
    assert not caplog.records


@pytest.mark.parametrize("box", [[6, 10, 20, 12], [6, 10, 20, 30]], ids=["IoU 0.67", "stray pixels lost, IoU 0.27"])
def test_doubtful_masks_are_counted_once(folder, caplog, box):
    marked(folder, [CORNERS.ravel().tolist()], box, 170)
    folder.annotations[0].update(area=900)
    with caplog.at_level(logging.WARNING):
        folder.load()
    (record,) = caplog.records
    assert re.search(r"instances\.json: 2 masks agree only roughly .* first is annotation 500", record.getMessage())


@needs_refer_mini
def test_refer_mini_has_no_doubtful_mask(caplog):
    load_refer(REFER_MINI)
    load_refer(REFER_MINI, "refcoco+")
    assert not caplog.records


# gRefCOCO: several targets and none


@pytest.fixture
def generalized(tmp_path) -> Folder:
    """Refs to two objects of two kinds, to two of one kind, to one and, in both of the known ways, to none; one image."""
    folder = Folder(tmp_path, dataset="grefcoco").fill({"train": [2, 5, 8, 11, 14, 17]})
    by_image = {
        ref["image_id"]: ref for ref in folder.refs
    }  # each has refs 0, 1, 2 of the categories zebra, cup, zebra
    for image_id, changes in {
        2: {"ann_id": [20, 21], "category_id": [3, 4], "no_target": False},
        5: {"ann_id": [50, 52], "category_id": [3, 3], "no_target": False},
        8: {"ann_id": [81], "category_id": [4], "no_target": False},
        11: {"ann_id": [-1], "category_id": [-1], "no_target": True},
        14: {"ann_id": [-1], "category_id": [-1]},
        17: {"ann_id": [170, 171, 170]},
    }.items():
        by_image[image_id].update(changes)
    folder.refs = list(by_image.values())
    return folder


def test_several_targets_are_one_mask(generalized):
    rows = {row["image_id"]: row for row in generalized.load()["train"]}
    annotations = {annotation["id"]: annotation for annotation in generalized.annotations}
    expected = {2: [20, 21], 5: [50, 52], 8: [81], 17: [170, 171]}
    for image_id, ann_ids in expected.items():
        row = rows[image_id]
        assert (row["ann_ids"], row["no_target"]) == (ann_ids, False)
        assert row["boxes"] == [annotations[ann_id]["bbox"] for ann_id in ann_ids]
        size = row["mask"]["size"]
        union = np.zeros(size, bool)
        for ann_id in ann_ids:
            left, top, width, height = annotations[ann_id]["bbox"]
            union[top : top + height, left : left + width] = True  # every polygon is its box
        assert np.array_equal(decode_mask(row["mask"]), union)
    assert [rows[i]["category"] for i in (2, 5, 8)] == ["zebra, cup", "zebra", "cup"]


def test_a_ref_to_nothing_has_an_empty_mask(generalized):
    rows = {row["image_id"]: row for row in generalized.load()["train"]}
    images = {image["id"]: image for image in generalized.images}
    for image_id in (11, 14):
        row = rows[image_id]
        assert (row["ann_ids"], row["no_target"], row["category"], row["boxes"]) == ([], True, "", [])
        assert decode_mask(row["mask"]).shape == (images[image_id]["height"], images[image_id]["width"])
        assert not decode_mask(row["mask"]).any()


def test_one_target_of_several_may_lie_outside_the_image_but_not_all(generalized):
    outside = [100, 100, 120, 100, 120, 120]
    annotations = {annotation["id"]: annotation for annotation in generalized.annotations}
    annotations[20].update(segmentation=[outside], bbox=[100, 100, 20, 20])
    assert {row["image_id"]: decode_mask(row["mask"]).any() for row in generalized.load()["train"]}[2]
    annotations[21].update(segmentation=[outside], bbox=[100, 100, 20, 20])
    with pytest.raises(ValueError, match=r"its annotation 20, 21 has no pixel .*instances\.json"):
        generalized.load()


def test_refs_that_are_not_json_name_the_file(generalized):
    generalized.write()
    (generalized.folder / "grefs(unc).json").write_text("[{")
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json is not JSON"):
        load_refer(generalized.root, "grefcoco")
    with pytest.raises(FileNotFoundError, match=r"refs\(umd\)\.p does not exist.*grefcoco/grefs\(unc\)\.json"):
        load_refer(generalized.root, "grefcoco", "umd")
