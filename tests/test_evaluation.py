"""Scoring every sentence, in one process and in two; the commands for evaluation and prediction; files."""

import io
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
from conftest import REFER_MINI, REPOSITORY, make_model, needs_refer_mini
from PIL import Image
from pycocotools import mask as coco_mask

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.modeling_sera import SeraReferringSegmentationOutput
from processing_sera import SeraImageProcessor, SeraProcessor
from training import prediction
from training.batches import picture_as_annotated, shuffled_sentences
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.data import decode_mask, load_refer
from training.evaluation import best_threshold, score_sentences, split_expressions, threshold_curve
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


def score_alone(
    processor: SeraProcessor, row: dict, sentence: str, threshold: float | None = None
) -> tuple[int, int, int]:
    """Intersection, predicted and true area of one sentence, asked alone, counted through sets of pixels."""
    inputs = processor(images=[picture_as_annotated(row)], text=[[sentence]], return_tensors="pt")
    result = processor.post_process_referring_segmentation(StandIn()(**inputs), inputs, threshold=threshold)[0]
    masks = result["mask"].numpy(), decode_mask(row["mask"])
    predicted, truth = (set(zip(*np.nonzero(mask), strict=True)) for mask in masks)
    return len(predicted & truth), len(predicted), len(truth)


def counts_of(score: SentenceScore) -> tuple[int, int, int]:
    return score.intersection, score.predicted, score.truth


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
        assert counts_of(score) == expected
    assert len({score.iou for score in scores}) > 20  # the stand-in answers, now well, now badly


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 3, "num_workers": 2},
        {"max_expressions": 1},
        {"batch_size": 2, "max_expressions": 5},
    ],
)
def test_scores_do_not_depend_on_batches_or_workers(rows, processor, accelerator, options):
    expected = score_sentences(StandIn(), processor, rows, accelerator)
    assert score_sentences(StandIn(), processor, rows, accelerator, **options) == expected


def test_shuffled_sentences_are_scored_in_the_places_of_the_true_ones(rows, processor, accelerator):
    scores = score_sentences(StandIn(), processor, rows, accelerator, shuffle=True)
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    asked = shuffled_sentences(rows)
    for score in scores[::3]:
        expected = score_alone(processor, rows[score.row], asked[score.row][score.sentence])
        assert counts_of(score) == expected


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_as_it_was(rows, processor, accelerator, training):
    model = tiny_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_sentences(model, processor, rows.select(range(4)), accelerator)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 100])
def test_split_inputs_hold_every_expression_once_with_its_picture(processor, rows, limit):
    pictures = [picture_as_annotated(rows[0]), picture_as_annotated(rows[len(rows) - 1])]
    text = [["left zebra", "cup", "the cup", "right"], ["zebra", "left"]]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    parts = list(split_expressions(inputs, limit))
    assert [len(part["input_ids"]) for part in parts] == [limit] * (6 // limit) + [6 % limit] * (6 % limit > 0)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), inputs[name])
    for name in ("pixel_values", "original_sizes"):
        shown = torch.cat([part[name][part["image_index"]] for part in parts])
        assert torch.equal(shown, inputs[name][inputs["image_index"]])
        assert all(len(part[name]) == len(part["image_index"].unique()) for part in parts)
    model = tiny_model()
    with torch.no_grad():
        together = model(**inputs).logits
        assert torch.allclose(torch.cat([model(**part).logits for part in parts]), together, atol=2e-5)


# An independent evaluator


def spread(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within a distance of a mask's: its copies, moved by every offset in a disc."""
    padded, (height, width) = np.pad(mask, radius), mask.shape
    result = np.zeros_like(mask)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            if down**2 + right**2 <= radius**2:
                result |= padded[radius + down : radius + down + height, radius + right : radius + right + width]
    return result


def contour(mask: np.ndarray) -> np.ndarray:
    """Mask pixels of which a horizontal or vertical neighbour is not in it."""
    wide = np.pad(mask, 1)
    neighbours = [np.roll(wide, shift, axis)[1:-1, 1:-1] for axis in (0, 1) for shift in (1, -1)]
    return mask & ~np.logical_and.reduce(neighbours)


def boundary_of(predicted: np.ndarray, truth: np.ndarray) -> float:
    a, b = contour(predicted), contour(truth)
    if a.sum() == 0 or b.sum() == 0:
        return float(a.sum() == b.sum())
    radius = int(np.ceil(0.008 * np.sqrt(np.square(truth.shape).sum())))
    precision, recall = (a & spread(b, radius)).sum() / a.sum(), (b & spread(a, radius)).sum() / b.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def evaluate_masks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Every metric from (predicted, true) masks of the pictures' own size, in the words of its definition."""
    inter = np.array([(p & t).sum() for p, t in pairs], dtype=np.float64)
    union = np.array([(p | t).sum() for p, t in pairs], dtype=np.float64)
    nothing_predicted = np.array([not p.any() for p, _ in pairs])
    nothing_there = np.array([not t.any() for _, t in pairs])
    iou = np.array([i / u if u else 1.0 for i, u in zip(inter, union, strict=True)])
    found = {"mIoU": iou.mean(), "oIoU": inter.sum() / union.sum(), "num_expressions": len(pairs)}
    found |= {f"Pr@{x}": (iou > x).mean() for x in (0.5, 0.6, 0.7, 0.8, 0.9)}
    found["boundary_F"] = np.mean([boundary_of(*pair) for pair in pairs])
    if nothing_there.any():
        found["gIoU"] = np.where(nothing_there, nothing_predicted, iou).mean()
        found["cIoU"] = inter.sum() / union.sum()
        found["N-acc"] = nothing_predicted[nothing_there].mean()
        found["T-acc"] = (~nothing_predicted[~nothing_there]).mean()
    return found


def ask_and_evaluate(model: torch.nn.Module, processor: SeraProcessor, rows: datasets.Dataset) -> dict[str, float]:
    """All sentences of the rows, one at a time, scored by the independent evaluator."""
    pairs = []
    for row in rows:
        stored = row["image"]
        picture = Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))
        truth = coco_mask.decode(row["mask"]) == 1
        for sentence in row["sentences"]:
            inputs = processor(images=[picture], text=[[sentence]], return_tensors="pt")
            with torch.no_grad():
                result = processor.post_process_referring_segmentation(model(**inputs), inputs)[0]
            pairs.append((result["mask"].numpy(), truth))
    return evaluate_masks(pairs)


