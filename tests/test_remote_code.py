"""A saved folder is whole: a machine that has only the Hub's libraries loads it and computes the same."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_tokenizer
from conftest import REPOSITORY, make_model
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from processing_sera import ReferringImageSegmentationPipeline, SeraImageProcessor, SeraProcessor
from training.train import save_model

PACKAGES = ("modeling_sera", "processing_sera")
CODE = {path.name: path for package in PACKAGES for path in (REPOSITORY / package).glob("*_sera.py")}
TASKS = ("image-segmentation", "referring-image-segmentation")
EXPRESSIONS = ["left zebra", "the cup", "right"]

# Runs with no code of ours in reach. Loads by folder or by id, and writes down everything it computes.
ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_sera", "processing_sera", "training"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
for name in ("modeling_sera", "processing_sera", "training"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported here")

from transformers import AutoModel, AutoProcessor, pipeline

source, out, photo, threads, *expressions = sys.argv[1:]
torch.set_num_threads(int(threads))
out = Path(out)
try:
    AutoModel.from_pretrained(source, trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
inputs = processor(images=[Image.open(photo)], text=[expressions], return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
arrays = {f"inputs {name}": value.numpy() for name, value in inputs.items()}
arrays |= {"logits": outputs.logits.numpy(), "presence_logits": outputs.presence_logits.numpy()}
found = {}
for task in ("image-segmentation", "referring-image-segmentation"):
    pipe = pipeline(task, model=source, trust_remote_code=True, device="cpu")
    results = pipe(photo, expressions)
    arrays |= {f"{task} {i}": np.asarray(result.pop("mask")) for i, result in enumerate(results)}
    found[task] = results
pipe.save_pretrained(out / "saved")
classes = [type(thing).__module__ for thing in (model, processor, processor.image_processor, pipe)]
handler_file = Path(source) / "handler.py"
if handler_file.is_file():  # loaded as the inference toolkit does it
    spec = importlib.util.spec_from_file_location("handler", handler_file)
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    answer = handler.EndpointHandler(source)({"inputs": Path(photo).read_bytes(), "parameters": {"text": expressions}})
    found["handler"] = answer
np.savez(out / "arrays.npz", **arrays)
(out / "found.json").write_text(json.dumps({"results": found, "classes": classes, "refusal": refusal}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny model that predicts presence, with its processor, as training saves them."""
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_model(text_config={"vocab_size": len(tokenizer), **special}, predict_presence=True)
    processor = SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tokenizer, mask_threshold=0.45)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target


def run_elsewhere(source: str, photo: Path, place: Path) -> subprocess.CompletedProcess:
    """The script above in an empty folder of a machine that has never seen us, and is not connected."""
    (place / "empty").mkdir(exist_ok=True)
    (place / "elsewhere.py").write_text(ELSEWHERE)
    settings = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    command = [sys.executable, "-I", str(place / "elsewhere.py"), source, str(place), str(photo)]
    return subprocess.run(
        [*command, str(torch.get_num_threads()), *EXPRESSIONS],
        cwd=place / "empty",
        env=inherited | settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def check_equal_to_here(saved: Path, photo: Path, place: Path) -> dict:
    """Everything computed elsewhere equals, to the last bit, what the installed packages compute; returns the rest."""
    model = SeraForReferringSegmentation.from_pretrained(saved).eval()
    processor = SeraProcessor.from_pretrained(saved)
    arrays, found = np.load(place / "arrays.npz"), json.loads((place / "found.json").read_text())
    inputs = processor(images=[photo], text=[EXPRESSIONS], return_tensors="pt")
    for name, value in inputs.items():
        assert np.array_equal(arrays[f"inputs {name}"], value.numpy()), name
    with torch.inference_mode():
        outputs = model(**inputs)
    for name in ("logits", "presence_logits"):
        assert np.array_equal(arrays[name], outputs[name].numpy()), name
    assert outputs.logits.std() > 0
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor, device="cpu")
    expected = pipe(photo, EXPRESSIONS)
    masks = [np.asarray(result.pop("mask")) for result in expected]
    for task in TASKS:
        assert found["results"][task] == expected
        for i, mask in enumerate(masks):
            assert np.array_equal(arrays[f"{task} {i}"], mask)
    assert all(module.startswith("transformers_modules.") for module in found["classes"])
    assert "trust_remote_code" in found["refusal"]
    return found


