"""Routing health against the routers' own outputs, counted again in numpy; dead and saturated routers and idle experts."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_inputs, make_model

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import EXPERT_NAMES
from training.learning.routing_health import RoutingHealth, named_routers, routers_of, routing_warnings


def information(weights: np.ndarray) -> float:
    """Of sample and expert, in nats: the mean divergence of a sample's weights from the mean weights."""
    ratio = weights.astype(np.float64) / np.maximum(weights.mean(axis=0, dtype=np.float64), 1e-12)
    return (weights * np.log(np.where(ratio > 0, ratio, 1))).sum(axis=1).mean()


@pytest.mark.parametrize("k", [2, 4])
def test_what_the_routers_decided_is_counted(k):
    model = make_model(num_selected_experts=k, router_logit_loss_weight=0.5, router_logit_bound=0.0)
    health = RoutingHealth(model)
    taps, adapters = [], []
    with health.watch(), torch.inference_mode():
        for count in (3, 2):
            out = model(**make_inputs(count, size=(28 * count, 56)), output_router_weights=True)
            taps.append([weights.numpy() for weights in out.fusion_router_weights])
            adapters.append([weights.numpy() for weights in out.adapter_router_weights])
    model(**make_inputs(2))  # not watched
    summary = health.summary(Accelerator(cpu=True))

    assert list(summary["taps"]) == [str(depth) for depth in model.config.tap_layers]
    for number, tap in enumerate(summary["taps"].values()):
        weights = np.concatenate([batch[number] for batch in taps]).astype(np.float64)
        assert weights.shape == (5, 4)
        shares = weights.mean(axis=0)
        assert [tap["shares"][name] for name in EXPERT_NAMES] == pytest.approx(shares, abs=1e-6)
        selected = (weights > 0).mean(axis=0)
        assert [tap["selected"][name] for name in EXPERT_NAMES] == pytest.approx(selected)
        assert sum(tap["selected"].values()) == pytest.approx(k)
        nonzero = np.where(weights > 0, weights, 1.0)
        assert tap["entropy"] == pytest.approx(-(nonzero * np.log(nonzero)).sum(axis=1).mean(), abs=1e-6)
        balance = model.config.router_balance_loss_weight * (shares.std() / shares.mean()) ** 2
        assert tap["balance_loss"] == pytest.approx(balance, abs=1e-6)
        assert tap["logit_loss"] > 0
        assert tap["token_loss"] > 0 if k < 4 else tap["token_loss"] == 0

    assert list(summary["adapters"]) == [str(block) for block in model.config.adapter_layers]
    for number, figures in enumerate(summary["adapters"].values()):
        weights = np.concatenate([batch[number] for batch in adapters]).astype(np.float64)
        assert list(figures["shares"].values()) == pytest.approx(weights.mean(axis=0), abs=1e-6)
        logits = np.log(weights) - np.log(weights).mean(axis=1, keepdims=True)
        assert figures["logit_deviation"] == pytest.approx(logits.std(axis=0).max(), rel=1e-4)
        assert figures["saturated"] == pytest.approx((weights.max(axis=1) > 0.95).mean())
    for number, figures in enumerate(named_routers(summary).values()):
        weights = np.concatenate([[*tap, *adapter][number] for tap, adapter in zip(taps, adapters, strict=True)])
        assert figures["samples"] == 5
        assert figures["deviation"] == pytest.approx(weights.astype(np.float64).std(axis=0).max(), rel=1e-4)
        assert figures["mutual_information"] == pytest.approx(information(weights), abs=1e-6)


def test_the_losses_of_one_batch_are_the_models_own():
    """In training mode without noise, the model's auxiliary loss is the mean over the taps of the three terms together."""
    model = make_model(router_noise_std=0.0, num_selected_experts=3, router_logit_bound=0.1).train()
    health = RoutingHealth(model)
    with health.watch(), torch.no_grad():
        expected = model(**make_inputs(4)).router_aux_loss.item()
    taps = health.summary(Accelerator(cpu=True))["taps"].values()
    terms = [tap[name] for tap in taps for name in ("logit_loss", "balance_loss", "token_loss")]
    assert sum(terms) / len(taps) == pytest.approx(expected, rel=1e-5)


def summary_of(model: SeraForReferringSegmentation, count: int = 8) -> dict:
    """The figures for so many images, each with an expression of its own."""
    health = RoutingHealth(model)
    with health.watch(), torch.inference_mode():
        model(**make_inputs(count))
    return health.summary(Accelerator(cpu=True))


