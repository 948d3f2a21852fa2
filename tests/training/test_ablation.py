"""The ablation command: grids, records, interruptions, and statistics that numpy computes again."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from runs import TINY, VARIANTS, write_grid

from training import ablation
from training.ablation import FAILED, OK, UNFINISHED, main
from training.ablations.grid import Records, read_grid
from training.ablations.tables import fresh_seed_interval, mean_and_error
from training.scoring.intervals import bootstrap_intervals, paired_intervals
from training.support.locks import locked_folder

# Grids and records


def test_variants_change_what_they_name_and_nothing_else(tmp_path):
    grid = read_grid(write_grid(tmp_path), ["--optimization.batch_size", "3"])
    runs = grid.runs()
    assert [(run.variant, run.seed) for run in runs] == [(name, seed) for seed in (0, 1) for name in VARIANTS]
    for run in runs:
        config = TINY.model.config | {k.removeprefix("model.config."): v for k, v in run.overrides.items()}
        assert run.settings.model.config == config
        assert run.settings.optimization.epochs == 1 and run.settings.optimization.batch_size == 3
        assert run.settings.data == TINY.data and run.settings.seed == run.seed
    assert [run.variant for run in grid.runs(["k2"], [7])] == ["k2"] and grid.runs(["k2"], [7])[0].seed == 7


def test_runs_that_compute_the_same_have_the_same_name(tmp_path):
    def keys(extra=(), **changes):
        return [run.key for run in read_grid(write_grid(tmp_path, **changes), list(extra)).runs()]

    first = keys()
    assert len(set(first)) == len(first) == 6
    assert keys(["--checkpoint_every", "5", "--data.root", "/somewhere/data"]) == keys(["--data.root", "/else/data"])
    assert keys(["--cache_dir", "elsewhere"]) == first
    assert keys(seeds=[1, 0])[:3] == first[3:]
    # the models of all runs have the same name
    one, other = (keys(["--model.pretrained", f"/somewhere/{run}/model", "--model.config", "{}"]) for run in ("a", "b"))
    assert not set(one) & set(other)
    assert keys(evaluation={}) == first and not set(keys(evaluation={"tta": "flip"})) & set(first)
    assert not set(keys(["--optimization.batch_size", "3"])) & set(first)
    one_changed = keys(variants=VARIANTS | {"k2": {"model.config.num_selected_experts": 3}})
    assert [a == b for a, b in zip(one_changed, first, strict=True)] == [True, True, False] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "must hold the fields"),
        ({"variants": {}}, "variants must map names"),
        ({"variants": {"a/b": {}, "baseline": {}}}, "variants must map names"),
        ({"baseline": "none"}, "baseline is 'none'; the variants are baseline"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0, -1]}, "seeds is"),
        ({"evaluation": "flip"}, "evaluation is 'flip'"),
        (
            {"evaluation": {"flip": True}},
            "evaluation has 'flip'; it may have tta, expected_iou, largest_component, threshold",
        ),
        ({"evaluation": {"tta": "no"}}, "evaluation.tta is 'no'; it must be flip"),
        (
            {"evaluation": {"largest_component": False}},
            "evaluation.largest_component is False; it must be true, or be left out",
        ),
        ({"evaluation": {"threshold": 1}}, "evaluation.threshold is 1; it must be a number between 0 and 1"),
        ({"evaluation": {"threshold": 0.4, "expected_iou": True}}, "which exclude each other"),
        ({"split": 3}, "split is 3"),
        ({"split": "tset"}, "no split 'tset'"),
        ({"config": "absent.yaml"}, "there is no configuration .*absent.yaml"),
        ({"variants": VARIANTS | {"bad": {"model.config.experts": 3}}}, "'bad' sets model.config.experts, which"),
        ({"variants": VARIANTS | {"bad": {"optimization.speed": 3}}}, "settings of the variant 'bad' are not accepted"),
        (
            {"variants": VARIANTS | {"bad": {"optimization.epochs": 0}}},
            "settings of the variant 'bad' are not accepted",
        ),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        main([str(write_grid(tmp_path, **changes)), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_time_that_is_too_short_for_any_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--minutes 0\.1 is too short"):
        main([str(write_grid(tmp_path)), "--minutes", "0.1", "--output", str(tmp_path / "out")])


def test_an_unknown_variant_is_refused_and_the_known_ones_named(tmp_path):
    with pytest.raises(ValueError, match="no variant 'k9'; it has baseline, full, k2"):
        main([str(write_grid(tmp_path)), "--only", "k9", "--output", str(tmp_path / "out")])


def test_records_are_added_whole_and_replace_those_of_the_same_run(tmp_path):
    records = Records(tmp_path / "new" / "runs.jsonl")
    assert records.read() == {}
    for key, value in (("a", 1), ("b", 2), ("a", 3)):
        records.add({"key": key, "value": value})
    assert {key: record["value"] for key, record in records.read().items()} == {"a": 3, "b": 2}
    assert len(records.path.read_text().splitlines()) == 2


# Runs: scripts in the place of training and evaluation, which do in a moment what the runner looks at

TRAIN = """
import json, sys, time, yaml
from pathlib import Path
settings = yaml.safe_load(Path(sys.argv[2]).read_text())
folder, seconds = Path(settings["output_dir"]), {seconds}
progress = folder / "checkpoint" / "progress"
progress.parent.mkdir(exist_ok=True)
done = int(progress.read_text()) if progress.exists() else 0
with (folder / "starts").open("a") as file:
    file.write(f"{{done}}\\n")
