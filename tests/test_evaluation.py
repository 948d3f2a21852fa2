"""Scoring every sentence, in one process and in two; the commands for evaluation and prediction; figures and files."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import tiny_tokenizer
from conftest import REPOSITORY, make_model
from PIL import Image
from pycocotools import mask as coco_mask

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.modeling_sera import SeraReferringSegmentationOutput
from processing_sera import SeraImageProcessor, SeraProcessor
from training import evaluation, prediction
from training.batches import picture_as_annotated, shuffled_sentences
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.data import decode_mask
from training.evaluation import score_sentences
from training.figures import draw_sheet, overlay
from training.files import partial_folder, recover_folder, replace_folder, write_binary, write_text
from training.metric import SentenceScore, summarize
from training.scenes import generate_scenes

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class StandIn(torch.nn.Module):
    """In the model's place: logits from the picture and the expression, the same to the last bit in whatever batch."""

    def forward(self, pixel_values, input_ids, attention_mask, image_index, **kwargs):
        brightness = pixel_values.double().mean(dim=1)[:, 3::7, 3::7]
        word = (input_ids * attention_mask * torch.arange(1, input_ids.shape[1] + 1)).sum(dim=1) % 11 / 5 - 1
        return SeraReferringSegmentationOutput(logits=(brightness[image_index] * word[:, None, None]).float())


def make_processor() -> SeraProcessor:
    return SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tiny_tokenizer())


def make_rows(num_scenes: int = 5) -> datasets.Dataset:
    return generate_scenes(num_scenes, seed=3, image_size=64)


def tiny_model(**overrides) -> SeraForReferringSegmentation:
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return make_model(text_config={"vocab_size": len(tokenizer), **special}, **overrides)


def score_alone(processor: SeraProcessor, row: dict, sentence: str, threshold: float | None = None) -> tuple[int, int]:
    """Intersection and union of one sentence, asked alone, counted through sets of pixels."""
    inputs = processor(images=[picture_as_annotated(row)], text=[[sentence]], return_tensors="pt")
    result = processor.post_process_referring_segmentation(StandIn()(**inputs), inputs, threshold=threshold)[0]
    masks = result["mask"].numpy(), decode_mask(row["mask"])
    predicted, truth = (set(zip(*np.nonzero(mask), strict=True)) for mask in masks)
    return len(predicted & truth), len(predicted | truth)


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return make_rows()


@pytest.fixture(scope="module")
def processor() -> SeraProcessor:
    return make_processor()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


# Scores


def places(rows: datasets.Dataset) -> list[tuple[int, int, str]]:
    return [(n, i, kind) for n, kinds in enumerate(rows["sentence_kinds"]) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("threshold", [None, 0.45])
def test_scores_equal_those_of_sentences_asked_alone(rows, processor, accelerator, threshold):
    rows = rows.shuffle(seed=0)  # rows of a picture need not be neighbours
    scores = score_sentences(StandIn(), processor, rows, accelerator, threshold=threshold)
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    for score in scores:
        row = rows[score.row]
        expected = score_alone(processor, row, row["sentences"][score.sentence], threshold)
        assert (score.intersection, score.union) == expected
    assert len({score.iou for score in scores}) > 20  # the stand-in answers, now well, now badly


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 3, "num_workers": 2}])
def test_scores_do_not_depend_on_batches_or_workers(rows, processor, accelerator, options):
    expected = score_sentences(StandIn(), processor, rows, accelerator)
    assert score_sentences(StandIn(), processor, rows, accelerator, **options) == expected


def test_shuffled_sentences_are_scored_in_the_places_of_the_true_ones(rows, processor, accelerator):
    scores = score_sentences(StandIn(), processor, rows, accelerator, shuffle=True)
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    asked = shuffled_sentences(rows)
    for score in scores[::3]:
        expected = score_alone(processor, rows[score.row], asked[score.row][score.sentence])
        assert (score.intersection, score.union) == expected


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_as_it_was(rows, processor, accelerator, training):
    model = tiny_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_sentences(model, processor, rows.select(range(4)), accelerator)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


