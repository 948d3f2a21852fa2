"""Training processes that a test may kill, and a comparison of the files that two runs leave."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from conftest import REPOSITORY
from runs import TINY, written
from safetensors.torch import load_file

from training.configuration import AugmentationSettings, OptimizationSettings, TrainingSettings

# everything random at once: dropout, routing noise, augmentation; a worker; several batches to a step; frozen towers
NOISY = replace(
    TINY,
    model=replace(
        TINY.model,
        config=TINY.model.config | {"decoder_dropout": 0.3, "router_noise_std": 0.5, "num_selected_experts": 2},
        vision_tuning="norm_bias",
        text_tuning="frozen",
    ),
    data=replace(TINY.data, num_scenes=(15, 2, 1)),
    augmentation=AugmentationSettings(flip=0.5, word_dropout=0.3),
    optimization=OptimizationSettings(epochs=2, batch_size=1, learning_rate=2e-3, gradient_accumulation_steps=2),
    num_workers=1,
    checkpoint_every=3,
    log_every=1,
)
STEPS = 16  # fifteen images make eight steps, the last of a single image

# a process forked from one that has imported everything starts in no time
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.train"])


def run_script(options: list[str], environment: dict[str, str], output: str, prepare: Callable | None) -> None:
    """`training/train.py` in this (new) process, its output in a file."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as if the script had been started alone
    os.cpu_count = lambda: 1  # a few scenes are drawn faster than worker processes start
    if prepare:
        prepare()
    sys.argv = ["train.py", *options]
    runpy.run_path(str(REPOSITORY / "training" / "train.py"), run_name="__main__")


def start(settings: TrainingSettings, folder: Path, *options: str, prepare: Callable | None = None, **environment: str):
    """Start a training process that writes to `folder`; a file beside the folder takes what it prints."""
    config = written(settings, folder.with_suffix(".yaml"))
    arguments = ["--config", config, "--output_dir", str(folder), *options]
    environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"} | environment
    output = str(folder.with_suffix(f".{environment.get('RANK', '0')}.txt"))
    process = CONTEXT.Process(target=run_script, args=(arguments, environment, output, prepare))
    process.start()
    return process


def printed(folder: Path, rank: int = 0) -> str:
    """What a process of `start` has printed."""
    return folder.with_suffix(f".{rank}.txt").read_text()


def wait_for_step(process: BaseProcess, folder: Path, step: int, before: int | None) -> None:
    """Wait until this process (not the one before, which last changed its log at the time `before`) has logged a step."""
    log = folder / "losses.jsonl"
    while process.is_alive():
        if log.exists() and log.stat().st_mtime_ns != before and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(printed(folder))


def assert_same_run(folder: Path, whole: Path) -> None:
    """Every loss, every score and the model, to the last bit; nothing but a run's files is left."""
    lines = (folder / "losses.jsonl").read_text()
    assert len(lines.splitlines()) == STEPS and lines == (whole / "losses.jsonl").read_text()
    assert (folder / "history.json").read_text() == (whole / "history.json").read_text()
    weights = [load_file(run / "model" / "model.safetensors") for run in (folder, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
