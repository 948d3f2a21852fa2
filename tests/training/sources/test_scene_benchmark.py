"""The benchmark's scenes: what training never shows, how hard they are, and that every expression means what it says."""

import hashlib
import io
import itertools
import re
from collections import defaultdict

import numpy as np
import PIL.Image
import pytest
from scene_reading import LEXICON, candidates, centers, parse, readings

from training.configuration import DataSettings
from training.examples.splits import load_splits
from training.sources.masks import decode_mask
from training.sources.refer import REFER_FEATURES
from training.sources.scenes.benchmark import (
    LEVELS,
    SHAPES,
    SPLITS,
    TEXTURES,
    VERSION,
    compositions,
    describe_benchmark_scene,
    describe_nothing,
    draw_benchmark_scene,
)
from training.sources.scenes.dataset import generate_scenes, load_scenes, train_tokenizer
from training.sources.scenes.demo import draw_scene
from training.sources.scenes.drawing import COLORS
from training.sources.scenes.semantics import KINDS

LOCATION_WORDS = {
    "top",
    "bottom",
    "upper",
    "lower",
    "leftmost",
    "rightmost",
    "middle",
    "center",
    "corner",
    "far",
    "side",
}

# The pairs that training must not show, written out: by (shape number - color or texture number) modulo 6.
HELD_OUT = {
    "test": {
        *("red circle", "white circle", "orange square", "black square", "yellow triangle", "green star", "blue heart"),
        *(
            "purple cross",
            "red moon",
            "white moon",
            "orange hourglass",
            "black hourglass",
            "yellow ring",
            "green frame",
        ),
        *("blue bar", "purple arch", "striped square", "striped hourglass", "dotted triangle", "checkered star"),
    },
    "val": {
        *("green circle", "blue square", "purple triangle", "red star", "white star", "orange heart", "black heart"),
        *("yellow cross", "green moon", "blue hourglass", "purple ring", "red frame", "white frame", "orange bar"),
        *(
            "black bar",
            "yellow arch",
            "striped heart",
            "striped bar",
            "dotted cross",
            "checkered circle",
            "checkered moon",
        ),
    },
}


@pytest.fixture(scope="module")
def scenes():
    """(split, number, scene), so that every split and level is there."""
    return [(split, i, draw_benchmark_scene(4, split, i, 96)) for split in SPLITS for i in range(25)]


@pytest.fixture(scope="module")
def mixed():
    return {split: generate_scenes(30, 2, split=split, scene_set="mixed", no_target=True) for split in SPLITS}


def pairs_of(item):
    return {f"{item.color} {item.shape}", f"{item.texture} {item.shape}"}


def pairs_in(phrase):
    """The "color shape" and "texture shape" pairs that a noun phrase names."""
    named = dict(LEXICON[word] for word in phrase.split() if word != "with")
    return {f"{named[key]} {named['shape']}" for key in ("color", "texture") if key in named and named["shape"]}


def noun_phrases(text):
    groups = parse(text)[1]
    return [groups["a"], *(noun_phrases(groups["b"]) if "b" in groups else [])]


# ------------------------------------------------------------------------------------------ what is drawn never changes


def fingerprint(objects, texts):
    """A digest of what does not depend on the processor, beside numbers that a rounding error leaves nearly alone."""
    told = [(item.shape, item.color, item.size, item.texture, item.rgb) for item in objects]
    return hashlib.sha256(repr((told, texts)).encode()).hexdigest()[:16]


def pixel_sums(image, objects):
    return [
        *image.mean((0, 1)).tolist(),
        float(image.std()),
        float(sum(item.area * (i + 1) for i, item in enumerate(objects))),
    ]


def test_the_demos_scenes_are_what_they_always_were():
    digests, sums = [], []
    for seed, size in ((0, 96), (1, 96), (2, 64), (3, 112)):
        scene = draw_scene(seed, size)
        digests.append(fingerprint(scene.objects, [(e.text, e.kind, e.target) for e in scene.expressions]))
        sums.append(pixel_sums(scene.image, scene.objects))
    assert digests == DEMO_DIGESTS
    np.testing.assert_allclose(sums, DEMO_SUMS, atol=2e-3)


def test_a_version_of_the_benchmark_is_drawn_once_and_for_all():
    """Where this fails, `VERSION` must change, and with it what is said here."""
    digests, sums = [], []
    for split, size in zip(SPLITS, (96, 112, 128, 96), strict=True):
        scene = draw_benchmark_scene(0, split, 3, size)
        texts = [e.text for kind in KINDS for e in describe_benchmark_scene(scene, kind, 0, split, 3)]
        texts += [describe_nothing(scene, kind, 0, split, 3) for kind in KINDS]
        digests.append(fingerprint(scene.objects, (texts, scene.level, scene.targets, scene.quality)))
        sums.append(pixel_sums(scene.image, scene.objects))
    assert VERSION == "1"
    assert digests == DIGESTS
    np.testing.assert_allclose(sums, SUMS, atol=2e-3)