class Presence(StandIn):
    """The stand-in with an opinion on whether the thing meant is there."""

    def forward(self, input_ids, attention_mask, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs["presence_logits"] = ((input_ids * attention_mask).sum(dim=1) % 7 - 2.0).float()
        return outputs


def without_some_targets(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with nothing meant in every third."""

    def change(row: dict, n: int) -> dict:
        empty = np.zeros(row["mask"]["size"], dtype=np.uint8, order="F")
        mask = {"size": row["mask"]["size"], "counts": coco_mask.encode(empty)["counts"].decode()}
        return {"mask": mask, "no_target": True, "ann_ids": [], "boxes": []} if n % 3 == 0 else {}

    return rows.map(change, with_indices=True, features=rows.features)


@pytest.mark.parametrize("model", [StandIn(), Presence()], ids=["masks alone", "with presence"])
def test_metrics_equal_an_independent_evaluators_on_rows_without_a_target(rows, processor, accelerator, model):
    rows = without_some_targets(rows)
    scores = score_sentences(model, processor, rows, accelerator)
    got, expected = summarize(scores)["all"], ask_and_evaluate(model, processor, rows)
    assert got.keys() == expected.keys() and got == pytest.approx(expected, abs=1e-9)
    assert 0 < got["N-acc"] < 1 and 0 < got["T-acc"] <= 1
    assert all((score.no_target is not None) == isinstance(model, Presence) for score in scores)
    assert all(score.predicted == 0 for score in scores if (score.no_target or 0) > 0.5)


@needs_refer_mini
def test_metrics_equal_an_independent_evaluators_on_photographs(processor, accelerator):
    rows = load_refer(REFER_MINI, splits=["val"])["val"]
    model = StandIn()
    got = summarize(score_sentences(model, processor, rows, accelerator))["all"]
    expected = ask_and_evaluate(model, processor, rows)
    assert got.keys() == expected.keys() and got == pytest.approx(expected, abs=1e-9)
    assert got["num_expressions"] == 241 and 0.02 < got["mIoU"] < 0.5 and got["boundary_F"] > 0


# Calibration


@pytest.mark.parametrize("model", [StandIn(), Presence()], ids=["masks alone", "with presence"])
def test_the_threshold_curve_holds_the_score_at_each_threshold(rows, processor, accelerator, model):
    rows = without_some_targets(rows)
    curve = threshold_curve(model, processor, rows, accelerator, batch_size=2, max_expressions=9)
    assert len(curve) == 19 and all(0 < threshold < 1 for threshold in curve)
    for threshold in (0.05, 0.45, 0.5, 0.6, 0.95):
        scores = score_sentences(model, processor, rows, accelerator, threshold=threshold)
        assert curve[threshold] == pytest.approx(summarize(scores)["all"]["mIoU"], abs=1e-12)
    assert len(set(curve.values())) > 5


def test_the_best_threshold_is_the_highest_and_among_equals_the_one_in_the_middle():
    assert best_threshold({0.2: 0.3, 0.5: 0.4, 0.7: 0.6, 0.9: 0.1}) == 0.7
    assert best_threshold({0.1: 0.5, 0.4: 0.5, 0.5: 0.2, 0.95: 0.5}) == 0.4


# The prediction command


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


def message_of(command, arguments: list[str], capsys) -> str:
    """What a command says when it fails."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        command(arguments)
    if isinstance(error.value, SystemExit):
        assert error.value.code not in (None, 0)
    return capsys.readouterr().err + str(error.value)


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
