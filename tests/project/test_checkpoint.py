"""The checkpoints in the repository are whole, small and self-contained, and their figures are those of their weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import REFER_MINI, REPOSITORY, needs_refer_mini, save_tiny_model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.configuration import DataSettings, load_settings
from training.evaluation import score_sentences
from training.examples.splits import load_splits
from training.learning.checkpoints import checksum
from training.publishing.card import read_evaluation, read_run
from training.sources.scenes.dataset import generate_scenes
from training.support.model_location import locate_model

RECIPES = {"sera-scenes": "scenes.yaml", "sera-photos": "photos.yaml"}
BYTES = {"sera-scenes": 10_000_000, "sera-photos": 70_000_000}
FOLDERS = [REPOSITORY / "checkpoints" / name for name in RECIPES]
SCENES = 8  # a few of the hundreds that were scored
OBJECTS = 5


each_checkpoint = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_checkpoint
def test_it_is_a_whole_folder_of_a_bounded_size(folder, tmp_path):
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".py"}
    assert files["model.safetensors"] <= BYTES[folder.name]
    run = {"settings.yaml", "history.json", "tuning.json", "README.md"}
    scores = {path.name for path in folder.glob("evaluation-*")}
    save_tiny_model(tmp_path)
    assert set(files) == run | scores | {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}


@each_checkpoint
def test_its_code_is_the_packages_own(folder):
    """Real files, for checkouts without symbolic links. `make checkpoint-code` writes them."""
    code = {path.name: path.read_bytes() for path in folder.glob("*.py") if not path.is_symlink()}
    packages = (REPOSITORY / "modeling_sera", REPOSITORY / "processing_sera")
    assert code == {path.name: path.read_bytes() for package in packages for path in package.glob("*_sera.py")}


@each_checkpoint
def test_its_settings_lie_with_it(folder):
    location = locate_model(folder)
    assert location.home == folder and location.settings.is_file() and location.name == folder.name


@each_checkpoint
def test_it_was_trained_as_its_configuration_file_says(folder):
    recipe = load_settings(REPOSITORY / "training" / "configs" / RECIPES[folder.name])
    recipe.output_dir = f"outputs/{folder.name}"
    assert read_run(folder).settings == recipe


def compare(folder: Path, name: str, rows_of: Callable[[DataSettings], datasets.Dataset], number: int) -> None:
    """Some sentences are scored again. Another processor may round a pixel at the edge of a mask differently."""
    model, info = SeraForReferringSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32
    processor = SeraProcessor.from_pretrained(folder)
    record = read_evaluation(folder / name, {folder.name})
    assert record.get("weights") in (None, checksum(model.state_dict()))  # an older record has no checksum
    scores = score_sentences(model.eval(), processor, rows_of(DataSettings(**record["data"])), Accelerator(cpu=True))
    recorded = {(score["row"], score["sentence"]): score for score in record["scores"]}
    assert len(scores) >= number
    differences = []
    for score in scores:
        before = recorded[score.row, score.sentence]
        assert (score.kind, score.truth) == (before["kind"], before["truth"])
        union = before["predicted"] + before["truth"] - before["intersection"]
        differences.append(abs(score.iou - before["intersection"] / union))
    assert sum(differences) / len(differences) < 0.01


def test_the_figures_of_the_scenes_are_those_of_the_weights():
    def rows_of(data: DataSettings) -> datasets.Dataset:
        return generate_scenes(SCENES, data.scene_seed, data.scene_size, split="test", scene_set=data.scene_set)

    compare(FOLDERS[0], "evaluation-test.json", rows_of, 5 * SCENES)


@needs_refer_mini
def test_the_figures_of_the_photographs_are_those_of_the_weights():
    def rows_of(data: DataSettings) -> datasets.Dataset:
        return load_splits(replace(data, root=str(REFER_MINI)), ["val"])[0].select(range(OBJECTS))

    compare(FOLDERS[1], "evaluation-val.json", rows_of, 2 * OBJECTS)