DEMO_DIGESTS = ["49c8190b708da91f", "d6f997c176b3bfca", "e295b5eb1aa7e0f4", "32cdbf62484b1816"]
DEMO_SUMS = [
    [113.1013, 121.5173, 106.2679, 36.5124, 10005.0],
    [146.8561, 138.5472, 135.5754, 38.1415, 7470.0],
    [100.9629, 114.3748, 94.7358, 35.9772, 3252.0],
    [136.9414, 125.056, 138.0119, 40.8576, 6844.0],
]
DIGESTS = ["239e4c3ab9ef4601", "2373ac9d86cabb69", "5193d14e5963d2e9", "638086f896f83c9e"]
SUMS = [
    [147.7339, 144.251, 160.4806, 32.1286, 4214.0],
    [103.817, 103.7824, 119.7177, 44.1068, 12643.0],
    [138.9513, 124.2435, 142.5916, 66.1358, 19664.0],
    [130.5489, 107.7357, 100.8052, 45.7585, 12991.0],
]


# --------------------------------------------------------------------------------------------------------- compositions


def test_what_may_be_a_target_in_one_split_may_not_in_another():
    sets = {split: set(compositions(split)) for split in ("train", "val", "test")}
    assert not any(a & b for a, b in itertools.combinations(sets.values(), 2))
    for split in ("val", "test"):
        for shape, color, texture in sets[split]:
            pairs = {f"{color} {shape}", f"{texture} {shape}"}
            assert pairs & HELD_OUT[split] and not pairs & HELD_OUT["test" if split == "val" else "val"]
    for shape, color, texture in sets["train"]:
        assert not {f"{color} {shape}", f"{texture} {shape}"} & (HELD_OUT["val"] | HELD_OUT["test"])
    # training shows every shape in several colors, every color and texture on several shapes
    for i, names in enumerate((SHAPES, COLORS, TEXTURES)):
        for name in names:
            assert len({c[1 - (i > 0)] for c in sets["train"] if c[i] == name}) >= 4


def test_training_neither_shows_nor_names_a_held_out_composition(scenes, mixed):
    held_out = HELD_OUT["val"] | HELD_OUT["test"]
    seen = set()
    for split, _, scene in scenes:
        pairs = set().union(*(pairs_of(item) for item in scene.objects))
        if split in ("train", "test_seen"):
            assert not pairs & held_out
        else:
            assert not pairs & HELD_OUT["test" if split == "val" else "val"]
            seen |= pairs & HELD_OUT[split]
    assert len(seen) > 30  # of 41
    for split in ("train", "test_seen"):
        for sentences in mixed[split]["sentences"]:
            for text in sentences:
                assert not any(pairs_in(phrase) & held_out for phrase in noun_phrases(text)), text


def test_targets_of_val_and_test_are_of_unseen_compositions_alone(scenes):
    for split, _, scene in scenes:
        if split in ("train", "test_seen"):
            assert scene.targets == tuple(range(len(scene.objects)))
        else:
            unseen = [i for i, item in enumerate(scene.objects) if pairs_of(item) & HELD_OUT[split]]
            assert list(scene.targets) == unseen and len(unseen) >= 2


# -------------------------------------------------------------------------------------------------------------- language


def test_every_expression_denotes_exactly_its_object_by_an_independent_reading(scenes):
    noise, asked = np.random.default_rng(0), 0
    for split, number, scene in scenes:
        objects = scene.objects
        positions = [centers(objects), centers(objects) + noise.uniform(-0.012, 0.012, (len(objects), 2))]
        for kind in KINDS:
            for expression in describe_benchmark_scene(scene, kind, 4, split, number):
                assert expression.target in scene.targets
                for xy in positions:
                    assert readings(expression.text, objects, xy) == ({expression.target},) * 2, expression.text
                asked += 1
    assert asked > 900


def test_an_expression_about_nothing_fits_no_object_even_leniently(scenes):
    held_out, near = defaultdict(set), []
    for split, number, scene in scenes:
        for kind in KINDS:
            text = describe_nothing(scene, kind, 4, split, number)
            if text is None:  # a relation needs something that attributes alone single out
                assert kind == "relation"
                continue
            phrase = parse(text)[1]["a"]
            assert candidates(phrase, scene.objects)[1] == set(), text
            held_out[split] |= pairs_in(phrase)
            named = [LEXICON[word] for word in phrase.split() if word != "with"]
            near.append([any(getattr(item, key) == value for item in scene.objects) for key, value in named])
    # its words mostly stand in the scene, but not together
    assert np.mean([any(found) for found in near]) > 0.95 and np.mean([all(found) for found in near]) > 0.4
    for split, pairs in held_out.items():
        if split in ("val", "test"):
            assert pairs <= HELD_OUT[split]
        else:
            assert not pairs & (HELD_OUT["val"] | HELD_OUT["test"])


