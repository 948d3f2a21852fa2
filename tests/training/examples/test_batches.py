"""From rows to batches: variations keep words true and masks whole, what is drawn, what is shuffled, how it is collated."""

import io
from collections import Counter

import datasets
import numpy as np
import pytest
from builders import tiny_tokenizer
from PIL import ExifTags, Image, ImageOps, features
from squares import COLORS, make_rows, png
from torch.utils.data import DataLoader

from processing_sera import SeraImageProcessor, SeraProcessor
from training.configuration import AugmentationSettings
from training.examples.augmentation import augment, drop_words
from training.examples.batches import (
    Collator,
    EvaluationExamples,
    ImageExample,
    TrainingExamples,
    group_by_image,
    image_as_annotated,
    shuffled_sentences,
)
from training.sources.masks import decode_mask, encode_mask
from training.sources.refer import REFER_FEATURES

PLAIN = AugmentationSettings()
STRONG = AugmentationSettings(flip=0.5, min_crop=0.6, color_jitter=0.0, word_dropout=0.0)


def random_rows(seed: int, number: int = 12) -> datasets.Dataset:
    """Images with one to four objects of one to five sentences, each sentence found nowhere else."""
    rng = np.random.default_rng(seed)
    images = []
    for p in range(number):
        colors = rng.permutation(list(COLORS))[: rng.integers(1, 5)].tolist()
        images.append({color: [f"{color} {p} {i}" for i in range(rng.integers(1, 6))] for color in colors})
    return make_rows(images, seed)


def examples_of(rows: datasets.Dataset, augmentation: AugmentationSettings = PLAIN, **options) -> TrainingExamples:
    options = {"objects_per_image": 4, "sentences_per_object": 1, "seed": 0} | options
    return TrainingExamples(rows, augmentation=augmentation, **options)


def content(example: ImageExample) -> tuple:
    masks = [(mask.shape, mask.tobytes()) for mask in example.masks]
    return example.image.size, example.image.tobytes(), masks, example.text, example.sources


@pytest.fixture
def processor() -> SeraProcessor:
    return SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 70}), tiny_tokenizer())


def test_flipped_images_carry_flipped_words():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    masks = [rng.random((20, 30)) < 0.3 for _ in range(2)]
    sentences = [["left one"], ["the right", "blue"]]
    always = AugmentationSettings(flip=1.0)
    once = augment(image, masks, sentences, always, rng)
    assert once[2] == [["right one"], ["the left", "blue"]]
    assert np.array_equal(np.asarray(once[0]), np.asarray(image)[:, ::-1])
    assert all(np.array_equal(got, mask[:, ::-1]) for got, mask in zip(once[1], masks, strict=True))
    twice = augment(*once, always, rng)
    assert np.array_equal(np.asarray(twice[0]), np.asarray(image)) and twice[2] == sentences
    assert all(np.array_equal(got, mask) for got, mask in zip(twice[1], masks, strict=True))


def test_a_flipped_object_is_where_its_sentence_says():
    rows = make_rows([{"red": ["left one"], "green": ["middle"], "blue": ["right one"]}] * 3)
    examples = examples_of(rows, STRONG)
    seen = set()
    for epoch in range(20):
        examples.set_epoch(epoch)
        for example in (examples[i] for i in range(len(examples))):
            places = [np.flatnonzero(mask.any(axis=0)).mean() for mask in example.masks]
            columns = dict(zip(example.text, places, strict=True))
            assert columns["left one"] < columns["middle"] < columns["right one"]
            seen.add(example.text.index("left one"))
    assert seen == {0, 2}  # with and without a flip


# Other variations


def test_without_variations_everything_stays():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    masks, sentences = [rng.random((20, 30)) < 0.3], [["the left  one"]]
    got = augment(image, masks, sentences, PLAIN, rng)
    assert got[0].tobytes() == image.tobytes() and np.array_equal(got[1][0], masks[0]) and got[2] == sentences


