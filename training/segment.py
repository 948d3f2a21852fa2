# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["sera-segmentation[train] @ git+https://github.com/OWNER/sera-segmentation"]
# ///
"""Masks for the expressions about any number of images: `accelerate launch training/segment.py MODEL --data DATA --output DIR`.

The input is cut into parts by its rows. Each process takes parts that are missing, and writes each as one Parquet file, whole or
not at all. So the same command goes on after any interruption, on any number of processes. (Ours.)

`uv run segment.py …` runs this file alone: the comment at its top says what to install. Torch and what is built on it take seconds
to import, so that happens in the functions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from training.prediction import (
    OneLineParser,
    count_argument,
    expression_argument,
    load_pipeline,
    probability_argument,
)
from training.support.commands import run_command
from training.support.files import write_text
from training.support.processes import agree

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from modeling_sera import SeraForReferringSegmentation
    from processing_sera import SeraProcessor
    from training.examples.asked_batches import Batch, Question
    from training.scoring.predictions import Part, Prediction
    from training.sources.asked_images import AskedImages

logger = logging.getLogger(__name__)

MANIFEST, MASKS, OVERLAYS, PREVIEW = "manifest.json", "masks", "overlays", "preview.png"
REFRESH_S = 2.0  # how often the bar looks for the parts that other processes have written
PREVIEW_SIDE = 400  # pixels of an image on the sheet
EPILOG = """\
examples:
  accelerate launch training/segment.py MODEL --data photos/ --phrases "a person" "the road" --output masks/
  accelerate launch training/segment.py MODEL --data photos/phrases.csv --output masks/ --masks
  accelerate launch training/segment.py MODEL --data "shards/*.tar" --output masks/ --limit 1000
