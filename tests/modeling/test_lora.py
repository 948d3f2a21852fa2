"""LoRA with `peft`: what is trained is saved whole, and batch norms of frozen layers keep their running statistics."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_inputs, make_model
from torch import nn

from modeling_sera import SeraForReferringSegmentation

TARGETS = {
    "attention of all parts": ["q_proj", "v_proj"],
    "attention of the towers": r".*tower.*\.(q_proj|v_proj)",
    "convolutions too": ["q_proj", "conv1", "mix.0", "reduce.0"],
    "all-linear": "all-linear",
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft, which puts LoRA on a model, is not installed")


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """A few steps on a few images; the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    inputs, losses = make_inputs(2, [0, 1, 1]), []
    labels = torch.zeros(3, 56, 56)
    labels[:, 10:30, 20:50] = 1
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_inputs(2, [0, 1, 1])).logits


def statistics(model: nn.Module) -> list[torch.Tensor]:
    """Running statistics of the batch norms, in a copy."""
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_lora_that_is_saved_and_loaded_gives_the_same_logits(peft, tmp_path, targets, whole):
    base = make_model()
    clean = copy.deepcopy(base)
    saved = base.modules_to_save_for_lora if whole else None
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS[targets], modules_to_save=saved))
    before = logits(model)
    losses = train(model.train())
    trained = logits(model)
    assert losses[-1] < losses[0] and (trained - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(clean, tmp_path)), trained)
    assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-4)


def test_frozen_before_or_after_the_training_mode_makes_no_difference(peft):
    base = make_model().train()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))  # freezes, after train()
    before = statistics(model)
    train(model)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))


def test_modules_that_are_trained_whole_move_and_save_their_statistics(peft, tmp_path: Path):
    base = make_model()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=base.modules_to_save_for_lora)
    model = peft.get_peft_model(base, config).train()
    before = statistics(model)
    train(model)
    assert sum(not torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True)) == len(before) / 2
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(statistics(loaded), statistics(model), strict=True))


def test_an_adapter_of_transformers_own_is_saved_and_loaded(peft, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    train(model.train())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = SeraForReferringSegmentation.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))


def test_a_lora_trains_the_same_with_checkpointed_activations(peft):
    found = []
    for checkpointing in (False, True):
        base = make_model(router_noise_std=0.0, decoder_dropout=0.0)
        if checkpointing:
            (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["decoder"]))
        found.append((train(model.train()), logits(model)))
    (plain, expected), (checkpointed, got) = found
    assert checkpointed == pytest.approx(plain, abs=1e-4) and torch.allclose(got, expected, atol=1e-3)


# Without peft


@pytest.mark.parametrize("overrides", [{}, {"predict_presence": True}, {"adapter_layers": []}, {"tap_layers": [2, 4]}])
def test_the_named_modules_hold_all_that_sera_adds(overrides):
    model = make_model(**overrides)
    names = model.modules_to_save_for_lora
    inside = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    towers = (model.model.vision.tower, model.model.text_tower)
    in_towers = {id(parameter) for tower in towers for parameter in tower.parameters()}
    assert inside | in_towers == {id(parameter) for parameter in model.parameters()} and not inside & in_towers


def test_batch_norms_keep_their_statistics_where_their_layer_is_frozen():
    model = make_model()
    model.decoder.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model.train()(**make_inputs(2), labels=torch.ones(2, 56, 56)).loss.backward()
    moved = {name for name, value in before.items() if not torch.equal(model.get_buffer(name), value)}
    assert moved == {name for name in before if not name.startswith("decoder.")}
    model.requires_grad_(True).train()(**make_inputs(2))
    assert not any(torch.equal(model.get_buffer(name), value) for name, value in before.items())
