"""Measure the speed of SERA, of its vision tower alone and of CLIPSeg, and the time of each part of SERA.

`python benchmarks/inference_speed.py [--repeats N] [--device cpu|cuda] [--only WORD …] [--curves] [--output FILE.json]` prints
Markdown tables and writes a JSON file. With `--curves` it also measures larger images and more expressions, and draws a plot beside
the JSON file. Weights are random, so nothing is downloaded.
"""

import argparse
import io
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import matrix_rate, measure, memory, memory_alone, reset_memory, wait
from PIL import Image
from speed_curves import draw_curves, measure_curves
from subjects import (
    PRECISIONS,
    Entry,
    Models,
    build_model,
    count_flops,
    run_once,
    train_once,
    training_step,
)
from torch.autograd import DeviceType

from processing_sera import SeraImageProcessor, SeraProcessor
from training.sources.scenes.dataset import train_tokenizer
from training.support.commands import in_one_line, run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_text

logger = logging.getLogger(__name__)

ENTRIES = [
    *(Entry(kind, precision) for precision in PRECISIONS for kind in ("backbone", "sera", "clipseg")),
    Entry("fused"),
    Entry("late"),
    Entry("sera", expressions=4),
    Entry("sera", expressions=16),
    Entry("sera", expressions=16, at_once=4),
    Entry("late", expressions=16, at_once=4),
    Entry("sera", images=4, expressions=4),
    Entry("sera", "bf16 weights", expressions=16, at_once=4),
    Entry("late", "bf16 weights", expressions=16, at_once=4),
    *(
        Entry(kind, precision, compiled=True)
        for precision in ("float32", "bf16 weights")
        for kind in ("backbone", "sera")
    ),
]
REMEMBERED = [
    Entry("backbone"),
    Entry("sera"),
    Entry("sera", expressions=16),
    Entry("late", expressions=16),
    Entry("clipseg"),
]
TRAINING_BATCHES = {"cpu": (2,), "cuda": (2, 16, 64)}
PHOTOGRAPH = (480, 640)  # height and width of the JPEG that processing is measured on


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All figures as plain values. Times are in seconds, memory in bytes."""
    device, tiny = torch.device(options.device), options.tiny
    trains = not options.only or any(word in "training step" for word in options.only)
    largest = {}
    if trains and device.type == "cuda":  # first, while no other model is in the GPU's memory
        largest = {precision: largest_batch(precision, tiny, device) for precision in PRECISIONS[:2]}
    models = Models(tiny, device)
    calls, skipped = {}, {}
    for entry in ENTRIES:
        if options.only and not any(word in entry.name for word in options.only):
            continue
        try:
            call = models.forward(entry)
            call()
        except Exception as error:  # a compiler may fail in many ways; the other figures are still measured
            if not entry.compiled:
                raise
            skipped[entry.name] = in_one_line(error)[:200]
            logger.warning("%s is left out: %s", entry.name, skipped[entry.name])
        else:
            calls[entry] = call
    steps = {}
    if trains:
        trained = build_model("sera", tiny).to(device)
        for precision in PRECISIONS[:2]:
            for size in TRAINING_BATCHES[device.type]:
                steps[f"training step, batch {size} ({precision})"] = (
                    precision,
                    size,
                    training_step(trained, precision, size, tiny, device),
                )
    named = {entry.name: call for entry, call in calls.items()} | {name: step for name, (_, _, step) in steps.items()}
    logger.info("%d entries, in turns", len(named))
    seconds = measure(named, options.repeats, device, warm_up=1 if device.type == "cpu" else 5)
    # only for the precisions in use: without units for bfloat16, one such product takes minutes
    used = {entry: torch.float32 if entry.precision == "float32" else torch.bfloat16 for entry in calls}
    rates = {dtype: matrix_rate(dtype, device) for dtype in dict.fromkeys(used.values())}

    entries = {}
    for entry in calls:
        flops = count_flops(entry.kind, entry.images, entry.expressions, tiny)
        figures = seconds[entry.name]
        rate = rates[used[entry]]
        entries[entry.name] = figures | {
            "flops": flops,
            "parameters": sum(p.numel() for p in models.get(entry).parameters()),
            "images_per_second": entry.images / figures["median"],
            "expressions_per_second": entry.expressions / figures["median"],
            "share_of_matrix_rate": flops / figures["median"] / rate,
            "images": entry.images,
            "expressions": entry.expressions,
        }
    training = {
        name: seconds[name] | {"batch": size, "samples_per_second": size / seconds[name]["median"]}
        for name, (_, size, _) in steps.items()
    }
    if options.memory:
        _add_memory(entries, training, steps, calls, tiny, device)
    record = {
        "entries": entries,
        "training": training,
        "parts": {
            precision: measure_parts(models, precision, options.repeats)
            for precision in ("float32", "bf16 weights")
            if Entry("sera", precision) in calls
        },
        "operators": {
            precision: measure_operators(models, precision)
            for precision in ("float32", "bf16 weights")
            if Entry("sera", precision) in calls
        },
        "processing": measure_processing(max(options.repeats, 3) * 5),
        "matrix_rate": {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()},
        "skipped": skipped,
    }
    if largest:
        record["largest_batch"] = largest
    if options.curves:
        record["curves"] = measure_curves(models, options.memory)
    return record | {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "tiny": tiny,
        "hardware": describe_hardware(),
        "versions": library_versions(),
    }


def _add_memory(entries: dict, training: dict, steps: dict, calls: dict, tiny: bool, device: torch.device) -> None:
    """Add the peak memory: on the CPU from a new process each, on a GPU from its allocator, with all models that are loaded."""
    if device.type == "cuda":
        held = {entry.name: (entries, call) for entry, call in calls.items()}
        held |= {name: (training, step) for name, (_, _, step) in steps.items()}
        for name, (figures, call) in held.items():
            reset_memory(device)
            call()
            wait(device)
            figures[name]["peak_memory"] = memory(device)
        return
    for entry in REMEMBERED:
        if entry in calls:
            entries[entry.name]["peak_memory"] = memory_alone(run_once, entry, tiny)
    for name, (precision, size, _) in steps.items():
        training[name]["peak_memory"] = memory_alone(train_once, precision, size, tiny)


def measure_parts(models: Models, precision: str, repeats: int) -> dict[str, float]:
    """Median seconds of each part of SERA-B in a forward pass of one image and one expression."""
    entry, device = Entry("sera", precision), models.device
    model = models.get(entry)
    total: dict[str, float] = {}
    vision = model.model.vision
    adapters = [block.adapter for block in vision.adapted_blocks.values()]
    parts: list[tuple[str, Any, str]] = [
        ("text", model.model, "encode_text"),
        *(("adapters", adapter, name) for adapter in adapters for name in ("look", "attend")),
        ("backbone and adapters", vision, "encode_images"),
        ("backbone and adapters", vision, "forward"),
        *(("fusion", fusion, name) for fusion in model.model.fusions for name in ("look", "mix")),
        ("projector", model.decoder.projector, "forward"),
        ("decoder and projector", model.decoder, "forward"),
    ]

    def timed(part: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            wait(device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            wait(device)
            total[part] = total.get(part, 0.0) + time.perf_counter() - start
            return result

        return run

    for part, owner, name in parts:
        setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        call, runs = timed("all", models.forward(entry)), []
        for i in range(repeats + 1):
            total.clear()
            call()
            if i:
                runs.append(dict(total))
    finally:
        for _, owner, name in parts:
            vars(owner).pop(name, None)  # the method of the class again
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    outer = {"backbone": ("backbone and adapters", "adapters"), "decoder": ("decoder and projector", "projector")}
    for name, (whole, inner) in outer.items():
        medians[name] = medians.pop(whole) - medians[inner]
    return {name: medians[name] for name in ("text", "backbone", "adapters", "fusion", "decoder", "projector", "all")}


def measure_operators(models: Models, precision: str, count: int = 8) -> dict[str, float]:
    """Shares of time, in [0, 1], of the slowest operators in such a pass, from torch's profiler."""
    call = models.forward(Entry("sera", precision))
    call()
    with torch.profiler.profile() as profiler:
        call()
        wait(models.device)
    on_gpu = models.device.type == "cuda"
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # an operator; its time includes its kernels'
    }
    costly = sorted(spent, key=spent.__getitem__, reverse=True)[:count]
    return {name.removeprefix("aten::"): spent[name] / sum(spent.values()) for name in costly}


