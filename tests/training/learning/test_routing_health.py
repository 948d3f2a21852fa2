"""Routing health against the routers' own outputs, counted again in numpy."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_inputs, make_model

from modeling_sera.fusion_sera import EXPERT_NAMES
from training.learning.routing_health import RoutingHealth


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
    for number, shares in enumerate(summary["adapters"].values()):
        weights = np.concatenate([batch[number] for batch in adapters])
        assert [shares["spatial"], shares["boundary"]] == pytest.approx(weights.mean(axis=0), abs=1e-6)


def test_the_losses_of_one_batch_are_the_models_own():
    """In training mode without noise, the model's auxiliary loss is the mean over the taps of the three terms together."""
    model = make_model(router_noise_std=0.0, num_selected_experts=3, router_logit_bound=0.1).train()
    health = RoutingHealth(model)
    with health.watch(), torch.no_grad():
        expected = model(**make_inputs(4)).router_aux_loss.item()
    taps = health.summary(Accelerator(cpu=True))["taps"].values()
    terms = [tap[name] for tap in taps for name in ("logit_loss", "balance_loss", "token_loss")]
    assert sum(terms) / len(taps) == pytest.approx(expected, rel=1e-5)