def test_a_machine_with_only_the_hubs_libraries_computes_the_same(saved, photo, tmp_path):
    folder = copy(saved, tmp_path / "download")
    (folder / "handler.py").write_bytes((REPOSITORY / "hub" / "handler.py").read_bytes())
    done = run_elsewhere(str(folder), photo, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = check_equal_to_here(saved, photo, tmp_path)
    handler, arrays = found["results"]["handler"], np.load(tmp_path / "arrays.npz")
    for i, result in enumerate(found["results"]["image-segmentation"]):
        assert (handler[i]["label"], handler[i]["score"]) == (result["label"], result["score"])
        mask = Image.open(io.BytesIO(base64.b64decode(handler[i]["mask"])))
        assert np.array_equal(np.asarray(mask), arrays[f"image-segmentation {i}"])
    # what is saved there is the folder that it came from
    assert contents(tmp_path / "saved") == contents(saved)


def test_a_hub_id_works_as_the_folder_does(saved, photo, tmp_path):
    """Through the cache as a download leaves it; there, every file of the code is fetched on its own."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--sera"
    copy(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = run_elsewhere("someone/sera", photo, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal_to_here(saved, photo, tmp_path)
    assert contents(tmp_path / "saved") == contents(saved)


@pytest.fixture
def code_cache(tmp_path, monkeypatch) -> None:
    """Code of folders that are loaded here goes to a place of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("missing", ["routing_sera.py", "modeling_sera.py"])
def test_a_missing_file_of_code_is_named(saved, tmp_path, code_cache, missing):
    folder = copy(saved, tmp_path / "download")
    (folder / missing).unlink()
    with pytest.raises(OSError, match=missing):
        get_class_from_dynamic_module("modeling_sera.SeraForReferringSegmentation", str(folder))


def test_the_folder_holds_all_code_flat_and_nothing_that_could_run_by_itself(saved):
    files = contents(saved)
    assert {name: files[name] for name in files if name.endswith(".py")} == {
        name: path.read_bytes() for name, path in CODE.items()
    }
    assert {Path(name).suffix for name in files} == {".py", ".json", ".safetensors"}
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sera.SeraConfig",
        "AutoModel": "modeling_sera.SeraForReferringSegmentation",
    }
    assert set(config["custom_pipelines"]) == set(TASKS)
    for entry in config["custom_pipelines"].values():
        assert entry == {"impl": "pipeline_sera.ReferringImageSegmentationPipeline", "pt": ["AutoModel"]}


def test_saving_what_was_loaded_changes_no_byte(saved, tmp_path, code_cache):
    model, processor = AutoModel.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    model.save_pretrained(tmp_path / "auto")
    processor.save_pretrained(tmp_path / "auto")
    pipe = pipeline("image-segmentation", model=str(saved), trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "pipe")
    for folder in ("auto", "pipe"):
        assert contents(tmp_path / folder) == contents(saved), folder


def test_with_the_packages_installed_no_trust_is_needed_nor_foreign_code_run(saved, photo, tmp_path):
    folder = copy(saved, tmp_path / "model")
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('code from the folder was run')")
    for options in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **options)) is SeraConfig
        assert type(AutoModel.from_pretrained(folder, **options)) is SeraForReferringSegmentation
        assert type(AutoProcessor.from_pretrained(folder, **options)) is SeraProcessor
        assert type(AutoImageProcessor.from_pretrained(folder, **options)) is SeraImageProcessor
        assert AutoTokenizer.from_pretrained(folder, **options)("zebra").input_ids
    pipe = pipeline("image-segmentation", model=str(folder), pipeline_class=ReferringImageSegmentationPipeline)
    assert type(pipe.model) is SeraForReferringSegmentation
    assert len(pipe(photo, EXPRESSIONS)) == 3
