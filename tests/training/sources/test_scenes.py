"""The embedded scenes: what they look like, what is said about them, and that the two agree.

The meaning of every expression is derived here a second time, from its text alone, by a parser and a geometry that
share nothing with the generator's: they see the words, the attributes and the masks.
"""

import hashlib
import io
import itertools
import os
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import PIL.Image
import pytest
from conftest import REPOSITORY
from scene_reading import PATTERNS, candidates, centers, parse, readings
from transformers import CLIPTokenizer

from training.sources.masks import decode_mask
from training.sources.refer import REFER_FEATURES
from training.sources.scenes.dataset import generate_scenes, train_tokenizer
from training.sources.scenes.demo import SHAPES, draw_scene
from training.sources.scenes.drawing import COLORS
from training.sources.scenes.semantics import SceneSemantics

LOCATION_WORDS = {
    *("left", "right", "top", "bottom", "upper", "lower", "leftmost", "rightmost", "topmost", "highest", "lowest"),
    *("middle", "center", "corner", "far", "side", "near"),
}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in range(120)]


@pytest.fixture(scope="module")
def dataset():
    return generate_scenes(150, seed=5)


def by_scene(dataset):
    rows = defaultdict(list)
    for row in dataset:
        rows[row["image_id"]].append(row)
    return rows


def test_every_expression_denotes_exactly_its_object_by_an_independent_reading(scenes):
    noise = np.random.default_rng(0)
    for scene in scenes:
        objects = scene.objects
        # the answer must be clear: misjudging every position by a pixel or so must not change it
        positions = [
            centers(objects),
            *(centers(objects) + noise.uniform(-0.012, 0.012, (3, len(objects), 2))),
        ]
        for expression in scene.expressions:
            for xy in positions:
                assert readings(expression.text, objects, xy) == ({expression.target},) * 2, expression.text


def test_the_generators_own_evaluator_agrees_and_knows_ambiguity(scenes):
    ambiguous = 0
    for scene in scenes:
        semantics = SceneSemantics(scene.objects)
        for expression in scene.expressions:
            assert semantics.referent(expression.meaning) == expression.target
            bare = expression.meaning._replace(clause=None, anchor=None)
            lenient = candidates(parse(expression.text)[1]["a"], scene.objects)[1]
            assert (semantics.referent(bare) is not None) == (len(lenient) == 1)
            ambiguous += len(lenient) > 1
    assert ambiguous > 100


def test_what_a_side_means_is_visible(scenes):
    """ "left of" is not merely a smaller x, and "left" not merely the leftmost of what lies on the right."""
    checked = Counter()
    for scene in scenes:
        xy = centers(scene.objects)
        along = {"left": xy[:, 0], "right": 1 - xy[:, 0], "top": xy[:, 1], "bottom": 1 - xy[:, 1]}
        for expression in scene.expressions:
            relation, groups = parse(expression.text)
            if relation == "rank" and "rank" not in groups:
                assert along[groups["side"]][expression.target] < 0.45, expression.text
            elif relation == "beside":
                (anchor,) = candidates(groups["b"], scene.objects)[0]
                gap = along[groups["side"]][anchor] - along[groups["side"]][expression.target]
                other = xy[:, 1] if groups["side"] in ("left", "right") else xy[:, 0]
                assert gap > 0.1 and gap > 0.99 * abs(other[anchor] - other[expression.target]), expression.text
            checked[relation] += 1
    assert set(checked) == {relation for relation, _ in PATTERNS}


# ------------------------------------------------------------------------------------------------------------ scenes


def test_scenes_hold_four_to_eight_objects_each_with_an_expression(scenes):
    assert {len(scene.objects) for scene in scenes} == {4, 5, 6, 7, 8}
    for scene in scenes:
        said = [(expression.target, expression.kind) for expression in scene.expressions]
        assert len(said) == len(set(said))
        assert {target for target, _ in said} == set(range(len(scene.objects)))


def test_every_shape_color_texture_and_size_occurs(scenes):
    objects = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.color for item in objects} == set(COLORS)
    assert {item.texture for item in objects} == {"plain", "striped", "dotted"}
    assert {item.size for item in objects} == {"small", "medium", "large"}


