"""Measure the speed of training: the input pipeline alone, a training step, and the forward pass of the vision tower alone.

`python benchmarks/training_speed.py [--repeats N] [--output FILE.json] --config training/configs/demo.yaml [--option value ...]`
takes the options of `training/train.py`, prints a Markdown table and writes a JSON file. accelerate chooses the CPU or the GPU.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from measuring import measure, memory, reset_memory

from training.configuration import TrainingSettings, read_settings
from training.examples.batches import Collator, TrainingExamples
from training.examples.splits import load_splits
from training.learning.building import build_model, build_processor
from training.learning.optimizers import build_optimizer
from training.learning.tuning import apply_tuning, checkpoint_activations
from training.support.commands import run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_text

WARM_UP = 3  # first calls allocate, compile and choose kernels


def benchmark(settings: TrainingSettings, repeats: int) -> dict[str, Any]:
    """All figures for the settings of a run, as plain values. Times are in seconds per batch, memory in bytes.

    Raises:
        ValueError: The settings use the feature cache; then training steps do not run the vision tower.
    """
    if settings.data.cached_versions:
        raise ValueError(
            f"data.cached_versions is {settings.data.cached_versions}; this benchmark runs the vision tower. Set it to 0."
        )
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    device = accelerator.device
    (rows,) = load_splits(settings.data, [settings.data.train_split])
    processor = build_processor(settings, rows)
    examples = TrainingExamples(
        rows,
        objects_per_image=settings.data.objects_per_image,
        sentences_per_object=settings.data.sentences_per_object,
        augmentation=settings.augmentation,
        seed=settings.seed,
    )
    collate = Collator(processor, with_labels=True)
    size = settings.optimization.batch_size
    order = np.resize(np.random.default_rng(settings.seed).permutation(len(examples)), size * (WARM_UP + repeats))
    batches = iter(order.reshape(-1, size).tolist())
    sizes, made = [], []

    def prepare() -> None:
        inputs, _ = collate([examples[i] for i in next(batches)])
        sizes.append(len(inputs["input_ids"]))
        made[:] = [inputs]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker process has one thread
    pipeline = measure({"pipeline": prepare}, repeats, torch.device("cpu"), WARM_UP)["pipeline"]
    torch.set_num_threads(threads)

    model = build_model(settings, processor)
    apply_tuning(model, vision=settings.model.vision_tuning, text=settings.model.text_tuning)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tower = model.model.vision.tower
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings.optimization))
    if settings.compile:
        model = torch.compile(model)
    inputs = made[0].to(device)

    def forward() -> None:
        with torch.inference_mode(), accelerator.autocast():
            tower(inputs["pixel_values"])

    def step() -> None:
        accelerator.backward(model(**inputs).loss)
        if settings.optimization.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), settings.optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    tower.eval()
    figures = {"pipeline": pipeline | _rates(pipeline, size, statistics.mean(sizes[WARM_UP:]))}
    for name, call in (("tower_forward", forward), ("training_step", step)):
        if name == "training_step":
            model.train()
        reset_memory(device)
        seconds = measure({name: call}, repeats, device, WARM_UP)[name]
        figures[name] = seconds | _rates(seconds, size, len(inputs["input_ids"])) | {"peak_memory": memory(device)}
    return {
        "figures": figures,
        "step_per_tower_forward": figures["training_step"]["median"] / figures["tower_forward"]["median"],
        "workers_needed": figures["training_step"]["images_per_second"] / figures["pipeline"]["images_per_second"],
        "batch": {
            "images": size,
            "expressions": len(inputs["input_ids"]),
            "input": list(inputs["pixel_values"].shape),
        },
        "parameters": {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in trained)},
        "device": str(device),
        "threads": threads,
        "mixed_precision": settings.mixed_precision,
        "repeats": repeats,
        "hardware": describe_hardware(),
        "versions": library_versions(),
    }


def format_figures(record: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    hardware, batch = record["hardware"], record["batch"]
    where = ", ".join(hardware["gpus"]) if record["device"].startswith("cuda") else hardware["processor"]
    names = {
        "pipeline": "input pipeline alone, one core",
        "tower_forward": "vision tower alone, forward",
        "training_step": "training step",
    }
    lines = [
        "| | ms for a batch: median [quartiles] | images/s | samples/s | peak memory, MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for key, figure in record["figures"].items():
        median, low, high = (1000 * figure[name] for name in ("median", "low", "high"))
        peak = f"{figure['peak_memory'] / 2**20:.0f}" if "peak_memory" in figure else "–"
        rates = f"{figure['images_per_second']:.1f} | {figure['samples_per_second']:.1f}"
        lines.append(f"| {names[key]} | {median:.1f} [{low:.1f}, {high:.1f}] | {rates} | {peak} |")
    where_used = "allocated on the GPU" if record["device"].startswith("cuda") else "in the whole process"
    lines += [
        "",
        f"{where}, {record['threads']} thread(s), {record['mixed_precision']} mixed precision, {record['repeats']} repeats. "
        f"A batch: {batch['images']} images of {batch['input'][2]}×{batch['input'][3]} with {batch['expressions']} expressions "
        f"(samples). Memory: the peak so far, {where_used}.",
        f"A step takes {record['step_per_tower_forward']:.1f} times as long as the tower's forward pass. The input pipeline needs "
        f"{record['workers_needed']:.2f} cores to keep up.",
    ]
    return "\n".join(lines)


def _rates(seconds: dict[str, float], images: float, samples: float) -> dict[str, float]:
    return {
        "images_per_second": images / seconds["median"],
        "samples_per_second": samples / seconds["median"],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other options are those of train.py."
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each part")
    parser.add_argument("--output", type=Path, default=Path("outputs/training_speed.json"), help="JSON file")
    own, others = parser.parse_known_args(arguments)
    if own.repeats < 1:
        parser.error(f"--repeats is {own.repeats}; it must be 1 or more.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = benchmark(read_settings(others), own.repeats)
    record["command"] = command_line("benchmarks/training_speed.py", arguments)
    logging.getLogger(__name__).info(format_figures(record))
    write_text(own.output, json.dumps(record, indent=1))


if __name__ == "__main__":
    run_command(main)
