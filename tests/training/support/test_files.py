"""Saved models: weights stored in another type still run in the model's own."""

import json

import torch
from builders import tiny_tokenizer
from conftest import make_inputs, make_model
from safetensors.torch import load_file

from modeling_sera import SeraForReferringSegmentation
from training.support.files import save_model


def test_weights_stored_in_halves_run_in_float32(tmp_path):
    model = make_model().eval()
    save_model(model, tiny_tokenizer(), tmp_path / "model", torch.float16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    loaded = SeraForReferringSegmentation.from_pretrained(tmp_path / "model").eval()
    assert loaded.dtype == torch.float32
    inputs = make_inputs(2)
    with torch.no_grad():
        expected, found = model(**inputs).logits, loaded(**inputs).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
