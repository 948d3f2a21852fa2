"""Rows as a user makes them, with images of noise."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from training.sources.masks import encode_mask
from training.sources.refer import REFER_FEATURES


def write_own(root: Path, **splits: list[int]) -> str:
    """A folder of rows that a user made: by split the image ids, one row and one image of noise for each."""
    (root / "data").mkdir(parents=True)
    rng = np.random.default_rng(len(str(root)))
    for split, image_ids in splits.items():
        rows = [own_row(number, image_id, rng) for number, image_id in enumerate(image_ids)]
        table = datasets.Dataset.from_list(rows, features=REFER_FEATURES)
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


def own_row(number: int, image_id: int, rng: np.random.Generator) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return {
        "image": {"path": None, "bytes": buffer.getvalue()},
        "image_id": image_id,
        "ref_id": number,
        "ann_ids": [],
        "no_target": False,
        "category": "",
        "sentences": [f"thing {number}"],
        "sentence_ids": [0],
        "sentence_kinds": ["mine"],
        "mask": encode_mask(np.eye(20, 30, dtype=bool)),
        "boxes": [],
    }
