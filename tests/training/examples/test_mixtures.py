"""Mixtures: no image of another split, no image taken for another, shares of an epoch that hold whatever reads them."""

import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from builders import Folder, write_hub_copy
from own_rows import write_own
from PIL import Image
from torch.utils.data import DataLoader

from training.configuration import AugmentationSettings, DataSettings, MixedSet, TrainingSettings, read_settings
from training.examples.batches import (
    EvaluationExamples,
    TrainingExamples,
    group_by_image,
    image_as_annotated,
    is_drawn_upright,
)
from training.examples.draws import SET_COLUMN, WeightedDraws
from training.examples.splits import load_training_splits
from training.examples.streaming import StreamedExamples
from training.preparation import prepare_refer
from training.sources.refer import REFER_FEATURES

PLAIN = AugmentationSettings()
ONE_EACH = {"objects_per_image": 1, "sentences_per_object": 1, "augmentation": PLAIN, "seed": 0}


# No image of another split


@pytest.fixture
def sets(tmp_path) -> DataSettings:
    """Three sets under one root; each holds out images that others train on."""
    root = tmp_path / "refer"
    for i, (dataset, split_by, images) in enumerate(
        [
            ("refcoco", "unc", {"train": [1, 2, 3, 4, 5], "val": [6], "testA": [7], "testB": [8]}),
            ("refcoco+", "unc", {"train": [1, 2, 6, 9], "val": [3], "testA": [10]}),
            ("refcocog", "google", {"train": [1, 5, 8, 11], "val": [11, 5]}),  # it splits objects, not images
        ]
    ):
        Folder(root, image_dir=f"images{i}" if i else "images", dataset=dataset, split_by=split_by).fill(images)
        for image in (root / f"images{i}").glob("*.png") if i else ():
            image.rename(root / "images" / image.name)
    return DataSettings(
        root=str(root), mix=[MixedSet(dataset="refcoco+"), MixedSet(dataset="refcocog", split_by="google")]
    )


def as_folders(data: DataSettings, target) -> DataSettings:
    parts = (data, *data.mix)
    for part in parts:
        prepare_refer(data.root, target / part.dataset, part.dataset, part.split_by)
    further = [MixedSet(source="folder", root=str(target / part.dataset)) for part in data.mix]
    return replace(data, source="folder", root=str(target / data.dataset), mix=further)


HELD_OUT = {3, 5, 6, 7, 8, 10, 11}
KEPT = {"refcoco": [1, 2, 4], "refcoco+": [1, 2, 9], "refcocog": [1]}


@pytest.mark.parametrize("way", ["refer", "folder", "streaming"])
def test_a_mixture_trains_on_no_image_of_another_split_of_any_set(sets, tmp_path, caplog, way):
    data = sets if way == "refer" else replace(as_folders(sets, tmp_path / "prepared"), streaming=way == "streaming")
    with caplog.at_level(logging.INFO):
        train, val = load_training_splits(data)
    rows = list(train)
    assert train.features == REFER_FEATURES
    assert not {row["image_id"] for row in rows} & HELD_OUT
    by_set = {name: {row["image_id"] for row in rows if row["sentence_kinds"][0] == name} for name in KEPT}
    assert by_set == {name: set(ids) for name, ids in KEPT.items()}
    assert len(rows) == sum(1 + image_id % 3 for ids in KEPT.values() for image_id in ids)
    assert set(val["image_id"]) == {6}  # the first set's own
    assert "left out 2 of 5 images, 4 of 11 rows" in caplog.text  # refcoco without 3 and 5: one row and three
    assert "left out 1 of 4 images, 1 of 7 rows" in caplog.text
    assert "left out 3 of 4 images, 9 of 11 rows" in caplog.text


def test_rows_of_one_photograph_share_an_example_across_sets(sets):
    train, _ = load_training_splits(sets)
    examples = TrainingExamples(
        train, objects_per_image=99, sentences_per_object=1, augmentation=PLAIN, seed=0
    )  # refs of all three sets, whose ids are the same here
    assert len(examples) == len({1, 2, 4, 9})
    kinds = [{text.split()[0] for text in examples[i].text} for i in range(len(examples))]
    assert {"refcoco", "refcoco+", "refcocog"} in kinds
    sources = [source for i in range(len(examples)) for source in examples[i].sources]
    assert len({row for row, _ in sources}) == len(sources) == len(train)


