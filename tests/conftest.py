"""What several tests need: a small model, and inputs for it."""

from pathlib import Path

import pytest
import torch

from modeling_sera import SeraConfig, SeraForReferringSegmentation

REPOSITORY = Path(__file__).resolve().parents[1]
REFER_MINI = REPOSITORY.parent / "shared" / "data" / "refer-mini"

needs_refer_mini = pytest.mark.skipif(
    not REFER_MINI.is_dir(), reason="refer-mini, the part of RefCOCO that development measures on, is not here"
)


def make_model(seed: int = 0, **overrides) -> SeraForReferringSegmentation:
    """A tiny model in eval mode whose adapters do something: up-projections and batch norms are moved off their start."""
    torch.manual_seed(seed)
    model = SeraForReferringSegmentation(SeraConfig.tiny(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name and "mlp" not in name:
                parameter.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model


def make_inputs(
    num_pictures: int = 2, image_index: list[int] | None = None, size: tuple[int, int] = (56, 56), length: int = 7
) -> dict[str, torch.Tensor]:
    """Random pictures and expressions of different lengths, padded as the processor pads them."""
    generator = torch.Generator().manual_seed(1)
    index = list(range(num_pictures)) if image_index is None else image_index
    ids = torch.randint(0, 998, (len(index), length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(len(index)):
        end = length - 1 - i % 3
        ids[i, end:] = 999
        mask[i, end + 1 :] = 0
    ids[:, 0] = 998
    return {
        "pixel_values": torch.randn(num_pictures, 3, *size, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": torch.tensor(index),
    }


@pytest.fixture
def model() -> SeraForReferringSegmentation:
    return make_model()
