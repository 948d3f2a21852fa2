"""Activations that are computed again: the gradients and the running statistics of a plain step, or a refusal."""

import inspect
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import make_inputs, make_model

SECOND = []  # one entry per block that was computed again within the context below


@contextmanager
def noted():
    SECOND.append(True)
    yield


MODES = {
    "default": None,
    "not reentrant": {"use_reentrant": False},
    "reentrant is left open": {"use_reentrant": None},
    "other settings alone": {"determinism_check": "none"},
    "a context of the user's own": {"context_fn": lambda: (nullcontext(), noted())},
    "every second layer": {"every_n_layers": 2},
}


def enable(model: torch.nn.Module, mode: dict | None) -> None:
    """Checkpointing under its present name in transformers."""
    layers = {name: mode[name] for name in mode or () if name == "every_n_layers"}
    settings = {name: value for name, value in (mode or {}).items() if name not in layers} or None
    method = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if layers.keys() - inspect.signature(method).parameters.keys():
        pytest.skip("this release of transformers cannot checkpoint every second layer alone")
    method(settings, **layers)


def step(mode: dict | None, checkpointing: bool, frozen: tuple[str, ...]) -> tuple[dict, dict]:
    """Gradients and buffers after a step in training."""
    model = make_model(
        router_noise_std=0.0,
        vision_config={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        text_config={"attention_dropout": 0.1},
        decoder_dropout=0.0,
    ).train()
    towers = {"vision": model.model.vision.tower, "text": model.model.text_tower}
    for name in frozen:
        towers[name].requires_grad_(False)
    if checkpointing:
        enable(model, mode)
    torch.manual_seed(3)
    model(**make_inputs(2, [0, 1, 1]), labels=torch.ones(3, 56, 56)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "text")])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_gradients_of_a_plain_step(mode, frozen):
    SECOND.clear()
    (plain, before), (gradients, after) = (step(MODES[mode], checkpointing, frozen) for checkpointing in (False, True))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(after[name], value) for name, value in before.items())  # moved once, not twice
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-4), name
    assert bool(SECOND) == (mode == "a context of the user's own")


@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"preserve_rng_state": False}])
def test_a_mode_that_changes_gradients_is_refused(model, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        enable(model, settings)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
