"""Image features: encoded once, they give for any expressions what the whole call gives."""

import pickle
import threading

import pytest
import torch
from conftest import make_inputs, make_model
from variants import INDEX, VARIANTS

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.features_sera import SeraFeatureCache, SeraImageFeatures, feature_shapes, tensors_in

KINDS = VARIANTS | {
    "no experts in the adapters": {"adapter_experts": False},
    "no experts in the taps": {"fusion_experts": False, "adapter_layers": [2]},
    "no experts": {"fusion_experts": False, "adapter_experts": False, "predict_presence": True},
    "one tap, in the last block": {"adapter_layers": [3], "tap_layers": [4]},
}


def split(inputs: dict) -> tuple[torch.Tensor, dict]:
    """The images, and everything else."""
    return inputs["pixel_values"], {name: value for name, value in inputs.items() if name != "pixel_values"}


def same_bits(got, expected) -> bool:
    pairs = list(zip(tensors_in(got), tensors_in(expected), strict=True))
    return got.keys() == expected.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_expressions", [None, 3])
def test_features_give_the_bits_of_the_whole_call(kind, max_expressions):
    model, inputs = make_model(**KINDS[kind]), make_inputs(3, INDEX, size=(56, 70))
    images, text = split(inputs)
    options = {"output_router_weights": True, "max_expressions": max_expressions}
    with torch.inference_mode():
        features = model.get_image_features(images)
        expected = model(**inputs, **options)
        for _ in range(2):
            assert same_bits(model(image_features=features, **text, **options), expected)
    assert features.batch_size == 3 and features.nbytes == sum(t.nbytes for t in tensors_in(features))
    assert expected.logits.std() > 0.01


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("kind", ["default", "late", "no adapters", "presence", "routers of the image alone"])
def test_any_part_of_the_images_may_have_expressions(kind, is_padded):
    """Features of three images answer as each image does alone, also in the order of the caller's choice."""
    model, (images, text) = make_model(**KINDS[kind]), split(make_inputs(3, [2, 0, 2]))
    if not is_padded:
        text["attention_mask"] = None
    with torch.inference_mode():
        features = model.get_image_features(images)
        got = model(image_features=features, **text)
        for row, image in enumerate([2, 0, 2]):
            mask = None if text["attention_mask"] is None else text["attention_mask"][row : row + 1]
            alone = model(images[image : image + 1], text["input_ids"][row : row + 1], mask)
            for name, value in alone.items():
                largest = alone.logits.abs().max()
                assert (got[name][row] - value[0]).abs().max() < 1e-4 * largest, name


def test_one_expression_for_each_image_needs_no_index():
    model, (images, text) = make_model(), split(make_inputs(3))
    del text["image_index"]
    with torch.inference_mode():
        features = model.get_image_features(images)
        assert same_bits(model(image_features=features, **text), model(images, **text))
        with pytest.raises(ValueError, match="1 expressions for 3 images need image_index"):
            model(image_features=features, input_ids=text["input_ids"][:1])