def test_a_streamed_mixture_gives_every_row_once(sets, tmp_path):
    data = replace(as_folders(sets, tmp_path / "prepared"), streaming=True)
    train, _ = load_training_splits(data)
    expected = Counter(row["sentences"][0] for row in train)
    options = {"objects_per_image": 1, "sentences_per_object": 9, "augmentation": PLAIN, "seed": 0}
    examples = StreamedExamples(train, batch_size=1, **options)
    got = Counter(sorted(example.text)[0] for example in examples)
    assert got == expected


def test_without_a_mixture_the_splits_are_as_they_are(sets):
    train, val = load_training_splits(replace(sets, mix=[], dataset="refcocog", split_by="google"))
    assert set(train["image_id"]) == {1, 5, 8, 11} and set(val["image_id"]) == {5, 11}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": [MixedSet(dataset="refcoco+", split_by="umd")]}, r"refs\(umd\)\.p does not exist"),
        ({"mix": [MixedSet(root="nowhere")]}, r"the REFER root .*nowhere is not a folder"),
        ({"mix": [MixedSet(source="folder", root="/nowhere")]}, r"/nowhere is not a folder"),
        ({"weight": 2.0}, r"give a weight to every set, or to none; the weights are \[2\.0, None, None\]"),
        ({"weight": 2.0, "mix": []}, r"data\.weight is the share of a set in a mixture"),
        ({"val_split": "test"}, r"refcoco/unc has no split 'test'; it has .*testA"),
        ({"train_split": "testB"}, r"refcoco\+/unc has no split 'testB'"),
        ({"streaming": True}, r"data\.streaming takes data\.source folder, not refer"),
        ({"source": "scenes"}, r"data\.mix takes REFER sets or folders"),
        ({"source": "scenes", "mix": [], "streaming": True}, r"data\.streaming takes data\.source folder, not scenes"),
        ({"root": None}, r"data\.root is not set"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(sets, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_training_splits(replace(sets, **changes))


def test_a_mixture_that_leaves_nothing_of_a_set_is_refused(sets, tmp_path):
    Folder(tmp_path / "refer", image_dir="images3", dataset="other", split_by="unc").fill({"train": [6, 7]})
    with pytest.raises(ValueError, match=r"every image of .*other/unc train stands in another split"):
        load_training_splits(replace(sets, mix=[MixedSet(dataset="other")]))


def test_a_copy_of_coco_without_its_ids_cannot_be_mixed(sets, tmp_path):
    folder = Folder(tmp_path / "more").fill({"train": [40, 41]})
    write_hub_copy(folder, "moondream", tmp_path / "copy", {"train": "train"})
    further = [MixedSet(source="folder", root=str(tmp_path / "copy"))]
    data = replace(as_folders(sets, tmp_path / "prepared"), mix=further)
    with pytest.raises(ValueError, match=r"copy.* does not tell its images' COCO image ids"):
        load_training_splits(data)


# Images told apart


def test_own_sets_that_count_alike_are_kept_apart(tmp_path):
    roots = [write_own(tmp_path / name, train=[1, 2, 2**62], val=[9]) for name in ("one", "other")]
    for root in roots:  # rows of an image of each set's own
        file = next(Path(root, "data").glob("train*"))
        rows = datasets.Dataset.from_parquet(str(file))
        datasets.concatenate_datasets([rows, rows]).to_parquet(file)
    data = DataSettings(source="folder", root=roots[0], mix=[MixedSet(source="folder", root=roots[1])])
    train, _ = load_training_splits(data)
    groups = group_by_image(train, None)
    assert sorted(map(len, groups)) == [2] * 6
    assert len({train[group[0]]["image"]["bytes"] for group in groups}) == 6
    for group in groups:
        assert train[group[0]]["image"] == train[group[1]]["image"]


def test_the_val_images_of_one_own_set_are_no_images_of_another(tmp_path):
    roots = [write_own(tmp_path / "one", train=[1, 2], val=[3]), write_own(tmp_path / "other", train=[3, 4], val=[1])]
    data = DataSettings(source="folder", root=roots[0], mix=[MixedSet(source="folder", root=roots[1])])
    train, _ = load_training_splits(data)
    assert len(train) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_held_out_image_is_found_by_its_content(tmp_path, streaming):
    one, other = tmp_path / "one", tmp_path / "other"
    write_own(one, train=[1, 2], val=[3])
    write_own(other, train=[11, 12, 13], val=[14])
    copied = datasets.Dataset.from_parquet(str(next(one.glob("data/val*")))).cast(REFER_FEATURES)[0]
    file = next(other.glob("data/train*"))
    rows = [*datasets.Dataset.from_parquet(str(file)).cast(REFER_FEATURES), copied | {"image_id": 77}]
    datasets.Dataset.from_list(rows, features=REFER_FEATURES).to_parquet(file)
    further = [MixedSet(source="folder", root=str(other))]
    train, val = load_training_splits(DataSettings(source="folder", root=str(one), mix=further, streaming=streaming))
    images = [row["image"]["bytes"] for row in train]
    assert len(images) == 5 and val[0]["image"]["bytes"] not in images


def test_refer_sets_of_one_name_under_different_roots_are_mixed(tmp_path, caplog):
    Folder(tmp_path / "mini").fill({"train": [1, 2, 3], "val": [4]})
    folder = Folder(tmp_path / "more").fill({"train": [3, 4, 5, 6], "val": [2]})
    # the same photographs, in files of other sizes and of other names
    for image_id, name in ((3, "COCO_train2014_000000000003.png"), (5, "mine.png")):
        (record,) = (image for image in folder.images if image["id"] == image_id)
        path = folder.image_folder / record["file_name"]
        with Image.open(path) as image:
            content = image.resize((60, 50))
        path.unlink()
        content.save(folder.image_folder / name)
        record.update(file_name=name, width=60, height=50)
    shutil.copy(tmp_path / "mini/images/train2014/COCO_train2014_000000000004.png", folder.image_folder / "same.png")
    (record,) = (image for image in folder.images if image["id"] == 6)
    with Image.open(folder.image_folder / "same.png") as image:
        record.update(file_name="same.png", width=image.width, height=image.height)
    folder.write()
    with caplog.at_level(logging.INFO):
        train, _ = load_training_splits(
            DataSettings(root=str(tmp_path / "mini"), mix=[MixedSet(root=str(tmp_path / "more"))])
        )
    files = {Path(path["path"]).relative_to(tmp_path).parts for path in train["image"]}
    kept = {(parts[0], parts[-1][-7:]) for parts in files}
    assert kept == {("mini", "001.png"), ("mini", "003.png"), ("more", "003.png"), ("more", "ine.png")}
    assert "left out 1 of 3 images" in caplog.text and "left out 2 of 4 images" in caplog.text  # by id, id and content
    examples = TrainingExamples(train, **ONE_EACH | {"objects_per_image": 99})
    assert len(examples) == 4
    assert all(examples[i].image.size == examples[i].masks[0].shape[::-1] for i in range(4))


def test_rows_of_one_id_with_different_images_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_parquet(str(next(Path(write_own(tmp_path / "own", val=[5, 6, 5])).glob("data/*"))))
    rows = rows.cast(REFER_FEATURES)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        ValueError, match="ref_id 0 and 2 have the image_id 5 and hold different images, an image without"
    ):
        EvaluationExamples(rows)
    named = [row | {"image": row["image"] | {"path": f"{row['ref_id']}.png"}} for row in rows]
    with pytest.raises(
        ValueError, match=r"hold different images, 0\.png and 2\.png: give every image an id of its own"
    ):
        TrainingExamples(datasets.Dataset.from_list(named, features=REFER_FEATURES), **ONE_EACH)
    sound = rows.select([0, 1]).to_list() * 2
    assert group_by_image(datasets.Dataset.from_list(sound, features=REFER_FEATURES), None) == [[0, 2], [1, 3]]


def test_images_are_compared_once(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_parquet(str(next(Path(write_own(tmp_path / "own", val=[5, 6])).glob("data/*"))))
    group_by_image(rows, None)
    monkeypatch.setattr("training.examples.batches._refuse_other_images", lambda *_: pytest.fail("compared again"))
    group_by_image(rows, 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("orientation", ["by_source", "upright", "stored"])
def test_rows_say_which_pixels_the_settings_chose(sets, tmp_path, orientation, streaming):
    data = replace(as_folders(sets, tmp_path / "prepared"), orientation=orientation, streaming=streaming)
    for mix in ([], data.mix):
        for rows in load_training_splits(replace(data, mix=mix)):
            row = next(iter(rows))
            assert row.get("upright") == {"by_source": None, "upright": True, "stored": False}[orientation]
            assert is_drawn_upright(row) == (orientation == "upright")  # the files have COCO's names
            assert image_as_annotated(row)


# Shares of an epoch


def test_an_epoch_draws_every_set_after_its_weight_and_all_of_it_in_turn():
    sets = [0] * 5 + [1] * 30 + [2] * 12
    draws, drawn = WeightedDraws(sets, {0: 3.0, 1: 1.5, 2: 0.5}, seed=4), Counter()
    for epoch in range(40):
        numbers = draws.epoch(epoch)
        assert len(numbers) == 47
        shares = np.bincount(np.array(sets)[numbers], minlength=3)
        assert shares.tolist() == [28, 14, 5]
        assert max(Counter(numbers.tolist()).values()) <= 7  # 28 draws of 5 examples
        drawn.update(numbers.tolist())
    for members, count in ((range(5), 28), (range(5, 35), 14), (range(35, 47), 5)):
        times = [drawn[number] for number in members]
        assert max(times) - min(times) <= 1 and sum(times) == 40 * count


def test_draws_depend_on_seed_and_epoch_alone():
    def draws(seed: int) -> WeightedDraws:
        return WeightedDraws([0] * 20 + [1] * 20, {0: 1.0, 1: 3.0}, seed)

    one = draws(0)
    later = [one.epoch(epoch).tolist() for epoch in (3, 0, 1)]
    assert later == [draws(0).epoch(epoch).tolist() for epoch in (3, 0, 1)]
    assert len({tuple(numbers) for numbers in [*later, draws(1).epoch(0).tolist()]}) == 4


def test_a_set_that_would_never_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"the weight 0\.001 of set 1 gives it no draw in an epoch of 10"):
        WeightedDraws([0] * 5 + [1] * 5, {0: 1.0, 1: 0.001}, seed=0)


def weighted(sets: DataSettings, *weights: float) -> DataSettings:
    further = [replace(part, weight=weight) for part, weight in zip(sets.mix, weights[1:], strict=True)]
    return replace(sets, weight=weights[0], mix=further)


def test_examples_of_a_weighted_mixture_are_drawn_by_weight(sets):
    train, _ = load_training_splits(weighted(sets, 1, 2, 1))
    examples = TrainingExamples(train, **ONE_EACH | {"objects_per_image": 9})
    drawn = []
    for epoch in (0, 1):
        examples.set_epoch(epoch)
        kinds = Counter(example.text[0].split()[0] for example in map(examples.__getitem__, range(len(examples))))
        assert kinds == {"refcoco": 2, "refcoco+": 3, "refcocog": 2}  # 7 groups: images of a set stand alone
        loader = DataLoader(examples, 2, collate_fn=list, num_workers=2)
        alone = [examples[i].sources for i in range(len(examples))]
        assert [example.sources for batch in loader for example in batch] == alone
        drawn.append(alone)
    assert drawn[0] != drawn[1]


def test_processes_share_the_draws_of_an_epoch(sets):
    train, _ = load_training_splits(weighted(sets, 1, 2, 1))
    examples = TrainingExamples(train, **ONE_EACH)
    examples.set_epoch(3)
    whole = Counter(str(examples[i].sources) for i in range(len(examples)))
    loader = Accelerator(cpu=True).prepare(DataLoader(examples, 1, collate_fn=list, shuffle=True))
    loader.set_epoch(3)
    assert Counter(str(example.sources) for batch in loader for example in batch) == whole


def test_weights_do_not_change_the_rows(sets):
    one, other = (load_training_splits(weighted(sets, *weights))[0] for weights in ((1, 2, 1), (5, 1, 1)))
    assert one.remove_columns("set_weight")[:] == other.remove_columns("set_weight")[:]
    assert one[SET_COLUMN][:] == sorted(one[SET_COLUMN])
    hidden, _ = load_training_splits(replace(weighted(sets, 1, 2, 1), hide_sentences=True))
    assert hidden[SET_COLUMN][:] == one[SET_COLUMN][:]


def test_weights_of_a_stream_are_refused(sets, tmp_path):
    data = weighted(replace(as_folders(sets, tmp_path / "prepared"), streaming=True), 1, 1, 1)
    with pytest.raises(ValueError, match=r"data\.streaming draws every object once; leave out the weights"):
        load_training_splits(data)


def test_a_mixture_is_read_from_a_file_and_from_the_command_line(tmp_path):
    parts = [{"root": "more", "weight": 0.5}, {"source": "folder", "root": "prepared"}]
    expected = [MixedSet(root="more", weight=0.5), MixedSet(source="folder", root="prepared")]
    (tmp_path / "settings.yaml").write_text(json.dumps({"data": {"root": "mini", "weight": 2, "mix": parts}}))
    for arguments in (
        ["--config", str(tmp_path / "settings.yaml")],
        ["--data.mix", json.dumps(parts), "--data.weight", "2"],
    ):
        data = read_settings(arguments).data
        assert data.mix == expected and data.weight == 2
    assert TrainingSettings().data.mix == []
