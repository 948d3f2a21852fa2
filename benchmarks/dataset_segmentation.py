"""`training/segment.py` on many small images: is its memory flat, how fast is it, and what share of the time has the model?

`python benchmarks/dataset_segmentation.py --images 20000` makes the images, segments them in a process of its own for each form of
input, and watches that process's resident memory. It ends with exit code 1 where memory grew by more than `--limit_mib` while nine
tenths of the images were segmented.
"""

import argparse
import io
import json
import logging
import multiprocessing
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image

from training import segment
from training.scoring.predictions import list_parts
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_text

PHRASES = ("the red circle", "a spotted triangle", "the hourglass on the left", "the largest square")
SHARDS = 4
EVERY_S = 0.05


def image_bytes(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG file of waves, (width, height) pixels."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    wave = np.stack(
        [127 + 120 * np.sin((columns + rows * k + 13 * number) / (5 + k + number % 7)) for k in range(3)], -1
    )
    buffer = io.BytesIO()
    Image.fromarray(wave.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_folder(place: Path, images: int, size: tuple[int, int]) -> Path:
    """A folder of images, with a table of one phrase for each."""
    with (place / "phrases.csv").open("w") as table:
        table.write("file,phrase\n")
        for i in range(images):
            (place / f"{i // 1000:03d}").mkdir(exist_ok=True)
            (place / f"{i // 1000:03d}" / f"{i:06d}.jpg").write_bytes(image_bytes(i, size))
            table.write(f"{i // 1000:03d}/{i:06d}.jpg,{PHRASES[i % len(PHRASES)]}\n")
    return place


def write_tars(place: Path, images: int, size: tuple[int, int]) -> Path:
    """WebDataset tars."""
    for shard in range(SHARDS):
        with tarfile.open(place / f"{shard}.tar", "w") as archive:
            for i in range(shard, images, SHARDS):
                for suffix, content in (("jpg", image_bytes(i, size)), ("txt", PHRASES[i % len(PHRASES)].encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return place


def write_parquet(place: Path, images: int, size: tuple[int, int]) -> Path:
    """Parquet files with the images in them."""
    features = datasets.Features({"image": datasets.Image(), "phrase": datasets.Value("string")})
    for shard in range(SHARDS):
        rows = [
            {"image": {"bytes": image_bytes(i, size), "path": None}, "phrase": PHRASES[i % len(PHRASES)]}
            for i in range(shard, images, SHARDS)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(place / f"{shard}.parquet", batch_size=100)
    return place


FORMS: dict[str, Callable[[Path, int, tuple[int, int]], Path]] = {
    "folder": write_folder,
    "tars": write_tars,
    "parquet": write_parquet,
}


def watched(arguments: list[str], output: Path, threads: int, sender: Any) -> None:
    """Segment in this process, and send what came of it: timing, and (images done, resident bytes) over time."""
    torch.set_num_threads(threads)
    datasets.config.HF_DATASETS_CACHE = output.parent / "cache"
    process, samples, over = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            done = sum(part.stop - part.first for part in list_parts(output))
            samples.append((done, process.memory_info().rss))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    timing = segment.segment(segment.segment_parser().parse_args(arguments))
    over.set()
    watcher.join()
    sender.send((timing.images, timing.seconds, timing.shares(), samples))


def measure_form(form: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Figures of one form of input."""
    (place / form).mkdir()
    started = time.perf_counter()
    data = FORMS[form](place / form, options.images, tuple(options.size))
    logging.info(f"{form}: {options.images} images written in {time.perf_counter() - started:.0f} s")
    output = place / f"{form}-out"
    arguments = [options.model, "--data", str(data), "--output", str(output), "--num_workers", "0"]
    arguments += ["--part_size", str(max(1, options.images // 40))]  # what is done is seen by the parts
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=watched, args=(arguments, output, options.threads, sender))
    process.start()
    sender.close()
    try:
        images, seconds, shares, samples = receiver.recv()
    except EOFError:
        raise OSError(f"the process that segments ended before it was done (exit code {process.exitcode}).") from None
    finally:
        process.join()
    early = [memory for done, memory in samples if 0 < done <= images // 10]
    late = [memory for done, memory in samples if done >= 0.9 * images]
    if not early or not late:
        raise ValueError(f"--images {options.images} are done too soon to watch the memory; take more.")
    return {
        "images": images,
        "seconds": seconds,
        "images_per_second_per_core": images / seconds / options.threads,
        "shares": shares,
        "memory_mib": {"first tenth": max(early) / 2**20, "last tenth": max(late) / 2**20},
        "growth_mib": (max(late) - max(early)) / 2**20,
        "peak_mib": max(memory for _, memory in samples) / 2**20,
    }


def format_figures(record: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| form | images | images/s per core | reading | model | masks | writing | memory in the first and last tenth, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for form, figures in record["forms"].items():
        shares = " | ".join(f"{share:.0%}" for share in figures["shares"].values())
        first, last = figures["memory_mib"].values()
        rate = f"{figures['images_per_second_per_core']:.1f}"
        lines.append(f"| {form} | {figures['images']} | {rate} | {shares} | {first:.0f}, {last:.0f} |")
    width, height = record["size"]
    lines += [
        "",
        f"{record['hardware']['processor']}, {record['threads']} thread(s); images of {width}×{height} pixels with a phrase each. "
        f"Load of the machine before: {record['load_before']:.1f}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/sera-scenes", help="folder of a SERA")
    parser.add_argument("--images", type=int, default=20_000, help="their number")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 96), help="width and height of the images, pixels")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of input")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--limit_mib", type=float, default=64, help="growth of memory that is an error, MiB")
    parser.add_argument("--output", type=Path, default=Path("outputs/dataset_segmentation.json"), help="JSON file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    load = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        forms = {form: measure_form(form, options, Path(place)) for form in options.forms}
    record = {
        "forms": forms,
        "model": options.model,
        "size": list(options.size),
        "threads": options.threads,
        "load_before": load,
        "hardware": describe_hardware(),
        "versions": library_versions(),
        "command": command_line("benchmarks/dataset_segmentation.py", arguments),
    }
    logging.info(format_figures(record))
    write_text(options.output, json.dumps(record, indent=1))
    grown = {
        form: figures["growth_mib"] for form, figures in forms.items() if figures["growth_mib"] > options.limit_mib
    }
    if grown:
        sys.exit(f"error: memory grew by {grown} MiB.")


if __name__ == "__main__":
    main()
