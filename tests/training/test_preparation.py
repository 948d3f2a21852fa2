"""The preparation command: what it writes loads by itself and is what `load_refer` reads; whole or not at all."""

import hashlib
import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from builders import Folder
from conftest import REFER_MINI, REPOSITORY, needs_refer_mini
from PIL import ExifTags, Image

from training import preparation
from training.examples import prepared_folders
from training.preparation import PUBLISHED_REFS, compare_with_published, main, prepare_refer
from training.sources.images import open_image
from training.sources.refer import REFER_FEATURES, load_refer

SPLITS = {"train": [31, 7, 19, 2, 25, 11], "val": [4, 3], "testA": [8], "testB": [5, 6]}


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "refer").fill(SPLITS)


def sorted_rows(rows: datasets.Dataset) -> list[dict]:
    return sorted(rows, key=lambda row: (row["image_id"], row["ref_id"]))


def assert_same_rows(prepared: datasets.Dataset, read: datasets.Dataset) -> None:
    """Column by column, and the images by their files, names and pixels."""
    assert prepared.features == read.features == REFER_FEATURES
    for ours, theirs in zip(sorted_rows(prepared), sorted_rows(read), strict=True):
        image, path = ours.pop("image"), Path(theirs.pop("image")["path"])
        assert ours == theirs
        assert (image["path"], image["bytes"]) == (path.name, path.read_bytes())
        expected = open_image({"path": str(path), "bytes": None})
        assert np.array_equal(np.asarray(open_image(image)), np.asarray(expected))


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_prepared_folder_loads_by_itself_as_what_was_read(folder, tmp_path):
    prepare_refer(folder.root, tmp_path / "prepared" / "refcoco")
    prepared, read = datasets.load_dataset(str(tmp_path / "prepared" / "refcoco")), folder.load()
    assert set(prepared) == {"train", "val", "testA", "testB"}
    for split in read:
        assert_same_rows(prepared[split], read[split])
    assert left_in(tmp_path / "prepared") == ["refcoco", "refcoco/README.md", "refcoco/data"] + [
        f"refcoco/data/{split}-00000-of-00001.parquet" for split in sorted(SPLITS)
    ]


def test_several_targets_and_none_are_prepared_like_one(tmp_path):
    folder = Folder(tmp_path / "refer", dataset="grefcoco").fill({"train": [2, 5, 8], "testB": [11]})
    by_image = {ref["image_id"]: ref for ref in folder.refs}
    by_image[8].update(ann_id=[-1], no_target=True)
    by_image[5].update(ann_id=[50, 51, 52])
    folder.write()
    prepare_refer(folder.root, tmp_path / "out", dataset="grefcoco")
    prepared, read = datasets.load_dataset(str(tmp_path / "out")), folder.load()
    for split in ("train", "testB"):
        assert_same_rows(prepared[split], read[split])
    assert sum(sum(rows["no_target"]) for rows in prepared.values()) == 1
    assert "| testB | 3 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("shard_bytes", [1, 9000, 10**9])
def test_shards_hold_whole_images_next_to_each_other(folder, tmp_path, shard_bytes):
    prepare_refer(folder.root, tmp_path / "out", shard_bytes=shard_bytes)
    shards = sorted((tmp_path / "out" / "data").glob("train-*.parquet"))
    assert [path.name for path in shards] == [f"train-{i:05d}-of-{len(shards):05d}.parquet" for i in range(len(shards))]
    if shard_bytes == 1:
        assert len(shards) == len(SPLITS["train"])
    seen: list[int] = []
    for path in shards:
        ids = pq.read_table(path)["image_id"].to_pylist()
        assert ids and not set(ids) & set(seen)
        changes = 1 + sum(a != b for a, b in pairwise(ids))
        assert changes == len(set(ids))
        seen += ids
    assert_same_rows(datasets.load_dataset(str(tmp_path / "out"), split="train"), folder.load()["train"])


def test_the_rows_of_an_image_hold_its_file_once(folder, tmp_path):
    prepare_refer(folder.root, tmp_path / "out")
    names = {row["path"] for row in folder.load()["train"]["image"]}
    once = sum(os.path.getsize(name) for name in names)
    columns = [
        pq.read_metadata(tmp_path / "out" / "data" / "train-00000-of-00001.parquet").row_group(0).column(i)
        for i in range(2)
    ]
    stored = next(column.total_compressed_size for column in columns if column.path_in_schema == "image.bytes")
    assert once <= stored < 1.05 * once


