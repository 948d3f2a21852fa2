"""Every faster path gives what the plain one gives: folded batch norms, expressions in parts, shared images, resizing."""

import io

import numpy as np
import pytest
import torch
from builders import GEOMETRIES, disc
from conftest import REPOSITORY, make_inputs, make_model
from PIL import Image
from variants import INDEX, VARIANTS

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleNorm
from processing_sera import SeraImageProcessor, SeraProcessor
from processing_sera.image_processing_sera import letterbox_box
from training.configuration import read_settings

CONFIGS = REPOSITORY / "training" / "configs"


def assert_same(got, expected, tolerance: float = 2e-5) -> None:
    assert set(got.keys()) == set(expected.keys())
    for name, value in expected.items():
        pairs = zip(got[name], value, strict=True) if isinstance(value, tuple) else [(got[name], value)]
        for a, b in pairs:
            assert a.shape == b.shape and (a - b).abs().max() < tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_batch_norms_change_nothing(variant):
    model = make_model(**VARIANTS[variant])
    inputs = make_inputs(3, INDEX)
    with torch.inference_mode():
        plain = model(**inputs, output_router_weights=True)
        assert model.fuse_for_inference() is model
        assert not any(isinstance(module, (torch.nn.BatchNorm2d, SeraSampleNorm)) for module in model.modules())
        assert_same(model(**inputs, output_router_weights=True), plain)
        assert_same(model.fuse_for_inference()(**inputs, output_router_weights=True), plain)  # twice is once
        assert float(plain.logits.std()) > 0.01