The same command goes on where it was stopped."""


@dataclass
class Timing:
    """Where this process's time goes, in seconds, and what came of it."""

    reading: float = 0.0
    model: float = 0.0
    masks: float = 0.0
    writing: float = 0.0
    images: int = 0
    expressions: int = 0
    errors: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to one of the four."""
        now = time.perf_counter()
        setattr(self, name, getattr(self, name) + now - self._since)
        self._since = now

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.reading + self.model + self.masks + self.writing

    def shares(self) -> dict[str, float]:
        """The share of each of the four, in [0, 1]."""
        return {name: getattr(self, name) / self.seconds for name in ("reading", "model", "masks", "writing")}

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())
        return (
            f"{self.images} images, {self.expressions} expressions ({self.errors} with an error) in {self.seconds:.1f} s: "
            f"{self.images / self.seconds:.2f} images/s. {shares}"
        )


@dataclass
class Segmenter:
    """A model that answers batches.

    Attributes:
        model: The model, on its device.
        processor: Its processor.
        threshold: Probability at the mask's edge; `None`: the processor's mask selection.
        max_expressions: Expressions that the model works on at once.
        timing: Is kept.
    """

    model: SeraForReferringSegmentation
    processor: SeraProcessor
    threshold: float | None
    max_expressions: int
    timing: Timing

    def answer(self, batch: Batch) -> Iterator[tuple[Question, Prediction, np.ndarray | None]]:
        """Every question of the batch with its prediction and its mask, bool (H, W); those with an error, and no mask, begin.

        Masks are of the images' own sizes, far larger than logits: they are made one at a time.
        """
        import torch

        from training.scoring.predictions import Prediction, describe_mask

        def prediction(question: Question, **known: Any) -> Prediction:
            return Prediction(question.key, batch.shard, question.row, question.index, question.expression, **known)

        for question in batch.questions:
            if question.error is not None:
                yield question, prediction(question, error=question.error), None
        for shape in batch.inputs:
            inputs = {name: value.to(self.model.device) for name, value in shape.inputs.items()}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.inference_mode():
                outputs = self.model(**inputs, max_expressions=self.max_expressions)
            wait_for(outputs.logits)
            self.timing.lap("model")
            answers = {name: outputs[name] for name in ("logits", "presence_logits") if outputs.get(name) is not None}
            for number, question in enumerate(shape.questions):
                one = slice(number, number + 1)
                (result,) = self.processor.post_process_referring_segmentation(
                    {name: values[one] for name, values in answers.items()},
                    {**shape.inputs, "image_index": shape.inputs["image_index"][one]},
                    self.threshold,
                )
                mask = result["mask"].cpu().numpy()
                known = {"score": result["score"], "no_target": result.get("no_target"), **describe_mask(mask)}
                yield question, prediction(question, **known), mask


def wait_for(values: Tensor) -> None:
    """Until the device has computed them."""
    import torch

    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)


class PartWriter:
    """Turns answers into predictions, and writes parts.

    Args:
        output: The folder of predictions.
        masks: Whether each mask is also a PNG file.
        overlays: Whether each image is also drawn with its masks, as a PNG file.
    """

    def __init__(self, output: Path, masks: bool, overlays: bool):
        self.output, self.masks, self.overlays = output, masks, overlays
        self.open: dict[tuple[int, int], list[Prediction]] = defaultdict(list)
        self.rows: dict[tuple[int, int], int] = defaultdict(int)  # input rows answered of each open part

    def add(self, batch: Batch, answers: Iterable[tuple[Question, Prediction, np.ndarray | None]]) -> list[Prediction]:
        """The predictions of a batch, kept until the part is written. PNG files are written at once, so before the part."""
        from training.scoring.overlay import overlay

        made: list[Prediction] = []

        def masks(group: Iterable[tuple[Question, Prediction, np.ndarray | None]]) -> Iterator[np.ndarray]:
            for question, prediction, mask in group:
                if self.masks and mask is not None:
                    path = self._png(MASKS, batch, question, f"-{question.index + 1}")
                    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
                    prediction = replace(prediction, mask_file=path.relative_to(self.output).as_posix())
                made.append(prediction)
                if mask is not None:
                    yield mask

        for image, group in groupby(answers, key=lambda answer: answer[0].image):
            if self.overlays and image is not None:
                first = next(question for question in batch.questions if question.image == image)
                overlay(batch.images[image], masks(group)).save(self._png(OVERLAYS, batch, first))
            else:
                for _ in masks(group):
                    pass
        made.sort(key=lambda prediction: (prediction.row, prediction.index))
        self.open[batch.shard, batch.first] += made
        self.rows[batch.shard, batch.first] += batch.rows
        return made

    def finish(self, batch: Batch) -> None:
        """Write the part that the batch is the last of."""
        from training.scoring.predictions import Part, write_part

        key = (batch.shard, batch.first)
        write_part(self.output, Part(*key, batch.stop), self.open[key])
        del self.open[key], self.rows[key]

    def _png(self, kind: str, batch: Batch, question: Question, suffix: str = "") -> Path:
        """A file of its own for each question; a folder for each part, since file systems are slow with large ones."""
        folder = self.output / kind / f"{batch.shard:05d}-{batch.first:09d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(question.key).stem)[-80:]
        return folder / f"{question.row:09d}-{name}{suffix}.png"


class Bar:
    """The share of all rows that all processes have done, as far as the main process sees it."""

    def __init__(self, accelerator: Accelerator, output: Path, total: int | None, done: list[Part]):
        from accelerate.utils import tqdm

        self.output, self.written, self._looked = output, _rows_of(done), time.monotonic()
        self.bar = tqdm(
            total=total, initial=self.written, unit=" images", desc="segmenting", smoothing=0.05, mininterval=1
        )

    def update(self, under_way: int, look: bool = False) -> None:
        """Move the bar; `under_way`: rows answered in parts that are not written yet."""
        from training.scoring.predictions import list_parts

        if look or time.monotonic() > self._looked + REFRESH_S:
            self.written, self._looked = _rows_of(list_parts(self.output)), time.monotonic()
        self.bar.update(max(self.written + under_way - self.bar.n, 0))

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    segment(segment_parser().parse_args(arguments))


def segment(options: argparse.Namespace) -> Timing:
    """Segment what the options name; returns where this process's time went.

    Raises:
        ValueError: Where an option, the model or the data cannot be used, or `--output` holds the results of other options.
        OSError: Where something is not found.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from training.learning.checkpoints import checksum
    from training.scoring.predictions import list_parts
    from training.sources.asked_images import Columns, open_asked_images

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # the model's own type is what it computes in, whatever mixed precision the launcher is set to
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))]
    )
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder.")
    asked = open_asked_images(
        options.data,
        expressions=options.phrases,
        columns=Columns(options.image_column, options.text_column, options.key_column),
        split=options.split,
        subset=options.subset,
        limit=options.limit if options.preview is None else min(options.preview, options.limit or options.preview),
    )
    dtype = options.dtype or _default_dtype(accelerator.device)
    pipe = load_pipeline(options.model, device=str(accelerator.device), dtype=dtype)
    segmenter = Segmenter(pipe.model, pipe.processor, options.threshold, options.max_expressions, Timing())
    if options.preview is not None:
        if accelerator.is_main_process:
            _preview(segmenter, asked, output, options.batch_size or 1)
        return segmenter.timing

    def done_before() -> list[Part]:
        manifest = {
            "data": asked.identity,
            "phrases": options.phrases,
            "columns": [options.image_column, options.text_column, options.key_column],
            "limit": options.limit,
            "part_size": options.part_size,
            "masks": options.masks,
            "overlays": options.overlays,
            "threshold": pipe.processor.mask_threshold if options.threshold is None else options.threshold,
            "keep_largest_component": pipe.processor.keep_largest_component,
            "no_target_threshold": pipe.processor.no_target_threshold,
            "score_calibration": pipe.processor.score_calibration,
            "dtype": dtype,
            "images": pipe.processor.image_processor.to_dict(),
            "weights": checksum(pipe.model.state_dict()),
        }
        _check_manifest(output, manifest)
        return list_parts(output)

    done = agree(accelerator, done_before)
    try:
        _work(segmenter, asked, output, done, accelerator, options)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device's memory does not suffice ({str(error).splitlines()[0]}); lower --batch_size or --max_expressions: the "
            "same command then goes on."
        ) from error
    return segmenter.timing


