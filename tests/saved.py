"""Saved models, an image for them, and copies of their folders."""

from pathlib import Path

import numpy as np
import torch
from conftest import save_tiny_model
from PIL import Image

from modeling_sera import SeraForReferringSegmentation

TASKS = ("image-segmentation", "referring-image-segmentation")
EXPRESSIONS = ["left zebra", "the cup", "right"]


def save_presence_model(folder: Path) -> Path:
    """A tiny model that predicts presence, with a threshold of its own."""
    return save_tiny_model(folder, mask_threshold=0.45, predict_presence=True)


def save_photo(path: Path) -> Path:
    """An image of noise, 40 high and 60 wide."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def spread_logits(model: SeraForReferringSegmentation, inputs: dict[str, torch.Tensor]) -> None:
    """Scale and shift the mask logits of a random model, so that masks for these inputs have pixels on both sides."""
    kernel = model.decoder.projector.predict_kernel
    with torch.no_grad():
        kernel.weight *= 20
        kernel.bias *= 20
        logits = model(**inputs).logits
        kernel.bias[-1] -= logits.mean() + logits.std()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(folder: Path, target: Path) -> Path:
    """Copy a folder of files to a new folder."""
    target.mkdir(parents=True)
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target