def test_the_readme_counts_and_its_checksums_hold(folder, tmp_path):
    prepare_refer(folder.root, tmp_path / "out", shard_bytes=9000)
    text = (tmp_path / "out" / "README.md").read_text()
    for split, rows in folder.load().items():
        counts = (len(rows), sum(map(len, rows["sentences"])), len(SPLITS[split]), 0)
        assert f"| {split} | {' | '.join(map(str, counts))} |" in text
    stated = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)}
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert stated == {f"data/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    card = yaml.safe_load(text.split("---")[1])
    assert [entry["split"] for entry in card["configs"][0]["data_files"]] == list(folder.load())


def test_preparing_twice_gives_the_same_bytes(folder, tmp_path):
    prepare_refer(folder.root, tmp_path / "a")
    prepare_refer(folder.root, tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "b" / "README.md").read_text()


def test_counts_other_than_published_are_said_and_stop_nothing(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        prepare_refer(folder.root, tmp_path / "out")
    difference = f"testA has {len(folder.load()['testA'])} refs, published are 1975"
    assert difference in caplog.text
    assert difference in (tmp_path / "out" / "README.md").read_text()


def test_published_counts_are_recognised(folder, tmp_path, monkeypatch, caplog):
    counts = {split: len(rows) for split, rows in folder.load().items()}
    monkeypatch.setattr(preparation, "PUBLISHED_REFS", {("refcoco", "unc"): counts})
    with caplog.at_level(logging.WARNING):
        prepare_refer(folder.root, tmp_path / "out")
    assert not caplog.records
    assert "are the published ones" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("key", "counts"), PUBLISHED_REFS.items())
def test_a_missing_or_added_ref_or_split_is_a_difference(key, counts):
    assert compare_with_published(counts, *key) == ""
    assert compare_with_published(counts | {"val": counts["val"] - 1}, *key) == (
        f"val has {counts['val'] - 1} refs, published are {counts['val']}"
    )
    assert "train has 0 refs" in compare_with_published({k: n for k, n in counts.items() if k != "train"}, *key)
    assert "extra has 1 refs, published are 0" in compare_with_published(counts | {"extra": 1}, *key)
    assert compare_with_published(counts, "unheard-of", "unc") == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(folder, tmp_path, monkeypatch, error):
    write, written = prepared_folders._write_shard, []

    def fail_at_the_third(rows, path):
        if len(written) == 2:
            raise error
        write(rows, path)
        written.append(path)

    monkeypatch.setattr(prepared_folders, "_write_shard", fail_at_the_third)
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare_refer(folder.root, tmp_path / "prepared" / "out")
    assert written and left_in(tmp_path / "prepared") == []
    monkeypatch.undo()
    prepare_refer(folder.root, tmp_path / "prepared" / "out")
    assert (tmp_path / "prepared" / "out" / "README.md").is_file()


def test_damaged_images_are_named_before_anything_is_written(folder, tmp_path):
    victim = folder.image_folder / "COCO_train2014_000000000008.png"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"1 images cannot be used; the first: the image .*000008\.png"):
        prepare_refer(folder.root, tmp_path / "prepared" / "out")
    victim.write_bytes((folder.image_folder / "COCO_train2014_000000000007.png").read_bytes())
    with pytest.raises(ValueError, match=r"000008\.png is \d+×\d+, its mask \d+×\d+ pixels"):
        prepare_refer(folder.root, tmp_path / "prepared" / "out")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("name", "orientation", "meaning"),
    [
        ("mine.jpg", "by_source", "all others as drawn on the upright image"),
        ("COCO_train2014_000000000004.jpg", "stored", "drawn on the pixels as stored"),
        (
            "COCO_train2014_000000000004.jpg",
            "by_source",
            "COCO's file names are taken as drawn on the pixels as stored",
        ),
    ],
)
def test_images_with_an_orientation_tag_are_counted(folder, tmp_path, caplog, name, orientation, meaning):
    (record,) = (image for image in folder.images if image["id"] == 4)
    with Image.open(folder.image_folder / record["file_name"]) as image:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 3 if orientation == "by_source" else 6
        image.convert("RGB").save(folder.image_folder / name, exif=exif)
    record["file_name"] = name
    folder.write()
    with caplog.at_level(logging.WARNING):
        prepare_refer(folder.root, tmp_path / "out", orientation=orientation)
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (text, caplog.text):
        assert f"1 images have an orientation tag other than 1 (the first is {name}, with" in said and meaning in said


def test_doubtful_masks_are_counted_in_the_readme(folder, tmp_path):
    annotation = folder.annotations[0]
    left, top, width, height = annotation["bbox"]
    annotation["bbox"] = [left, top, width, height + 4]
    folder.write()
    prepare_refer(folder.root, tmp_path / "out")
    assert "1 masks agree only roughly with their boxes." in (tmp_path / "out" / "README.md").read_text()


def test_what_stands_at_the_output_is_left_alone(folder, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=r"precious is there already"):
        prepare_refer(folder.root, tmp_path / "precious")
    assert left_in(tmp_path / "precious") == ["file"]


def test_a_split_that_would_write_elsewhere_is_refused(folder, tmp_path):
    for ref in folder.refs:
        ref["split"] = ref["split"].replace("testA", "../../testA")
    folder.write()
    with pytest.raises(ValueError, match=r"the split '\.\./\.\./testA' of refcoco \(unc\)"):
        prepare_refer(folder.root, tmp_path / "prepared" / "out")
    assert not (tmp_path / "prepared").exists()


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "training" / "preparation.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def test_the_command_takes_relative_paths(folder, tmp_path):
    done = run("refer", "refer", "--output", "prepared/refcoco", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "published are 42404" in done.stderr
    assert_same_rows(datasets.load_dataset(str(tmp_path / "prepared/refcoco"), split="testA"), folder.load()["testA"])


def test_the_command_says_in_one_line_what_is_wrong(folder, tmp_path):
    done = run("refer", "refer", "--dataset", "refcoco+", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "refs found below" in done.stderr and "Traceback" not in done.stderr


@needs_refer_mini
def test_refer_mini_is_prepared_whole(tmp_path):
    main(["refer", str(REFER_MINI), "--dataset", "refcoco", "--split_by", "unc", "--output", str(tmp_path / "mini")])
    text = (tmp_path / "mini" / "README.md").read_text()
    assert "| train | 858 | 2418 | 845 | 0 |" in text and "| val | 84 | 241 | 75 | 0 |" in text
    prepared = datasets.load_dataset(str(tmp_path / "mini"), split="val")

    assert_same_rows(prepared, load_refer(REFER_MINI, splits=["val"])["val"])