def test_long_relations_go_over_two_steps_that_are_both_needed(scenes):
    lengths, two_steps, asked = defaultdict(list), 0, 0
    for split, number, scene in scenes:
        for kind in KINDS:
            for expression in describe_benchmark_scene(scene, kind, 4, split, number):
                words = expression.text.split()
                lengths[kind].append(len(words))
                if kind == "appearance":
                    assert not {*LOCATION_WORDS, "left", "right"} & set(words)
                if kind == "location":
                    assert "b" not in parse(expression.text)[1]
                if kind == "relation":
                    asked += 1
                    outer = parse(expression.text)[1]
                    if "b" in outer and "b" in parse(outer["b"])[1]:
                        two_steps += 1
                        # without the second step nobody knows which anchor is meant
                        assert len(candidates(parse(outer["b"])[1]["a"], scene.objects)[1]) > 1
    assert two_steps > 0.5 * asked
    assert np.mean(lengths["appearance"]) < 4 and np.mean(lengths["location"]) < 5 and np.mean(lengths["relation"]) > 11


def test_every_word_is_one_token(mixed):
    sentences = [text for texts in mixed["train"]["sentences"] for text in texts]
    tokenizer = train_tokenizer(sentences)
    words = {word for text in sentences for word in text.split()}
    assert 80 < len(words) < 150
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in words)


# --------------------------------------------------------------------------------------------------------------- images


def test_levels_are_graded(scenes):
    measures = defaultdict(list)
    for _, _, scene in scenes:
        level, objects = LEVELS[scene.level], scene.objects
        assert level.objects[0] <= len(objects) <= level.objects[1]
        visible = [item.area / item.full_mask.sum() for item in objects]
        assert min(visible) > level.min_visible - 0.01
        hollow = np.mean([item.shape in ("ring", "frame", "bar", "arch") for item in objects])
        alike = sum(
            sum(getattr(a, key) == getattr(b, key) for key in ("shape", "color", "size", "texture")) == 3
            for a, b in itertools.combinations(objects, 2)
        )
        small = np.mean([item.size == "small" for item in objects])
        measures[scene.level].append((len(objects), 1 - np.mean(visible), hollow, alike, small, 100 - scene.quality))
    assert set(measures) == set(LEVELS)
    means = np.array([np.mean(measures[level], axis=0) for level in LEVELS])
    assert (np.diff(means, axis=0) > 0).all(), means


@pytest.mark.parametrize("size", [96, 112, 128])
def test_masks_are_the_visible_pixels_and_not_too_small(size):
    radii = []
    for number in range(10):
        scene = draw_benchmark_scene(1, "train", number, size)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        for i, item in enumerate(scene.objects):
            hidden = np.any(
                [np.zeros((size, size), bool), *(other.full_mask for other in scene.objects[i + 1 :])], axis=0
            )
            assert (item.mask == (item.full_mask & ~hidden)).all() and item.area == item.mask.sum() > 0.003 * size**2
            radii.append(item.radius)
    assert np.median(radii) > 12 / 112 * size


def test_nuisances_leave_the_named_colors_apart(scenes):
    """A plain object's pixels, as the JPEG file shows them, are nearest to its own color in more or less light."""
    shades = [(name, gain * np.array(rgb)) for name, rgb in COLORS.items() for gain in np.linspace(0.55, 1.1, 12)]
    right = []
    for _, _, scene in scenes:
        file = io.BytesIO()
        PIL.Image.fromarray(scene.image).save(file, "JPEG", quality=scene.quality, subsampling=0)
        shown = np.asarray(PIL.Image.open(file), float)
        for item in scene.objects:
            if item.texture == "plain":
                median = np.median(shown[item.mask], axis=0)
                right.append(min(shades, key=lambda shade: np.linalg.norm(median - shade[1]))[0] == item.color)
    assert len(right) > 200 and np.mean(right) > 0.97


# -------------------------------------------------------------------------------------------------------------- data sets


