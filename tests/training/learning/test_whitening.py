"""The start of the projections: uncorrelated channels of unit variance, and nothing else changed."""

import pytest
import torch
from conftest import make_inputs

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from training.learning.whitening import projections, whiten_projections


@pytest.mark.parametrize("overrides", [{}, {"adapter_layers": []}, {"fusion_dim": 48}])
def test_projections_give_uncorrelated_channels_of_unit_variance(overrides):
    torch.manual_seed(0)
    model = SeraForReferringSegmentation(SeraConfig.tiny(**overrides))
    images = torch.randn(40, 3, 56, 70) * torch.rand(40, 3, 1, 1) * 3 + torch.randn(40, 1, 1, 1)
    layers = list(projections(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        states = model.model.vision.encode_states(images)
    whiten_projections(model, ((part, (56, 70)) for part in states.split(8)))
    assert model.training

    seen = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, output: seen.update({layer: output.flatten(0, 1)}))
    inputs = make_inputs(40, size=(56, 70)) | {"pixel_values": images}
    with torch.no_grad():
        model.eval()(**inputs)
    for layer in layers:
        output = seen[layer][:, : layer.in_features]
        covariance = torch.cov(output.T)
        assert output.mean(dim=0).abs().max() < 1e-2
        assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-2
        assert covariance[0, 0] == pytest.approx(1, abs=0.01) and covariance.diag().max() < 1.01
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    names = {id(module): name for name, module in model.named_modules()}
    assert changed == {f"{names[id(layer)]}.{part}" for layer in layers for part in ("weight", "bias")}
