"""Parts that an ablation switches off are not there, and nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_inputs, make_model

from modeling_sera import SeraConfig, SeraForReferringSegmentation, adapter_sera
from modeling_sera.loss_sera import mask_segmentation_loss
from training.configuration import DataSettings
from training.examples.splits import load_splits, load_training_splits
from training.learning.routing_health import RoutingHealth

SWITCHES = [
    {"routing": "uniform"},
    {"adapter_experts": False},
    {"fusion_experts": False},
    {"adapter_experts": False, "fusion_experts": False},
]
PARTS = {
    "routing": ["router.", "model.sentence_norm"],
    "adapter_experts": ["adapter.spatial_expert", "adapter.boundary_expert", "adapter.router"],
    "fusion_experts": [".experts.", "fusions.0.router", "fusions.1.router", "fusions.2.router"],
}


def with_weights_of(full: SeraForReferringSegmentation, **overrides) -> SeraForReferringSegmentation:
    """A model with a part switched off that has all its weights from a full one."""
    reduced = make_model(**overrides)
    weights = full.state_dict()
    reduced.load_state_dict({name: weights[name] for name in reduced.state_dict()})
    return reduced


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_parameters_of_a_part_that_is_off_are_gone_and_no_others(switches):
    full, reduced = set(make_model().state_dict()), set(make_model(**switches).state_dict())
    named = [part for switch in switches for part in PARTS[switch]]
    if len(switches) == 2:  # no router is left that could see the sentence
        named.append("model.sentence_norm")
    gone = {name for name in full if any(part in name for part in named)}
    assert gone and reduced == full - gone


@pytest.mark.parametrize("training", [False, True])
def test_uniform_routing_weighs_every_expert_alike_whatever_the_input(training):
    model = make_model(routing="uniform", router_noise_std=5.0).train(training)
    for scale in (0.0, 1.0, 30.0):
        inputs = make_inputs(3)
        outputs = model(**inputs | {"pixel_values": scale * inputs["pixel_values"]}, output_router_weights=True)
        assert len(outputs.fusion_router_weights) == 3 and len(outputs.adapter_router_weights) == 2
        assert all(torch.equal(weights, torch.full((3, 4), 0.25)) for weights in outputs.fusion_router_weights)
        assert all(torch.equal(weights, torch.full((3, 2), 0.5)) for weights in outputs.adapter_router_weights)


def test_uniform_routing_is_what_a_learned_router_of_equal_scores_gives():
    full = make_model()
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if "router.score" in name:
                parameter.zero_()
    with torch.inference_mode():
        expected, got = (model(**make_inputs()).logits for model in (full, with_weights_of(full, routing="uniform")))
    assert torch.allclose(got, expected, atol=1e-5)


def test_an_adapter_without_experts_is_one_whose_experts_add_nothing(monkeypatch):
    full = make_model()
    reduced = with_weights_of(full, adapter_experts=False)
    monkeypatch.setattr(adapter_sera, "SPATIAL_GAIN", 0.0)
    with torch.inference_mode():
        before = full(**make_inputs()).logits
        monkeypatch.setattr(adapter_sera, "BOUNDARY_GAIN", 0.0)
        silenced, got = full(**make_inputs()).logits, reduced(**make_inputs()).logits
    assert torch.allclose(got, silenced, atol=1e-6) and not torch.allclose(before, silenced, atol=1e-3)


def test_fusion_without_experts_projects_and_normalises():
    fusion = make_model(fusion_experts=False).model.fusions[0]
    tokens = torch.randn(2, 6, 32)
    with torch.inference_mode():
        fused, routing = fusion(tokens, grid_size=(2, 3), sentence=torch.randn(2, 24))
        projected = (tokens @ fusion.project.weight.T + fusion.project.bias).double().numpy()
    centred = projected - projected.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=-1, keepdims=True) + fusion.norm.eps)
    assert routing is None
    assert np.abs(fused.numpy() - normed.transpose(0, 2, 1).reshape(2, 16, 2, 3)).max() < 1e-4


@pytest.mark.parametrize("switches", SWITCHES)
def test_expressions_that_share_an_image_get_what_they_get_alone(switches):
    model = make_model(**switches)
    shared = make_inputs(2, [0, 0, 1])
    alone = shared | {"pixel_values": shared["pixel_values"][shared["image_index"]], "image_index": None}
    with torch.inference_mode():
        assert torch.allclose(model(**shared).logits, model(**alone).logits, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_parameter_that_is_left_is_trained(switches):
    model = make_model(**switches).train()
    labels = torch.zeros(2, 56, 56)
    labels[:, 10:30, 10:40] = 1
    outputs = model(**make_inputs(2), labels=labels)
    outputs.loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in idle if "tower" not in name] == []
    if not model.config.fusion_experts:
        assert outputs.router_aux_loss.item() == 0


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_reduced_model_is_saved_and_loaded_and_its_routing_is_counted(switches, tmp_path):
    model = make_model(**switches)
    model.save_pretrained(tmp_path)
    loaded = SeraForReferringSegmentation.from_pretrained(tmp_path)
    assert all(getattr(loaded.config, name) == value for name, value in switches.items())
    health = RoutingHealth(loaded)
    with torch.inference_mode(), health.watch():
        assert torch.equal(loaded(**make_inputs()).logits, model(**make_inputs()).logits)
    summary = health.summary(Accelerator(cpu=True))
    assert bool(summary["taps"]) == model.config.fusion_experts
    assert bool(summary["adapters"]) == model.config.adapter_experts


def test_nearest_targets_read_one_pixel_of_those_that_a_logit_covers():
    config = {kind: SeraConfig.tiny(mask_targets=kind) for kind in ("area", "nearest")}
    logits = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    blocks = (torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    labels = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)  # every 2x2 block has one value
    losses = {kind: mask_segmentation_loss(logits, labels, config[kind]).item() for kind in config}
    assert losses["area"] == pytest.approx(losses["nearest"])
    thinned = labels.clone()
    thinned[:, 1::2], thinned[:, :, 1::2] = 0, 0
    assert mask_segmentation_loss(logits, thinned, config["nearest"]).item() == pytest.approx(losses["nearest"])
    assert mask_segmentation_loss(logits, thinned, config["area"]).item() != pytest.approx(losses["area"], rel=1e-2)


def test_uniform_routing_refuses_to_select():
    with pytest.raises(Exception, match="num_selected_experts is 2, but routing is 'uniform'"):
        SeraConfig.tiny(routing="uniform", num_selected_experts=2)


@pytest.mark.parametrize("aware", [False, True])
def test_uniform_routing_has_nothing_that_sees_the_sentence(aware):
    config = SeraConfig.tiny(routing="uniform", expression_aware_routing=aware)
    assert not config.routers_see_sentence
    assert set(make_model(routing="uniform", expression_aware_routing=aware).state_dict()) == set(
        make_model(routing="uniform").state_dict()
    )


@pytest.mark.parametrize("name", ["routing", "mask_targets"])
def test_an_unknown_choice_is_refused_and_the_known_ones_named(name):
    with pytest.raises(Exception, match=rf"{name}.*'(learned|area)'.*perhaps"):
        SeraConfig.tiny(**{name: "perhaps"})


def test_hidden_sentences_are_all_the_same_and_the_rest_of_the_data_is_as_it_was():
    settings = DataSettings(source="scenes", num_scenes=(3, 2, 1), scene_size=64)
    blind = replace(settings, hide_sentences=True)
    shown = [*load_training_splits(settings), *load_splits(settings, ["test"])]
    hidden = [*load_training_splits(blind), *load_splits(blind, ["test"])]
    for before, after in zip(shown, hidden, strict=True):
        assert after.features == before.features
        assert list(map(len, after["sentences"])) == list(map(len, before["sentences"]))
        assert len({sentence for group in after["sentences"] for sentence in group}) == 1
        assert after.remove_columns("sentences")[:] == before.remove_columns("sentences")[:]
    with pytest.raises(ValueError, match="hide_sentences does not go together"):
        load_training_splits(replace(blind, source="folder", root="any", streaming=True))
