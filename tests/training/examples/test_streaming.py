"""Training from a stream: the examples of the map-style way, each once, whatever reads them."""

from collections import Counter
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import Folder, write_hub_copy
from own_rows import write_own
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


def test_a_stream_with_two_images_of_one_id_is_refused(tmp_path):
    write_own(tmp_path / "own", train=[1, 1], val=[2])
    rows, _ = load_training_splits(DataSettings(source="folder", root=str(tmp_path / "own"), streaming=True))
    options = {"objects_per_image": 2, "sentences_per_object": 1, "augmentation": PLAIN, "seed": 0}
    with pytest.raises(ValueError, match=r"ref_id 0 and 1 have the image_id 1 and hold different images, .* without"):
        list(StreamedExamples(rows, batch_size=1, **options))


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


def test_numbers_of_rows_are_those_of_the_folder(prepared):
    (rows,) = load_splits(DataSettings(source="folder", root=prepared), ["train"])
    assert len(rows) == sum(1 + i % 3 for i in SPLITS["train"])
    assert np.all(np.diff(rows["image_id"]) >= 0)
