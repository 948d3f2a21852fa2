"""`training/segment.py`: every form of input, what it writes, that it goes on after any kill, on any number of processes."""

import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from builders import iou
from conftest import REPOSITORY, save_tiny_model
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training import segment
from training.scoring.predictions import Prediction, list_parts, read_predictions
from training.sources.masks import decode_mask
from training.sources.refer import REFER_FEATURES

PHRASES = ["left zebra", "the cup"]
NUMBER = 9
MANY = 45  # images that take long enough for a run to be killed in its midst
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# a process forked from one that has imported everything starts in no time
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "modeling_sera",
        "processing_sera",
        "training.examples.asked_batches",
        "training.scoring.predictions",
    ]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("run") / "model")


def image_of(number: int) -> Image.Image:
    """Waves of its own; 40 high, 50 to 58 wide."""
    rows, columns = np.mgrid[0:40, 0 : 50 + number % 9]
    wave = 127 + 120 * np.sin((rows + 7 * number) / 7)[..., None] * np.cos(columns[..., None] / np.array([5, 9, 14]))
    return Image.fromarray(wave.astype(np.uint8))


def phrases_of(number: int) -> list[str]:
    return [f"zebra {number}", "the cup", "left"][: 1 + number % 3]


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    image_of(number).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path, number: int = NUMBER) -> Path:
    """Images `000.png` … and a table of their phrases, those of an image not together."""
    folder.mkdir(parents=True)
    for i in range(number):
        image_of(i).save(folder / f"{i:03d}.png")
    rows = [(f"{i:03d}.png", phrases_of(i)[j]) for j in range(3) for i in range(number) if j <= i % 3]
    (folder / "phrases.csv").write_text("".join(f"{name},{phrase}\n" for name, phrase in [("file", "phrase"), *rows]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def expected(model) -> dict[tuple[int, str], tuple[float, np.ndarray]]:
    """Score and mask by image and phrase, by model and processor asked directly."""
    loaded, processor = SeraForReferringSegmentation.from_pretrained(model).eval(), SeraProcessor.from_pretrained(model)
    found = {}
    for number in range(NUMBER):
        asked = [*dict.fromkeys(phrases_of(number) + PHRASES)]
        inputs = processor(images=[image_of(number)], text=[asked], return_tensors="pt")
        with torch.no_grad():
            results = processor.post_process_referring_segmentation(loaded(**inputs), inputs)
        found |= {(number, a): (r["score"], r["mask"].numpy()) for a, r in zip(asked, results, strict=True)}
    return found


def run(model: Path, data: object, output: Path, *options: object) -> list[Prediction]:
    """The predictions of a run in this process, without errors."""
    segment.main([str(model), "--data", str(data), "--output", str(output), *map(str, options)])
    return list(read_predictions(output))


# The forms of input


def write_parquet(place: Path) -> list[str]:
    """Two files; images in them, phrases in a list."""
    features = datasets.Features(
        {"image": datasets.Image(), "name": datasets.Value("string"), "ask": datasets.List(datasets.Value("string"))}
    )
    (place / "data").mkdir(parents=True)
    for shard, numbers in enumerate((range(4), range(4, NUMBER))):
        rows = [
            {"image": {"bytes": encoded(i), "path": None}, "name": f"{i:03d}", "ask": phrases_of(i)} for i in numbers
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(place / "data" / f"train-{shard}.parquet")
    return [str(place), "--text_column", "ask", "--key_column", "name"]


def write_rows(place: Path) -> list[str]:
    """One Parquet file with a row per phrase, those of an image in sequence, which name the file of the image."""
    make_folder(place / "images")
    rows = [{"image_path": f"images/{i:03d}.png", "phrase": phrase} for i in range(NUMBER) for phrase in phrases_of(i)]
    datasets.Dataset.from_list(rows).to_parquet(place / "rows.parquet")
    return [str(place / "rows.parquet")]


def write_tars(place: Path, as_json: bool) -> list[str]:
    place.mkdir(parents=True)
    for shard, numbers in enumerate((range(5), range(5, NUMBER))):
        with tarfile.open(place / f"{shard}.tar", "w") as archive:
            for i in numbers:
                text = json.dumps({"about": {"phrases": phrases_of(i)}}) if as_json else "\n".join(phrases_of(i)) + "\n"
                for suffix, content in ((".png", encoded(i)), (".json" if as_json else ".txt", text.encode())):
                    member = tarfile.TarInfo(f"{i:03d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return [f"{place}/*.tar", "--text_column", "json.about.phrases"] if as_json else [str(place)]


def write_saved(place: Path) -> list[str]:
    rows = [{"image": image_of(i), "id": i, "sentences": phrases_of(i)} for i in range(NUMBER)]
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(place)
    return [str(place), "--split", "test"]


def write_table(place: Path, suffix: str) -> list[str]:
    make_folder(place / "images")
    (place / "images" / "phrases.csv").unlink()
    asked = [(f"images/{i:03d}.png", phrases_of(i)) for i in range(NUMBER)]
    if suffix == ".jsonl":
        lines = [json.dumps({"file_name": name, "text": phrases}) for name, phrases in asked]
    else:
        lines = ["file\ttext", *(f"{name}\t{phrase}" for name, phrases in asked for phrase in phrases)]
    (place / f"table{suffix}").write_text("\n".join(lines))
    return [str(place / f"table{suffix}")]


FORMS = {
    "folder with CSV": lambda place: [str(make_folder(place))],
    "CSV": lambda place: [str(make_folder(place) / "phrases.csv")],
    "TSV": lambda place: write_table(place, ".tsv"),
    "JSON lines": lambda place: write_table(place, ".jsonl"),
    "Parquet": write_parquet,
    "rows of Parquet": write_rows,
    "tars with text": lambda place: write_tars(place, as_json=False),
    "tars with JSON": lambda place: write_tars(place, as_json=True),
    "saved": write_saved,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_gives_what_the_model_gives(model, expected, tmp_path, form):
    data, *options = FORMS[form](tmp_path / "data")
    predictions = run(model, data, tmp_path / "out", *options, "--part_size", 4, "--batch_size", 3)
    asked = [(int(re.search(r"(\d+)(\.png)?$", p.image)[1]), p.expression) for p in predictions]
    assert asked == [(i, phrase) for i in range(NUMBER) for phrase in phrases_of(i)]
    for key, prediction in zip(asked, predictions, strict=True):
        score, mask = expected[key]
        assert prediction.error is None and prediction.score == pytest.approx(score, abs=1e-4)
        found = decode_mask(prediction.rle)
        assert found.shape == mask.shape and (found != mask).mean() < 0.01
    assert len({(p.shard, p.row, p.index) for p in predictions}) == len(predictions)


def test_one_list_of_phrases_is_asked_of_every_image(model, expected, folder, tmp_path):
    (tmp_path / "data" / "more").mkdir(parents=True)
    for i in range(NUMBER):
        shutil.copy(folder / f"{i:03d}.png", tmp_path / "data" / ("more" if i > 5 else "") / f"{i:03d}.png")
    (tmp_path / "data" / "notes.txt").write_text("no image")
    predictions = run(model, tmp_path / "data", tmp_path / "out", "--phrases", *PHRASES)
    assert [(p.image, p.expression) for p in predictions] == [
        (f"{'more/' if i > 5 else ''}{i:03d}.png", phrase) for i in range(NUMBER) for phrase in PHRASES
    ]
    for prediction in predictions:
        score, _ = expected[int(prediction.image[-7:-4]), prediction.expression]
        assert prediction.score == pytest.approx(score, abs=1e-4)


def test_one_phrase_for_every_image(model, expected, folder, tmp_path):
    found = run(model, folder, tmp_path / "out", "--phrases", PHRASES[0])
    assert [p.expression for p in found] == PHRASES[:1] * NUMBER
    assert all(p.score == pytest.approx(expected[p.row, PHRASES[0]][0], abs=1e-4) for p in found)


def test_a_data_set_on_the_hub_is_streamed(model, tmp_path, monkeypatch):
    """As far as that can be seen without a network: the id's place is taken by a folder."""
    write_parquet(tmp_path / "hub")
    original = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: original(str(tmp_path / "hub")))
    monkeypatch.setattr(datasets, "load_dataset", None)  # nothing is copied to the cache
    predictions = run(model, "someone/photos", tmp_path / "out", "--text_column", "ask", "--limit", 6)
    assert [p.row for p in predictions if p.index == 0] == list(range(6))


def test_rows_prepared_for_training_are_read_as_they_are(model, tmp_path):
    row = dict.fromkeys(REFER_FEATURES) | {"image": {"bytes": encoded(2), "path": None}, "image_id": 7}
    rows = [row | {"sentences": sentences} for sentences in (["left", "right"], ["cup"])]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=REFER_FEATURES).to_parquet(tmp_path / "data" / "val.parquet")
    predictions = run(model, tmp_path / "data", tmp_path / "out")
    found = [(p.image, p.row, p.index, p.expression) for p in predictions]
    assert found == [("7", 0, 0, "left"), ("7", 0, 1, "right"), ("7", 1, 0, "cup")]


# What is done with it


@pytest.mark.parametrize("form", ["CSV", "rows of Parquet"])
def test_each_image_is_encoded_once_with_all_its_phrases(model, tmp_path, monkeypatch, form):
    data, *options = FORMS[form](tmp_path / "data")
    images, phrases = [], []
    original = SeraForReferringSegmentation.forward

    def forward(self, pixel_values, input_ids, **inputs):
        images.append(len(pixel_values))
        phrases.append(len(input_ids))
        assert inputs["max_expressions"] == 5
        return original(self, pixel_values, input_ids, **inputs)

    monkeypatch.setattr(SeraForReferringSegmentation, "forward", forward)
    run(model, data, tmp_path / "out", *options, "--max_expressions", 5, "--batch_size", 4)
    assert sum(images) == NUMBER and max(images) == 4
    assert sum(phrases) == sum(len(phrases_of(i)) for i in range(NUMBER))


def test_what_cannot_be_asked_is_a_row_with_its_error(model, tmp_path):
    folder = make_folder(tmp_path / "data")
    (folder / "004.png").write_bytes(encoded(4)[:100])
    (folder / "005.png").unlink()
    with (folder / "phrases.csv").open("a") as table:
        table.write('000.png,\n,left\n001.png,"a, \u200b"\n002.png,NULL\n002.png,\u200b\n')
    predictions = run(model, folder, tmp_path / "out", "--part_size", 2, "--overlays")
    errors = {(p.image, p.expression): p.error for p in predictions if p.error is not None}
    assert errors == {
        ("004.png", "zebra 4"): errors["004.png", "zebra 4"],
        ("004.png", "the cup"): errors["004.png", "zebra 4"],
        **{("005.png", phrase): errors["005.png", "left"] for phrase in phrases_of(5)},
        ("000.png", ""): "the expression '' is empty",
        ("002.png", "\u200b"): "the expression '\\u200b' is empty",
        ("", "left"): "the row has no image",
    }
    assert "004.png" in errors["004.png", "zebra 4"] and "005.png" in errors["005.png", "left"]
    assert not [error for error in errors.values() if str(tmp_path) in error]
    counts = Counter((p.image, p.expression) for p in predictions)
    assert set(counts.values()) == {1} and counts["001.png", "a, \u200b"] and counts["002.png", "NULL"]
    for p in predictions:
        assert all((value is None) == (p.error is not None) for value in (p.score, p.rle, p.area))


def test_png_files_hold_the_same_masks(model, folder, tmp_path):
    predictions = run(model, folder, tmp_path / "out", "--masks", "--overlays", "--part_size", 4)
    for prediction in predictions:
        written = np.asarray(Image.open(tmp_path / "out" / prediction.mask_file))
        assert np.array_equal(written, 255 * decode_mask(prediction.rle).astype(np.uint8))
        ys, xs = np.nonzero(written)
        assert prediction.area == len(ys)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1] if len(xs) else None
        assert prediction.box == box
    assert len({p.mask_file for p in predictions}) == len(predictions)
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out" / "overlays").rglob("*.png"))]
    assert sizes == [image_of(i).size for i in range(NUMBER)]


def test_a_model_that_predicts_presence_says_so(folder, tmp_path):
    model = save_tiny_model(tmp_path / "model", predict_presence=True)
    assert all(0 < p.no_target < 1 for p in run(model, folder, tmp_path / "out"))


def test_without_padding_an_answer_does_not_depend_on_the_batch(model, tmp_path):
    unpadded = tmp_path / "model"
    shutil.copytree(model, unpadded)
    config = json.loads((unpadded / "processor_config.json").read_text())
    config["image_processor"] |= {"do_pad": False, "size": {"height": 56, "width": 56}}
    (unpadded / "processor_config.json").write_text(json.dumps(config))
    data = tmp_path / "images"
    data.mkdir()
    for number, size in enumerate([(60, 40), (40, 60), (50, 50), (60, 40)]):
        image_of(number).resize(size).save(data / f"{number}.png")
    found = [run(unpadded, data, tmp_path / str(n), "--phrases", *PHRASES, "--batch_size", n) for n in (1, 4)]
    assert len(found[0]) == len(found[1]) == 8
    for single, batched in zip(*found, strict=True):
        assert (single.image, single.expression) == (batched.image, batched.expression)
        assert batched.score == pytest.approx(single.score, abs=1e-5)
        assert (decode_mask(single.rle) == decode_mask(batched.rle)).mean() > 0.999


def test_precision_and_threshold(model, folder, tmp_path):
    whole = run(model, folder, tmp_path / "whole", "--limit", 3)
    half = run(model, folder, tmp_path / "half", "--limit", 3, "--dtype", "bfloat16")
    assert [p.score for p in whole] != [p.score for p in half]
    assert [p.score for p in half] == pytest.approx([p.score for p in whole], abs=0.05)
    loose, strict = (
        run(model, folder, tmp_path / str(edge), "--limit", 3, "--threshold", edge) for edge in (0.01, 0.99)
    )
    assert sum(p.area for p in strict) < sum(p.area for p in loose)


@pytest.mark.parametrize(("form", "limit"), [("CSV", 4), ("Parquet", 6), ("Parquet", 99)])
def test_a_limit_takes_the_first_images(model, tmp_path, form, limit):
    data, *options = FORMS[form](tmp_path / "data")
    limited = run(model, data, tmp_path / str(limit), *options, "--limit", limit, "--part_size", 2)
    found = [(int(p.image[:3]), p.expression) for p in limited]
    assert found == [(i, phrase) for i in range(min(limit, NUMBER)) for phrase in phrases_of(i)]


def test_a_preview_is_a_sheet_and_nothing_else(model, folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "001.png").write_bytes(b"none")
    (tmp_path / "data" / "phrases.csv").open("a").write("".join(f"000.png,phrase $x {i}$\n" for i in range(9)))
    segment.main([str(model), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--preview", "5"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preview.png"]
    width, height = Image.open(tmp_path / "out" / "preview.png").size
    assert width > 1000 and height > 600


def test_workers_give_the_same(model, tmp_path):
    for form in ("CSV", "tars with text"):
        data, *options = FORMS[form](tmp_path / form / "data")
        options += ["--part_size", 2]
        alone = run(model, data, tmp_path / form / "alone", *options)
        assert run(model, data, tmp_path / form / "workers", *options, "--num_workers", 2) == alone


# What it goes on with


def test_a_finished_run_is_left_as_it_is(model, folder, tmp_path, monkeypatch):
    done = run(model, folder, tmp_path / "out")
    monkeypatch.setattr(SeraForReferringSegmentation, "forward", None)
    assert run(model, folder, tmp_path / "out", "--batch_size", 2) == done


def test_other_options_do_not_go_on(model, folder, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    shutil.copytree(folder, tmp_path / "data")
    before = run(model, tmp_path / "data", tmp_path / "out")
    for options, name in (
        (["--threshold", 0.4], "threshold was 0.5, it is 0.4"),
        (["--part_size", 9], "part_size was 256, it is 9"),
        (["--dtype", "bfloat16"], 'dtype was "float32", it is "bfloat16"'),
        (["--masks"], "masks was false, it is true"),
        (["--limit", 2], "data was"),
        (["--phrases", "left"], "data was"),
    ):
        with pytest.raises(ValueError, match=f"was begun with other options: {name}"):
            run(model, tmp_path / "data", tmp_path / "out", *options)
    with pytest.raises(ValueError, match="weights was"):
        run(other, tmp_path / "data", tmp_path / "out")
    settings = json.loads((model / "processor_config.json").read_text())
    for name, value in (
        ("keep_largest_component", True),
        ("no_target_threshold", 0.4),
        ("score_calibration", [[0.0, 0.0], [1.0, 0.9]]),
    ):
        selecting = Path(shutil.copytree(model, tmp_path / name))
        (selecting / "processor_config.json").write_text(json.dumps(settings | {name: value}))
        with pytest.raises(ValueError, match=f"{name} was"):
            run(selecting, tmp_path / "data", tmp_path / "out")
    (tmp_path / "data" / "phrases.csv").open("a").write("003.png,left\n")
    with pytest.raises(ValueError, match="data was"):
        run(model, tmp_path / "data", tmp_path / "out")
    assert list(read_predictions(tmp_path / "out")) == before
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds parts, but no manifest\.json"):
        run(model, tmp_path / "data", tmp_path / "out")


def test_a_model_or_folder_elsewhere_goes_on(model, folder, tmp_path):
    before = run(model, folder, tmp_path / "out")
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "data")
    assert run(tmp_path / "model", tmp_path / "data", tmp_path / "out") == before


def run_script(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """`training/segment.py` in this (new) process, its output in a file."""
    os.environ.update(ENVIRONMENT | environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(output).parent / "cache"
    sys.argv = ["segment.py", *arguments]
    runpy.run_path(str(REPOSITORY / "training" / "segment.py"), run_name="__main__")


def start(model: Path, data: Path, output: Path, processes: int = 1) -> list[BaseProcess]:
    """The processes of a run, as a launcher would start them."""
    arguments = [str(model), "--data", str(data), "--output", str(output), "--part_size", "3", "--masks"]
    common: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        log = str(output.with_suffix(f".{rank}.txt"))
        started.append(CONTEXT.Process(target=run_script, args=(arguments, common | ranks, log)))
        started[-1].start()
    return started


def finish(started: list[BaseProcess], output: Path) -> list[Prediction]:
    for rank, process in enumerate(started):
        process.join()
        assert process.exitcode == 0, output.with_suffix(f".{rank}.txt").read_text()
    return list(read_predictions(output))


def kill_at_random(started: list[BaseProcess], output: Path, rng: random.Random) -> int:
    """Kill all processes some moment after a part more is there; returns the number of parts that are left."""
    before, number = len(list_parts(output)), rng.randint(1, 4)
    while len(list_parts(output)) < before + number and any(process.is_alive() for process in started):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.2))
    for rank in rng.sample(range(len(started)), len(started)):
        started[rank].kill()
        started[rank].join()
        # one that had no part left had ended
        assert started[rank].exitcode in (-signal.SIGKILL, 0), output.with_suffix(f".{rank}.txt").read_text()
    return len(list_parts(output))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("many") / "images", MANY)
    (folder / "007.png").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def whole(model, many, tmp_path_factory) -> list[Prediction]:
    """The rows of a run of one process that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return finish(start(model, many, output), output)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_rows(model, many, whole, tmp_path, processes):
    output, rng = tmp_path / "out", random.Random(processes)
    parts = []
    for _ in range(3):
        parts.append(kill_at_random(start(model, many, output, processes), output, rng))
    number = MANY // 3 + 1  # and an empty one that says where the input ends
    assert 0 < parts[0] < parts[1] < number
    assert finish(start(model, many, output, processes), output) == whole
    assert len(list_parts(output)) == number
    assert {path.name for path in (output / "parts").iterdir()} == {
        f"{part.name}.parquet" for part in list_parts(output)
    }
    masks = {path.relative_to(output).as_posix() for path in (output / "masks").rglob("*.png")}
    assert masks == {p.mask_file for p in whole if p.error is None}


def test_what_one_process_began_three_go_on_with(model, many, whole, tmp_path):
    kill_at_random(start(model, many, tmp_path / "out"), tmp_path / "out", random.Random(5))
    assert finish(start(model, many, tmp_path / "out", 3), tmp_path / "out") == whole


def test_two_processes_give_the_rows_of_one(model, many, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["training/segment.py", str(model), "--data", str(many), "--output", str(tmp_path / "out")]
    environment = (
        os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    )
    options = ["--part_size", "4", "--batch_size", "3"]  # other batches than those of one process
    done = subprocess.run([*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"is complete: {MANY} images" in done.stderr and re.search(r"[\d.]+ images/s\. .*model \d+%", done.stderr)
    predictions = list(read_predictions(tmp_path / "out"))
    assert [(p.image, p.index, p.expression, p.error) for p in predictions] == [
        (p.image, p.index, p.expression, p.error) for p in whole
    ]
    for found, alone in zip(predictions, whole, strict=True):
        if alone.error is None:
            assert found.score == pytest.approx(alone.score, abs=1e-4)
            masks = [decode_mask(p.rle) for p in (found, alone)]
            assert iou(*masks) >= 0.999 if masks[1].any() else not masks[0].any()
    # what the main process refuses, both end with; it is said once
    done = subprocess.run([*command, "--limit", "3"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("was begun with other options") == 1


# The command line, and the file by itself


def test_the_common_options_fit_one_screen_and_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from training.segment import main; main()"
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code, "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    common, _, further = done.stdout.partition("\nwhere the data")
    assert common.count("\n") <= 24
    for option in ("--data", "--output", "--phrases", "--limit", "--preview", "--masks", "--overlays", "--threshold"):
        assert option in common
    assert "--batch_size" in further and "goes on where it was stopped" in further


def test_bad_input_ends_with_a_sentence(model, folder, tmp_path, capsys):
    for options, message in (
        (["--limit", "0"], "'0' is no whole number from 1 on"),
        (["--threshold", "2"], "is not a number between 0 and 1"),
        (["--phrases", " "], "is an empty expression"),
    ):
        with pytest.raises(SystemExit) as error:
            run(model, folder, tmp_path / "out", *options)
        said = capsys.readouterr().err
        assert error.value.code == 2 and message in said and said.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        run(tmp_path / "none", folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"--output .*phrases\.csv is a file"):
        run(model, folder, folder / "phrases.csv")
    assert not (tmp_path / "out").exists()


def header_of(script: str) -> str:
    """The TOML of a script's inline metadata (PEP 723), by the expression that its specification gives."""
    found = re.findall(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script)
    ((kind, content, *_),) = found
    assert kind == "script"
    return "".join(line[2:] if line.startswith("# ") else line[1:] for line in content.splitlines(keepends=True))


def test_the_file_alone_runs_with_the_package_that_its_header_names(model, folder, tmp_path):
    header = header_of((REPOSITORY / "training" / "segment.py").read_text())
    project = (REPOSITORY / "pyproject.toml").read_text()
    (requires,) = re.findall(r'^requires-python = ("[^"]+")$', header, flags=re.MULTILINE)
    assert f"requires-python = {requires}" in project
    (dependency,) = re.findall(r'^dependencies = \["([^"]+)"\]$', header, flags=re.MULTILINE)
    assert re.fullmatch(r"sera-segmentation\[train\] @ git\+https://\S+", dependency)

    source = tmp_path / "source"
    source.mkdir()
    for name in ("modeling_sera", "processing_sera", "training"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path / "wheels"),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").glob("sera_segmentation-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "-t", str(site), str(wheel)], check=True)
    shutil.rmtree(source)

    empty = tmp_path / "empty"
    empty.mkdir()
    script = shutil.copy(REPOSITORY / "training" / "segment.py", empty)
    arguments = [str(model), "--data", str(folder), "--output", "out"]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(site), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"cwd": empty, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, script, *arguments], **options)
    assert done.returncode == 0, done.stderr
    assert len(list(read_predictions(empty / "out"))) == sum(len(phrases_of(i)) for i in range(NUMBER))
    ask = "import training, modeling_sera; print(training.__file__, modeling_sera.__file__)"
    said = subprocess.run([sys.executable, "-c", ask], **options).stdout
    assert said.count(str(site)) == 2