def measure_processing(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of pre- and post-processing on one core, for one 640×480 JPEG and one expression."""
    height, width = PHOTOGRAPH
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    photograph = Image.open(buffer)
    photograph.load()
    text = "the zebra that is drinking on the left"
    processor = SeraProcessor(SeraImageProcessor(), train_tokenizer([text]))
    inputs = processor(images=[photograph], text=[text], return_tensors="pt")
    smooth = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.interpolate(smooth, size=(128, 128), mode="bicubic")[0]
    calls = {
        "decode the JPEG": lambda: Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"),
        "pre-processing": lambda: processor(images=[photograph], text=[text], return_tensors="pt"),
        "post-processing": lambda: processor.post_process_referring_segmentation({"logits": logits}, inputs),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(calls, repeats, torch.device("cpu"), warm_up=3)
    finally:
        torch.set_num_threads(threads)


def largest_batch(precision: str, tiny: bool, device: torch.device, limit: int = 4096) -> int:
    """The largest power of two of images that a training step fits on the GPU; 0 if it fits none."""
    model, size, fitting = build_model("sera", tiny).to(device), 1, 0
    while size <= limit:
        try:
            training_step(model, precision, size, tiny, device)()
            wait(device)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        fitting, size = size, 2 * size
    return fitting


def format_record(record: dict[str, Any]) -> str:
    """The figures as Markdown tables. Times are multiples of the bare backbone's time, if it was measured."""
    backbone = record["entries"].get(Entry("backbone").name)
    unit = backbone["median"] if backbone else 1.0
    lines = [
        "| | relative [quartiles] | per expression | ms | GFLOP | million parameters | expressions/s | share of matrix rate "
        "| peak memory, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, figures in record["entries"].items():
        spread, peak = _spread_and_peak(figures, unit)
        lines.append(
            f"| {name} | {spread} | {figures['median'] / unit / figures['expressions']:.3f} "
            f"| {1000 * figures['median']:.1f} | {figures['flops'] / 1e9:.1f} | {figures['parameters'] / 1e6:.1f} "
            f"| {figures['expressions_per_second']:.2f} | {figures['share_of_matrix_rate']:.2f} | {peak} |"
        )
    for name, figures in record["training"].items():
        spread, peak = _spread_and_peak(figures, unit)
        lines.append(
            f"| {name} | {spread} | – | {1000 * figures['median']:.1f} | – | – "
            f"| {figures['samples_per_second']:.2f} | – | {peak} |"
        )
    if record["parts"]:
        names = list(next(iter(record["parts"].values())))
        lines += ["", f"| SERA-B, one expression: ms | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for precision, parts in record["parts"].items():
            lines.append(f"| {precision} | {' | '.join(f'{1000 * parts[name]:.1f}' for name in names)} |")
    for precision, shares in record["operators"].items():
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        lines += ["", f"SERA-B, one expression, {precision}: {told}."]
    lines += ["", "| a 640×480 JPEG, one core | ms: median [quartiles] |", "|---|--:|"]
    for name, figures in record["processing"].items():
        median, low, high = (1000 * figures[key] for key in ("median", "low", "high"))
        lines.append(f"| {name} | {median:.2f} [{low:.2f}, {high:.2f}] |")
    hardware = record["hardware"]
    where = ", ".join(hardware["gpus"]) if record["device"].startswith("cuda") else hardware["processor"]
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in record["matrix_rate"].items())
    lines += [
        "",
        f"{where}, {record['threads']} thread(s), {record['repeats']} repeats in turns; one matrix product: {rates}.",
    ]
    for name, size in record.get("largest_batch", {}).items():
        lines.append(f"Largest training batch that fits ({name}): {size}.")
    for name, reason in record["skipped"].items():
        lines.append(f"Left out: {name}: {reason}")
    return "\n".join(lines)


def _spread_and_peak(figures: dict[str, float], unit: float) -> tuple[str, str]:
    """Cells of a table: the time in units of `unit` with its quartiles, and the peak memory if it was measured."""
    median, low, high = (figures[key] / unit for key in ("median", "low", "high"))
    peak = f"{figures['peak_memory'] / 2**20:.0f}" if "peak_memory" in figures else "–"
    return f"{median:.3f} [{low:.3f}, {high:.3f}]", peak


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each entry")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="measure only entries whose names contain one of these words"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument(
        "--curves", action="store_true", help="also measure the cost over image size and number of expressions"
    )
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to try the command")
    parser.add_argument("--output", type=Path, default=Path("outputs/inference_speed.json"), help="JSON file")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be 1 or more.")
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(
            f"--device is {options.device}; here it may be cpu{' or cuda' if torch.cuda.is_available() else ''}."
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = benchmark(options)
    record["command"] = command_line("benchmarks/inference_speed.py", arguments)
    logger.info(format_record(record))
    write_text(options.output, json.dumps(record, indent=1))
    if options.curves:
        draw_curves(record, options.output.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