def test_hollow_shapes_have_holes_and_thin_ones_are_thin(scenes):
    for scene in scenes:
        for item in scene.objects:
            y, x = np.nonzero(item.full_mask)
            middle = item.full_mask[round(y.mean()), round(x.mean())]
            assert middle == (item.shape not in ("ring", "frame"))
            if item.shape == "bar":
                spread = np.sort(np.linalg.eigvalsh(np.cov(x, y)))
                assert spread[1] > 15 * spread[0]


def test_sizes_are_told_apart_by_extent(scenes):
    extents = defaultdict(list)
    for scene in scenes:
        for item in scene.objects:
            if item.shape == "circle":
                extents[item.size].append(np.sqrt(item.full_mask.sum()))
    assert max(extents["small"]) * 1.1 < min(extents["medium"]) and max(extents["medium"]) * 1.1 < min(extents["large"])


@pytest.mark.parametrize("size", [64, 96, 200])
def test_masks_are_the_visible_pixels(size):
    overlapping = 0
    for seed in range(12):
        scene = draw_scene(seed, size)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert np.sum([item.mask for item in scene.objects], axis=0).max() == 1
        for i, item in enumerate(scene.objects):
            above = [other.full_mask for other in scene.objects[i + 1 :]]
            hidden = np.any(above, axis=0) if above else np.zeros((size, size), bool)
            assert (item.mask == (item.full_mask & ~hidden)).all()
            assert item.area == item.mask.sum() >= 0.55 * item.full_mask.sum()
            assert item.area >= 40 * (size / 96) ** 2
            np.testing.assert_allclose(np.array(item.center) / size, centers([item])[0])
            overlapping += (item.full_mask & hidden).any()
    assert overlapping > 12


def test_the_image_shows_each_object_in_its_color_where_its_mask_is(scenes):
    shares = defaultdict(list)
    for scene in scenes:
        for item in scene.objects:
            close = np.linalg.norm(scene.image.astype(float) - item.rgb, axis=2) < 50
            shares[item.texture].append(close[item.mask].mean())
            alike = [other.full_mask for other in scene.objects if other.color == item.color]
            assert close[~np.any(alike, axis=0)].mean() < 0.05
    assert min(shares["plain"]) > 0.25 and np.mean(shares["plain"]) > 0.65
    assert min(shares["striped"]) > 0.05 and min(shares["dotted"]) > 0.15
    assert max(np.mean(shares["striped"]), np.mean(shares["dotted"])) < np.mean(shares["plain"]) - 0.1


def test_the_background_is_textured_and_muted(scenes):
    for scene in scenes:
        shown = np.any([item.full_mask for item in scene.objects], axis=0)
        background = scene.image[~shown].astype(float)
        assert background.std(0).mean() > 3
        assert np.ptp(background.mean(0)) < 70 and 60 < background.mean() < 200


def test_size_out_of_range_is_refused():
    for size in (32, 1024):
        with pytest.raises(ValueError, match=str(size)):
            draw_scene(0, size)


# ---------------------------------------------------------------------------------------------------------- language


def test_kinds_keep_to_their_words(scenes):
    lengths = defaultdict(list)
    for scene in scenes:
        for expression in scene.expressions:
            words = expression.text.split()
            assert expression.text == expression.text.lower() == " ".join(words)
            lengths[expression.kind].append(len(words))
            if expression.kind == "location":
                assert LOCATION_WORDS & set(words), expression.text
            if expression.kind == "appearance":
                assert parse(expression.text)[0] in ("plain", "largest", "smallest"), expression.text
                assert not LOCATION_WORDS & set(words), expression.text
    assert set(lengths) == {"location", "appearance", "relation"}
    means = {kind: np.mean(values) for kind, values in lengths.items()}
    assert means["appearance"] < 4 and means["location"] < 5 < 7 < means["relation"]
    counts = {kind: len(values) for kind, values in lengths.items()}
    assert min(counts.values()) > 0.7 * max(counts.values())