def test_units_that_do_not_vary_and_what_the_experts_add_are_counted_again():
    model, inputs = make_model(), make_inputs(6)
    found = named_routers(summary_of(model, 6))
    units, maps = {}, {}
    for depth, fusion in zip(model.config.tap_layers, model.model.fusions, strict=True):
        name = f"tap {depth}"
        fusion.router.activation.register_forward_hook(lambda m, args, out, name=name: units.update({name: out}))
        for expert, module in fusion.experts.items():
            module.register_forward_hook(
                lambda m, args, out, name=name, expert=expert: maps.update({(name, expert): (args[0], out - args[0])})
            )
    for block, adapted in model.model.vision.adapted_blocks.items():
        for expert, gain in (("spatial", 0.25), ("boundary", 0.15)):
            key = f"adapter {block}", expert
            getattr(adapted.adapter, f"{expert}_expert").register_forward_hook(
                lambda m, args, out, key=key, gain=gain: maps.update({key: (args[0], gain * out)})
            )
    with torch.inference_mode():
        model(**inputs)
    for name, values in units.items():
        is_dead = values.double().std(dim=0, unbiased=False) < 0.01
        assert found[name]["dead_units"] == pytest.approx(is_dead.double().mean().item())
    assert len(maps) == 4 * len(units) + 2 * len(model.config.adapter_layers)
    for (name, expert), (grid, added) in maps.items():
        shares = added.flatten(1).norm(dim=1) / grid.flatten(1).norm(dim=1)
        assert found[name]["added"][expert] == pytest.approx(shares.mean().item(), rel=1e-4)


def decide(model: SeraForReferringSegmentation, router: str, logits: torch.Tensor) -> None:
    """Give the router's samples these logits (N, E), whatever they were given before."""

    def replace(module, args, result):
        if isinstance(result, torch.Tensor):
            return logits.softmax(-1)
        return result._replace(weights=logits.softmax(-1), logits=logits, selected=torch.ones_like(logits).bool())

    routers_of(model)[router].register_forward_hook(replace)


def healthy_model() -> SeraForReferringSegmentation:
    """A tiny model without a warning."""
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    for name in routers_of(model):
        decide(model, name, torch.randn(8, 4 if name.startswith("tap") else 2, generator=generator))
    for fusion in model.model.fusions:
        for expert in fusion.experts.values():
            expert.register_forward_hook(lambda m, args, out: 2 * args[0])
    for block in model.model.vision.adapted_blocks.values():
        for expert in (block.adapter.spatial_expert, block.adapter.boundary_expert):
            expert.register_forward_hook(lambda m, args, out: args[0])
    return model


def test_one_expert_for_each_sample_is_the_logarithm_of_the_number_of_experts_used():
    model = healthy_model()
    taps = [name for name in routers_of(model) if name.startswith("tap")]
    for name, used in zip(taps, (4, 2), strict=False):
        decide(model, name, 100 * torch.eye(4)[torch.arange(8) % used])
        figures = named_routers(summary_of(model))[name]
        assert figures["mutual_information"] == pytest.approx(math.log(used), abs=1e-6)
        assert figures["deviation"] == pytest.approx(math.sqrt((1 / used) * (1 - 1 / used)), abs=1e-6)


def test_routers_that_decide_and_experts_that_add_give_no_warning():
    assert routing_warnings(summary_of(healthy_model())) == []


@pytest.mark.parametrize("router", ["tap 1", "adapter 1"])
@pytest.mark.parametrize("case", ["dead", "saturated", "idle expert: spatial", "idle expert: boundary (mean weight"])
def test_each_fault_has_one_sentence_that_names_the_router(router, case):
    model = healthy_model()
    assert router in routers_of(model)
    experts = 4 if router.startswith("tap") else 2
    generator = torch.Generator().manual_seed(1)
    if case == "dead":
        decide(model, router, torch.tensor([0.5, 0.0, 0.1, 0.2])[:experts].repeat(8, 1))
    elif case == "saturated":
        decide(model, router, 20 * torch.eye(experts)[torch.arange(8) % experts])
    elif case.startswith("idle expert: spatial"):
        fusions = dict(zip((f"tap {depth}" for depth in model.config.tap_layers), model.model.fusions, strict=True))
        if router in fusions:
            fusions[router].experts["spatial"].register_forward_hook(lambda m, args, out: 1.05 * args[0])
        else:
            block = model.model.vision.adapted_blocks[router.removeprefix("adapter ")]
            block.adapter.spatial_expert.register_forward_hook(lambda m, args, out: 0.2 * args[0])
    else:
        logits = 0.3 * torch.randn(8, experts, generator=generator)
        place = 2 if experts == 4 else 1
        logits[:, place] -= 4
        logits[0] = 0  # not all samples agree, so that the router is not saturated
        decide(model, router, logits)
    (warning,) = routing_warnings(summary_of(model))
    assert warning.startswith(f"The router of {router} ") and warning.endswith(".") and case in warning
    assert sum(word in warning for word in ("dead:", "saturated", "idle")) == 1


def test_dead_hidden_units_make_a_router_dead():
    model = healthy_model()
    name, router = next((name, router) for name, router in routers_of(model).items() if name.startswith("tap"))
    router.activation.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    (warning,) = routing_warnings(summary_of(model))
    assert warning.startswith(f"The router of {name} is dead") and "100 % of its hidden units" in warning


def test_equal_weights_that_are_meant_give_no_warning():
    summary = summary_of(make_model(routing="uniform"))
    assert not any(word in warning for warning in routing_warnings(summary) for word in ("dead", "saturated", "weight"))
    assert all(figures["deviation"] == pytest.approx(0, abs=1e-6) for figures in named_routers(summary).values())