for step in range(done, 10):
    time.sleep(seconds / 10)
    progress.with_name("new").write_text(str(step + 1))
    progress.with_name("new").rename(progress)
    if settings["seed"] == {fails_at}:
        sys.exit("what went wrong")
routing = {{"taps": {{}}, "adapters": {{}}}}
epoch = {{"epoch": 1, "loss": 1.0, "val": {{"mIoU": 0.5}}, "routing": routing}}
epochs = range(1, settings["optimization"]["epochs"] + 1)
(folder / "history.json").write_text(json.dumps([epoch | {{"epoch": i}} for i in epochs]))
(folder / "tuning.json").write_text(json.dumps({{"vision_trained": 1, "text_trained": 2, "added": 3}}))
(folder / "losses.jsonl").write_text("".join(json.dumps({{"step": i, "loss": 1 / i}}) + "\\n" for i in range(1, 251)))
"""
EVALUATE = """
import json, sys
from pathlib import Path
metrics = {"mIoU": 0.5, "oIoU": 0.4, "Pr@0.5": 0.5, "Pr@0.7": 0.1, "boundary_F": 0.3, "num_expressions": 4}
score = {"kind": "any", "intersection": 2, "predicted": 4, "truth": 4, "boundary_f": 0.3}
record = {"split": sys.argv[sys.argv.index("--split") + 1], "intervals": {}, "slices": {}}
record |= {"counts": {"images": 2, "objects": 4, "expressions": 4}}
record |= {"threshold": {"value": 0.5, "source": "given"}, "image_ids": [0, 0, 1, 1]}
record |= {"tta": "flip" if "--tta" in sys.argv else None}
record |= {"largest_component": "--largest_component" in sys.argv, "expected_iou": "--expected_iou" in sys.argv}
if "--mixed_precision" in sys.argv:
    record["threshold"]["source"] = sys.argv[sys.argv.index("--mixed_precision") + 1]
if "--threshold" in sys.argv:
    record["threshold"]["value"] = float(sys.argv[sys.argv.index("--threshold") + 1])
if record["expected_iou"]:
    record["threshold"]["value"] = None