def test_vocabulary_is_small_and_wording_varies(dataset):
    sentences = [text for texts in dataset["sentences"] for text in texts]
    words = Counter(word for text in sentences for word in text.split())
    assert 60 <= len(words) <= 150
    assert len(set(sentences)) > len(sentences) / 3


def test_ignoring_the_text_does_not_pay(dataset):
    """Neither a fixed place nor a fixed object answers more than its fair share."""
    masks = np.stack([decode_mask(row["mask"]) for row in dataset]).astype(np.float32)
    prior = masks.mean(0)
    for quantile in (0.5, 0.7, 0.85, 0.95):
        guess = prior > np.quantile(prior, quantile)
        overlap = (masks * guess).sum((1, 2))
        assert (overlap / (masks.sum((1, 2)) + guess.sum() - overlap)).mean() < 0.2
    shares = []
    for rows in by_scene(dataset).values():
        counts = [len(row["sentences"]) for row in rows]
        shares.append(max(counts) / sum(counts))
    assert np.mean(shares) < 0.25


def test_reading_one_word_does_not_pay(scenes):
    """Knowing only the target's shape, or only its color, leaves more than one object to choose from."""
    by_shape, by_color, shared = [], [], 0
    for scene in scenes:
        shapes, colors = Counter(o.shape for o in scene.objects), Counter(o.color for o in scene.objects)
        shared += max(shapes.values()) > 1 or max(colors.values()) > 1
        for expression in scene.expressions:
            by_shape.append(1 / shapes[scene.objects[expression.target].shape])
            by_color.append(1 / colors[scene.objects[expression.target].color])
    assert shared == len(scenes)
    assert np.mean(by_shape) < 0.5 and np.mean(by_color) < 0.65


def test_a_relation_is_mostly_needed(scenes):
    """Without its location words or its relation, an expression mostly fits several objects."""
    for kind in ("location", "relation"):
        phrases = [
            (candidates(parse(expression.text)[1]["a"], scene.objects)[1])
            for scene in scenes
            for expression in scene.expressions
            if expression.kind == kind
        ]
        assert np.mean([len(found) > 1 for found in phrases]) > 0.7


# --------------------------------------------------------------------------------------------------------- data sets


def digest(dataset):
    return hashlib.sha256(repr(dataset[:]).encode()).hexdigest()


def test_rows_follow_the_shared_contract(dataset):
    assert dataset.features == REFER_FEATURES
    assert len(set(dataset["ref_id"])) == len({tuple(ids) for ids in dataset["ann_ids"]}) == len(dataset)
    sentence_ids = [i for ids in dataset["sentence_ids"] for i in ids]
    assert len(set(sentence_ids)) == len(sentence_ids)
    image_ids = dataset["image_id"]
    assert sum(a != b for a, b in itertools.pairwise(image_ids)) == len(set(image_ids)) - 1 == 149
    for rows in by_scene(dataset).values():
        assert 4 <= len(rows) <= 8
        assert len({row["image"]["bytes"] for row in rows}) == 1
        assert len(rows[0]["image"]["bytes"]) < 15_000
        with PIL.Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as image:
            assert image.size == (96, 96) and image.mode == "RGB"
        assert np.sum([decode_mask(row["mask"]) for row in rows], axis=0).max() == 1
        for row in rows:
            assert len(row["sentences"]) == len(row["sentence_ids"]) == len(row["sentence_kinds"]) > 0
            assert set(row["sentence_kinds"]) <= {"location", "appearance", "relation"}
            y, x = np.nonzero(decode_mask(row["mask"]))
            assert row["boxes"] == [[x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]]


def test_a_scene_depends_on_seed_split_and_number_alone(dataset):
    short = generate_scenes(7, seed=5)
    assert short[:] == dataset[: len(short)]
    assert digest(generate_scenes(150, seed=5, num_workers=2)) == digest(dataset)


