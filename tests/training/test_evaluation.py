"""Scores of every sentence against an independent evaluator, calibration, and files that are written whole."""

import io
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REFER_MINI, REPOSITORY, needs_refer_mini
from PIL import Image
from pycocotools import mask as coco_mask
from stand_ins import Presence, StandIn, counts_of, make_processor, make_rows, places, tiny_model

from processing_sera import SeraProcessor
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.evaluation import best_threshold, score_sentences, threshold_curve
from training.examples.batches import image_as_annotated, shuffled_sentences
from training.scoring.mask_selection import MaskSelection
from training.scoring.metric import summarize
from training.sources.masks import decode_mask
from training.sources.refer import load_refer
from training.support.files import partial_folder, recover_folder, replace_folder, write_binary, write_text


def score_alone(
    processor: SeraProcessor, row: dict, sentence: str, threshold: float | None = None
) -> tuple[int, int, int]:
    """Intersection, predicted and true area of one sentence alone, counted with sets of pixels."""
    inputs = processor(images=[image_as_annotated(row)], text=[[sentence]], return_tensors="pt")
    result = processor.post_process_referring_segmentation(StandIn()(**inputs), inputs, threshold=threshold)[0]
    masks = result["mask"].numpy(), decode_mask(row["mask"])
    predicted, truth = (set(zip(*np.nonzero(mask), strict=True)) for mask in masks)
    return len(predicted & truth), len(predicted), len(truth)


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


@pytest.mark.parametrize("threshold", [None, 0.45])
def test_scores_equal_those_of_single_sentences(rows, processor, accelerator, threshold):
    rows = rows.shuffle(seed=0)  # the rows of an image are not neighbours any more
    scores = score_sentences(StandIn(), processor, rows, accelerator, MaskSelection(threshold))
    assert [(score.row, score.sentence, score.kind) for score in scores] == places(rows)
    for score in scores:
        row = rows[score.row]
        expected = score_alone(processor, row, row["sentences"][score.sentence], threshold)
        assert counts_of(score) == expected
    assert len({score.iou for score in scores}) > 20  # the stand-in has good and bad answers


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


def test_shuffled_sentences_have_the_places_of_the_true_ones(rows, processor, accelerator):
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


# An independent evaluator


def spread(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within a distance of a mask: the union of its copies, moved by every offset in a disc."""
    padded, (height, width) = np.pad(mask, radius), mask.shape
    result = np.zeros_like(mask)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            if down**2 + right**2 <= radius**2:
                result |= padded[radius + down : radius + down + height, radius + right : radius + right + width]
    return result


def contour(mask: np.ndarray) -> np.ndarray:
    """Mask pixels with a horizontal or vertical neighbour outside of the mask."""
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
    """Every metric, as it is defined, from (predicted, true) masks of the size of the image."""
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
    """The independent evaluator's scores of all sentences of the rows, one at a time."""
    pairs = []
    for row in rows:
        stored = row["image"]
        image = Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))
        truth = coco_mask.decode(row["mask"]) == 1
        for sentence in row["sentences"]:
            inputs = processor(images=[image], text=[[sentence]], return_tensors="pt")
            with torch.no_grad():
                result = processor.post_process_referring_segmentation(model(**inputs), inputs)[0]
            pairs.append((result["mask"].numpy(), truth))
    return evaluate_masks(pairs)


def without_some_targets(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows, with no target in every third."""

    def change(row: dict, n: int) -> dict:
        empty = np.zeros(row["mask"]["size"], dtype=np.uint8, order="F")
        mask = {"size": row["mask"]["size"], "counts": coco_mask.encode(empty)["counts"].decode()}
        return {"mask": mask, "no_target": True, "ann_ids": [], "boxes": []} if n % 3 == 0 else {}

    return rows.map(change, with_indices=True, features=rows.features)


@pytest.mark.parametrize("model", [StandIn(), Presence()], ids=["masks alone", "with presence"])
def test_metrics_equal_those_of_an_independent_evaluator_on_rows_without_a_target(rows, processor, accelerator, model):
    rows = without_some_targets(rows)
    scores = score_sentences(model, processor, rows, accelerator)
    got, expected = summarize(scores)["all"], ask_and_evaluate(model, processor, rows)
    assert got.keys() == expected.keys() and got == pytest.approx(expected, abs=1e-9)
    assert 0 < got["N-acc"] < 1 and 0 < got["T-acc"] <= 1
    assert all((score.no_target is not None) == isinstance(model, Presence) for score in scores)
    assert all(score.predicted == 0 for score in scores if (score.no_target or 0) > 0.5)


@needs_refer_mini
def test_metrics_equal_those_of_an_independent_evaluator_on_photographs(processor, accelerator):
    rows = load_refer(REFER_MINI, splits=["val"])["val"]
    model = StandIn()
    got = summarize(score_sentences(model, processor, rows, accelerator))["all"]
    expected = ask_and_evaluate(model, processor, rows)
    assert got.keys() == expected.keys() and got == pytest.approx(expected, abs=1e-9)
    assert got["num_expressions"] == 241 and 0.02 < got["mIoU"] < 0.5 and got["boundary_F"] > 0


# Calibration


@pytest.mark.parametrize("model", [StandIn(), Presence()], ids=["masks alone", "with presence"])
def test_the_threshold_curve_has_the_score_at_each_threshold(rows, processor, accelerator, model):
    rows = without_some_targets(rows)
    curve = threshold_curve(model, processor, rows, accelerator, batch_size=2, max_expressions=9)
    assert len(curve) == 19 and all(0 < threshold < 1 for threshold in curve)
    for threshold in (0.05, 0.45, 0.5, 0.6, 0.95):
        scores = score_sentences(model, processor, rows, accelerator, MaskSelection(threshold))
        assert curve[threshold] == pytest.approx(summarize(scores)["all"]["mIoU"], abs=1e-12)
    assert len(set(curve.values())) > 5


def test_the_best_threshold_has_the_highest_score_and_among_equals_is_nearest_to_a_half():
    assert best_threshold({0.2: 0.3, 0.5: 0.4, 0.7: 0.6, 0.9: 0.1}) == 0.7
    assert best_threshold({0.1: 0.5, 0.4: 0.5, 0.5: 0.2, 0.95: 0.5}) == 0.4


# The command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder as training writes it: a fresh model and the settings of its data."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    data = DataSettings(source="scenes", num_scenes=(1, 1, 3), scene_size=64)
    write_text(folder / "settings.yaml", dump_settings(TrainingSettings(data=data)))
    return folder


def test_a_failing_script_ends_with_one_message(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["evaluation.py", str(run_folder / "model"), "--split", "nowhere"])
    with pytest.raises(SystemExit) as error:  # any other exception would print a traceback
        runpy.run_path(str(REPOSITORY / "training" / "evaluation.py"), run_name="__main__")
    assert error.value.code not in (None, 0)
    assert "nowhere" in capsys.readouterr().err + str(error.value)


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
def test_a_folder_can_be_recovered_after_any_step_of_its_replacement(tmp_path, monkeypatch, calls):
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
            patch.setattr(f"training.support.files.{place}", stop_after(getattr(sys.modules[module], name)))
        try:
            replace_with(path, "two")
        except KeyboardInterrupt:
            assert len(done) == calls
    assert recover_folder(path) and found(path) in (["one"], ["two"])
    replace_with(path, "three")
    assert found(path) == ["three"] and found(path.parent) == ["folder"]