def test_rows_follow_the_shared_contract(mixed):
    ids = []
    for split, rows in mixed.items():
        assert rows.features == REFER_FEATURES
        ids += [f"sentence {i}" for group in rows["sentence_ids"] for i in group] + [f"ref {i}" for i in rows["ref_id"]]
        labels = {label for labels in rows["sentence_kinds"] for label in labels}
        assert labels <= {f"{kind}, {level}" for kind in KINDS for level in LEVELS}
        for row in rows:
            mask = decode_mask(row["mask"])
            with PIL.Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                assert image.format == "JPEG" and image.size == mask.shape[::-1] == (96, 96)
            assert len(row["sentences"]) == len(row["sentence_ids"]) == len(row["sentence_kinds"]) > 0
            if row["no_target"]:
                assert not mask.any() and row["ann_ids"] == row["boxes"] == []
            else:
                y, x = np.nonzero(mask)
                assert row["boxes"] == [[x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]]
        assert sum(rows["no_target"]) == len(set(rows["image_id"])) == 30, split
    assert len(ids) == len(set(ids))


def test_rows_show_the_drawn_scenes(mixed):
    masks = defaultdict(list)
    for row in mixed["test"]:
        masks[row["image_id"]].append(row)
    for number, rows in enumerate(masks.values()):
        scene = draw_benchmark_scene(2, "test", number, 96)
        for row in rows:
            shown = np.asarray(PIL.Image.open(io.BytesIO(row["image"]["bytes"])), float)
            assert np.abs(shown - scene.image).mean() < 10
            if not row["no_target"]:
                item = scene.objects[row["ref_id"] % 20]
                assert (decode_mask(row["mask"]) == item.mask).all() and row["category"] == item.shape


def test_the_three_sets_are_the_mixed_one_taken_apart(mixed):
    told = {i: text for row in mixed["val"] for i, text in zip(row["sentence_ids"], row["sentences"], strict=True)}
    apart = {}
    for kind in KINDS:
        rows = generate_scenes(30, 2, split="val", scene_set=kind, no_target=True)
        assert {label for labels in rows["sentence_kinds"] for label in labels} <= set(LEVELS)
        assert {image["bytes"] for image in rows["image"]} <= {image["bytes"] for image in mixed["val"]["image"]}
        apart |= {i: text for row in rows for i, text in zip(row["sentence_ids"], row["sentences"], strict=True)}
    assert apart == told


def test_without_no_target_the_other_rows_are_the_same(mixed):
    rows = generate_scenes(30, 2, split="val", scene_set="mixed")
    assert rows[:] == mixed["val"].filter(lambda row: not row["no_target"])[:]


def test_what_is_drawn_depends_on_seed_split_number_and_size_alone(mixed):
    settings = DataSettings(
        source="scenes", scene_set="mixed", num_scenes=(102, 30, 7), scene_seed=2, scene_no_target=True
    )
    train, seen = load_splits(
        settings, ["train", "test_seen"]
    )  # two chunks, which two processes draw where there are two cores
    for long, short in ((train, mixed["train"]), (mixed["test_seen"], seen)):
        assert long[: len(short)] == short[:]
    assert len(set(train["image_id"])) == 102 and len(set(seen["image_id"])) == 7
    assert (
        load_scenes(102, 2, 96, split="train", scene_set="mixed", no_target=True)[:] == train[:]
    )  # now from the cache
    others = [generate_scenes(3, seed, split=split, scene_set="mixed") for seed, split in ((3, "train"), (2, "test"))]
    images = [{image["bytes"] for image in rows["image"]} for rows in (train, *others)]
    assert not any(a & b for a, b in itertools.combinations(images, 2))


@pytest.mark.parametrize(
    ("settings", "split", "named"),
    [
        ({"scene_set": "mixed"}, "testA", "mixed scenes have no split 'testA'; they have train, val, test, test_seen"),
        ({}, "test_seen", "demo scenes have no split 'test_seen'; they have train, val, test"),
        ({"scene_no_target": True}, "val", "demo scenes have no expressions without a target"),
        ({"scene_set": "location", "scene_size": 16}, "val", "16"),
        ({"scene_set": "location", "num_scenes": (4, 0, 4)}, "val", "val split .* 0"),
    ],
)
def test_what_there_is_not_is_said(settings, split, named):
    with pytest.raises(ValueError, match=named):
        load_splits(DataSettings(source="scenes", **settings), [split])


def test_an_unknown_set_and_scenes_about_which_nothing_is_clear_are_named():
    with pytest.raises(
        ValueError, match=re.escape("must be one of demo, location, appearance, relation, mixed, got 'easy'")
    ):
        generate_scenes(1, 0, scene_set="easy")
    seed = next(i for i in range(200) if not len(generate_scenes(1, i, 64, split="val", scene_set="appearance")))
    with pytest.raises(ValueError, match="1 val scenes"):
        load_scenes(1, seed, 64, split="val", scene_set="appearance")
