"""A saved folder is complete: it holds its code, and a second saving changes nothing. Our packages need no code from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, make_model
from PIL import Image
from saved import EXPRESSIONS, TASKS, contents, copy, save_photo, save_presence_model
from towers import text_values, tokenizer_for
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from processing_sera import ReferringImageSegmentationPipeline, SeraImageProcessor, SeraProcessor
from training.support.files import save_model

PACKAGES = ("modeling_sera", "processing_sera")
CODE = {path.name: path for package in PACKAGES for path in (REPOSITORY / package).glob("*_sera.py")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_presence_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    return save_photo(tmp_path_factory.mktemp("photo") / "photo.png")


@pytest.fixture
def code_cache(tmp_path, monkeypatch) -> None:
    """Code of folders that are loaded here goes to a folder of this test, whatever code was loaded before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [place for place in sys.path if Path(place, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in others])


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
        "AutoModelForImageSegmentation": "modeling_sera.SeraForReferringSegmentation",
        "AutoModelForUniversalSegmentation": "modeling_sera.SeraForReferringSegmentation",
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
        for auto_class in (AutoModel, AutoModelForImageSegmentation, AutoModelForUniversalSegmentation):
            assert type(auto_class.from_pretrained(folder, **options)) is SeraForReferringSegmentation
        assert type(AutoProcessor.from_pretrained(folder, **options)) is SeraProcessor
        assert type(AutoImageProcessor.from_pretrained(folder, **options)) is SeraImageProcessor
        assert AutoTokenizer.from_pretrained(folder, **options)("zebra").input_ids
    pipe = pipeline("image-segmentation", model=str(folder), pipeline_class=ReferringImageSegmentationPipeline)
    assert type(pipe.model) is SeraForReferringSegmentation
    assert len(pipe(photo, EXPRESSIONS)) == 3


ONE_PACKAGE_AFTER_THE_OTHER = """
import sys
folder, first, second = sys.argv[1:]
__import__(first)
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
def load():
    if "processing_sera" in sys.modules:
        from processing_sera import SeraImageProcessor, SeraProcessor
        loaded = [c.from_pretrained(folder) for c in (SeraProcessor, AutoProcessor, SeraImageProcessor, AutoImageProcessor)]
        yield from [*loaded, loaded[0].image_processor]
    if "modeling_sera" in sys.modules:
        from modeling_sera import SeraConfig, SeraForReferringSegmentation
        yield from [c.from_pretrained(folder) for c in (SeraConfig, SeraForReferringSegmentation, AutoModel)]
def check():
    packages = {type(thing).__module__.split(".")[0] for thing in load()}
    assert packages == {"modeling_sera", "processing_sera"} & set(sys.modules), packages
check()
__import__(second)
check()
"""


@pytest.mark.parametrize("order", [PACKAGES, PACKAGES[::-1]], ids=lambda order: order[0])
def test_no_order_of_imports_makes_a_class_at_hand_ask_whether_to_run_code(saved, tmp_path, order):
    folder = copy(saved, tmp_path / "model")
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('code from the folder was run')")
    command = [sys.executable, "-c", ONE_PACKAGE_AFTER_THE_OTHER, str(folder), *order]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    found = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "custom code" not in found.stdout + found.stderr


def test_a_folder_saved_before_code_came_along_is_loaded_and_saved_with_it(saved, tmp_path):
    """With the packages installed; settings that an older configuration lacks have their defaults."""
    folder = copy(saved, tmp_path / "old")
    for path in folder.glob("*.py"):
        path.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        defaults = SeraConfig().to_dict() if name == "config.json" else {}
        for part in (settings, settings.get("image_processor", {})):
            part.pop("auto_map", None)
        settings.pop("custom_pipelines", None)
        older = {key: value for key, value in settings.items() if key == "model_type" or value != defaults.get(key)}
        (folder / name).write_text(json.dumps(older))
    assert "auto_map" not in "".join(path.read_text() for path in folder.glob("*.json"))
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is SeraForReferringSegmentation and type(processor) is SeraProcessor
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    assert contents(tmp_path / "new") == contents(saved)


WITHOUT_THE_PACKAGES = """
import sys
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = processor(images=[Image.new("RGB", (40, 30), "red")], text=[["left zebra"]], return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits
assert not {"modeling_sera", "processing_sera"} & set(sys.modules)
print(tuple(inputs["input_ids"].shape), logits.double().sum().item())
"""


def test_towers_of_other_families_run_with_the_folders_code_alone(tmp_path):
    vision = {"model_type": "dinov3_vit", "patch_size": 16, "image_size": 64}
    model = make_model(vision_config=vision, text_config=text_values("siglip_text_model"), image_size=64)
    image_processor = SeraImageProcessor(size={"height": 48, "width": 64})
    processor = SeraProcessor(image_processor, tokenizer_for("siglip_text_model"))
    save_model(model, processor, tmp_path / "model")
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGES, str(tmp_path / "model")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    inputs = processor(images=[Image.new("RGB", (40, 30), "red")], text=[["left zebra"]], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits.double().sum().item()
    shape, total = done.stdout.rsplit(maxsplit=1)
    assert shape == "(1, 16)" and float(total) == pytest.approx(expected, rel=1e-4)
