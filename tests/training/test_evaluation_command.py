"""The evaluation command: its files, the source of its data and threshold, two processes, and bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from builders import Folder
from PIL import Image
from runs import ENVIRONMENT, ON_CPU
from saved import spread_logits
from stand_ins import StandIn, make_processor, make_rows, places, tiny_model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training import evaluation
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.evaluation import score_sentences
from training.scoring.metric import SentenceScore, summarize
from training.sources.scenes.dataset import generate_scenes
from training.support.environment import command_line, without_folders
from training.support.files import write_text


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder as training writes it: a fresh model and the settings of its data."""
    folder = tmp_path_factory.mktemp("outputs") / "trial"
    tiny_model(predict_presence=True).save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    data = DataSettings(source="scenes", num_scenes=(1, 2, 3), scene_size=64)
    write_text(folder / "settings.yaml", dump_settings(TrainingSettings(data=data)))
    return folder


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory) -> Path:
    """The JSON file that the command wrote, with others beside it."""
    output = tmp_path_factory.mktemp("new") / "deeper" / "scores.json"
    options = ["--split", "test", "--output", str(output), "--sheet", str(output.with_name("sheet.png"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        evaluation.main([str(run_folder / "model"), *options])
    return output


def message_of(command, arguments: list[str], capsys) -> str:
    """The message of a command that fails."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        command(arguments)
    if isinstance(error.value, SystemExit):
        assert error.value.code not in (None, 0)
    return capsys.readouterr().err + str(error.value)


def scores_in(record: dict) -> list[SentenceScore]:
    return [SentenceScore(**score) for score in record["scores"]]


def test_the_record_holds_the_scores_and_the_metrics(evaluated):
    record = json.loads(evaluated.read_text())
    rows, scores = generate_scenes(3, 0, 64, split="test"), scores_in(record)
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    assert len(record["weights"]) == 64
    assert record["split"] == "test" and record["model"] == "trial" and record["predicts_presence"]
    assert record["summary"]["as written"] == summarize(scores)
    assert record["summary"]["shuffled"].keys() == record["summary"]["as written"].keys()
    assert {"all", "location", "appearance", "relation"} == set(record["summary"]["as written"])
    assert record["counts"] == {"images": 3, "objects": len(rows), "expressions": len(scores), "without_target": 0}
    assert record["threshold"] == {"value": 0.5, "source": "the processor's", "candidates": None}
    assert record["data"]["num_scenes"] == [1, 2, 3] and record["bootstrap"]["unit"] == "image"
    for group, ends in record["intervals"].items():
        for name, (low, high) in ends.items():
            assert 0 <= low <= high <= 1 and name in record["summary"]["as written"][group]
        assert ends.keys() == record["summary"]["as written"][group].keys() - {"num_expressions"}
    for groups in record["slices"].values():
        assert sum(group["num_expressions"] for group in groups.values()) == len(scores)
    assert {"torch", "transformers", "python"} <= set(record["versions"]) and record["hardware"]["cores"] >= 1


def test_the_tables_show_the_record(evaluated):
    record, report = json.loads(evaluated.read_text()), evaluated.with_suffix(".md").read_text()
    value, (low, high) = record["summary"]["as written"]["all"]["mIoU"], record["intervals"]["all"]["mIoU"]
    assert f"| {100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}] |" in report
    assert "Threshold 0.5, the processor's" in report and record["command"] in report
    for groups in record["slices"].values():
        for label, group in groups.items():
            assert f"| {label} | {group['num_expressions']} |" in report
    widths = {len(line.split("|")) for line in report.splitlines() if line.startswith("|")}
    assert len(widths) == 2  # two tables


def test_the_model_index_is_that_of_a_model_card(evaluated):
    record = json.loads(evaluated.read_text())
    (entry,) = yaml.safe_load(evaluated.with_suffix(".yaml").read_text())["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "trial" and result["task"]["type"] == "image-segmentation"
    assert result["dataset"]["split"] == "test"
    summary = record["summary"]["as written"]["all"]
    assert {metric["type"] for metric in result["metrics"]} == summary.keys() - {"num_expressions"}
    for metric in result["metrics"]:
        assert metric["value"] == round(100 * summary[metric["type"]], 2)
        assert metric["args"]["interval"] == [round(100 * end, 2) for end in record["intervals"]["all"][metric["type"]]]
        assert metric["args"]["threshold"] == 0.5 and metric["args"]["threshold_source"] == "the processor's"


def test_the_drawings_are_images(evaluated):
    for path in (evaluated.with_suffix(".png"), evaluated.with_name("sheet.png")):
        assert Image.open(path).size > (500, 500)


@pytest.mark.parametrize(
    ("option", "field", "said", "argument"),
    [
        ("--tta=flip", "tta", "flipped image", "tta"),
        ("--expected_iou", "expected_iou", "expected-IoU threshold", "expected_iou"),
        ("--largest_component", "largest_component", "connected component", "largest_component"),
    ],
)
def test_every_file_names_the_mask_selection(run_folder, tmp_path, option, field, said, argument):
    output = tmp_path / "scores.json"
    for options in ([], [option, "--sheet", str(tmp_path / "sheet.png")]):
        evaluation.main([str(run_folder / "model"), "--output", str(output), *options])
        chosen = bool(options)
        assert bool(json.loads(output.read_text())[field]) is chosen
        assert (said in output.with_suffix(".md").read_text()) is chosen
        (entry,) = yaml.safe_load(output.with_suffix(".yaml").read_text())["model-index"]
        (result,) = entry["results"]
        assert all((argument in metric["args"]) is chosen for metric in result["metrics"])


def test_no_file_names_a_folder_of_the_machine(evaluated, run_folder):
    for suffix in (".json", ".md", ".yaml"):
        text = evaluated.with_suffix(suffix).read_text()
        assert str(run_folder.parent) not in text and str(evaluated.parent) not in text


# Data


def evaluate(*arguments: object) -> dict:
    """Run the command and return its record, which is written to the last argument."""
    *options, output = map(str, arguments)
    evaluation.main([*options, "--output", output])
    return json.loads(Path(output).read_text())


def test_a_run_can_be_named_by_its_folder(run_folder):
    evaluation.main([str(run_folder), "--data.num_scenes", "[1, 1, 1]"])
    record = json.loads((run_folder / "evaluation-test.json").read_text())
    assert record["model"] == "trial" and record["command"].startswith("python training/evaluation.py trial --data")


def test_single_fields_of_the_runs_data_can_be_overridden(run_folder, tmp_path):
    record = evaluate(run_folder / "model", "--data.num_scenes", "[1, 1, 2]", tmp_path / "a.json")
    assert record["counts"]["images"] == 2 and record["data"]["scene_size"] == 64


def test_a_model_without_a_run_is_scored_on_a_refer_folder(run_folder, tmp_path):
    folder = Folder(tmp_path / "data")
    folder.load()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").symlink_to(run_folder / "model")
    data = ["--data.source", "refer", "--data.root", tmp_path / "data", "--data.dataset", "refcoco"]
    record = evaluate(tmp_path / "elsewhere" / "weights", *data, "--split", "testA", tmp_path / "a.json")
    assert record["counts"] == {"images": 1, "objects": 1, "expressions": 2, "without_target": 0}
    assert record["model"] == "weights" and record["data"]["root"] == "data"
    (entry,) = yaml.safe_load((tmp_path / "a.yaml").read_text())["model-index"]
    dataset = entry["results"][0]["dataset"]
    assert dataset == {
        "name": "a part of RefCOCO (unc)",
        "type": "refcoco",
        "config": "unc",
        "split": "testA",
        "args": record["counts"],
    }
    assert record["intervals"] == {"all": {}}  # a single image gives none


# Threshold


def test_a_calibrated_threshold_is_chosen_on_val_and_every_file_names_it(run_folder, tmp_path, caplog):
    with caplog.at_level("INFO"):
        record = evaluate(run_folder / "model", "--calibrate", "val", tmp_path / "a.json")
    threshold, candidates = record["threshold"]["value"], record["threshold"]["candidates"]
    assert len(candidates) == 19 and candidates[f"{threshold:g}"] == max(candidates.values())
    source = record["threshold"]["source"]
    assert source == "chosen on val for the highest mIoU" and record["split"] == "test"
    for text in (caplog.text, *((tmp_path / f"a{suffix}").read_text() for suffix in (".md", ".yaml"))):
        assert source in re.sub(r"\s+", " ", text) and f"{threshold:g}" in text
    assert "| location |" in caplog.text and "mIoU" in caplog.text
    given = evaluate(run_folder / "model", "--threshold", threshold, tmp_path / "b.json")
    assert given["scores"] == record["scores"] and given["threshold"]["source"] == "given"
    same = evaluate(run_folder / "model", "--calibrate", "val", "--split", "val", tmp_path / "c.json")
    assert "the split scored here" in same["threshold"]["source"]


@pytest.fixture
def refusal(run_folder, tmp_path, monkeypatch, capsys):
    """Returns the message for options that the command must refuse before it scores or writes anything."""

    def work(*arguments, **options):
        raise AssertionError("scoring began")

    monkeypatch.setattr(evaluation, "score_sentences", work)
    monkeypatch.setattr(evaluation, "threshold_curve", work)

    def said(*options: object, model: Path | str = run_folder / "model") -> str:
        arguments = [str(model), *map(str, options), "--output", str(tmp_path / "no" / "a.json")]
        message = message_of(evaluation.main, arguments, capsys)
        assert not (tmp_path / "no").exists()
        return message

    return said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--split", "nope"], "'nope'"),
        (["--calibrate", "test"], "--calibrate test"),
        (["--calibrate", "testA"], "--calibrate testA"),
        (["--calibrate", "train"], "--calibrate train"),
        (["--calibrate", "val", "--threshold", "0.4"], "exclude each other"),
        (["--threshold", "0"], "threshold"),
        (["--threshold", "0.4", "--expected_iou"], "leave out --threshold and --calibrate"),
        (["--calibrate", "val", "--expected_iou"], "leave out --threshold and --calibrate"),
        (["--fit_scores", "--split", "test"], "not fitted on a test split"),
        (["--fit_scores", "--split", "testA"], "not fitted on a test split"),
        (["--fit_scores", "--split", "val", "--tta", "flip"], "leave out --tta"),
        (["--threshold", "1"], "threshold"),
        (["--threshold", "1.5"], "1.5"),
        (["--threshold", "nan"], "nan"),
        (["--batch_size", "0"], "batch_size"),
        (["--max_expressions", "-1"], "max_expressions"),
        (["--data.source", "nope"], "nope"),
        (["--nope", "1"], "--nope"),
        (["--settings", "/nowhere/settings.yaml"], "/nowhere/settings.yaml is not there"),
    ],
)
def test_what_it_cannot_use_is_named_before_any_work(refusal, options, named):
    assert named in refusal(*options)


def test_a_missing_model_or_its_data_is_named(refusal, run_folder, tmp_path):
    missing = tmp_path / "nowhere" / "model"
    assert str(missing) in refusal(model=missing)
    assert "There is no folder gone, and an id on the Hub has the form user/name" in refusal(model="gone")
    (tmp_path / "model").symlink_to(run_folder / "model")
    assert f"{tmp_path / 'settings.yaml'} is not there" in refusal(model=tmp_path / "model")
    assert "A model on the Hub brings no settings.yaml" in refusal(model="someone/zebra-finder")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal("--data.source", "scenes", model=tmp_path / "empty")


# The model's own mask selection, and honest scores


def test_the_processors_mask_selection_is_the_default_and_can_be_overridden(run_folder, tmp_path):
    plain_folder = Path(shutil.copytree(run_folder, tmp_path / "plain"))
    model = SeraForReferringSegmentation.from_pretrained(plain_folder / "model").eval()
    processor = SeraProcessor.from_pretrained(plain_folder / "model")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    spread_logits(model, processor(images=[noise], text=["the left cup"], return_tensors="pt"))
    model.save_pretrained(plain_folder / "model")
    folder = Path(shutil.copytree(plain_folder, tmp_path / "run"))
    processor.mask_threshold, processor.keep_largest_component = "expected_iou", True
    processor.save_pretrained(folder / "model")
    own = evaluate(folder, tmp_path / "a.json")
    asked = evaluate(plain_folder, "--expected_iou", "--largest_component", tmp_path / "b.json")
    assert own["scores"] == asked["scores"] and own["expected_iou"] and own["largest_component"]
    off = evaluate(folder, "--threshold", 0.5, "--no_largest_component", tmp_path / "c.json")
    plain = evaluate(plain_folder, tmp_path / "d.json")
    assert off["scores"] == plain["scores"] != own["scores"]
    assert off["threshold"]["value"] == 0.5 and not off["expected_iou"] and not off["largest_component"]


def test_every_record_says_how_honest_the_scores_are(evaluated):
    record, report = json.loads(evaluated.read_text()), evaluated.with_suffix(".md").read_text()
    quality, scores = record["score_quality"], scores_in(record)
    assert quality["calibration"] is None and "mean probabilities inside the masks" in report
    assert sum(part["number"] for part in quality["bins"]) == len(scores) and len(quality["bins"]) == 5
    total = sum(part["number"] * abs(part["score"] - part["IoU"]) for part in quality["bins"])
    assert quality["ECE"] == pytest.approx(total / len(scores))
    assert f"{quality['ECE']:.3f} in 5 bins" in report and f"about {quality['ECE_by_chance']:.3f}, by chance" in report


def test_fitted_scores_and_their_mask_selection_become_the_models_own(run_folder, tmp_path):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    before = json.loads((folder / "model" / "processor_config.json").read_text())
    val = ["--split", "val", "--data.num_scenes", "[1, 6, 1]"]
    selection = ["--expected_iou", "--largest_component"]
    fitted = evaluate(folder, *val, *selection, "--fit_scores", tmp_path / "a.json")
    after = json.loads((folder / "model" / "processor_config.json").read_text())
    changed = {"mask_threshold": "expected_iou", "keep_largest_component": True}
    assert after == before | changed | {"score_calibration": after["score_calibration"]}
    assert "fitted on this split" in fitted["score_quality"]["calibration"]
    own = evaluate(folder, *val, tmp_path / "b.json")
    plain = evaluate(run_folder, *val, *selection, tmp_path / "c.json")
    for score, reference, other in zip(own["scores"], fitted["scores"], plain["scores"], strict=True):
        assert score == reference | {"score": pytest.approx(reference["score"], abs=1e-6)}
        assert other | {"score": None} == score | {"score": None}
    assert own["score_quality"]["ECE"] < plain["score_quality"]["ECE"]
    assert own["score_quality"]["calibration"] == "the processor's estimates of the IoU"


# Two processes

TWO_PROCESSES = """
import json, sys
from dataclasses import astuple
from pathlib import Path
from accelerate import Accelerator
from stand_ins import StandIn, make_processor, make_rows
from training import evaluation

accelerator = Accelerator()
assert accelerator.num_processes == 2
folder = Path(sys.argv[1])
for num_scenes in (5, 1):  # a number that does not divide, and one that leaves a process without work
    arguments = StandIn(), make_processor(), make_rows(num_scenes), accelerator
    scores = evaluation.score_sentences(*arguments, batch_size=2, max_expressions=20)
    text = json.dumps([astuple(score) for score in scores])
    (folder / f"{num_scenes}-{accelerator.process_index}.json").write_text(text)
evaluation.main([sys.argv[2], "--calibrate", "val", "--output", str(folder / "command.json")])
accelerator.end_training()
"""


def test_two_processes_give_the_same_scores(run_folder, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", str(script), str(tmp_path), str(run_folder / "model")]
    done = subprocess.run(launch, env=ENVIRONMENT | ON_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for num_scenes in (5, 1):
        expected = score_sentences(StandIn(), make_processor(), make_rows(num_scenes), Accelerator(cpu=True))
        for process in (0, 1):
            got = json.loads((tmp_path / f"{num_scenes}-{process}.json").read_text())
            assert [SentenceScore(*score) for score in got] == expected
    two = json.loads((tmp_path / "command.json").read_text())
    one = evaluate(run_folder / "model", "--calibrate", "val", tmp_path / "one.json")
    assert (one["processes"], two["processes"]) == (1, 2) and one["counts"] == two["counts"]
    assert len(two["scores"]) == len(one["scores"])
    for asked in ("as written", "shuffled"):
        for group, summary in one["summary"][asked].items():
            assert two["summary"][asked][group] == pytest.approx(summary, abs=1e-6)
    assert two["threshold"]["candidates"] == pytest.approx(one["threshold"]["candidates"], abs=1e-6)


# Arithmetic and environment


def test_the_arithmetic_is_as_asked_for_and_said(run_folder, tmp_path):
    records = {}
    for precision, said in (("no", ""), ("bf16", "forward pass in bf16")):
        output = tmp_path / f"{precision}.json"
        command = [sys.executable, evaluation.__file__, str(run_folder / "model"), "--output", str(output)]
        done = subprocess.run(
            [*command, "--mixed_precision", precision], env=ENVIRONMENT | ON_CPU, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        records[precision] = json.loads(output.read_text())
        assert records[precision]["precision"] == precision
        assert ("forward pass in" in output.with_suffix(".md").read_text()) is bool(said)
        assert said in output.with_suffix(".md").read_text()
    absences = [[score["no_target"] for score in record["scores"]] for record in records.values()]
    assert absences[0] != absences[1] and absences[0] == pytest.approx(absences[1], abs=0.05)


def test_a_command_is_recorded_without_folders():
    arguments = ["/home/someone/outputs/run/model", "--split", "val", "--data.root=/data/my refer", "--batch_size", "4"]
    recorded = command_line("training/evaluation.py", arguments)
    assert recorded == "python training/evaluation.py run/model --split val '--data.root=my refer' --batch_size 4"
    assert without_folders(["a", "/b/c", 3, None, ["/d/e"], "b/c"]) == ["a", "c", 3, None, ["e"], "b/c"]
