"""`sera-segment`: its files agree with each other and with the model, and bad input is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, save_tiny_model
from PIL import Image
from segmenting import check_files, refusal, segment, smooth_image
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor

EXPRESSIONS = ["left zebra", 'the "right" cup', "zebra — drinking"]
COMMAND = "import sys; from training.prediction import main; sys.exit(main())"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return smooth_image()


@pytest.fixture
def photo(photograph, tmp_path) -> Path:
    photograph.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run_command(*arguments: str | bytes, code: str = COMMAND, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def results_of(model: Path, photo: Path, expressions: list[str], **options) -> list[dict]:
    """The results of model and processor, without the command."""
    loaded, processor = SeraForReferringSegmentation.from_pretrained(model).eval(), SeraProcessor.from_pretrained(model)
    inputs = processor(images=[photo], text=[expressions], return_tensors="pt")
    with torch.no_grad():
        outputs = loaded(**inputs)
    return processor.post_process_referring_segmentation(outputs, inputs, **options)


# What it writes


def test_the_installed_command_writes_the_models_results(model, photo, tmp_path):
    """It runs without the packages that only training needs, and imports only the modules of the list below."""
    entry = re.search(r'^sera-segment = "(.+):(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE)
    code = f"""
import sys
sys.modules |= dict.fromkeys(("accelerate", "datasets", "evaluate", "jsonargparse", "matplotlib", "tensorboard"))
from {entry[1]} import {entry[2]}
{entry[2]}()
print(sorted(name for name in sys.modules if name.startswith("training.")))
"""
    output = tmp_path / "new" / "out"
    done = run_command(str(photo), *EXPRESSIONS, "--model", str(model), "--out", str(output), code=code)
    assert done.returncode == 0, done.stderr
    masks = check_files(output, (64, 40), EXPRESSIONS)
    for mask, result in zip(masks, results_of(model, photo, EXPRESSIONS), strict=True):
        assert (mask != result["mask"].numpy()).mean() < 0.01
    for i, text in enumerate(EXPRESSIONS, start=1):
        assert re.search(rf"mask-{i}\.png: score 0\.\d+, {re.escape(text)}\n", done.stdout)
    modules = (
        "prediction",
        "scoring",
        "scoring.boundary",
        "scoring.overlay",
        "support",
        "support.commands",
        "support.default_model",
        "support.files",
        "support.hub_ids",
        "support.model_location",
    )
    assert done.stdout.endswith(f"{[f'training.{module}' for module in modules]}\n")


def test_help_is_complete_and_needs_no_torch():
    done = run_command("--help", code=f"import sys; sys.modules['torch'] = None; {COMMAND}")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("photo", "expression", "--model", "--out", "--threshold", "--device", "--dtype", "example: "):
        assert word in done.stdout


def test_a_model_that_predicts_presence_says_so(photo, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model", predict_presence=True)
    segment(photo, *EXPRESSIONS, "--model", folder, "--out", tmp_path / "out")
    check_files(tmp_path / "out", (64, 40), EXPRESSIONS)
    records = json.loads((tmp_path / "out" / "prediction.json").read_text())
    said = capsys.readouterr().out
    for record, result in zip(records, results_of(folder, photo, EXPRESSIONS), strict=True):
        assert record["no_target"] == pytest.approx(result["no_target"], abs=1e-5)
        assert f"no target {record['no_target']:.3f}" in said


def test_500_expressions(model, photo, tmp_path):
    texts = [f"zebra {i}" for i in range(500)]
    segment(photo, *texts, "--model", model, "--out", tmp_path / "out")
    masks = check_files(tmp_path / "out", (64, 40), texts)
    for i in (0, 31, 32, 499):
        assert (masks[i] != results_of(model, photo, [texts[i]])[0]["mask"].numpy()).mean() < 0.01


def test_a_rotated_photograph_is_predicted_upright(model, photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    photograph.save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        segment(tmp_path / f"{name}.png", *EXPRESSIONS, "--model", model, "--out", tmp_path / name)
    masks = [check_files(tmp_path / name, (64, 40), EXPRESSIONS) for name in ("turned", "upright")]
    assert np.array_equal(*masks)
    overlays = [np.asarray(Image.open(tmp_path / name / "overlay.png")) for name in ("turned", "upright")]
    assert np.array_equal(*overlays)


def test_a_16_bit_photograph_is_predicted_as_its_8_bit_copy(model, photograph, tmp_path):
    grey = np.asarray(photograph.convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8", "16"):
        segment(tmp_path / f"{name}.png", "left zebra", "--model", model, "--out", tmp_path / name)
    for file in ("mask-1.png", "overlay.png"):
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / name / file)) for name in ("8", "16"))), file


def test_the_threshold_is_the_probability_at_the_masks_edge(model, photo, tmp_path):
    found = results_of(model, photo, ["left zebra"], return_probabilities=True)[0]
    probabilities = found["probabilities"].numpy()
    assert probabilities.std() > 1e-3
    for threshold in np.quantile(probabilities, [0.2, 0.7]).tolist():
        segment(photo, "left zebra", "--model", model, "--threshold", threshold, "--out", tmp_path / "out")
        mask = check_files(tmp_path / "out", (64, 40), ["left zebra"])[0]
        assert (mask != (probabilities > threshold)).mean() < 0.01


def test_device_and_precision(model, photo, tmp_path):
    options = ("--model", model, "--device", "cpu", "--out", tmp_path / "out")
    segment(photo, "left zebra", *options, "--dtype", "bfloat16")
    half = check_files(tmp_path / "out", (64, 40), ["left zebra"])[0]
    score = json.loads((tmp_path / "out" / "prediction.json").read_text())[0]["score"]
    segment(photo, "left zebra", *options)
    whole = check_files(tmp_path / "out", (64, 40), ["left zebra"])[0]
    assert score != json.loads((tmp_path / "out" / "prediction.json").read_text())[0]["score"]
    assert (half != whole).mean() < 0.1


# What it refuses: exit code 2, one line, and no folder


def test_what_it_cannot_use_is_named(model, photo, tmp_path, capsys, monkeypatch):
    corrupt, bomb = tmp_path / "corrupt.png", tmp_path / "bomb.png"
    corrupt.write_bytes(photo.read_bytes()[:200])
    Image.new("RGB", (200, 200)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    output, text = tmp_path / "out", "left zebra"

    def said(*arguments: object) -> str:
        return refusal(capsys, *arguments, "--out", output)

    assert "No image at" in said("nowhere.png", text, "--model", model)
    assert re.search(r"corrupt\.png is not a readable image", said(corrupt, text, "--model", model))
    assert re.search(r"bomb\.png is not a readable image.*exceeds limit", said(bomb, text, "--model", model))
    assert re.search("expression.*'  ' is an empty expression", said(photo, text, "  ", "--model", model))
    assert "is an empty expression" in said(
        photo, text, "\u200b", "--model", model
    )  # nothing is left of it after cleaning
    assert "required: expression" in said(photo, "--model", model)
    for threshold in ("1.5", "0", "nan", "half"):
        assert f"--threshold: '{threshold}' is not a number between 0 and 1" in said(
            photo, text, "--model", model, "--threshold", threshold
        )
    assert "--dtype: invalid choice: 'int8'" in said(photo, text, "--model", model, "--dtype", "int8")
    for device in ("gpu", "meta"):
        assert f"The device '{device}' cannot be used" in said(photo, text, "--model", model, "--device", device)
    assert "unrecognized arguments: --treshold" in said(photo, text, "--model", model, "--treshold", "0.5")
    assert not output.exists()


def test_an_argument_that_is_not_utf8(model, photo, tmp_path):
    """Arguments reach the command as bytes. The name of an image may be no UTF-8."""
    name = os.fsencode(tmp_path) + b"/photo-\xe9.png"
    try:
        shutil.copy(os.fsencode(photo), name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    arguments = (name, b"left \xff zebra", "--model", str(model), "--out", str(tmp_path / "out"))
    done = run_command(*arguments, PYTHONUTF8="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert r"'left \udcff zebra' is not valid UTF-8" in done.stderr
    out = os.fsencode(tmp_path) + b"/out-\xe9"
    done = run_command(name, "zebra — drinking", *arguments[2:-1], out, PYTHONUTF8="1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    check_files(Path(os.fsdecode(out)), (64, 40), ["zebra — drinking"])


@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_missing_or_damaged_file_of_the_model_is_named(model, photo, tmp_path, capsys, name):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    whole = (broken / name).read_bytes()
    (broken / name).unlink()
    command = (photo, "left", "--model", broken, "--out", tmp_path / "out")
    assert f"has no {name}" in refusal(capsys, *command)
    for damaged in (b"", whole[:-50], b"[]", *([b"{}"] if name == "tokenizer_config.json" else [])):
        (broken / name).write_bytes(damaged)
        said = refusal(capsys, *command)
        assert str(broken) in said and (name in said or name == "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_or_with_another_one(model, photo, tmp_path, capsys, monkeypatch):
    def said(folder: object) -> str:
        return refusal(capsys, photo, "left", "--model", folder, "--out", tmp_path / "out")

    for folder in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        assert f"There is no folder {folder}." in said(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "someone/nothing is no folder here and could not be loaded from the Hub" in said("someone/nothing")

    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    for changes, message in (
        ({"decoder_num_layers": 2}, "do not fit its config.json: decoder.layers.1."),
        ({"decoder_dim": 64}, "do not fit its config.json: decoder."),
        ({"num_selected_experts": 9}, "num_selected_experts is 9; it must lie in 1..4"),
        ({"vision_config": 5}, "vision_config"),
    ):
        (other / "config.json").write_text(json.dumps(config | changes))
        assert message in said(other)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(**small, vocab_size=10)).save_pretrained(other)
    assert "holds a model of the type 'clip_text_model', not 'sera'" in said(other)


def test_nothing_of_the_users_is_overwritten(model, photo, tmp_path, capsys):
    for name in ("overlay.png", "mask-1.png"):
        mine = shutil.copy(photo, tmp_path / name)
        assert "would be overwritten" in refusal(capsys, mine, "left", "--model", model, "--out", tmp_path)
        assert mine.read_bytes() == photo.read_bytes()
    assert "is a file" in refusal(capsys, photo, "left", "--model", model, "--out", photo)
    segment(photo, "left", "--model", model, "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    segment(photo, "right", "--model", model, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_absent_package_and_its_extra_are_named(model, photo, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit) as error:
        segment(photo, "left", "--model", model)
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "pycocotools is not installed" in said and ".[demo]" in said and said.count("\n") == 1
    extras = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert re.search(r'^demo = \["pycocotools', extras, flags=re.MULTILINE)
