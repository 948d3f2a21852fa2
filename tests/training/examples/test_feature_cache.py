"""Images drawn once: kept states stand for the images, masks and words keep together, and a whole run reads them."""

import json
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import iou, tiny_tokenizer
from conftest import make_model
from PIL import Image
from runs import ON_CPU, TRAIN, finished, history_of, refer_settings, run, written
from squares import make_rows, png

from processing_sera import SeraImageProcessor, SeraProcessor
from training.configuration import (
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    TrainingSettings,
    check_settings,
    read_settings,
)
from training.examples import feature_cache
from training.examples.augmentation import swap_left_right
from training.examples.batches import image_as_annotated
from training.examples.feature_cache import CachedCollator, CachedExamples, FeatureCache
from training.examples.shapes import ShapeBatches
from training.examples.splits import HIDDEN
from training.sources.masks import encode_mask

ROWS = [{"red": ["left red", "red one"], "green": ["green a", "green b", "green c"]}, {"blue": ["blue square", "blue"]}]
AUGMENTATION = AugmentationSettings(flip=0.5, min_crop=0.6, color_jitter=0.2)


def settings_for(folder, **data) -> TrainingSettings:
    return TrainingSettings(
        model=ModelSettings(vision_tuning="frozen"),
        data=DataSettings(**({"cached_versions": 3, "copy_paste": 2, "sentences_per_object": 2} | data)),
        augmentation=AUGMENTATION,
        cache_dir=str(folder),
    )


@pytest.fixture
def store_of(monkeypatch):
    """Builds the store of the rows for some settings."""
    rows = make_rows(ROWS)
    monkeypatch.setattr(feature_cache, "load_training_splits", lambda data: (rows, rows))
    processor = SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tiny_tokenizer())
    model = make_model()
    return lambda settings: FeatureCache(settings, rows, model, processor, Accelerator()), model, processor


def test_cached_versions_are_the_image_its_flipped_image_and_variations(store_of, tmp_path):
    make, _, _ = store_of
    store = make(settings_for(tmp_path))
    assert len(store.examples) == 3 * 3 + 3 * 2
    for group in range(3):
        plain, flipped, varied = (store[3 * group + i] for i in range(3))
        by_source = [dict(zip(version.sources, version.text, strict=True)) for version in (plain, flipped, varied)]
        assert by_source[0] == by_source[2]
        assert by_source[1] == {source: swap_left_right(text) for source, text in by_source[0].items()}
        labels = [dict(zip(version.sources, version.labels, strict=True)) for version in (plain, flipped, varied)]
        for source, label in labels[0].items():
            assert label.max() == 255
            assert iou(label[:, ::-1] > 127, labels[1][source] > 127) > 0.8  # an odd padding shifts by a pixel
            assert labels[2][source].any()
        assert not np.array_equal(plain.states, varied.states)
    assert {row for i in range(9, 15) for row, _ in store[i].sources} == {-1}


def test_without_flips_every_version_but_the_first_is_varied(store_of, tmp_path):
    make, _, _ = store_of
    settings = settings_for(tmp_path, cached_versions=2)
    store = make(replace(settings, augmentation=replace(AUGMENTATION, flip=0.0)))
    for group in range(3):
        plain, varied = (store[2 * group + i] for i in range(2))
        assert dict(zip(plain.sources, plain.text, strict=True)) == dict(zip(varied.sources, varied.text, strict=True))
        assert not np.array_equal(plain.states, varied.states)