@pytest.mark.parametrize("min_crop", [0.3, 0.75, 1.0])
def test_crops_keep_every_pixel_of_every_object_and_stay_aligned(min_crop):
    rng = np.random.default_rng(1)
    sizes = set()
    for trial in range(60):
        height, width = rng.integers(1, 40, 2)
        # the image numbers its pixels, so that a crop says where it came from
        place = np.arange(height * width).reshape(height, width)
        pixels = np.stack([place // 256, place % 256, place * 0], axis=-1).astype(np.uint8)
        masks = [rng.random((height, width)) < rng.choice([0.0, 0.01, 0.5]) for _ in range(rng.integers(1, 4))]
        if trial % 3 == 0:
            masks[0][[0, -1], [0, -1]] = True  # objects that touch opposite corners
        settings = AugmentationSettings(min_crop=min_crop)
        image, cropped, _ = augment(Image.fromarray(pixels), masks, [["a"]] * len(masks), settings, rng)
        found = np.asarray(image).astype(int) @ [256, 1, 0]
        assert image.size == cropped[0].shape[::-1]
        rows, columns = found // width, found % width
        assert (rows == rows[:, :1]).all() and (np.diff(rows[:, 0]) == 1).all()
        assert (columns == columns[:1]).all() and (np.diff(columns[0]) == 1).all()
        for before, after in zip(masks, cropped, strict=True):
            assert after.sum() == before.sum()
            assert np.array_equal(after, before[rows, columns])
        assert image.width >= round(min_crop * width) and image.height >= round(min_crop * height)
        sizes.add(image.size != (width, height))
    assert sizes == ({False} if min_crop == 1.0 else {True, False})


def test_color_jitter_changes_colors_alone():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    masks = [rng.random((20, 30)) < 0.3]
    jittered, after, text = augment(image, masks, [["a b"]], AugmentationSettings(color_jitter=0.4), rng)
    assert jittered.size == image.size and np.array_equal(after[0], masks[0]) and text == [["a b"]]
    old, new = (np.asarray(p, dtype=float).ravel() for p in (image, jittered))
    assert (old != new).any() and np.corrcoef(old, new)[0, 1] > 0.8


def test_dropped_words_leave_the_others_in_order():
    rng = np.random.default_rng(0)
    sentence = "the tall man in the dark coat"
    kept = [drop_words(sentence, 0.4, rng).split() for _ in range(200)]
    for words in kept:
        rest = iter(sentence.split())
        assert words and all(word in rest for word in words)  # a subsequence
    assert 0.5 < np.mean([len(words) for words in kept]) / len(sentence.split()) < 0.7
    assert drop_words(sentence, 0.0, rng) == sentence
    assert {drop_words("left zebra", 1.0, rng) for _ in range(50)} == {"left", "zebra"}


# Grouping and drawing


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_grouping_keeps_every_row_once_and_images_together(size):
    rows = random_rows(3).shuffle(seed=1)  # rows of an image need not be neighbours
    groups = group_by_image(rows, size)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    image_ids = rows["image_id"]
    for group in groups:
        assert len({image_ids[row] for row in group}) == 1 and group == sorted(group)
        assert size is None or len(group) <= size
    per_image = Counter(image_ids[group[0]] for group in groups)
    needed = {i: -(-count // (size or count)) for i, count in Counter(image_ids).items()}
    assert per_image == needed  # as few groups as the size allows


def test_examples_hold_what_their_sources_say():
    rows = random_rows(0)
    examples = examples_of(rows, sentences_per_object=2, objects_per_image=3)
    for example in (examples[i] for i in range(len(examples))):
        assert len(example.text) == len(example.masks) == len(example.sources) == len(set(example.sources))
        assert example.image.tobytes() == image_as_annotated(rows[example.sources[0][0]]).tobytes()
        for text, mask, (row, i) in zip(example.text, example.masks, example.sources, strict=True):
            assert text == rows[row]["sentences"][i]
            assert np.array_equal(mask, decode_mask(rows[row]["mask"]))
    asked = Counter(row for i in range(len(examples)) for row, _ in examples[i].sources)
    assert asked == {row: min(2, len(sentences)) for row, sentences in enumerate(rows["sentences"])}


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone():
    rows = random_rows(0)
    settings = AugmentationSettings(flip=0.5, min_crop=0.7, color_jitter=0.2, word_dropout=0.2)
    drawn = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        first, second = (examples_of(rows, settings, seed=seed) for _ in range(2))
        first.set_epoch(5)
        first[3]  # what was asked before does not matter
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        forward = [content(first[i]) for i in range(len(first))]
        backward = [content(second[i]) for i in reversed(range(len(second)))][::-1]
        assert forward == backward
        drawn[seed, epoch] = forward
    for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))):
        same = sum(x == y for x, y in zip(drawn[a], drawn[b], strict=True))
        assert same < len(rows) // 4


def test_workers_draw_the_same():
    rows = random_rows(0, number=6)
    examples = examples_of(rows, STRONG)
    for epoch in (0, 1):
        examples.set_epoch(epoch)
        alone, shared = (
            [content(e) for batch in DataLoader(examples, 2, collate_fn=list, num_workers=n) for e in batch]
            for n in (0, 2)
        )
        assert alone == shared


def test_every_sentence_has_its_turn():
    rows = random_rows(0, number=5)
    examples = examples_of(rows)
    turns = Counter()
    for epoch in range(60):
        examples.set_epoch(epoch)
        turns.update(source for i in range(len(examples)) for source in examples[i].sources)
    assert set(turns) == {(row, i) for row, group in enumerate(rows["sentences"]) for i in range(len(group))}
    fives = [turns[row, i] for row, group in enumerate(rows["sentences"]) for i in range(5) if len(group) == 5]
    assert fives and min(fives) >= 3  # 12 are expected of each


def test_evaluation_asks_every_sentence_once_and_varies_nothing():
    rows = random_rows(2).shuffle(seed=0)
    examples = EvaluationExamples(rows)
    sources = []
    for example in (examples[i] for i in range(len(examples))):
        sources += example.sources
        for text, mask, (row, i) in zip(example.text, example.masks, example.sources, strict=True):
            assert text == rows[row]["sentences"][i]
            assert np.array_equal(mask, decode_mask(rows[row]["mask"]))
            assert example.image.tobytes() == image_as_annotated(rows[row]).tobytes()
    expected = [(row, i) for row, group in enumerate(rows["sentences"]) for i in range(len(group))]
    assert sorted(sources) == expected


# The text-blind control


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_sentences_come_from_other_images_each_once(seed):
    rows = random_rows(seed)
    sentences, image = rows["sentences"], rows["image_id"]
    home = {text: image[row] for row, group in enumerate(sentences) for text in group}
    sizes = Counter(home.values())
    assert 2 * max(sizes.values()) <= len(home)  # else it is impossible
    shuffled = shuffled_sentences(rows, seed=seed)
    assert [len(group) for group in shuffled] == [len(group) for group in sentences]
    assert sorted(t for group in shuffled for t in group) == sorted(home)
    assert all(home[text] != image[row] for row, group in enumerate(shuffled) for text in group)
    assert shuffled == shuffled_sentences(rows, seed=seed) != shuffled_sentences(rows, seed=seed + 1)


def test_shuffling_works_at_the_limit_and_beyond_it():
    even = make_rows([{"red": ["a", "b"], "blue": ["c"]}, {"red": ["d"], "blue": ["e", "f"]}])
    assert [sorted(group) for group in shuffled_sentences(even)] != [sorted(group) for group in even["sentences"]]
    assert {t for group in shuffled_sentences(even)[:2] for t in group} == {"d", "e", "f"}
    pair = make_rows([{"red": ["a"], "blue": ["b"]}])
    assert shuffled_sentences(pair) == [["b"], ["a"]]
    alone = make_rows([{"red": ["a"]}])
    assert shuffled_sentences(alone) == [["a"]]


# Collating


def under_label(inputs: dict, processor: SeraProcessor) -> np.ndarray:
    """Mean colour (N, 3), 0-255, of the input under each expression's label."""
    mean, std = (np.array(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    images = inputs["pixel_values"].numpy() * std[:, None, None] + mean[:, None, None]
    labels = inputs["labels"].numpy()
    index = inputs.get("image_index", np.arange(len(labels)))  # absent: one expression for each image
    sums = np.einsum("nchw,nhw->nc", images[index], labels)
    return 255 * sums / labels.sum(axis=(1, 2))[:, None]


@pytest.mark.parametrize("augmentation", [PLAIN, STRONG])
def test_labels_lie_on_the_objects_that_the_sentences_name(processor, augmentation):
    examples = examples_of(random_rows(5), augmentation, sentences_per_object=2)
    inputs, batch = Collator(processor, with_labels=True)([examples[i] for i in range(len(examples))])
    asked = [text for example in batch for text in example.text]
    assert inputs["labels"].shape == (len(asked), 56, 70) and inputs["pixel_values"].shape == (len(batch), 3, 56, 70)
    counts = [len(example.text) for example in batch]
    assert inputs["image_index"].tolist() == np.repeat(np.arange(len(batch)), counts).tolist()
    named = [list(COLORS.values()).index(COLORS[text.split()[0]]) for text in asked]
    distance = np.abs(under_label(inputs, processor)[:, None] - np.array(list(COLORS.values()))[None]).max(axis=-1)
    assert distance.argmin(axis=1).tolist() == named
    assert distance.min(axis=1).max() < 60  # edges are blurred by resampling
    tokens = processor(text=asked, return_tensors="pt")
    assert np.array_equal(tokens["input_ids"], inputs["input_ids"])


def test_no_labels_where_none_are_wanted(processor):
    inputs, _ = Collator(processor, with_labels=False)([EvaluationExamples(random_rows(5))[0]])
    assert "labels" not in inputs


# Images as their annotations see them


def ramp() -> np.ndarray:
    return np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (20, 1))


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def exif_of(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    return exif


def tagged(image: Image.Image, tag: int, format_name: str) -> bytes:
    """A file of these pixels with an orientation tag, nearly without loss."""
    buffer = io.BytesIO()
    options = {"TIFF": {}, "PNG": {}, "WEBP": {"lossless": True}}.get(
        format_name, {"quality": 95, "subsampling": "4:4:4"}
    )
    image.save(buffer, format_name, exif=exif_of(tag), **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corners() -> Image.Image:
    """Another colour in each corner, 24 high and 36 wide: every turn of it looks different."""
    quarters = np.array([[(230, 20, 20), (20, 200, 20)], [(20, 20, 230), (230, 230, 20)]], np.uint8)
    return Image.fromarray(np.kron(quarters, np.ones((12, 18, 1), np.uint8)))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("format_name", FORMATS)
def test_one_rule_turns_images_of_every_format(corners, format_name, tag):
    content = tagged(corners, tag, format_name)
    shown = corners.copy()
    shown.getexif()[ExifTags.Base.Orientation] = tag
    shown = ImageOps.exif_transpose(shown)
    for upright, path, expected in (
        (None, None, shown),  # own data
        (None, "mine.jpg", shown),
        (None, "COCO_train2014_000000000009.jpg", corners),
        (None, "000000000009.jpg", corners),
        (True, "COCO_train2014_000000000009.jpg", shown),
        (False, "mine.jpg", corners),
    ):
        row = {"image": {"path": path, "bytes": content}, "mask": {"size": [expected.height, expected.width]}}
        row |= {} if upright is None else {"upright": upright}
        seen = image_as_annotated(row)
        assert seen.getexif().get(ExifTags.Base.Orientation) is None
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(expected)).max() < 40  # lossy formats blur the edges


@pytest.mark.parametrize("tag", [3, 6])
def test_a_mask_drawn_upright_lies_on_its_object(processor, tag):
    row = make_rows([{"red": ["red"], "blue": ["blue"]}])[0]
    shown = image_as_annotated(row)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[tag]
    row = row | {"image": {"path": None, "bytes": png(shown.transpose(turn), exif=exif_of(tag))}}
    rows = datasets.Dataset.from_list([row], features=REFER_FEATURES)
    inputs, _ = Collator(processor, with_labels=True)([examples_of(rows)[0]])
    assert np.abs(under_label(inputs, processor)[0] - COLORS["red"]).max() < 60


def test_a_mask_of_the_turned_size_names_the_setting(corners):
    row = {"image": {"path": None, "bytes": tagged(corners, 6, "PNG")}, "mask": {"size": [24, 36]}}
    with pytest.raises(ValueError, match=r"its mask 36×24 pixels. Its orientation tag is 6: data\.orientation stored"):
        image_as_annotated(row)


@pytest.mark.parametrize("mode", ["L", "I;16", "1", "P", "CMYK", "RGBA", "LA"])
def test_an_image_of_any_mode_looks_the_same_as_to_the_processor(mode):
    grey = Image.fromarray(ramp())
    if mode == "I;16":
        image = Image.fromarray(ramp().astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        image.putalpha(Image.fromarray(ramp()[:, ::-1].copy()))
    else:
        image = grey.convert("RGB" if mode == "CMYK" else "L").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    row = make_rows([{"red": ["red"]}])[0] | {"image": {"path": None, "bytes": buffer.getvalue()}}
    seen = image_as_annotated(row | {"mask": encode_mask(np.ones((20, 32), bool))})
    image_processor = SeraImageProcessor(size={"height": 20, "width": 32})
    expected = image_processor(image)["pixel_values"]
    assert np.abs(image_processor(seen)["pixel_values"] - expected).max() < 0.02


@pytest.mark.parametrize("augmentation", [PLAIN, AugmentationSettings(flip=1.0), AugmentationSettings(min_crop=0.9)])
def test_an_image_of_another_size_than_its_mask_is_refused(processor, augmentation):
    row = make_rows([{"red": ["red"], "blue": ["blue"]}])[0]
    smaller = image_as_annotated(row).reduce(2)
    row = row | {"image": {"path": None, "bytes": png(smaller)}}
    examples = examples_of(datasets.Dataset.from_list([row], features=REFER_FEATURES), augmentation)
    with pytest.raises(ValueError, match=f"{smaller.height}.*{smaller.width}|{smaller.width}.*{smaller.height}"):
        Collator(processor, with_labels=True)([examples[0]])
