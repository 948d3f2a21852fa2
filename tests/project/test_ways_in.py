"""Every way in selects masks as the processor says: the same image and phrase have the same mask everywhere.

The exported graph is compared in `tests/training/test_export.py`.
"""

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, save_tiny_model
from PIL import Image
from saved import spread_logits
from squares import png
from stand_ins import counts_of

from modeling_sera import SeraForReferringSegmentation
from processing_sera import ReferringImageSegmentationPipeline, SeraProcessor
from training import prediction, segment
from training.evaluation import score_sentences
from training.scoring.figures import _predict
from training.scoring.mask_selection import MaskSelection
from training.scoring.predictions import read_predictions
from training.sources.masks import decode_mask, encode_mask
from training.sources.refer import REFER_FEATURES

PHRASES = ["left zebra", "the cup", "right"]
SELECTION = {
    "mask_threshold": "expected_iou",
    "keep_largest_component": True,
    "score_calibration": [[0.0, 0.1], [0.5, 0.6], [1.0, 0.9]],
}


def load(name: str, path: Path) -> ModuleType:
    """A file of hub/, imported."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with a mask selection of its own. Its masks have several parts, and it finds one of the phrases absent."""
    folder = save_tiny_model(tmp_path_factory.mktemp("ways") / "model", predict_presence=True)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SELECTION))
    model, inputs = SeraForReferringSegmentation.from_pretrained(folder).eval(), inputs_of(folder)
    spread_logits(model, inputs)
    presence = model.decoder.presence_head.score
    with torch.no_grad():
        presence.weight *= -1
        presence.bias.zero_()
        presence.bias -= model(**inputs).presence_logits.sort().values[:2].mean()
    model.save_pretrained(folder)
    return folder


def inputs_of(folder: Path) -> dict[str, torch.Tensor]:
    """The inputs for the image and the phrases."""
    return SeraProcessor.from_pretrained(folder)(images=[photo_of()], text=[PHRASES], return_tensors="pt")


