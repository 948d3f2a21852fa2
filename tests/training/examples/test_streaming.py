"""Training from a stream: the examples of the map-style way, each once, whatever reads them; and mixtures without leaks."""

import logging
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import Folder, write_hub_copy
from torch.utils.data import DataLoader

from training.configuration import AugmentationSettings, DataSettings
from training.examples.batches import ImageExample, TrainingExamples
from training.examples.splits import load_splits, load_training_splits
from training.examples.streaming import StreamedExamples, streamed_loader
from training.preparation import prepare_refer
from training.sources.refer import REFER_FEATURES

PLAIN = AugmentationSettings()
VARIED = AugmentationSettings(flip=0.5, min_crop=0.6, color_jitter=0.3, word_dropout=0.3)
SPLITS = {"train": [*range(30, 66)], "val": [4, 3], "testA": [8], "testB": [5, 6]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> str:
    """72 rows of 36 images in about ten shards."""
    root = tmp_path_factory.mktemp("streaming")
    prepare_refer(Folder(root / "refer").fill(SPLITS).root, root / "prepared", shard_bytes=16000)
    return str(root / "prepared")


def streamed(root: str, **options) -> StreamedExamples:
    rows, _ = load_training_splits(DataSettings(source="folder", root=root, streaming=True))
    options = {"batch_size": 2, "objects_per_image": 3, "sentences_per_object": 1, "augmentation": PLAIN} | options
    return StreamedExamples(rows, **({"seed": 0} | options))


def load(examples: StreamedExamples, num_workers: int = 0) -> list[list[ImageExample]]:
    return list(DataLoader(examples, examples.batch_size, collate_fn=list, num_workers=num_workers))


def content(example: ImageExample) -> tuple:
    masks = tuple((mask.shape, mask.tobytes()) for mask in example.masks)
    return example.image.size, example.image.tobytes(), masks, tuple(example.text)


def contents(batches: list[list[ImageExample]]) -> list[list[tuple]]:
    return [[content(example) for example in batch] for batch in batches]


# The stream


@pytest.mark.parametrize("objects_per_image", [1, 2, 3])
def test_the_stream_holds_the_examples_of_the_map_style_way(prepared, objects_per_image):
    options = {"objects_per_image": objects_per_image, "sentences_per_object": 9, "augmentation": PLAIN, "seed": 0}
    (rows,) = load_splits(DataSettings(source="folder", root=prepared), ["train"])
    mapped = TrainingExamples(rows, **options)

    def unordered(example: ImageExample) -> tuple:
        size, pixels, _, _ = content(example)
        return size, pixels, frozenset(zip((mask.tobytes() for mask in example.masks), example.text, strict=True))

    expected = Counter(unordered(mapped[i]) for i in range(len(mapped)))
    examples = streamed(prepared, batch_size=1, **options)
    assert len(examples) == examples.num_batches == len(mapped)
    assert Counter(unordered(example) for example in examples) == expected


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_and_workers_share_the_batches_of_one(prepared, num_processes, num_workers):
    options = {"augmentation": VARIED, "batch_size": 2}
    alone = contents(load(streamed(prepared, **options)))
    assert len(alone) == 18 and len({example for batch in alone for example in batch}) == 36
    parts = [
        load(streamed(prepared, process_index=i, num_processes=num_processes, **options), num_workers)
        for i in range(num_processes)
    ]
    assert {len(part) for part in parts} == {18 // num_processes}
    dealt = [batch for turn in zip(*map(contents, parts), strict=True) for batch in turn]
    assert dealt == alone


def test_what_is_left_over_differs_from_epoch_to_epoch_and_nothing_comes_twice(prepared):
    seen: set = set()
    for epoch in range(6):
        taken: list = []
        for process in range(2):
            examples = streamed(prepared, batch_size=5, process_index=process, num_processes=2)
            assert len(examples) == 15  # 3 whole batches: 36 // (2 * 5)
            examples.set_epoch(epoch)
            batches = load(examples)
            assert [len(batch) for batch in batches] == [5, 5, 5]
            taken += [example.image.tobytes() for batch in batches for example in batch]
        assert len(set(taken)) == len(taken) == 30
        seen |= set(taken)
    assert len(seen) == 36


def test_order_and_drawing_depend_on_seed_and_epoch_alone(prepared):
    def epoch(number: int, seed: int = 0) -> list:
        examples = streamed(prepared, augmentation=VARIED, seed=seed)
        examples.set_epoch(number)
        return [content(example) for example in examples]

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(1) == epoch(1) != epoch(1, seed=1)
    order = [[example.sources[0][0] for example in streamed(prepared, seed=seed)] for seed in range(2)]
    assert sorted(order[0]) != order[0] != order[1]


def test_a_small_buffer_still_gives_each_example_once_and_holds_no_more(prepared, monkeypatch):
    monkeypatch.setattr("training.examples.streaming.SHUFFLED_GROUPS", 4)
    examples = streamed(prepared, batch_size=1)
    order = [example.image.tobytes() for example in examples]
    assert len(set(order)) == 36
    monkeypatch.setattr("training.examples.streaming.SHUFFLED_GROUPS", 1)
    unshuffled = [example.image.tobytes() for example in streamed(prepared, batch_size=1)]
    delays = [abs(order.index(image) - unshuffled.index(image)) for image in order]
    assert 0 < max(delays) < 4


def test_the_shards_come_in_another_order_in_each_epoch(prepared, monkeypatch):
    monkeypatch.setattr("training.examples.streaming.SHUFFLED_GROUPS", 1)
    (rows,) = load_splits(DataSettings(source="folder", root=prepared), ["train"])
    examples = streamed(prepared, batch_size=1)
    orders = []
    for epoch in range(2):
        examples.set_epoch(epoch)
        orders.append([example.sources[0][0] // 10 for example in examples])  # of the builder's ids, the image's
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(set(rows["image_id"]))
    assert orders[0] != orders[1] and sorted(orders[0]) not in orders
    follows = dict(pairwise(sorted(orders[0])))
    kept = [sum(follows.get(a) == b for a, b in pairwise(order)) for order in orders]
    assert min(kept) >= 36 - examples.rows.num_shards > 18  # within a shard the order stays


def test_the_examples_of_one_image_are_varied_apart(prepared):
    rows, _ = load_training_splits(DataSettings(source="folder", root=prepared, streaming=True))
    rows = rows.map(lambda row: row | {"sentences": row["sentences"][:1]}, features=REFER_FEATURES)
    options = {"objects_per_image": 1, "sentences_per_object": 1, "seed": 0}
    images: dict[int, set] = {}
    for example in StreamedExamples(rows, batch_size=1, augmentation=AugmentationSettings(flip=0.5), **options):
        images.setdefault(example.sources[0][0] // 10, set()).add(example.image.tobytes())
    several = [i for i in images if i % 3]  # of two or three objects
    assert len(several) / 3 < sum(len(images[i]) == 2 for i in several) < len(several)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_may_begin_in_its_middle(prepared, num_workers):
    examples = streamed(prepared, augmentation=VARIED)
    examples.set_epoch(2)
    whole = contents(load(examples))
    examples.set_epoch(0)
    examples.start_at(2, 7)
    examples.set_epoch(2)  # what a training loop says anyway
    assert contents(load(examples, num_workers)) == whole[7:]
    examples.set_epoch(3)
    assert len(load(examples)) == len(whole)


def test_skipped_batches_are_not_decoded(prepared, monkeypatch):
    examples = streamed(prepared)
    examples.start_at(0, examples.num_batches - 1)
    opened = []
    draw = StreamedExamples._draw
    monkeypatch.setattr(StreamedExamples, "_draw", lambda self, *given: opened.append(given) or draw(self, *given))
    assert len(load(examples)) == 1 and len(opened) == 2


def test_the_loader_takes_the_batches_as_they_are_dealt(prepared):
    examples = streamed(prepared, augmentation=VARIED, process_index=1, num_processes=3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = streamed_loader(examples, list, 2, accelerator)
    assert len(loader) == 6
    steps = 0
    for epoch in (0, 3):
        loader.set_epoch(epoch)
        batches = []
        for batch in loader:
            with accelerator.accumulate(torch.nn.Linear(1, 1)):
                steps += accelerator.sync_gradients
            batches.append(batch)
        expected = streamed(prepared, augmentation=VARIED, process_index=1, num_processes=3)
        expected.set_epoch(epoch)
        assert contents(batches) == contents(load(expected))
    assert steps == 2 * 2  # the last batches of an epoch make a step, though fewer


def test_a_stream_shorter_than_a_batch_for_each_process_is_refused(prepared):
    with pytest.raises(ValueError, match=r"36 examples, fewer than one batch of 19 for each of 2 processes"):
        streamed(prepared, batch_size=19, num_processes=2)


def test_copies_on_the_hub_stream_too(tmp_path):
    folder = Folder(tmp_path / "refer").fill({"train": [31, 7, 19, 2], "val": [4]})
    target = write_hub_copy(folder, "jxu124", tmp_path / "copy", {"train": "train", "val": "val"}, shards=2)
    data = DataSettings(source="folder", root=str(target), image_dir=str(folder.root / "images"), streaming=True)
    rows, val = load_training_splits(data)
    assert isinstance(rows, datasets.IterableDataset) and isinstance(val, datasets.Dataset)
    options = {"objects_per_image": 1, "sentences_per_object": 9, "augmentation": PLAIN, "seed": 0}
    examples = StreamedExamples(rows, batch_size=1, **options)
    expected = {tuple(sorted(sentences)) for sentences in folder.load()["train"]["sentences"]}
    assert Counter(tuple(sorted(example.text)) for example in examples) == Counter(expected)


# Mixtures


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
    return DataSettings(root=str(root), mix=["refcoco+/unc", "refcocog/google"])


def as_folders(data: DataSettings, target) -> DataSettings:
    names = [f"{data.dataset}/{data.split_by}", *data.mix]
    for name in names:
        prepare_refer(data.root, target / name.split("/")[0], *name.split("/"))
    roots = [str(target / name.split("/")[0]) for name in names]
    return replace(data, source="folder", root=roots[0], mix=roots[1:])


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
    got = Counter(sorted(example.text)[0] for batch in load(examples, num_workers=2) for example in batch)
    assert got == expected


def test_without_a_mixture_the_splits_are_as_they_are(sets):
    train, val = load_training_splits(replace(sets, mix=[], dataset="refcocog", split_by="google"))
    assert set(train["image_id"]) == {1, 5, 8, 11} and set(val["image_id"]) == {5, 11}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": ["refcoco+"]}, r"dataset/split_by, such as refcoco\+/unc, got 'refcoco\+'"),
        ({"mix": ["refcoco+/umd"]}, r"refs\(umd\)\.p does not exist"),
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
    with pytest.raises(ValueError, match="every image of other/unc train stands in another split"):
        load_training_splits(replace(sets, mix=["other/unc"], image_dir=str(tmp_path / "refer" / "images")))


def test_a_set_without_coco_ids_cannot_be_mixed(sets, tmp_path):
    folder = Folder(tmp_path / "more").fill({"train": [40, 41]})
    write_hub_copy(folder, "moondream", tmp_path / "copy", {"train": "train"})
    data = replace(as_folders(sets, tmp_path / "prepared"), mix=[str(tmp_path / "copy")])
    with pytest.raises(ValueError, match=r"copy.* does not tell its images' COCO image ids"):
        load_training_splits(data)


def test_numbers_of_rows_are_those_of_the_folder(prepared):
    (rows,) = load_splits(DataSettings(source="folder", root=prepared), ["train"])
    assert len(rows) == sum(1 + i % 3 for i in SPLITS["train"])
    assert np.all(np.diff(rows["image_id"]) >= 0)