TWO_PROCESSES = """
import json, sys
from dataclasses import astuple
from pathlib import Path
from accelerate import Accelerator
from test_evaluation import StandIn, make_processor, make_rows
from training.evaluation import score_sentences

accelerator = Accelerator()
assert accelerator.num_processes == 2
for num_scenes in (5, 1):  # a number that does not divide, and one that leaves a process without work
    scores = score_sentences(StandIn(), make_processor(), make_rows(num_scenes), accelerator, batch_size=2)
    text = json.dumps([astuple(score) for score in scores])
    Path(sys.argv[1], f"{num_scenes}-{accelerator.process_index}.json").write_text(text)
accelerator.end_training()
"""


def test_two_processes_give_the_same_scores(rows, processor, accelerator, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for num_scenes in (5, 1):
        expected = score_sentences(StandIn(), processor, make_rows(num_scenes), accelerator)
        for process in (0, 1):
            got = json.loads((tmp_path / f"{num_scenes}-{process}.json").read_text())
            assert [SentenceScore(*score) for score in got] == expected


# The commands


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder like those of training: a model (fresh) and the settings of its data."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    data = DataSettings(source="scenes", num_scenes=(1, 1, 3), scene_size=64)
    write_text(folder / "settings.yaml", dump_settings(TrainingSettings(data=data)))
    return folder


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_the_evaluation_command(run_folder, tmp_path, caplog, on_cpu):
    output, sheet = tmp_path / "new" / "scores.json", tmp_path / "sheet.png"
    with caplog.at_level("INFO"):
        evaluation.main([str(run_folder / "model"), "--split", "test", "--output", str(output), "--sheet", str(sheet)])
    record = json.loads(output.read_text())
    rows = generate_scenes(3, 0, 64, split="test")
    scores = [SentenceScore(**{k: v for k, v in score.items() if k != "text"}) for score in record["scores"]]
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    assert record["split"] == "test" and record["summary"]["as written"] == summarize(scores)
    assert record["summary"]["shuffled"].keys() == record["summary"]["as written"].keys()
    assert {"all", "location", "appearance", "relation"} == set(record["summary"]["as written"])
    assert "| location |" in caplog.text and "mIoU" in caplog.text
    assert Image.open(sheet).size > (500, 500)


def message_of(command, arguments: list[str], capsys) -> str:
    """What a command says when it fails."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        command(arguments)
    if isinstance(error.value, SystemExit):
        assert error.value.code not in (None, 0)
    return capsys.readouterr().err + str(error.value)


def test_evaluation_says_what_is_missing(run_folder, tmp_path, capsys, on_cpu):
    model = str(run_folder / "model")
    assert "'nope'" in message_of(evaluation.main, [model, "--split", "nope"], capsys)
    assert "settings.yaml" in message_of(evaluation.main, [str(tmp_path / "nowhere" / "model")], capsys)
    assert "--nope" in message_of(evaluation.main, [model, "--nope", "1"], capsys)


@pytest.fixture(scope="module")
def photograph(rows) -> Image.Image:
    return picture_as_annotated(rows[0]).crop((0, 0, 64, 40))


EXPRESSIONS = ["left zebra", 'the "right" cup', "zebra — drinking"]


def check_prediction(folder: Path, image: Image.Image, expressions: list[str]) -> list[np.ndarray]:
    """The files of a prediction agree with each other; returns the masks."""
    records = json.loads((folder / "prediction.json").read_text())
    assert [record["expression"] for record in records] == expressions
    masks = []
    for record in records:
        written = Image.open(folder / record["mask"])
        assert written.mode == "L" and written.size == image.size
        mask = np.asarray(written)
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(coco_mask.decode(record["rle"]) == 1, mask == 255)
        assert 0 <= record["score"] <= 1
        masks.append(mask == 255)
    assert Image.open(folder / "overlay.png").size == image.size
    assert {path.name for path in folder.iterdir()} == {
        *(record["mask"] for record in records),
        *("overlay.png", "prediction.json"),
    }
    return masks


def test_the_prediction_command(run_folder, photograph, tmp_path):
    picture, output = tmp_path / "photo.png", tmp_path / "out"
    photograph.save(picture)
    command = [sys.executable, "training/prediction.py", str(run_folder / "model"), str(picture), *EXPRESSIONS]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    masks = check_prediction(output, photograph, EXPRESSIONS)
    assert len(masks) == 3
    for i in (1, 2, 3):
        assert f"mask-{i}.png" in done.stdout + done.stderr
    model, processor = SeraForReferringSegmentation.from_pretrained(run_folder / "model").eval(), make_processor()
    inputs = processor(images=[picture], text=[EXPRESSIONS], return_tensors="pt")
    with torch.no_grad():
        results = processor.post_process_referring_segmentation(model(**inputs), inputs)
    for mask, result in zip(masks, results, strict=True):
        assert (mask != result["mask"].numpy()).mean() < 0.01


def test_a_rotated_photograph_is_predicted_upright(run_folder, photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    photograph.save(tmp_path / "upright.png")
    masks = {}
    for name in ("turned", "upright"):
        picture, output = str(tmp_path / f"{name}.png"), str(tmp_path / name)
        prediction.main([str(run_folder / "model"), picture, *EXPRESSIONS, "--output", output])
        masks[name] = check_prediction(tmp_path / name, photograph, EXPRESSIONS)
    assert np.array_equal(masks["turned"], masks["upright"])
    overlays = [np.asarray(Image.open(tmp_path / name / "overlay.png")) for name in masks]
    assert np.array_equal(*overlays)


def test_a_16_bit_photograph_is_predicted_as_its_8_bit_copy(run_folder, photograph, tmp_path):
    grey = np.asarray(photograph.convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8", "16"):
        picture, output = str(tmp_path / f"{name}.png"), str(tmp_path / name)
        prediction.main([str(run_folder / "model"), picture, "left zebra", "--output", output])
    for file in ("mask-1.png", "overlay.png"):
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / name / file)) for name in ("8", "16"))), file


def test_the_threshold_is_the_probability_at_the_masks_edge(run_folder, photograph, tmp_path):
    photograph.save(tmp_path / "photo.png")
    model, processor = SeraForReferringSegmentation.from_pretrained(run_folder / "model").eval(), make_processor()
    inputs = processor(images=[photograph], text=[["left zebra"]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    found = processor.post_process_referring_segmentation(outputs, inputs, return_probabilities=True)[0]
    probabilities = found["probabilities"].numpy()
    assert probabilities.std() > 1e-3
    for threshold in np.quantile(probabilities, [0.2, 0.7]).tolist():
        arguments = [str(run_folder / "model"), str(tmp_path / "photo.png"), "left zebra"]
        prediction.main([*arguments, "--threshold", str(threshold), "--output", str(tmp_path / "out")])
        mask = check_prediction(tmp_path / "out", photograph, ["left zebra"])[0]
        assert (mask != (probabilities > threshold)).mean() < 0.01


def test_prediction_says_what_it_cannot_use(run_folder, photograph, tmp_path, capsys):
    good, corrupt, missing = tmp_path / "good.png", tmp_path / "corrupt.png", tmp_path / "missing.png"
    photograph.save(good)
    corrupt.write_bytes(good.read_bytes()[:200])
    output = tmp_path / "out"

    def said(*arguments: object) -> str:
        return message_of(prediction.main, [*map(str, arguments), "--output", str(output)], capsys)

    model = run_folder / "model"
    assert str(missing) in said(model, missing, "left zebra")
    assert str(corrupt) in said(model, corrupt, "left zebra")
    assert "empty expression" in said(model, good, "left zebra", " ")
    assert "expressions" in said(model, good)
    assert "1.5" in said(model, good, "left zebra", "--threshold", 1.5)
    assert str(tmp_path / "no-model") in said(tmp_path / "no-model", good, "left zebra")
    assert not output.exists()


@pytest.mark.parametrize("script", ["prediction.py", "evaluation.py"])
def test_a_failing_script_ends_with_a_message_alone(run_folder, tmp_path, monkeypatch, capsys, on_cpu, script):
    missing = str(tmp_path / "missing.png")
    arguments = {"prediction.py": [missing, "left zebra"], "evaluation.py": ["--split", missing]}[script]
    monkeypatch.setattr(sys, "argv", [script, str(run_folder / "model"), *arguments])
    with pytest.raises(SystemExit) as error:  # any other exception would print a traceback
        runpy.run_path(str(REPOSITORY / "training" / script), run_name="__main__")
    assert error.value.code not in (None, 0)
    assert missing in capsys.readouterr().err + str(error.value)


# Figures


def test_an_overlay_changes_the_masks_alone(photograph):
    masks = [np.zeros((40, 64), bool) for _ in range(3)]
    masks[0][5:15, 5:25] = True
    masks[1][20:38, 40:60] = True  # the third is empty
    before = photograph.tobytes()
    result = np.asarray(overlay(photograph, masks))
    assert photograph.tobytes() == before and result.shape == (40, 64, 3)
    covered = masks[0] | masks[1]
    assert np.array_equal(result[~covered], np.asarray(photograph)[~covered])
    changed = (result != np.asarray(photograph)).any(axis=-1)
    assert changed[covered].mean() > 0.95
    shift = [(result[m].astype(float) - np.asarray(photograph)[m]).mean(axis=0) for m in masks[:2]]
    assert np.abs(shift[0] - shift[1]).max() > 10  # each in a colour of its own


def sheet_of(model, processor, rows: datasets.Dataset, path: Path, text: str | None = None) -> np.ndarray:
    """A sheet of three examples as grey values, the expressions replaced by a text of our choice."""
    if text is not None:
        asked = [[text] * len(group) for group in rows["sentences"]]
        rows = rows.remove_columns("sentences").add_column("sentences", asked)
    scores = [SentenceScore(row, 0, "any", 3 - row, 4) for row in range(3)]
    draw_sheet(model, processor, rows, scores, path)
    return np.asarray(Image.open(path).convert("L"))


@pytest.mark.parametrize(("taps", "adapters"), [([4], []), ([1, 2, 3, 4], [0, 1, 2, 3])])
def test_a_sheet_shows_every_expert_of_any_model(rows, processor, tmp_path, taps, adapters):
    model = tiny_model(tap_layers=taps, adapter_layers=adapters)
    assert sheet_of(model, processor, rows, tmp_path / "new" / "sheet.png").std() > 5


LONG = "a man in a blue coat standing behind a bench " * 2


# Files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "one ←")
    assert path.read_text(encoding="utf-8") == "one ←"
    write_text(path, "two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]

    def half(partial: Path) -> None:
        partial.write_bytes(b"hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_binary(path, half)
    assert path.read_text() == "two"
    write_binary(path, lambda partial: partial.write_bytes(b"three"))
    assert path.read_bytes() == b"three" and list(path.parent.iterdir()) == [path]


def replace_with(path: Path, text: str) -> None:
    (partial_folder(path) / text).write_text(text)
    replace_folder(path)


def found(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("calls", range(4))
def test_a_folder_can_be_recovered_wherever_its_replacement_stopped(tmp_path, monkeypatch, calls):
    path = tmp_path / "runs" / "folder"
    assert not recover_folder(path)
    replace_with(path, "one")
    assert found(path) == ["one"] and found(path.parent) == ["folder"]
    done = []

    def stop_after(original):
        def step(*arguments, **options):
            if len(done) >= calls:
                raise KeyboardInterrupt
            done.append(original)
            return original(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for place in ("os.rename", "shutil.rmtree"):
            module, name = place.split(".")
            patch.setattr(f"training.files.{place}", stop_after(getattr(sys.modules[module], name)))
        try:
            replace_with(path, "two")
        except KeyboardInterrupt:
            assert len(done) == calls
    assert recover_folder(path) and found(path) in (["one"], ["two"])
    replace_with(path, "three")
    assert found(path) == ["three"] and found(path.parent) == ["folder"]