def _work(
    segmenter: Segmenter,
    asked: AskedImages,
    output: Path,
    done: list[Part],
    accelerator: Accelerator,
    options: argparse.Namespace,
) -> None:
    """This process's share of the parts that are missing; the main process then waits for the others'."""
    from training.examples.asked_batches import whole_shards
    from training.scoring.predictions import list_parts

    timing, is_main = segmenter.timing, accelerator.is_main_process
    timing.begin()
    on_cpu = accelerator.device.type == "cpu"
    batches = _batches(
        segmenter,
        asked,
        done,
        part_size=options.part_size,
        batch_size=options.batch_size or (4 if on_cpu else 16),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        keep_images=options.overlays,
        workers=_default_workers(accelerator) if options.num_workers is None else options.num_workers,
    )
    writer = PartWriter(output, options.masks, options.overlays)
    bar = Bar(accelerator, output, asked.count(), done) if is_main else None
    timing.lap("reading")
    for batch in batches:
        timing.lap("reading")
        predictions = writer.add(batch, segmenter.answer(batch))
        timing.images += batch.rows
        timing.expressions += len(predictions)
        timing.errors += sum(prediction.error is not None for prediction in predictions)
        timing.lap("masks")
        if batch.stop is not None:
            writer.finish(batch)
        if bar:
            bar.update(sum(writer.rows.values()))
        timing.lap("writing")
    timing.lap("reading")
    if not bar:
        return
    # No collective operation: it would end the run if another process works longer than its timeout. What lies in the folder tells
    # all; the launcher ends this process if another is lost.
    while len(whole_shards(list_parts(output), options.part_size)) < asked.shards:
        bar.update(0, look=True)
        time.sleep(0.5)
    bar.update(0, look=True)
    bar.close()
    for partial in output.glob("parts/.*.partial"):  # of killed processes
        partial.unlink(missing_ok=True)
    logger.info(f"{'This process: ' if accelerator.num_processes > 1 else ''}{timing}")
    logger.info(f"{output} is complete: {_rows_of(list_parts(output))} images")


