"""A pushed model computes the same in a virtual environment with the Hub's libraries and without our packages."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import make_environment, needed_distributions, run_elsewhere
from packaging.utils import canonicalize_name
from PIL import Image
from saved import EXPRESSIONS, TASKS, contents, copy, save_photo, save_presence_model

from modeling_sera import SeraForReferringSegmentation
from processing_sera import ReferringImageSegmentationPipeline, SeraProcessor
from training import push

HUB_LIBRARIES = {"torch", "transformers", "huggingface-hub", "safetensors", "tokenizers", "numpy", "pillow"}
ABSENT = (
    "modeling_sera",
    "processing_sera",
    "training",
    "hub",
    "datasets",
    "accelerate",
    "evaluate",
    "pycocotools",
    "gradio",
)

# Loads by folder or by id, and writes down everything it computes.
ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
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
def pushed(tmp_path_factory) -> Path:
    """The folder that `training/push.py` sends, of a tiny model that predicts presence."""
    place = tmp_path_factory.mktemp("pushed")
    save_presence_model(place / "trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(push, "check_answer", lambda folder: None)  # this test checks more
        push.stage(place / "trained", "someone/sera", place / "staged", evaluations=[], examples=[])
    return place / "staged"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    return save_photo(tmp_path_factory.mktemp("photo") / "photo.png")


@pytest.fixture(scope="module")
def clean_python(pushed, tmp_path_factory) -> Path:
    """Python of a new virtual environment with what `requirements.txt` asks for."""
    return make_environment(tmp_path_factory.mktemp("clean"), (pushed / "requirements.txt").read_text().split())


def compute_elsewhere(python: Path, source: object, photo: Path, place: Path) -> None:
    run_elsewhere(python, place, "-c", ELSEWHERE, source, place, photo, torch.get_num_threads(), *EXPRESSIONS)


def check_equal_to_here(folder: Path, photo: Path, place: Path) -> dict:
    """Check that the results are those of the installed packages, to the last bit; return the other results."""
    model = SeraForReferringSegmentation.from_pretrained(folder).eval()
    processor = SeraProcessor.from_pretrained(folder)
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
    # the model that was saved there is the one from here
    beside = {"README.md", "LICENSE", "handler.py", "requirements.txt"}
    written = contents(folder)
    assert contents(place / "saved") == {name: written[name] for name in set(written) - beside}
    return found


def test_the_environment_holds_the_hubs_libraries_alone(clean_python, pushed, tmp_path):
    ask = f"""
import importlib.metadata, importlib.util, json, sys
names = [found.metadata["Name"] for found in importlib.metadata.distributions()]
print(json.dumps([names, [name for name in {ABSENT!r} if importlib.util.find_spec(name)], sys.path, sys.prefix]))
"""
    names, present, path, prefix = json.loads(run_elsewhere(clean_python, tmp_path, "-c", ask))
    needed = needed_distributions((pushed / "requirements.txt").read_text().split())
    assert sorted(map(canonicalize_name, names)) == sorted(needed)
    assert set(needed) >= HUB_LIBRARIES and present == []
    assert prefix == str(clean_python.parents[1])
    assert not [place for place in path if "-packages" in place and not Path(place).is_relative_to(prefix)]


def test_a_machine_with_only_the_hubs_libraries_computes_the_same(clean_python, pushed, photo, tmp_path):
    folder = copy(pushed, tmp_path / "download")
    compute_elsewhere(clean_python, folder, photo, tmp_path)
    found, arrays = check_equal_to_here(pushed, photo, tmp_path), np.load(tmp_path / "arrays.npz")
    handler = found["results"]["handler"]
    for i, result in enumerate(found["results"]["image-segmentation"]):
        assert (handler[i]["label"], handler[i]["score"]) == (result["label"], result["score"])
        mask = Image.open(io.BytesIO(base64.b64decode(handler[i]["mask"])))
        assert np.array_equal(np.asarray(mask), arrays[f"image-segmentation {i}"])


def test_a_hub_id_works_as_the_folder_does(clean_python, pushed, photo, tmp_path):
    """The cache is as after a download. Every file of the code is loaded from it on its own."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--sera"
    copy(pushed, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    compute_elsewhere(clean_python, "someone/sera", photo, tmp_path)
    check_equal_to_here(pushed, photo, tmp_path)
