"""Saved models, an image for them, and copies of their folders."""

from pathlib import Path

import numpy as np
from conftest import save_tiny_model
from PIL import Image

TASKS = ("image-segmentation", "referring-image-segmentation")
EXPRESSIONS = ["left zebra", "the cup", "right"]


def save_presence_model(folder: Path) -> Path:
    """A tiny model that predicts presence, with a threshold of its own."""
    return save_tiny_model(folder, mask_threshold=0.45, predict_presence=True)


def save_photo(path: Path) -> Path:
    """An image of noise, 40 high and 60 wide."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(folder: Path, target: Path) -> Path:
    """Copy a folder of files to a new folder."""
    target.mkdir(parents=True)
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target
