"""The commands and the code of the README and of docs/ run as they are written, in a folder with the files that they name."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Folder, image_bytes, special_ids, tiny_tokenizer
from conftest import REPOSITORY
from documents import README, TEXTS, blocks, commands
from own_annotations import coco_content, photos, write_coco, write_cvat, write_datasets, write_labelme, write_masks
from transformers import CLIPConfig, CLIPModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from training.preparation import main as prepare
from training.sources.hub_layouts import RowFolder
from training.sources.images import open_image

SETS = {
    ("refcoco", "unc"): {"train": [1, 2, 3], "val": [4], "testA": [5], "testB": [7]},
    ("refcoco+", "unc"): {"train": [1, 2, 8], "val": [4], "testA": [5], "testB": [7]},
    ("refcocog", "umd"): {"train": [1, 2, 5], "val": [9], "test": [4]},
    ("refcocog", "google"): {"train": [1, 2, 4, 5], "val": [9]},  # of the same images: both share instances.json
    ("grefcoco", "unc"): {"train": [1, 2], "val": [4], "testA": [5], "testB": [7]},
}


SHEETS = ("photos/preview.png", "sheet.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a shell command in a folder with the code, REFER sets and, under their Hub ids, small towers."""
    place = tmp_path_factory.mktemp("readme")
    for name in (
        "modeling_sera",
        "processing_sera",
        "training",
        "benchmarks",
        "hub",
        "checkpoints",
        "docs",
        "model_card.md",
    ):
        (place / name).symlink_to(REPOSITORY / name)
    for (dataset, split_by), images in SETS.items():
        Folder(place / "refer", dataset=dataset, split_by=split_by).fill(images)
    (place / "photo.jpg").write_bytes(image_bytes("JPEG"))
    (place / "mask.png").write_bytes(image_bytes("PNG"))

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = Dinov2WithRegistersConfig(**small, mlp_ratio=2, patch_size=14, image_size=70, num_register_tokens=4)
    Dinov2WithRegistersModel(vision).save_pretrained(place / "facebook" / "dinov2-with-registers-base")
    tokenizer = tiny_tokenizer()
    special = special_ids(tokenizer)
    text = small | special | {"intermediate_size": 64, "vocab_size": len(tokenizer)}
    clip = CLIPConfig(text_config=text, vision_config=small | {"intermediate_size": 64}, projection_dim=24)
    CLIPModel(clip).save_pretrained(place / "openai" / "clip-vit-base-patch16")
    tokenizer.save_pretrained(place / "openai" / "clip-vit-base-patch16")

    environment = os.environ | {"PYTHONPATH": ".", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment |= {"ACCELERATE_USE_CPU": "true"}

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    run.place = place
    return run


def test_the_demo(run):
    """All commands of `make demo` after the installation, in their order, with fewer scenes and one epoch."""
    done = subprocess.run(["make", "-n", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.replace("\\\n", " ").splitlines() if " training/" in line]
    assert len(lines) == 3
    for line in lines:
        brief = "" if "segment.py" in line else " --data.num_scenes '[12,2,3]'"
        brief += " --optimization.epochs 1 --evaluate_every 1" * ("train.py" in line)
        run(line.replace(".venv/bin/", "") + brief)
    demo = run.place / "outputs" / "demo"
    drawn = {path.relative_to(run.place).as_posix() for path in demo.rglob("*.png")}
    assert set(re.findall(r"outputs/demo/\S*\.png", README)) == drawn & {f"outputs/demo/{name}" for name in SHEETS}
    assert len(re.findall(r"outputs/demo/\S*\.png", README)) == len(SHEETS)
    assert (demo / "model").is_dir()
    shutil.rmtree(demo)  # the other sections' model takes its place


def test_data(run):
    made = commands("Prepared folders")
    assert len(made) == len(SETS)
    for command in made:
        run(command)
    assert {folder.name for folder in (run.place / "prepared").iterdir()} == {
        *("refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "grefcoco")
    }
    (snippet,) = blocks("Rows from Python", "python")
    (run.place / "own_data.py").write_text(snippet)
    run("python own_data.py")
    (row,) = RowFolder(str(run.place / "mine")).read("val")
    assert row["sentences"] == ["left zebra", "the zebra drinking"] and open_image(row["image"]).size == (60, 40)


def test_own_annotations(run, monkeypatch):
    """From annotations in each form to a fine-tuned model."""
    place = run.place / "annotated"
    made = photos(10)
    write_labelme(place / "labelme", made)
    write_cvat(place / "cvat", made)
    write_masks(place / "masks", made)
    write_datasets(place / "hub", made)
    write_coco(place / "coco", made)
    for split, members in (("train", made[:7]), ("val", made[7:])):
        (place / "coco" / f"{split}.json").write_text(json.dumps(coco_content(members)))

    page = (REPOSITORY / "docs" / "own-data.md").read_text()
    monkeypatch.chdir(run.place)
    table = re.findall(r"^\| .*`python training/preparation.py (.*)` \|$", page, re.MULTILINE)
    assert len(table) == 7
    for command in table:
        prepare(shlex.split(command))  # in this process: seven more would take most of their time to start
        output = run.place / shlex.split(command)[-1]
        folder = RowFolder(str(output))
        assert sum(len(folder.read(split)) for split in ("train", "val")) == 20, command
        assert (output / "examples.png").is_file()
    first, train = commands("From ten annotated images to a model")
    assert commands("Your own annotations") == [first, train]
    run(first)
    run(f"{train} --optimization.epochs 1 --num_workers 0")
    assert (run.place / "outputs" / "mine" / "model" / "model.safetensors").is_file()


def test_train_use_and_evaluate(run):
    (recipe,) = commands("Train")
    # as written, except for fewer epochs, smaller images and no workers, which would import all libraries
    run(f"{recipe} --optimization.epochs 1 --data.image_size '[112, 112]' --num_workers 0")
    model = run.place / "outputs" / "refcoco" / "model"
    assert model.is_dir()

    if not (run.place / "prepared").exists():  # where this test runs alone
        test_data(run)
    for command in commands("Scoring a model"):
        run(command)
    assert commands("Evaluate")[0].partition("  ")[0] == commands("Scoring a model")[0]
    written = {path.name for path in (run.place / "outputs").rglob("*.json")}
    assert {"evaluation-testA.json", "calibrated-testA.json", "refcoco-plus-val.json"} <= written

    # the other sections use the demo's model
    (run.place / "outputs" / "demo").symlink_to(run.place / "outputs" / "refcoco")
    record = json.loads((model.parent / "evaluation-testA.json").read_text())
    (model.parent / "evaluation-test.json").write_text(json.dumps(record | {"model": "demo"}))
    (snippet,) = blocks("Serve", "python")
    (run.place / "serve.py").write_text(snippet + "\nprint(len(answers), answers[0]['label'])\n")
    assert "2 the spotted triangle" in run("python serve.py")
    (command,) = commands("Share")
    assert "model.safetensors" in run(command)


def test_the_first_screen_and_use(run):
    """One process for all Python of the README and of docs/python.md that needs no other towers, and the shell's commands."""
    first = README[: README.index("## Install")]
    snippets = re.findall(r"^```python\n(.*?)^```", first, re.DOTALL | re.MULTILINE) + blocks("Use", "python")
    for section in ("The pipeline", "Many phrases about one image", "Encode once, ask many times"):
        snippets += blocks(section, "python")
    checks = [
        "",
        "print(results[0]['mask'].shape, 0 <= results[0]['score'] <= 1)",
        "",
        "print(sorted(results[0]))",
        "print(len(results), results[3]['mask'].shape)",
        "print(yellow[0]['label'], red[0]['mask'].size, found['mask'].shape)",
    ]
    assert len(snippets) == len(checks)
    (run.place / "use.py").write_text(
        "\n".join(f"{code}\n{check}" for code, check in zip(snippets, checks, strict=True))
    )
    said = run("python use.py")
    assert "torch.Size([427, 640]) True" in said and "[('the yellow cap', " in said
    assert "['label', 'mask', 'no_target', 'score']" in said and "4 torch.Size([512, 512])" in said
    assert "the yellow cap (640, 427) torch.Size([512, 512])" in said
    (command,) = re.findall(r"^```bash\n(.*?)\n```", first, re.DOTALL | re.MULTILINE)
    run(command)
    assert (run.place / "prediction" / "overlay.png").is_file()


def test_segment_many_images(run):
    (command,) = commands("Use")
    assert "masks is complete" in run(command)
    snippets = [
        block for text in TEXTS for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    (snippet,) = (snippet for snippet in snippets if "masks/parts" in snippet)
    (run.place / "read_masks.py").write_text(snippet + "\nprint(len(good), mask.dtype)\n")
    phrases = (REPOSITORY / "docs" / "photos" / "phrases.csv").read_text().splitlines()[1:]
    assert f"{len(phrases)} bool" in run("python read_masks.py")


def test_the_papers_table(run):
    """Each command of docs/papers-table.md and of the README, with options that make the work small."""
    outputs, brief = run.place / "outputs", "--only refcoco-unc-val refcocog-umd-val"
    if not (outputs / "refcoco").exists():  # where this test runs alone
        (recipe,) = commands("Train")
        run(f"{recipe} --optimization.epochs 1 --data.image_size '[112, 112]' --num_workers 0")
    (command,) = commands("The table")
    assert commands("Evaluate")[1].partition("  ")[0] == command
    said = run(f"{command} {brief}")
    assert "| SERA | mIoU | no | 76.5 |" in said and "| refcoco | mIoU | no |" in said
    (command,) = commands("Zero-shot transfer")
    said = run(f"{command} {brief}")
    assert "refcocog-umd-val: scored before" in said and "Trained on: RefCOCO." in said
    assert "| RefCOCOg val(u)*† |" in said and "| RefCOCO val" not in said.split("How each split was scored")[1]
    shutil.copytree(outputs / "refcoco", outputs / "refcoco-late")
    (command,) = commands("Comparing two models")
    assert "| RefCOCO val | mIoU |" in run(command)
    (command,) = commands("The paper's grid")
    run(f"{command} --only both --seeds 0 --optimization.epochs 1 --data.image_size '[112, 112]' --num_workers 0")
    assert "| both | 1 |" in (outputs / "ablation" / "refcoco" / "results.md").read_text()
