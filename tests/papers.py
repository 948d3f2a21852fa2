"""Small models and REFER folders for the papers' table."""

from pathlib import Path

from builders import Folder
from stand_ins import make_processor, tiny_model

from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.support.files import write_text

# COCO ids; the sets share images across their splits, as the real ones do
SETS = {
    ("refcoco", "unc"): {"train": [1, 2, 3], "val": [4, 6], "testA": [5, 8], "testB": [7, 9]},
    ("refcoco+", "unc"): {"train": [1, 2, 3], "val": [4, 6], "testA": [5, 8], "testB": [7, 9]},
    ("refcocog", "umd"): {"train": [1, 2, 5], "val": [9, 6], "test": [4, 3]},
    ("refcocog", "google"): {"train": [1, 2, 4, 5], "val": [9, 6, 3]},
    ("grefcoco", "unc"): {"train": [1, 2], "val": [4, 6], "testA": [5], "testB": [7]},
}


def write_sets(root: Path, sets: dict | None = None) -> Path:
    """The sets as a REFER folder."""
    for (dataset, split_by), images in (sets or SETS).items():
        folder = Folder(root, dataset=dataset, split_by=split_by).fill(images)
        if dataset == "grefcoco":
            for ref in folder.refs[::2]:
                ref["ann_id"] = [-1]  # nothing is meant
            folder.write()
    return root


def write_model(folder: Path, data: DataSettings | None = None, **overrides) -> Path:
    """A run's folder: a small model and, of given data, the settings of its training."""
    tiny_model(**overrides).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    if data is not None:
        write_text(folder / "settings.yaml", dump_settings(TrainingSettings(data=data)))
    return folder