def _batches(
    segmenter: Segmenter, asked: AskedImages, done: list[Part], *, workers: int = 0, **share: Any
) -> Iterator[Batch]:
    from torch.utils.data import DataLoader

    from training.examples.asked_batches import AskedBatches
    from training.support.workers import end_with_parent

    batches = AskedBatches(asked, segmenter.processor, done, **share)
    return iter(
        DataLoader(batches, batch_size=None, collate_fn=_as_it_is, num_workers=workers, worker_init_fn=end_with_parent)
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _preview(segmenter: Segmenter, asked: AskedImages, output: Path, batch_size: int) -> None:
    """Draw the sheet of all rows of the input. Each phrase has a panel of its own, unless an image has too many of them."""
    from training.scoring.captioned_sheet import LINES
    from training.scoring.overlay import overlay
    from training.scoring.prediction_sheet import draw_predictions

    examples: list[tuple[Image.Image | None, Sequence[Prediction]]] = []
    images = 0
    # one part, so that rows come in their order
    for batch in _batches(segmenter, asked, [], part_size=sys.maxsize, batch_size=batch_size, keep_images=True):
        answers = sorted(segmenter.answer(batch), key=lambda answer: (answer[0].row, answer[0].index))
        for _, group in groupby(answers, key=lambda answer: answer[0].row):
            group, images = list(group), images + 1
            for panel in [[answer] for answer in group] if len(group) <= LINES else [group]:
                questions, predictions, masks = zip(*panel, strict=True)
                found = (batch.images[question.image] for question in questions if question.image is not None)
                image = next(found, None)
                if image is not None:
                    image = overlay(image, (mask for mask in masks if mask is not None))
                    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
                examples.append((image, predictions))
    if not examples:
        raise ValueError("The data has no rows, so there is nothing to preview.")
    draw_predictions(examples, output / PREVIEW)
    logger.info(f"{output / PREVIEW}: {images} images; nothing else was written")


def _check_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Keep what these predictions are made with; `ValueError` where others lie in the folder."""
    path = output / MANIFEST
    if not path.is_file():
        if (output / "parts").exists():
            raise ValueError(f"{output} holds parts, but no {MANIFEST}: name another folder with --output.")
        write_text(path, json.dumps(manifest | {"package": _version()}, indent=1, ensure_ascii=False))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in manifest.items():
        if before.get(name) != value:
            here, there = (json.dumps(each, ensure_ascii=False)[:200] for each in (value, before.get(name)))
            raise ValueError(
                f"{output} was begun with other options: {name} was {there}, it is {here}. Give what it was begun with, or name "
                "another folder with --output."
            )


def _version() -> str:
    try:
        return importlib.metadata.version("sera-segmentation")
    except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
        return "unknown"


def _rows_of(parts: list[Part]) -> int:
    return sum(part.stop - part.first for part in parts)


def _default_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU that computes in it, else float32: processors without units for it are many times slower in it."""
    import torch

    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast or device.type == "xpu" else "float32"


def _default_workers(accelerator: Accelerator) -> int:
    """None on a CPU, where they would take the model's cores; beside a GPU this process's share of the cores, 8 at most."""
    if accelerator.device.type == "cpu":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(1, min(8, usable // local - 1))


def segment_parser() -> OneLineParser:
    """The options of the command."""
    parser = OneLineParser(
        prog="segment.py",
        usage="accelerate launch training/segment.py MODEL --data DATA --output DIR [options]",
        description="Masks for the phrases about any number of images, as Parquet files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of a SERA")
    add("--data", required=True, metavar="DATA", help="folder, table, files or Hub id")
    add("--output", required=True, metavar="DIR", help="folder for the results")
    add("--phrases", nargs="+", type=expression_argument, metavar="PHRASE", help="ask these of every image")
    add("--limit", type=count_argument, metavar="N", help="the first N images only")
    add("--preview", type=count_argument, metavar="N", help=f"draw the first N images as {PREVIEW}, and stop")
    add("--masks", action="store_true", help="also write each mask as a PNG file")
    add("--overlays", action="store_true", help="also write each image with its masks")
    add(
        "--threshold",
        type=probability_argument,
        metavar="P",
        help="probability at a mask's edge (default: the model's own)",
    )
    data = parser.add_argument_group("where the data has several of them, or other names")
    data.add_argument("--split", metavar="NAME", help="split")
    data.add_argument("--subset", metavar="NAME", help="configuration of a data set on the Hub")
    data.add_argument("--image_column", metavar="NAME", help="column of images, or of their paths")
    data.add_argument("--text_column", metavar="NAME", help="column of phrases, one or a list in a row")
    data.add_argument("--key_column", metavar="NAME", help="column of what images are called")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--batch_size", type=count_argument, metavar="N", help="images at once (default: 16, on a CPU 4)"
    )
    speed.add_argument(
        "--max_expressions", type=count_argument, default=32, metavar="N", help="phrases at once (default: 32)"
    )
    speed.add_argument("--num_workers", type=int, metavar="N", help="processes that read images, for each process")
    speed.add_argument(
        "--part_size", type=count_argument, default=256, metavar="N", help="images in a file (default: 256)"
    )
    speed.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        metavar="TYPE",
        help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