@pytest.mark.parametrize("kind", ["default", "late", "no adapters", "routers of the image alone"])
def test_features_of_the_model_without_the_decoder(kind):
    model, inputs = make_model(**KINDS[kind]).model, make_inputs(3, INDEX)
    images, text = split(inputs)
    with torch.no_grad():
        assert same_bits(model(image_features=model.get_image_features(images), **text), model(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision(dtype):
    model, (images, text) = make_model(predict_presence=True).to(dtype), split(make_inputs(3, INDEX))
    with torch.inference_mode():
        features = model.get_image_features(images.to(dtype))
        expected = model(images.to(dtype), **text)
        assert {tensor.dtype for tensor in tensors_in(features)} == {dtype}
        assert same_bits(model(image_features=features, **text), expected)
        wide = features.to(torch.float32)
        assert wide.grid_size == features.grid_size and wide.nbytes == 2 * features.nbytes
        assert same_bits(model(image_features=wide.to("cpu", dtype), **text), expected)
        with pytest.raises(ValueError, match=f"are of torch.float32, the model is of {dtype}; cast them"):
            model(image_features=wide, **text)


def test_features_under_autocast():
    model, (images, text) = make_model(), split(make_inputs(3, INDEX))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        features = model.get_image_features(images)
        assert same_bits(model(image_features=features, **text), model(images, **text))


@pytest.mark.parametrize("kind", ["default", "presence", "no adapters", "routers of the image alone"])
def test_features_of_a_folded_model(kind):
    model, (images, text) = make_model(**KINDS[kind]), split(make_inputs(3, INDEX))
    with torch.inference_mode():
        plain = model(images, **text).logits
        model.fuse_for_inference()
        features = model.get_image_features(images)
        got = model(image_features=features, **text)
        assert same_bits(got, model(images, **text))
        assert (got.logits - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("aware", [False, True])
def test_a_further_expression_runs_nothing_that_no_text_reaches(aware):
    model = make_model(adapter_layers=[3], tap_layers=[1, 3, 4], expression_aware_routing=aware)
    ran = []
    vision, fusions = model.model.vision, model.model.fusions
    modules = {f"block {i}": block.attention for i, block in enumerate(vision.tower.encoder.layer)}
    modules |= {f"tap {i} {name}": expert for i in range(2) for name, expert in fusions[i].experts.items()}
    adapter = vision.adapted_blocks["3"].adapter
    modules |= {
        "enrich": adapter.enrich,
        "adapter's expert": adapter.spatial_expert,
        "feed-forward": fusions[0].project,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    images, text = split(make_inputs(2, [0, 0, 1]))
    with torch.inference_mode():
        features = model.get_image_features(images)
        assert sorted(ran) == sorted(modules)  # each once, for both images
        ran.clear()
        model(image_features=features, **text)
        model(image_features=features, **text, max_expressions=1)
    assert ran == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_of_features_follow_from_the_configuration(kind):
    model = make_model(**KINDS[kind])
    features = model.get_image_features(torch.zeros(2, 3, 56, 70))
    for name, expected in feature_shapes(model.config, 2, (4, 5)).items():
        assert [tuple(tensor.shape) for tensor in tensors_in(features[name])] == expected
    copied = pickle.loads(pickle.dumps(features))
    assert isinstance(copied, SeraImageFeatures) and same_bits(copied, features)
    assert not any(tensor.requires_grad for tensor in tensors_in(features))


OTHERS = {
    "another block": {"adapter_layers": [3]},
    "no adapters": {"adapter_layers": []},
    "no experts": {"fusion_experts": False, "num_selected_experts": 4},
    "other width": {"fusion_dim": 32},
    "unaware": {"expression_aware_routing": False},
}


@pytest.mark.parametrize("other", OTHERS)
def test_features_of_another_models_shape_are_refused(model, other):
    images, text = split(make_inputs(2))
    features = make_model(**OTHERS[other]).get_image_features(images)
    with pytest.raises(ValueError, match=r"of a model of another shape: their \w+ have the shapes \["):
        model(image_features=features, **text)


def test_features_are_refused_where_they_cannot_be_meant(model):
    images, text = split(make_inputs(2))
    features = model.get_image_features(images)
    given = {"image_features": features, **text}
    refusals = [
        (text, "either pixel_values or image_features; neither of them"),
        (given | {"pixel_values": images}, "either pixel_values or image_features; both of them"),
        ({"image_features": features}, "input_ids are missing"),
        (given | {"image_states": torch.zeros(2, 1, 21, 32)}, "image_states and image_features are both given"),
        (given | {"labels": torch.zeros(2, 56, 56)}, "for inference, but labels are given"),
        (given | {"image_index": torch.tensor([0, 2])}, "image_index holds 2; there are 2 images"),
        (given | {"image_features": images}, "image_features is a Tensor; it must be what model.get_image_features"),
    ]
    for inputs, message in refusals:
        for called in (model, model.model)[: 1 if "labels" in inputs else 2]:
            with pytest.raises(ValueError, match=message):
                called(**inputs)
    for wrong, message in ((images[0], "have shape"), (images[..., :50], "multiples"), (images.numpy(), "a ndarray")):
        with pytest.raises(ValueError, match=message):
            model.get_image_features(wrong)
    model.train()
    for call in (lambda: model(**given), lambda: model.get_image_features(images)):
        with pytest.raises(ValueError, match="for inference, but the model is in training mode"):
            call()


def test_features_that_are_not_finite_are_named(model):
    images, text = split(make_inputs(2))
    features = model.get_image_features(images * float("nan"))
    with pytest.raises(ValueError, match="image_features are not finite"):
        model(image_features=features, **text)


def test_saved_and_loaded_models_share_features(model, tmp_path):
    model.save_pretrained(tmp_path)
    images, text = split(make_inputs(2))
    loaded = SeraForReferringSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        features = model.get_image_features(images)
        assert same_bits(loaded(image_features=features, **text), model(images, **text))


def test_a_cache_drops_what_was_not_used_for_longest():
    cache = SeraFeatureCache(10)
    for key, size in (("a", 4), ("b", 4)):
        cache.put(key, key.upper(), size)
    assert cache.get("a") == "A" and cache.num_bytes == 8
    cache.put("c", "C", 5)
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"] and cache.num_bytes == 9
    cache.put("a", "again", 5)
    assert cache.get("a") == "again" and cache.num_bytes == 10 and len(cache) == 2
    cache.put("d", "larger than the cache", 11)
    assert cache.get("d") is None and cache.get("a") == "again"


def test_threads_share_a_cache():
    cache, wrong = SeraFeatureCache(20), []

    def work(seed: int) -> None:
        for step in range(500):
            key = (seed * 7 + step) % 11
            cache.put(key, key, 1 + key)
            found = cache.get((seed + step) % 11)
            if found not in (None, (seed + step) % 11) or cache.num_bytes < 0:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = [key for key in range(11) if cache.get(key) is not None]
    assert not wrong and cache.num_bytes == sum(1 + key for key in kept) <= 20
