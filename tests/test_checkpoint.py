"""The checkpoint in the repository: small and plain, and its figures its own."""

from accelerate import Accelerator
from conftest import REPOSITORY

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.card import read_evaluation, read_run
from training.configuration import DataSettings, load_settings
from training.evaluation import score_sentences
from training.scenes import generate_scenes

FOLDER = REPOSITORY / "checkpoints" / "sera-scenes"
SCENES = 8  # of the hundreds that were scored


def test_it_is_at_most_ten_megabytes_of_weights_and_no_code():
    files = {path.name: path.stat().st_size for path in (FOLDER / "model").iterdir() if path.suffix != ".py"}
    assert files.pop("model.safetensors") <= 10_000_000
    assert set(files) == {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_it_was_trained_as_its_configuration_file_says():
    recipe = load_settings(REPOSITORY / "training" / "configs" / "scenes-64.yaml")
    recipe.output_dir = "outputs/sera-scenes"
    assert read_run(FOLDER / "model").settings == recipe


def test_its_figures_are_those_of_its_weights():
    """Some of the scenes are drawn and scored again; another processor may round a pixel at a mask's edge the other way."""
    model, info = SeraForReferringSegmentation.from_pretrained(FOLDER / "model", output_loading_info=True)
    assert not any(info.values())
    processor = SeraProcessor.from_pretrained(FOLDER / "model")
    record = read_evaluation(FOLDER / "evaluation-test.json", {FOLDER.name})
    data = DataSettings(**record["data"])
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
