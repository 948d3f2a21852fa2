"""Restart: runs killed at any moment, with a full disk or a lost worker go on with the same command as if nothing had been."""

import contextlib
import json
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import make_inputs, make_model
from restarts import NOISY, STEPS, assert_same_run, printed, start, wait_for_step
from runs import TINY
from safetensors import safe_open

from training.configuration import TrainingSettings
from training.learning.checkpoints import Checkpoints, Progress
from training.learning.losses import LossLog
from training.learning.tuning import apply_tuning
from training.support import files


def finish(process: BaseProcess, folder: Path) -> str:
    process.join()
    assert process.exitcode == 0, printed(folder)
    return printed(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(NOISY, folder), folder)
    return folder


def test_a_run_killed_five_times_loses_nothing(whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "run" / "losses.jsonl"
    resumed, workers = [], []
    for step in sorted(random.Random(0).sample(range(1, STEPS), 5)):
        before = log.stat().st_mtime_ns if log.exists() else None
        process = start(NOISY, folder)
        wait_for_step(process, folder, step, before)
        if step % (STEPS // 2) not in (0, STEPS // 2 - 1):  # far from an evaluation
            workers += psutil.Process(process.pid).children()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with log.open("a") as file:
            file.write('{"step": 1, "lo')  # a line that the kill cut off
        resumed.append("going on" in printed(folder))
    assert "going on" in finish(start(NOISY, folder), folder)
    assert sum(resumed) >= 3 and workers
    assert_same_run(folder, whole)
    assert not psutil.wait_procs(workers, timeout=60)[1]  # nothing outlives a killed run


# Each of these breaks a run in its second checkpoint


def once_saved(step: Callable[[Callable, tuple, dict], object]) -> None:
    """Let `step` stand in for the second `Checkpoints.save`."""
    original, calls = Checkpoints.save, []

    def save(*arguments, **options):
        calls.append(1)
        return step(original, arguments, options) if len(calls) == 2 else original(*arguments, **options)

    Checkpoints.save = save


def fill_the_disk() -> None:
    """Files of more than 100 kB cannot be written any more, as a full disk would have it half-way through the weights."""

    def save(original, arguments, options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return original(*arguments, **options)

    once_saved(save)


def die_between_the_renames() -> None:
    def save(original, arguments, options):
        rename = os.rename

        def last_rename(*paths):
            rename(*paths)
            os.kill(os.getpid(), signal.SIGKILL)

        files.os.rename = last_rename
        return original(*arguments, **options)

    once_saved(save)


def die_before_the_renames() -> None:
    def save(original, arguments, options):
        files.os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    once_saved(save)


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [
        (fill_the_disk, 1, "checkpoint could not be written"),
        (die_between_the_renames, -signal.SIGKILL, ""),
        (die_before_the_renames, -signal.SIGKILL, ""),
    ],
)
def test_a_checkpoint_is_whole_or_absent(whole, tmp_path, prepare, code, said):
    folder = tmp_path / "run"
    process = start(NOISY, folder, prepare=prepare)
    process.join()
    assert process.exitcode == code and said in printed(folder)
    if code == 1:
        assert "Traceback" not in printed(folder)
        assert {path.name for path in folder.iterdir()} == {
            "settings.yaml",
            "tuning.json",
            "losses.jsonl",
            "checkpoint",
        }
    assert "step 3" in finish(start(NOISY, folder), folder)
    assert_same_run(folder, whole)


def test_a_lost_worker_ends_the_run_with_a_sentence(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(NOISY, folder)
    wait_for_step(process, folder, 4, None)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    process.join()
    assert process.exitcode == 1
    assert "process was lost" in printed(folder).split("error:")[1] and "Traceback" not in printed(folder)
    assert "going on" in finish(start(NOISY, folder), folder)
    assert_same_run(folder, whole)


# What a checkpoint holds


def make_run(folder: Path, **settings) -> tuple[torch.nn.Module, torch.optim.Optimizer, Checkpoints]:
    """A small model with frozen towers, one step trained, and its checkpoints."""
    accelerator = Accelerator(cpu=True)
    model = make_model().train()
    apply_tuning(model, vision="norm_bias", text="frozen")
    checkpoints = Checkpoints(accelerator, model, folder / "checkpoint", TrainingSettings(**settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared(**make_inputs(3), labels=torch.rand(3, 56, 56)).loss.backward()
    optimizer.step()
    return model, optimizer, checkpoints


@pytest.mark.parametrize("contents", ["trained", "all"])
def test_a_checkpoint_holds_what_training_changed_or_everything(tmp_path, contents):
    model, optimizer, checkpoints = make_run(tmp_path, checkpoint_contents=contents)
    checkpoints.save(Progress(step=5, history=[{"loss": 0.1 + 0.2}]))
    assert os.listdir(tmp_path) == ["checkpoint"]
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", "pt") as file:
        held = set(file.keys())
    before = make_model().state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= held and any("running_mean" in name for name in changed)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert held == set(before) - (frozen if contents == "trained" else set())
    assert any("token_embedding" in name for name in frozen)

    another, another_optimizer, other = make_run(tmp_path)
    with torch.no_grad():
        for parameter in another.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert other.exist()
    progress = other.load()
    assert progress == Progress(step=5, history=[{"loss": 0.1 + 0.2}])
    state = another.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    moments = [o.state_dict()["state"] for o in (optimizer, another_optimizer)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_a_checkpoint_is_not_laid_upon_other_towers(tmp_path):
    make_run(tmp_path)[-1].save(Progress())
    model = make_model()
    apply_tuning(model, vision="norm_bias", text="frozen")
    with torch.no_grad():
        model.model.text_tower.embeddings.token_embedding.weight[7, 3] += 1e-3
    settings = TrainingSettings(model=replace(TINY.model, text_model="another/clip"))
    checkpoints = Checkpoints(Accelerator(cpu=True), model, tmp_path / "checkpoint", settings)
    with pytest.raises(ValueError, match="another/clip"):
        checkpoints.load()


def test_a_run_does_not_go_on_with_another_number_of_processes(tmp_path):
    *_, checkpoints = make_run(tmp_path)
    checkpoints.save(Progress())
    path = tmp_path / "checkpoint" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match="2 processes, now there are 1"):
        checkpoints.load()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, checkpoints = make_run(tmp_path)
    checkpoints.save(Progress())
    for name in os.listdir(tmp_path / "checkpoint"):
        if name.endswith((".bin", ".pkl")):
            whole = (tmp_path / "checkpoint" / name).read_bytes()
            torch.save(Harmful(), tmp_path / "checkpoint" / name)
            with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
                checkpoints.load()
            assert not Path("harmed").exists(), name
            (tmp_path / "checkpoint" / name).write_bytes(whole)
    checkpoints.load()


def test_the_log_keeps_the_steps_of_the_checkpoint_and_no_half_line(tmp_path):
    log, progress = LossLog(Accelerator(cpu=True), tmp_path / "losses.jsonl", TINY), Progress()
    log.go_on_after(0)
    for step in range(1, 5):
        log.add({"step": step}, torch.tensor([step / 3, 0.1]), torch.tensor(1.0), [])
    assert not log.path.exists()
    assert [record["step"] for record in log.write(progress)] == [1, 2, 3, 4] and log.write(progress) == []
    assert progress.end_epoch()["loss"] == pytest.approx(10 / 12) and progress == Progress(epoch=1)
    text = log.path.read_text()
    assert json.loads(text.splitlines()[1]) == {
        "step": 2,
        "loss": torch.tensor(2 / 3).item(),
        "router_aux_loss": torch.tensor(0.1).item(),
    }
    for cut in range(len(text) - 30, len(text)):
        log.path.write_text(text[:cut])
        log.go_on_after(3)
        assert log.path.read_text() == "".join(text.splitlines(keepends=True)[:3])
