"""The splits that a run's settings name."""

import os

import datasets
from accelerate import PartialState

from training.configuration import DataSettings
from training.data import load_refer
from training.scenes import generate_scenes


def load_splits(data: DataSettings, splits: list[str]) -> list[datasets.Dataset]:
    """The named splits, one referred object per row (`training.data.REFER_FEATURES`). All names are checked before any is read.

    Raises:
        ValueError: Where there is no such split.
    """
    if data.source == "scenes":
        sizes = dict(zip(("train", "val", "test"), data.num_scenes, strict=True))
        for split in splits:
            if split not in sizes:
                raise ValueError(f"The embedded scenes have no split {split!r}; they have {', '.join(sizes)}.")
        workers = max((os.cpu_count() or 1) // PartialState().num_processes, 1)  # every process draws its own
        return [
            generate_scenes(sizes[split], data.scene_seed, data.scene_size, split=split, num_workers=workers)
            for split in splits
        ]
    if data.root is None:
        raise ValueError("data.root is not set; name the folder that holds the REFER sets.")
    loaded = load_refer(data.root, data.dataset, data.split_by, image_dir=data.image_dir, splits=splits)
    return [loaded[split] for split in splits]
