"""The whole model: a fresh one leaves the tower as it is; invariances, saving, gradients, sizes, loss."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import make_inputs, make_model
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleStatistics
from modeling_sera.loss_sera import area_average, mask_segmentation_loss


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < tolerance)


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_fresh_model_gives_the_bare_towers_features_bit_for_bit(model_type):
    torch.manual_seed(0)
    model = SeraForReferringSegmentation(SeraConfig.tiny(vision_config={"model_type": model_type})).eval()
    inputs = make_inputs(2)
    encoder = model.model.vision
    seen = []
    for fusion in model.model.fusions:
        fusion.project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        bare = encoder.tower(inputs["pixel_values"], output_hidden_states=True)
        model(**(inputs | {"image_index": None}))
    depths = model.config.tap_layers
    expected = [bare.hidden_states[depth] for depth in depths[:-1]] + [bare.last_hidden_state]
    for tapped, state in zip(seen, expected, strict=True):
        assert torch.equal(tapped, state[:, encoder.num_prefix :])


def test_adapters_change_the_features_once_they_are_trained(model):
    inputs = make_inputs(2)
    with torch.no_grad():
        with_adapters = model(**inputs).logits
        for block in model.model.vision.adapted_blocks.values():
            block.adapter.up_proj.weight.zero_()
            block.adapter.up_proj.bias.zero_()
        without = model(**inputs).logits
    assert not close(with_adapters, without, 1e-3)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("k", [2, 4])
def test_result_does_not_depend_on_the_rest_of_the_batch(aware, k):
    model = make_model(expression_aware_routing=aware, num_selected_experts=k)
    index = [0, 0, 1, 2, 2, 2]
    inputs = make_inputs(3, index)
    with torch.no_grad():
        together = model(**inputs, output_router_weights=True)
        for n, image in enumerate(index):
            alone = model(
                pixel_values=inputs["pixel_values"][image : image + 1],
                input_ids=inputs["input_ids"][n : n + 1],
                attention_mask=inputs["attention_mask"][n : n + 1],
                output_router_weights=True,
            )
            assert close(together.logits[n : n + 1], alone.logits)
            for a, b in zip(together.fusion_router_weights, alone.fusion_router_weights, strict=True):
                assert close(a[n : n + 1], b)
            for a, b in zip(together.adapter_router_weights, alone.adapter_router_weights, strict=True):
                assert close(a[n : n + 1], b)


def test_expressions_of_one_image_in_any_order(model):
    inputs = make_inputs(2, [0, 1, 0, 1])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        plain = model(**inputs).logits
        moved = model(
            pixel_values=inputs["pixel_values"],
            **{key: inputs[key][order] for key in ("input_ids", "attention_mask", "image_index")},
        ).logits
    assert close(plain[order], moved)


def test_result_does_not_depend_on_the_padding(model):
    inputs = make_inputs(2)
    longer = inputs | {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 9), value=999),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 9)),
    }
    with torch.no_grad():
        assert close(model(**inputs).logits, model(**longer).logits)


def test_the_text_matters(model):
    inputs = make_inputs(1, [0, 0])
    with torch.no_grad():
        first, second = model(**inputs).logits
    assert not close(first, second, 1e-2)


def test_late_adapters_share_the_taps_before_them():
    model = make_model(adapter_layers=[3], tap_layers=[1, 3, 4])
    inputs = make_inputs(2, [0, 0, 0, 1])
    rows = []
    for fusion in model.model.fusions:
        fusion.experts["context"].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    with torch.no_grad():
        together = model(**inputs).logits
        separate = model(
            **(inputs | {"pixel_values": inputs["pixel_values"][inputs["image_index"]], "image_index": None})
        )
    assert rows[:3] == [2, 2, 4]  # one row per image before the first adapter, one per expression after it
    assert close(together, separate.logits)


@pytest.mark.parametrize("aware", [False, True])
def test_save_and_load_give_identical_logits(tmp_path, aware):
    model = make_model(expression_aware_routing=aware)
    inputs = make_inputs(2, [0, 1, 1])
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] and not list(tmp_path.glob("*.bin"))
    loaded, info = SeraForReferringSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    buffers = dict(model.named_buffers())
    assert any("sobel" in name for name in buffers) and any("laplacian" in name for name in buffers)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    for field in model.config.__class__.__annotations__:
        if not field.endswith("_config"):
            assert getattr(loaded.config, field) == getattr(model.config, field)


def test_copies_and_pickles_compute_the_same(model):
    inputs = make_inputs(1)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected)


def test_training_works_after_inference_mode(model):
    inputs = make_inputs(2)
    with torch.inference_mode():
        model(**inputs)  # fills the per-size caches
    model.train()
    model(**inputs, labels=torch.rand(2, 56, 56)).loss.backward()


def test_eager_and_sdpa_agree(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    inputs = make_inputs(2, [0, 1, 1])
    outputs = {}
    for kernel in ("eager", "sdpa"):
        loaded = SeraForReferringSegmentation.from_pretrained(tmp_path, attn_implementation=kernel).eval()
        assert loaded.model.vision.tower.config._attn_implementation == kernel
        assert loaded.model.text_tower.config._attn_implementation == kernel
        with torch.no_grad():
            outputs[kernel] = loaded(**inputs).logits
    assert close(outputs["eager"], outputs["sdpa"])


def test_kernels_that_take_the_keys_mask_for_the_queries_are_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash"):
        SeraForReferringSegmentation.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert not SeraForReferringSegmentation._supports_flash_attn  # the error is not that the package is missing


def test_trainer_sees_the_same_gradient_however_many_batches_it_is_spread_over(tmp_path):
    inputs, generator = make_inputs(4), torch.Generator().manual_seed(2)
    rows = [{name: inputs[name][i] for name in inputs if name != "image_index"} for i in range(4)]
    rows = [row | {"labels": torch.rand(56, 56, generator=generator)} for row in rows]
    logged = {}
    for accumulated in (1, 2):
        model = make_model(router_noise_std=0.0, decoder_dropout=0.0, router_balance_loss_weight=0.0)
        for module in model.modules():  # each half of the batch has other statistics
            if isinstance(module, (torch.nn.BatchNorm2d, SeraSampleStatistics)):
                module.train = lambda mode=True, module=module: module
        arguments = TrainingArguments(
            str(tmp_path / str(accumulated)),
            max_steps=1,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        logged[accumulated] = trainer.state.log_history[0]
    for name in ("loss", "grad_norm"):
        assert logged[2][name] == pytest.approx(logged[1][name], rel=1e-2)


@pytest.mark.parametrize("k", [2, 4])
def test_every_new_parameter_receives_a_gradient(k):
    model = make_model(num_selected_experts=k, expression_aware_routing=True).train()
    inputs = make_inputs(4, [0, 1, 2, 3, 3])
    model(**inputs, labels=torch.rand(5, 56, 56)).loss.backward()
    towers = ("model.vision.tower.", "model.text_tower.")
    new = {name: p for name, p in model.named_parameters() if not name.startswith(towers)}
    assert [name for name, p in new.items() if p.grad is None] == []
    if k == 4:  # with a smaller k an expert may be unused; its gradient is then zero, not None
        still = [name for name, p in new.items() if not p.grad.abs().max() > 0]
        assert still == []


def test_first_step_of_a_fresh_model_trains_the_up_projections():
    torch.manual_seed(0)
    model = SeraForReferringSegmentation(SeraConfig.tiny()).train()
    model(**make_inputs(2), labels=torch.rand(2, 56, 56)).loss.backward()
    for block in model.model.vision.adapted_blocks.values():
        assert block.adapter.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(28, 28), (28, 84), (84, 42), (14, 140)])
def test_sizes(model, size):
    inputs = make_inputs(1, size=size)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, size[0] // 14 * 4, size[1] // 14 * 4)
    assert logits.isfinite().all()


def test_loss_equals_a_numpy_computation(model):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 8, 12))
    labels = (rng.random((3, 32, 48)) > 0.6).astype(np.float64)
    targets = labels.reshape(3, 8, 4, 12, 4).mean(axis=(2, 4))
    probability = 1 / (1 + np.exp(-logits))
    bce = -(targets * np.log(probability) + (1 - targets) * np.log(1 - probability)).mean()
    dice = [1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in zip(probability, targets, strict=True)]
    config = SeraConfig.tiny(bce_loss_weight=2.0, dice_loss_weight=0.5)
    got = mask_segmentation_loss(torch.tensor(logits), torch.tensor(labels), config)
    assert float(got) == pytest.approx(2.0 * bce + 0.5 * np.mean(dice), abs=1e-6)


@pytest.mark.parametrize("size", [(8, 16), (4, 12), (28, 42), (5, 3), (16, 9)])
def test_targets_are_averages_over_the_area_that_a_logit_covers(size):
    masks = np.random.default_rng(0).random((2, 28, 42)) > 0.5
    fine = masks.repeat(size[0], axis=1).repeat(size[1], axis=2)  # so fine that every area holds whole pixels
    expected = fine.reshape(2, size[0], 28, size[1], 42).mean(axis=(2, 4))
    averages = area_average(torch.tensor(masks).float(), size)
    assert torch.allclose(averages, torch.tensor(expected).float(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_labels_may_be_of_any_dtype(dtype):
    logits, labels = torch.randn(2, 8, 8), torch.rand(2, 32, 32) > 0.5
    expected = mask_segmentation_loss(logits, labels.float(), SeraConfig.tiny())
    assert torch.equal(mask_segmentation_loss(logits, labels.to(dtype), SeraConfig.tiny()), expected)


@pytest.mark.parametrize("kind", ["area", "nearest"])
def test_what_is_left_out_of_the_loss_counts_in_no_way(kind):
    rng = np.random.default_rng(0)
    config = SeraConfig.tiny(bce_loss_weight=2.0, dice_loss_weight=0.5, mask_targets=kind)
    logits = torch.tensor(rng.normal(size=(3, 8, 12)), requires_grad=True)
    labels = torch.tensor(rng.random((3, 32, 48)))
    whole = labels.reshape(3, 8, 4, 12, 4)  # axes 2 and 4 are the pixels of one logit
    whole[0, :, :, 6:] = -1  # its right half
    whole[1, 2, :2, 3] = -1  # half of one logit's pixels, the first
    loss = mask_segmentation_loss(logits, labels, config)

    counted = (whole >= 0).numpy()
    if kind == "area":
        shares = counted.mean(axis=(2, 4))
        targets = np.where(counted, whole, 0).sum(axis=(2, 4)) / counted.sum(axis=(2, 4)).clip(1)
    else:
        shares, targets = counted[:, :, 0, :, 0], whole[:, :, 0, :, 0].clamp(min=0).numpy()
    p = logits.detach().sigmoid().numpy()
    bce = -((targets * np.log(p) + (1 - targets) * np.log(1 - p)) * shares).sum(axis=(1, 2)) / shares.sum(axis=(1, 2))
    covered = (targets * shares).sum(axis=(1, 2))
    dice = 1 - (2 * (p * targets * shares).sum(axis=(1, 2)) + 1) / ((p * shares).sum(axis=(1, 2)) + covered + 1)
    assert loss.item() == pytest.approx(2.0 * bce.mean() + 0.5 * dice.mean(), abs=1e-6)

    loss.backward()
    assert (logits.grad[0, :, 6:] == 0).all() and (logits.grad[0, :, :6] != 0).all()
    nothing = mask_segmentation_loss(logits, torch.full((3, 32, 48), -1.0), config)
    assert nothing.item() == 0.0


def test_loss_in_forward_is_the_sum_of_its_parts(model):
    inputs, labels = make_inputs(2), torch.rand(2, 56, 56)
    evaluated = model(**inputs, labels=labels)
    assert evaluated.router_aux_loss is None and torch.equal(evaluated.loss, evaluated.mask_loss)
    trained = model.train()(**inputs, labels=labels)
    assert float(trained.loss) == pytest.approx(float(trained.mask_loss + trained.router_aux_loss))
    assert float(trained.router_aux_loss) > 0
    assert model(**inputs).loss is None


def test_half_precision_runs(model):
    inputs = make_inputs(2)
    with torch.no_grad():
        expected = model(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**inputs).logits
        whole = model.to(torch.bfloat16)(**(inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})).logits
    spread = expected.std()
    assert (mixed.float() - expected).abs().mean() < 0.1 * spread
    assert (whole.float() - expected).abs().mean() < 0.1 * spread


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 50, 56)}, "50×56"),
        ({"pixel_values": torch.zeros(3, 56, 56)}, "pixel_values have shape"),
        (
            {"image_index": None, "input_ids": torch.zeros(3, 4, dtype=torch.long), "attention_mask": None},
            "3 expressions",
        ),
        ({"image_index": torch.tensor([0, 2])}, "holds 2"),
        ({"image_index": torch.tensor([0, -1])}, "holds -1"),
        ({"image_index": torch.tensor([0])}, "image_index has shape"),
        ({"image_index": torch.tensor([0, 1], dtype=torch.uint8)}, "image_index is of torch.uint8"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long), "image_index": torch.zeros(0).long()}, "an expression"),
        ({"image_states": torch.zeros(1, 1, 21, 32)}, "image_states are of 1 images"),
        ({"labels": torch.zeros(2, 28, 28)}, "labels have shape"),
    ],
)
def test_wrong_sizes_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**(make_inputs(2) | change))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_selected_experts": 0}, "num_selected_experts is 0"),
        ({"num_selected_experts": 5}, "num_selected_experts is 5"),
        ({"adapter_layers": [1, 4]}, r"adapter_layers \[1, 4\]"),
        ({"tap_layers": []}, r"tap_layers \[\]"),
        ({"tap_layers": [1, 2], "adapter_layers": [1, 3]}, r"adapter_layers \[1, 3\] must lie below"),
        ({"fusion_dim": 18}, "fusion_dim"),
        ({"adapter_num_heads": 0}, "adapter_num_heads is 0"),
        ({"vision_config": {"model_type": "vit"}}, "'vit'"),
        ({"text_config": {"model_type": "resnet"}}, "'resnet'"),  # which has no number of layers either
    ],
)
def test_configurations_that_cannot_be_built_are_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        SeraConfig.tiny(**overrides)


def test_default_configuration_is_sera_b():
    config = SeraConfig()
    assert config.vision_config.model_type == "dinov2_with_registers" and config.patch_size == 14
    assert config.adapter_layers == [1, 3, 5, 7, 9, 11] and config.tap_layers == [4, 8, 12]
    assert SeraConfig(dice_loss_weight=1, router_noise_std=0).dice_loss_weight == 1
    large = SeraConfig(vision_config={"model_type": "dinov2", "num_hidden_layers": 24, "patch_size": 14})
    assert large.adapter_layers == [2, 6, 10, 14, 18, 22] and large.tap_layers == [8, 16, 24]


def test_layers_are_named_in_the_order_in_which_the_tower_gives_them():
    config = SeraConfig.tiny(adapter_layers=[3, 1, 3], tap_layers=[4, 2, 2])
    assert config.adapter_layers == [1, 3] and config.tap_layers == [2, 4]
    assert SeraConfig.tiny(tap_layers=[2, 1]).adapter_layers == [1]  # the default, without what nothing reads


def test_blocks_after_the_last_tap_are_not_run():
    model = make_model(tap_layers=[1, 3])
    expected = model(**make_inputs()).logits
    for part in (model.model.vision.tower.encoder.layer[3], model.model.vision.tower.layernorm):
        part.register_forward_pre_hook(lambda module, arguments: pytest.fail("run for nothing"))
    assert torch.equal(model(**make_inputs()).logits, expected)


def test_fresh_weights_start_as_documented():
    model = SeraForReferringSegmentation(SeraConfig.tiny())
    for block in model.model.vision.adapted_blocks.values():
        assert not block.adapter.up_proj.weight.any() and not block.adapter.up_proj.bias.any()
        assert not block.adapter.router.score.weight.any() and not block.adapter.router.score_sentence.weight.any()
    for fusion in model.model.fusions:
        assert not fusion.router.score.weight.any() and not fusion.router.score.bias.any()
        assert fusion.router.hidden.weight.std() > 0.1 and fusion.router.hidden_sentence.weight.std() > 0.1
    for gate in model.decoder.merge.gates:
        assert (gate.bias == 1).all() and not gate.weight.any()
    for gate in SeraForReferringSegmentation(SeraConfig.tiny(sentence_gate="linear")).decoder.merge.gates:
        assert (gate.bias == 1).all() and gate.weight.std() > 0.1
    deviation = model.decoder.layers[0].ffn[0].weight.std() * 32**0.5
    assert 0.8 < float(deviation) < 1.2  # variance 1 / fan-in


@pytest.mark.parametrize("overrides", [{}, {"adapter_layers": [3]}, {"adapter_layers": []}, {"tap_layers": [1, 3]}])
@pytest.mark.parametrize("training", [False, True])
def test_states_stand_for_the_images(overrides, training):
    model = make_model(**overrides, router_noise_std=0.0, decoder_dropout=0.0)
    inputs = make_inputs(2, [0, 0, 1], size=(56, 70))
    with torch.no_grad():
        states = model.model.vision.encode_states(inputs["pixel_values"])
        model.train(training)
        for module in model.modules():  # or the first call's samples would move what the second normalises by
            if isinstance(module, SeraSampleStatistics):
                module.is_kept = True
        expected = model(**inputs).logits
        blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert torch.equal(model(**blank, image_states=states).logits, expected)
        if not training:
            in_parts = model(**blank, image_states=states, max_expressions=2).logits
            assert torch.allclose(in_parts, expected, atol=1e-5)
        assert not torch.equal(model(**blank).logits, expected)


def test_a_saved_configuration_says_of_its_towers_what_is_their_own():
    config, common = SeraConfig.tiny(), PreTrainedConfig().to_dict()
    saved = json.loads(config.to_json_string())
    for name in ("vision_config", "text_config"):
        default = type(getattr(config, name))().to_dict()
        said = [key for key, value in saved[name].items() if key in common and value == default[key]]
        assert set(said) <= {"model_type"}
        assert SeraConfig.from_dict(saved).to_dict()[name] == config.to_dict()[name]
