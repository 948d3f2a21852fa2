"""The checkpoints in the repository: small and plain, and their figures their own."""

import pytest
from accelerate import Accelerator
from conftest import REPOSITORY, save_tiny_model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.configuration import DataSettings, load_settings
from training.evaluation import score_sentences
from training.learning.checkpoints import checksum
from training.publishing.card import read_evaluation, read_run
from training.sources.scenes.dataset import generate_scenes

RECIPES = {"sera-scenes": "scenes.yaml"}
FOLDERS = [REPOSITORY / "checkpoints" / name for name in RECIPES]
SCENES = 8  # of the hundreds that were scored


each_checkpoint = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_checkpoint
def test_it_is_a_whole_folder_of_at_most_ten_megabytes(folder, tmp_path):
    """The code in it is the repository's own, by symbolic links, as many as a saved model has files of code."""
    (code := [path for path in (folder / "model").iterdir() if path.suffix == ".py"]).sort()
    files = {path.name: path.stat().st_size for path in (folder / "model").iterdir() if path not in code}
    assert files.pop("model.safetensors") <= 10_000_000
    assert set(files) == {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    save_tiny_model(tmp_path)
    assert [path.name for path in code] == sorted(path.name for path in tmp_path.glob("*.py"))
    assert all(path.is_symlink() and path.resolve().parent.parent == REPOSITORY for path in code)


@each_checkpoint
def test_it_was_trained_as_its_configuration_file_says(folder):
    recipe = load_settings(REPOSITORY / "training" / "configs" / RECIPES[folder.name])
    recipe.output_dir = f"outputs/{folder.name}"
    assert read_run(folder / "model").settings == recipe


@each_checkpoint
def test_its_figures_are_those_of_its_weights(folder):
    """Some of the scenes are drawn and scored again; another processor may round a pixel at a mask's edge the other way."""
    model, info = SeraForReferringSegmentation.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values())
    processor = SeraProcessor.from_pretrained(folder / "model")
    record = read_evaluation(folder / "evaluation-test.json", {folder.name})
    data = DataSettings(**record["data"])
    assert record.get("weights") in (None, checksum(model.state_dict()))  # the first part's record is older than that
    rows = generate_scenes(SCENES, data.scene_seed, data.scene_size, split="test", scene_set=data.scene_set)
    scores = score_sentences(model.eval(), processor, rows, Accelerator(cpu=True))
    recorded = {(score["row"], score["sentence"]): score for score in record["scores"]}
    assert len(scores) > 5 * SCENES
    differences = []
    for score in scores:
        before = recorded[score.row, score.sentence]
        assert (score.kind, score.truth) == (before["kind"], before["truth"])
        union = before["predicted"] + before["truth"] - before["intersection"]
        differences.append(abs(score.iou - before["intersection"] / union))
    assert sum(differences) / len(differences) < 0.01