record |= {"summary": {"as written": {"all": metrics}, "shuffled": {"all": metrics}}}
record |= {"scores": [score | {"row": i, "sentence": 0} for i in range(4)]}
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.parent.mkdir(exist_ok=True)
output.write_text(json.dumps(record))
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Replaces the scripts by stand-ins. It takes the seconds of a training and the seed that fails."""

    def put(seconds: float, fails_at: int = -1) -> None:
        (tmp_path / "train.py").write_text(TRAIN.format(seconds=seconds, fails_at=fails_at))
        (tmp_path / "evaluation.py").write_text(EVALUATE)
        places = {"training": tmp_path / "train.py", "evaluation": tmp_path / "evaluation.py"}
        monkeypatch.setattr(ablation, "SCRIPTS", places)

    return put


def starts(output: Path) -> dict[str, list[int]]:
    """Per run the steps at which its training was started."""
    return {file.parent.name: list(map(int, file.read_text().split())) for file in output.glob("runs/*/starts")}


@pytest.mark.parametrize(
    "evaluation", [{}, {"tta": "flip"}, {"largest_component": True, "threshold": 0.4}, {"expected_iou": True}]
)
def test_the_grid_selects_the_masks(tmp_path, scripts, evaluation):
    scripts(0.0)
    output = tmp_path / "out"
    assert main([str(write_grid(tmp_path, evaluation=evaluation)), "--only", "k2", "--output", str(output)]) == OK
    results = (output / "results.md").read_text()
    for record in Records(output / "runs.jsonl").read().values():
        assert (record["tta"] == "flip") == ("flipped image" in results) == ("tta" in evaluation)
        assert record["largest_component"] == ("connected component" in results) == ("largest_component" in evaluation)
        assert record["expected_iou"] == ("expected-IoU threshold" in results) == evaluation.get("expected_iou", False)
        assert record["threshold"]["value"] == (None if record["expected_iou"] else evaluation.get("threshold", 0.5))
    assert (f"Threshold {evaluation.get('threshold', 0.5):g}, " in results) == ("expected_iou" not in evaluation)


def test_models_are_scored_in_the_precision_of_their_training(tmp_path, scripts):
    scripts(0.0)
    output = tmp_path / "out"
    grid = str(write_grid(tmp_path))
    assert main([grid, "--only", "k2", "--seeds", "0", "--output", str(output), "--mixed_precision", "bf16"]) == OK
    (record,) = Records(output / "runs.jsonl").read().values()
    assert record["settings"]["mixed_precision"] == record["threshold"]["source"] == "bf16"


def test_validation_is_drawn_only_if_it_has_several_points(tmp_path, scripts):
    scripts(0.0)
    widths = []
    for epochs in (1, 2):
        output = tmp_path / str(epochs)
        grid = write_grid(tmp_path, options={"optimization.epochs": epochs}, seeds=[0])
        assert main([str(grid), "--only", "k2", "--output", str(output)]) == OK
        with Image.open(output / "figures" / "curves.png") as image:
            widths.append(image.width)
    assert widths[0] < 0.6 * widths[1]  # a single point is no curve


def test_on_another_split_finished_models_are_scored_again(tmp_path, scripts):
    scripts(0.0)
    output = tmp_path / "out"
    for split in ("test", "val"):
        assert main([str(write_grid(tmp_path, split=split, seeds=[0])), "--output", str(output)]) == OK
        assert {record["split"] for record in Records(output / "runs.jsonl").read().values()} == {split}
        assert f"Split {split}:" in (output / "results.md").read_text()
    assert set(map(tuple, starts(output).values())) == {(0,)}


def test_finished_runs_are_not_repeated_and_others_are_added(tmp_path, scripts):
    scripts(0.0)
    grid, output = str(write_grid(tmp_path)), tmp_path / "out"
    assert main([grid, "--output", str(output), "--only", "full", "--seeds", "0"]) == OK
    before = (output / "runs.jsonl").read_text()
    assert main([grid, "--output", str(output), "--jobs", "3"]) == OK
    lines = (output / "runs.jsonl").read_text()
    assert lines.startswith(before) and len(lines.splitlines()) == 6
    assert main([grid, "--output", str(output)]) == OK
    assert (output / "runs.jsonl").read_text() == lines
    table = (output / "results.md").read_text()
    assert all(f"| {name} | 2 | 6 | 50.0 ± 0.0 | 40.0 ± 0.0 |" in table for name in VARIANTS)
    assert table.count("| 50.0 to 50.0 | +0.0 [+0.0, +0.0] | +0.0 ± 0.0 |") == 2  # all but the baseline
    assert len(starts(output)) == 6 and set(map(tuple, starts(output).values())) == {(0,)}
    assert not list(output.glob("runs/*/checkpoint"))


def test_the_tables_compare_with_the_variant_that_is_named(tmp_path, scripts):
    scripts(0.0)
    grid, output = str(write_grid(tmp_path)), tmp_path / "out"
    assert main([grid, "--output", str(output), "--against", "full"]) == OK
    table = (output / "results.md").read_text()
    assert "difference from full" in table
    rows = {name: next(line for line in table.splitlines() if line.startswith(f"| {name} |")) for name in VARIANTS}
    assert "| – | – | – |" in rows["full"] and "| +0.0 ± 0.0 |" in rows["baseline"] and "| +0.0 ± 0.0 |" in rows["k2"]
    with pytest.raises(ValueError, match="--against is 'nope'"):
        main([grid, "--output", str(output), "--against", "nope"])


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(tmp_path, scripts, caplog):
    grid, output = str(write_grid(tmp_path)), tmp_path / "out"
    scripts(0.0, fails_at=0)
    assert main([grid, "--output", str(output)]) == FAILED
    assert {record["seed"] for record in Records(output / "runs.jsonl").read().values()} == {1}
    assert "what went wrong" in next(output.glob("runs/full-*-seed0/log.txt")).read_text()
    scripts(0.0)
    assert main([grid, "--output", str(output)]) == OK
    assert len(Records(output / "runs.jsonl").read()) == 6


def test_at_the_end_of_the_time_runs_stop_after_a_checkpoint_and_continue_later(tmp_path, scripts, monkeypatch):
    monkeypatch.setattr(ablation, "LAST_SECONDS", 0.6)
    scripts(2.0)
    grid, output = str(write_grid(tmp_path, seeds=[0])), tmp_path / "out"
    command = [grid, "--output", str(output), "--jobs", "2"]
    assert main([*command, "--minutes", str(1.5 / 60)]) == UNFINISHED
    assert len(starts(output)) == 2 and not (output / "runs.jsonl").exists()
    scripts(0.0)
    assert main(command) == OK
    begun = starts(output)
    assert sorted(len(steps) for steps in begun.values()) == [1, 2, 2]
    assert all(steps[1] > 0 for steps in begun.values() if len(steps) == 2)


def test_a_killed_runner_leaves_no_process_and_loses_no_run(tmp_path, scripts):
    scripts(1.5)
    grid, output = str(write_grid(tmp_path, seeds=[0])), tmp_path / "out"
    command = [grid, "--output", str(output), "--jobs", "2"]
    for _ in range(2):
        runner = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        known = sum(map(len, starts(output).values()))
        runner.start()
        while sum(map(len, starts(output).values())) < known + 2:
            assert runner.is_alive()
            time.sleep(0.01)
        children = psutil.Process(runner.pid).children(recursive=True)
        os.kill(runner.pid, signal.SIGKILL)
        runner.join()
        assert len(children) == 2 and not psutil.wait_procs(children, timeout=30)[1]
    scripts(0.0)
    assert main(command) == OK
    records = Records(output / "runs.jsonl").read()
    assert {record["variant"] for record in records.values()} == set(VARIANTS)
    assert all(record["seconds"]["training"] > 0 for record in records.values())


def test_a_runner_that_died_before_its_last_line_continues(tmp_path, scripts, monkeypatch):
    scripts(0.0)
    grid, output = str(write_grid(tmp_path, seeds=[0])), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            main([grid, "--output", str(output)])
    assert main([grid, "--output", str(output)]) == OK
    assert {record["variant"] for record in Records(output / "runs.jsonl").read().values()} == set(VARIANTS)


def test_two_runners_do_not_work_on_one_folder(tmp_path, scripts):
    scripts(0.0)
    grid, output = str(write_grid(tmp_path)), tmp_path / "out"
    output.mkdir()
    with locked_folder(output, "wait"), pytest.raises(OSError, match="another command is at work there"):
        main([grid, "--output", str(output)])
    assert not (output / "runs").exists()


# Statistics


def test_means_errors_and_prediction_intervals():
    values = [0.3, 0.5, 0.4, 0.45]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values)) and error == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_error([0.3]) == (0.3, None) and fresh_seed_interval([0.3]) is None


@pytest.mark.parametrize("seeds", [2, 3, 5, 17, 40])
def test_a_fresh_seed_lands_in_the_interval_in_95_of_100_cases(seeds):
    drawn = np.random.default_rng(seeds).normal(3.0, 2.0, size=(20_000, seeds + 1))
    ends = np.array([fresh_seed_interval(row[:-1].tolist()) for row in drawn])
    inside = (ends[:, 0] <= drawn[:, -1]) & (drawn[:, -1] <= ends[:, 1])
    assert inside.mean() == pytest.approx(0.95, abs=0.005)


def test_paired_intervals_equal_a_numpy_computation_and_ignore_what_images_share():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(30), 4)
    difficulty = np.repeat(rng.normal(0.5, 0.2, size=30), 4)  # of the images, the same for both models
    first, second = (difficulty + shift + rng.normal(0, 0.02, size=120) for shift in (0.03, 0.0))
    ones = np.ones(120)
    got = paired_intervals({"mIoU": (first, ones)}, {"mIoU": (second, ones)}, images, resamples=500)["mIoU"]

    draws = np.random.default_rng(0).integers(30, size=(500, 30))
    each = (first - second).reshape(30, 4).mean(axis=1)
    assert got == pytest.approx(np.quantile(each[draws].mean(axis=1), [0.025, 0.975]))
    alone = bootstrap_intervals({"mIoU": (first, ones)}, images, resamples=500)["mIoU"]
    assert 0 < got[0] < 0.03 < got[1] and got[1] - got[0] < (alone[1] - alone[0]) / 5
    assert paired_intervals({"mIoU": (first, ones)}, {"mIoU": (first, ones)}, images)["mIoU"] == (0, 0)
