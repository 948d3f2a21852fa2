"""What several tests need: a small model with inputs for it, a small processor, and an image."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from builders import special_ids, tiny_tokenizer
from PIL import Image

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleStatistics
from modeling_sera.routing_sera import SeraRouterScore
from processing_sera import SeraImageProcessor, SeraProcessor
from training.support.files import save_model

REPOSITORY = Path(__file__).resolve().parents[1]
REFER_MINI = REPOSITORY.parent / "shared" / "data" / "refer-mini"

# Files of few, long tests. They begin, or one process would end with them while the other has nothing left to do.
LONG_FILES = [
    f"test_{name}.py"
    for name in (
        "readme",
        "clean_environment",
        "ablation_run",
        "segment",
        "restart",
        "benchmarks",
        "processes",
        "space",
        "export",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of LONG_FILES first, in that order."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


needs_refer_mini = pytest.mark.skipif(
    not REFER_MINI.is_dir(), reason="refer-mini, the part of RefCOCO that development measures on, is not here"
)


def make_model(seed: int = 0, **overrides) -> SeraForReferringSegmentation:
    """A tiny model in eval mode whose parts do something: up-projections, routers' scores and statistics are off their start."""
    torch.manual_seed(seed)
    model = SeraForReferringSegmentation(SeraConfig.tiny(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name and "mlp" not in name:
                parameter.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, SeraRouterScore):
                module.weight.normal_(std=0.3)
            if isinstance(module, (torch.nn.BatchNorm2d, SeraSampleStatistics)):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    return model


def save_tiny_model(folder: Path, mask_threshold: float = 0.5, **overrides) -> Path:
    """A model of `make_model` with its processor, for 56×56 images, in a folder as training saves them."""
    tokenizer = tiny_tokenizer()
    model = make_model(text_config={"vocab_size": len(tokenizer), **special_ids(tokenizer)}, **overrides)
    image_processor = SeraImageProcessor(size={"height": 56, "width": 56})
    save_model(model, SeraProcessor(image_processor, tokenizer, mask_threshold=mask_threshold), folder)
    return folder


def make_inputs(
    num_images: int = 2, image_index: list[int] | None = None, size: tuple[int, int] = (56, 56), length: int = 7
) -> dict[str, torch.Tensor]:
    """Random images and expressions of different lengths, padded as the processor pads them."""
    generator = torch.Generator().manual_seed(1)
    index = list(range(num_images)) if image_index is None else image_index
    ids = torch.randint(0, 998, (len(index), length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(len(index)):
        end = length - 1 - i % 3
        ids[i, end:] = 999
        mask[i, end + 1 :] = 0
    ids[:, 0] = 998
    return {
        "pixel_values": torch.randn(num_images, 3, *size, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": torch.tensor(index),
    }


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch) -> Path:
    """Nothing that a test loads is taken from, or left in, the user's cache."""
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def model() -> SeraForReferringSegmentation:
    return make_model()


@pytest.fixture
def processor() -> SeraProcessor:
    return SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tiny_tokenizer())


@pytest.fixture
def image() -> Image.Image:
    """Smooth colours, so that lossy formats stay near; 40 high and 30 wide."""
    rows, columns = np.mgrid[0:40, 0:30]
    channels = [6 * rows, 255 - 8 * columns, 3 * (rows + columns)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))