def test_a_folded_model_cannot_harm_a_checkpoint(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="training mode"):
        model.train().fuse_for_inference()
    model.eval().fuse_for_inference()
    with pytest.raises(ValueError, match="load it again to train it"):
        model.train()
    with pytest.raises(ValueError, match="save it before"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    inputs = make_inputs(2)
    with torch.inference_mode():
        again = SeraForReferringSegmentation.from_pretrained(tmp_path).eval()
        assert_same(model.eval()(**inputs), again(**inputs))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_expressions", [1, 3, 100])
def test_expressions_in_parts_give_the_same(variant, max_expressions):
    model, inputs = make_model(**VARIANTS[variant]), make_inputs(3, INDEX)
    labels = (torch.rand(len(INDEX), 56, 56, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    arguments = inputs | {"labels": labels, "output_router_weights": True}
    with torch.inference_mode():
        assert_same(model(**arguments, max_expressions=max_expressions), model(**arguments))


def test_parts_without_index_and_mask():
    model, inputs = make_model(), make_inputs(3)
    inputs = {name: inputs[name] for name in ("pixel_values", "input_ids")}
    with torch.inference_mode():
        assert_same(model(**inputs, max_expressions=2), model(**inputs))


@pytest.mark.parametrize("layers, shared_taps", [([1, 3], 1), ([3], 2), ([0], 0)])
@pytest.mark.parametrize("max_expressions", [None, 1, 2])
@pytest.mark.parametrize("aware", [False, True])
def test_what_does_not_see_the_text_runs_once_per_image(layers, shared_taps, max_expressions, aware):
    model = make_model(adapter_layers=layers, tap_layers=[1, 3, 4], expression_aware_routing=aware)
    rows = {}

    def count(name):
        return lambda module, args, output: rows.setdefault(name, []).append(len(args[0]))

    vision = model.model.vision
    for i, block in enumerate(vision.tower.encoder.layer):
        block.norm1.register_forward_hook(count(f"attention {i}"))
        block.mlp.register_forward_hook(count(f"feed-forward {i}"))
    for i, fusion in enumerate(model.model.fusions):
        fusion.experts["context"].register_forward_hook(count(f"fusion {i}"))
    first = vision.adapted_blocks[str(layers[0])].adapter
    first.spatial_expert.register_forward_hook(count("expert"))
    with torch.inference_mode():
        model(**make_inputs(2, [0, 0, 0, 1, 1]), max_expressions=max_expressions)
    shared = [f"{part} {i}" for part in ("attention", "feed-forward") for i in range(layers[0] + 1)]
    shared += ["expert", *(f"fusion {i}" for i in range(shared_taps))]
    assert {name: counts for name, counts in rows.items() if counts == [2]}.keys() == set(shared)
    parts = {None: [5], 1: [1] * 5, 2: [2, 2, 1]}[max_expressions]
    assert all(counts == parts for name, counts in rows.items() if name not in shared)


@pytest.mark.parametrize("max_expressions", [None, 1])
def test_an_expert_that_no_expression_chose_is_not_run_for_its_image(max_expressions):
    """Where routers see the sentence, each of two expressions chooses one expert: two run, once each."""
    model = make_model(adapter_layers=[3], tap_layers=[1, 4], num_selected_experts=1)
    fusion, inputs, ran = model.model.fusions[0], make_inputs(1, [0, 0]), []
    for name, expert in fusion.experts.items():
        expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    chosen = iter(torch.tensor([[False, False, True, False], [True, False, False, False]]).split(max_expressions or 2))

    def choose(router, args, routing):
        selected = next(chosen)
        return routing._replace(selected=selected, weights=selected.float())

    fusion.router.register_forward_hook(choose)
    with torch.inference_mode():
        outputs = model(**inputs, max_expressions=max_expressions, output_router_weights=True)
    assert sorted(ran) == ["boundary", "spatial"]
    assert outputs.fusion_router_weights[0].argmax(dim=1).tolist() == [2, 0]


def test_parts_are_refused_where_they_cannot_be_meant(model):
    inputs = make_inputs(2)
    with pytest.raises(ValueError, match="max_expressions is 0"):
        model(**inputs, max_expressions=0)
    with pytest.raises(ValueError, match=r"in training mode; call model\.eval\(\)"):
        model.train()(**inputs, max_expressions=1)


def test_the_late_configuration_is_the_recipe_with_late_adapters():
    late, default = (
        read_settings(["--config", str(CONFIGS / f"sera-b-refcoco{name}.yaml"), "--data.root", "x"])
        for name in ("-late", "")
    )
    assert min(late.model.config["adapter_layers"]) >= 8  # the last third of twelve blocks
    late.model.config = default.model.config
    assert late == default


@pytest.mark.parametrize(
    "original, frame", [*GEOMETRIES, ((1, 1), (14, 28)), ((1, 300), (56, 56)), ((3000, 20), (56, 42))]
)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_resizing_differs_from_pillow_by_rounding_at_most(original, frame, resample):
    pixels = np.random.default_rng(0).integers(0, 256, (*original, 3), dtype=np.uint8)
    processor = SeraImageProcessor(
        size={"height": frame[0], "width": frame[1]}, resample=resample, image_mean=(0, 0, 0), image_std=(1, 1, 1)
    )
    got = processor(Image.fromarray(pixels))["pixel_values"][0] * 255
    top, left, height, width = letterbox_box(original, frame)
    pillow = Image.fromarray(pixels).resize((width, height), resample, reducing_gap=3.0)
    difference = np.abs(got[:, top : top + height, left : left + width] - np.asarray(pillow).transpose(2, 0, 1))
    is_enlarged = height > original[0]
    assert difference.max() < (2.001 if is_enlarged else 1.001) and difference.mean() < 0.05


def test_a_photograph_file_is_prepared_as_its_pixels_are(tmp_path, image):
    image.save(tmp_path / "image.jpg", quality=90)
    processor = SeraImageProcessor(size=56)
    decoded = np.array(Image.open(io.BytesIO((tmp_path / "image.jpg").read_bytes())).convert("RGB"))
    assert np.array_equal(
        processor(tmp_path / "image.jpg")["pixel_values"], processor(Image.fromarray(decoded))["pixel_values"]
    )


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_the_score_is_the_mean_probability_inside_the_mask(processor: SeraProcessor, threshold):
    logits = torch.from_numpy(np.stack([disc((64, 64), (20, 30), 9), disc((64, 64), (40, 10), 3)])).float() * 6 - 3
    sizes = {"original_sizes": torch.tensor([[48, 64]]), "image_index": torch.tensor([0, 0])}
    for result in processor.post_process_referring_segmentation(
        {"logits": logits}, sizes, threshold=threshold, return_probabilities=True
    ):
        probabilities, mask = (result[name].numpy().astype(np.float64) for name in ("probabilities", "mask"))
        assert np.array_equal(mask, probabilities > np.float32(threshold)) and mask.any()
        assert result["score"] == pytest.approx((probabilities * mask).sum() / mask.sum(), rel=1e-5)