def test_kept_states_are_those_of_the_tower(store_of, tmp_path):
    make, model, processor = store_of
    version = make(settings_for(tmp_path))[0]
    pixels = processor(images=[image_as_annotated(make_rows(ROWS)[0])], text=["x"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision.encode_states(pixels)[0]
    assert version.states.dtype == np.float16
    assert torch.allclose(torch.from_numpy(version.states.copy()).float(), states, atol=1e-2, rtol=1e-3)


def test_states_are_made_in_the_precision_of_the_run(store_of, tmp_path):
    make, model, processor = store_of
    rows = make_rows(ROWS)
    settings = settings_for(tmp_path)

    def in_bfloat16():
        return torch.autocast("cpu", torch.bfloat16)

    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=in_bfloat16)
    coarse = FeatureCache(replace(settings, mixed_precision="bf16"), rows, model, processor, accelerator)
    fine = make(settings)
    assert coarse.folder != fine.folder
    pixels = processor(images=[image_as_annotated(rows[0])], text=["x"], return_tensors="pt")["pixel_values"]
    with torch.no_grad(), in_bfloat16():
        expected = model.model.vision.encode_states(pixels)[0].half().numpy()
    assert np.allclose(coarse[0].states, expected, atol=2e-2)
    assert not np.array_equal(coarse[0].states, fine[0].states)


def test_a_folder_is_made_once_and_for_what_it_depends_on(store_of, tmp_path, monkeypatch):
    make, model, _ = store_of
    settings = settings_for(tmp_path)
    folder = make(settings).folder
    monkeypatch.setattr(feature_cache, "_write", lambda *_: pytest.fail("drawn again"))
    same = replace(settings, seed=5, augmentation=replace(AUGMENTATION, word_dropout=0.5, feature_dropout=0.5))
    assert make(same).folder == folder == make(replace(same, data=replace(same.data, hide_sentences=True))).folder
    with torch.no_grad():
        next(model.model.vision.tower.parameters()).add_(1)
    for changed in (
        settings,
        replace(settings, augmentation=AugmentationSettings()),
        settings_for(tmp_path, cached_versions=2),
    ):
        with pytest.raises(pytest.fail.Exception, match="drawn again"):
            make(changed)


def test_other_images_of_the_same_sizes_are_cached_apart(store_of, tmp_path):
    _, model, processor = store_of
    rows = make_rows(ROWS)
    grey = [{"path": None, "bytes": png(Image.new("RGB", image_as_annotated(row).size))} for row in rows]
    folders = [
        FeatureCache(settings_for(tmp_path), those, model, processor, Accelerator()).folder
        for those in (rows, rows.remove_columns("image").add_column("image", grey).cast(rows.features))
    ]
    assert folders[0] != folders[1]


def test_what_is_drawn_depends_on_seed_epoch_and_place(store_of, tmp_path):
    make, _, processor = store_of
    settings = settings_for(tmp_path)
    store = make(settings)
    examples, again = CachedExamples(store, settings), CachedExamples(store, settings)
    assert len(examples) == 3 + 2
    seen, drawings = set(), defaultdict(set)
    for epoch in range(12):
        examples.set_epoch(epoch)
        again.set_epoch(epoch)
        for index in reversed(range(5)):
            one, same = examples[index], again[index]
            assert one.text == same.text and np.array_equal(one.labels, same.labels)
            assert len(one.text) == len(one.labels) == len(one.sources) <= 2
            assert one.sources[0][0] == (index if index < 3 else -1)
            drawings[index].add(one.states.tobytes())
            if index < 3:
                seen |= set(one.text)
    assert {"left red", "right red", "green a", "green b", "green c", "blue"} <= seen
    # all versions of an image, and all drawings of a copy-paste one, have their turn and no other's
    assert drawings == {i: {store[3 * i + version].states.tobytes() for version in range(3)} for i in range(5)}
    inputs, _ = CachedCollator(processor)([examples[0], examples[2]])
    number = len(inputs["input_ids"])
    assert inputs["labels"].shape == (number, 56, 56) and inputs["labels"].max() == 1
    assert inputs["pixel_values"].shape == (2, 3, 56, 56) and inputs["image_index"].tolist() == sorted(
        inputs["image_index"]
    )

    hiding = replace(settings, data=replace(settings.data, hide_sentences=True))
    hidden = CachedExamples(make(hiding), hiding)
    assert {text for index in range(5) for text in hidden[index].text} == {HIDDEN}


def test_images_without_padding_are_cached_in_their_own_shapes_and_batched_by_them(tmp_path):
    rows = make_rows([{"red": ["red"]}, {"green": ["green"]}, {"blue": ["blue"]}])
    sizes = [(40, 60), (60, 40), (40, 60)]
    images = [{"path": None, "bytes": png(Image.new("RGB", (width, height), "red"))} for height, width in sizes]
    masks = [encode_mask(np.eye(*size, dtype=bool)) for size in sizes]
    for name, values in (("image", images), ("mask", masks)):
        feature = rows.features[name]
        rows = rows.remove_columns(name).add_column(name, values, feature=feature)
    processor = SeraProcessor(SeraImageProcessor(size=56, do_pad=False), tiny_tokenizer())
    model = make_model()
    settings = replace(settings_for(tmp_path, cached_versions=1, copy_paste=0), augmentation=AugmentationSettings())
    store = FeatureCache(settings, rows, model, processor, Accelerator())
    examples = CachedExamples(store, settings)
    assert examples.frames == [(42, 56), (56, 42), (42, 56)]
    for index, frame in enumerate(examples.frames):
        pixels = processor.image_processor(image_as_annotated(rows[index]), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = model.model.vision.encode_states(pixels)[0]
        assert torch.allclose(torch.from_numpy(examples[index].states.copy()).float(), states, atol=1e-2, rtol=1e-3)
        assert examples[index].labels.shape == (1, *frame) and examples[index].labels.any()
    batches = list(ShapeBatches(lambda: examples.frames, 2, shuffle=True))
    assert sorted(map(sorted, batches)) == [[0, 2], [1]]
    inputs, _ = CachedCollator(processor)([examples[index] for index in sorted(max(batches, key=len))])
    assert inputs["pixel_values"].shape == (2, 3, 42, 56)
    assert [size for _, size in store.sample()] == examples.frames


def test_a_weighted_mixture_is_cached_once_and_drawn_by_weight(store_of, tmp_path):
    _, model, processor = store_of
    rows, settings = make_rows([{"red": ["red"]}, {"green": ["green"]}, {"blue": ["blue"]}]), settings_for(tmp_path)

    def store(*weights: float) -> FeatureCache:
        weighted = rows.add_column("mixed_set", [0, 1, 1])
        weighted = weighted.add_column("set_weight", [weights[0], weights[1], weights[1]])
        return FeatureCache(settings, weighted, model, processor, Accelerator())

    even = store(1.0, 2.0)
    examples, again = CachedExamples(even, settings), CachedExamples(store(2.0, 1.0), settings)
    assert examples.store.folder == again.store.folder
    shares = {}
    for name, drawn in (("even", examples), ("again", again)):
        seen = []
        for epoch in range(4):
            drawn.set_epoch(epoch)
            assert len(drawn) == 3 + 2
            assert [drawn[index].sources[0][0] for index in (3, 4)] == [-1, -1]
            seen.append([drawn[index].sources[0][0] for index in range(3)])
            assert seen[-1] == [drawn[index].sources[0][0] for index in range(3)]
        shares[name] = [sum(numbers.count(row) for numbers in seen) for row in range(3)]
    assert shares == {"even": [4, 4, 4], "again": [8, 2, 2]}


def test_whole_channels_are_silenced(store_of, tmp_path):
    make, _, _ = store_of
    settings = settings_for(tmp_path, cached_versions=1)
    store = make(settings)
    whole = CachedExamples(store, settings)[0].states
    silencing = replace(settings, augmentation=replace(AUGMENTATION, feature_dropout=0.5))
    shares = []
    for seed in range(20):
        states = CachedExamples(store, replace(silencing, seed=seed))[0].states
        silent = (states == 0).all(axis=(0, 1))
        assert states.dtype == np.float16
        assert np.allclose(states[..., ~silent], 2 * whole[..., ~silent], rtol=1e-3)
        shares.append(silent.mean())
    assert 0.4 < np.mean(shares) < 0.6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision_tuning": "norm_bias"}, "frozen.*norm_bias"),
        ({"streaming": True}, "streaming exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(changed, message, store_of, tmp_path):
    settings = settings_for(tmp_path, **{name: value for name, value in changed.items() if name != "vision_tuning"})
    if "vision_tuning" in changed:
        settings = replace(settings, model=ModelSettings(**changed))
    with pytest.raises(ValueError, match=message):
        store_of[0](settings)


@pytest.mark.parametrize(
    "option", ["data.copy_paste=3", "model.whitened_start=true", "augmentation.feature_dropout=0.1"]
)
def test_what_acts_on_the_feature_cache_wants_some(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]} needs the feature cache"):
        check_settings(read_settings([f"--{option}", "--output_dir", str(tmp_path)]))


@pytest.mark.parametrize("padding", [True, False])
def test_a_run_fills_the_cache_and_another_finds_it(tmp_path, padding):
    settings = refer_settings(tmp_path / "refer")
    data = replace(settings.data, cached_versions=2, copy_paste=2, padding=padding)
    model = replace(settings.model, vision_tuning="frozen", whitened_start=True)
    settings = replace(settings, data=data, model=model, num_workers=0, cache_dir=str(tmp_path / "features"))
    settings = replace(settings, optimization=replace(settings.optimization, epochs=2))
    path = written(settings, tmp_path / "settings.yaml")
    said = [
        finished(
            run([*TRAIN, "--config", path, "--output_dir", str(tmp_path / f"run{seed}"), "--seed", seed], **ON_CPU)
        )
        for seed in ("0", "1")
    ]
    assert "drawing 8 training images once" in said[0] and "drawing" not in said[1]
    for seed in (0, 1):
        assert len(history_of(tmp_path / f"run{seed}")) == 2
        assert json.loads((tmp_path / f"run{seed}" / "model" / "config.json").read_text())["model_type"] == "sera"
    assert len([entry for entry in (tmp_path / "features").iterdir() if entry.is_dir()]) == 1