def photo_of() -> Image.Image:
    """Noise, 70 high and 96 wide."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 96, 3), np.uint8))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photo_of().save(path)
    return path


@pytest.fixture(scope="module")
def expected(folder) -> list[dict]:
    """The answers of model and processor. Presence, component and threshold all matter for them."""
    model, processor = (
        SeraForReferringSegmentation.from_pretrained(folder).eval(),
        SeraProcessor.from_pretrained(folder),
    )
    inputs = processor(images=[photo_of()], text=[PHRASES], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    results = processor.post_process_referring_segmentation(outputs, inputs)
    others = processor.post_process_referring_segmentation(outputs, inputs, 0.5, keep_largest_component=False)
    parts = processor.post_process_referring_segmentation(outputs, inputs, keep_largest_component=False)
    assert sum(bool(result["mask"].any()) for result in results) == 2
    for changed in (others, parts):
        assert any(
            result["mask"].any() and not torch.equal(result["mask"], other["mask"])
            for result, other in zip(results, changed, strict=True)
        )
    return [result | {"mask": result["mask"].numpy()} for result in results]


def check(found: list[dict], expected: list[dict]) -> None:
    """The same masks, scores and probabilities of absence, bit for bit."""
    assert len(found) == len(expected)
    for result, reference in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(result["mask"]) > 0, reference["mask"])
        for name in ("score", "no_target"):
            assert result[name] == pytest.approx(reference[name], abs=1e-6)


def agree(mask: np.ndarray, other: np.ndarray) -> bool:
    """Whether masks of another batch, or of another program, are the same but for rounding."""
    union = (mask | other).sum()
    return not union or (mask & other).sum() / union >= 0.999


def test_the_pipeline(folder, expected):
    pipe = prediction.load_pipeline(str(folder), device="cpu")
    assert isinstance(pipe, ReferringImageSegmentationPipeline)
    check(pipe(photo_of(), PHRASES), expected)
    for found in pipe([{"image": photo_of(), "text": PHRASES}] * 2, batch_size=2):
        assert all(agree(np.asarray(a["mask"]) > 0, b["mask"]) for a, b in zip(found, expected, strict=True))


def test_the_endpoint(folder, photo, expected):
    handler = load("ways_handler", REPOSITORY / "hub" / "handler.py").EndpointHandler(str(folder))
    handler.model.to("cpu")
    image = base64.b64encode(photo.read_bytes()).decode()
    answers = json.loads(json.dumps(handler({"inputs": {"image": image, "text": PHRASES}})))
    for answer in answers:
        answer["mask"] = Image.open(io.BytesIO(base64.b64decode(answer["mask"])))
    check(answers, expected)


def test_the_space(folder, photo, expected):
    pytest.importorskip("gradio", reason="the Space's page is made with gradio")
    app = load("ways_space", REPOSITORY / "hub" / "space" / "app.py")
    segmenter = app.Segmenter(str(folder))
    segmenter.model.to("cpu")
    answer = segmenter.answer(str(photo), PHRASES)
    results = segmenter.results(answer, None, answer.size)
    check(results, expected)
    said = [text for text, _ in app.legend(PHRASES, results, segmenter.processor.no_target_threshold)]
    absent = [not result["mask"].any() for result in expected]
    assert ["not in the image" in text for text in said] == absent


def test_the_command_for_one_image(folder, photo, expected, tmp_path, capsys):
    out = tmp_path / "out"
    prediction.main([str(photo), *PHRASES, "--model", str(folder), "--out", str(out), "--device", "cpu"])
    records = json.loads((out / "prediction.json").read_text())
    check([record | {"mask": Image.open(out / record["mask"])} for record in records], expected)
    for line, result in zip(capsys.readouterr().out.splitlines(), expected, strict=False):
        assert ("nothing there" in line) == (not result["mask"].any())


def test_the_command_for_many_images(folder, photo, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    output = tmp_path / "out"
    segment.main([str(folder), "--data", str(photo.parent), "--phrases", *PHRASES, "--output", str(output)])
    predictions = list(read_predictions(output))
    found = [{"mask": decode_mask(p.rle), "score": p.score, "no_target": p.no_target} for p in predictions]
    check(found, expected)


@pytest.fixture(scope="module")
def rows(expected):
    """One row with all phrases; its true mask is everything."""
    import datasets

    row = {
        "image": {"path": None, "bytes": png(photo_of())},
        "image_id": 1,
        "ref_id": 1,
        "ann_ids": [1],
        "no_target": False,
        "category": "any",
        "sentences": PHRASES,
        "sentence_ids": [0, 1, 2],
        "sentence_kinds": ["any"] * 3,
        "mask": encode_mask(np.ones((70, 96), bool)),
        "boxes": [[0.0, 0.0, 96.0, 70.0]],
    }
    return datasets.Dataset.from_list([row], features=REFER_FEATURES)


def test_the_evaluation_and_its_drawings(folder, rows, expected):
    model, processor = (
        SeraForReferringSegmentation.from_pretrained(folder).eval(),
        SeraProcessor.from_pretrained(folder),
    )
    scores = score_sentences(model, processor, rows, Accelerator(cpu=True))
    for score, phrase, result in zip(scores, PHRASES, expected, strict=True):
        area = result["mask"].sum()
        assert counts_of(score) == (area, area, result["mask"].size)
        assert score.score == pytest.approx(result["score"], abs=1e-6)
        drawn, _ = _predict(model, processor, photo_of(), phrase, MaskSelection())  # asked alone
        assert agree(drawn, result["mask"])


def test_the_flipped_answer_of_pipeline_and_evaluation(folder, rows):
    pipe = prediction.load_pipeline(str(folder), device="cpu")
    found = pipe(photo_of(), PHRASES, tta="flip")
    scores = score_sentences(pipe.model, pipe.processor, rows, Accelerator(cpu=True), MaskSelection(flip=True))
    plain = pipe(photo_of(), PHRASES)
    for score, result in zip(scores, found, strict=True):
        assert score.predicted == np.count_nonzero(result["mask"])
        assert score.score == pytest.approx(result["score"], abs=1e-6)
    assert [result["score"] for result in found] != [result["score"] for result in plain]