@pytest.mark.parametrize("size", [64, 130])
def test_rows_hold_the_drawn_scene_without_loss(size):
    dataset = generate_scenes(2, seed=3, image_size=size, split="val")
    for number, rows in enumerate(by_scene(dataset).values()):
        scene = draw_scene(np.random.SeedSequence(3, spawn_key=(1, number)), size)
        with PIL.Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as image:
            assert (np.asarray(image) == scene.image).all()
        for i, (row, item) in enumerate(zip(rows, scene.objects, strict=True)):
            assert (decode_mask(row["mask"]) == item.mask).all() and row["category"] == item.shape
            said = [(expression.text, expression.kind) for expression in scene.expressions if expression.target == i]
            assert list(zip(row["sentences"], row["sentence_kinds"], strict=True)) == said


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from training.sources.scenes.dataset import generate_scenes;"
        "print(hashlib.sha256(repr(generate_scenes(3, seed=11)[:]).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == digest(generate_scenes(3, seed=11))


def test_splits_and_seeds_share_no_scene():
    splits = {split: generate_scenes(n, 2, split=split) for split, n in (("train", 20), ("val", 10), ("test", 10))}
    assert [len(set(split["image_id"])) for split in splits.values()] == [20, 10, 10]
    images = [{image["bytes"] for image in split["image"]} for split in splits.values()]
    images.append({image["bytes"] for image in generate_scenes(20, seed=3)["image"]})
    assert len(set.union(*images)) == sum(len(found) for found in images) == 60
    for column in ("image_id", "ref_id", "ann_ids"):
        ids = [set(map(str, split[column])) for split in splits.values()]
        assert len(set.union(*ids)) == sum(len(found) for found in ids)
    assert generate_scenes(10, seed=2, split="val")[:] == splits["val"][:]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_scenes": 0, "seed": 0}, "0"),
        ({"num_scenes": 3, "seed": -4}, "-4"),
        ({"num_scenes": 3, "seed": 0, "image_size": 16}, "16"),
        ({"num_scenes": 3, "seed": 0, "split": "testA"}, "testA"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        generate_scenes(**arguments)


# --------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return train_tokenizer(text for texts in dataset["sentences"] for text in texts)


def test_every_word_of_the_scenes_is_one_token(dataset, tokenizer):
    assert isinstance(tokenizer, CLIPTokenizer) and len(tokenizer) <= 1000
    for texts in dataset["sentences"]:
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [word + "</w>" for word in text.split()]


def test_every_process_trains_the_same_tokenizer():
    # each process of a run trains its own, and Python and Rust both hash differently in each
    code = (
        "from training.sources.scenes.dataset import generate_scenes, train_tokenizer\n"
        "texts = [text for texts in generate_scenes(5, seed=0)['sentences'] for text in texts]\n"
        "print(train_tokenizer(texts).get_vocab()['<|endoftext|>'], train_tokenizer(texts).backend_tokenizer.to_str())"
    )
    made = {
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True).stdout
        for _ in range(4)
    }
    assert len(made) == 1


def test_the_tokenizer_has_clips_form(tokenizer):
    entries = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(entries)))
    assert [entry + "</w>" for entry in entries[:256]] == entries[256:512]
    assert entries[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(entries) - 1
    assert tokenizer.model_max_length == 77
    assert tokenizer("The RED   Circle")["input_ids"] == tokenizer("the red circle")["input_ids"]


def test_nothing_is_unknown_to_the_tokenizer(tokenizer):
    for text in ("zebra 42 quietly", "naïve café", "日本 ☂", "it's 3-fold!"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.unk_token_id) == 1  # the end of the text, which is the same token
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_the_tokenizer_survives_saving(dataset, tokenizer, tmp_path):
    sentences = [text for texts in dataset["sentences"] for text in texts]
    again = train_tokenizer(sentences, tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == 77
    texts = ["the big red circle", "Qualle"]
    expected = tokenizer(texts, padding=True)
    assert loaded(texts, padding=True).data == expected.data
    assert expected["attention_mask"][0].count(0) > 0 or expected["attention_mask"][1].count(0) > 0


def test_the_tokenizer_keeps_its_size_on_rich_text():
    rng = np.random.default_rng(0)
    sentences = ["".join(map(chr, rng.integers(97, 123, 9))) for _ in range(3000)]
    assert len(train_tokenizer(sentences)) == 1000


def test_a_tokenizer_needs_text():
    with pytest.raises(ValueError, match="at least one sentence"):
        train_tokenizer([])
