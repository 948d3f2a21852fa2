"""Score a model on every sentence of a split, at every image's own size.

As a command: `python training/evaluation.py RUN --split test`. It prints a table and writes `evaluation-SPLIT.json`. Beside it lie
the same figures as Markdown, a PNG with curves and the worst and best cases, and the `model-index` of a model card (YAML).
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from torch.utils.data import DataLoader, Dataset, Subset

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from processing_sera.mask_selection_sera import calibrated
from training.configuration import DataSettings, default_data
from training.examples.batches import Collator, EvaluationExamples, shuffled_sentences
from training.examples.shapes import ShapeBatches
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.learning.checkpoints import checksum
from training.scoring.calibration import IDENTITY, fit_calibration
from training.scoring.figures import draw_report, draw_sheet
from training.scoring.kept_predictions import score_answer
from training.scoring.mask_selection import PROCESSORS_OWN, MaskSelection, selection_of
from training.scoring.metric import SentenceScore, format_table
from training.scoring.reports import (
    Threshold,
    calibration_of,
    evaluation_record,
    format_report,
    model_index,
    selection_note,
    threshold_of,
)
from training.support.commands import run_command
from training.support.environment import command_line
from training.support.files import write_text
from training.support.model_location import locate_model
from training.support.workers import end_with_parent

logger = logging.getLogger(__name__)

# (row, sentence) in the split, the true mask, and the processor's results for each mask selection, made one at a time
Answer = tuple[tuple[int, int], np.ndarray, Iterator[dict]]
CALIBRATION_SPLITS = ("val", "validation")
CALIBRATION_THRESHOLDS = tuple(i / 20 for i in range(1, 20))


def score_sentences(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    accelerator: Accelerator,
    selection: MaskSelection = PROCESSORS_OWN,
    *,
    batch_size: int = 8,
    max_expressions: int = 64,
    shuffle: bool = False,
    num_workers: int = 0,
) -> list[SentenceScore]:
    """Score the model's mask for every sentence of every row. Each sentence is scored once, for any number of processes.

    Args:
        model: The model, on the accelerator's device.
        processor: Its processor.
        rows: A split (one referred object per row).
        accelerator: Gives each process its share of the images.
        selection: How masks are selected.
        batch_size: Images per batch.
        max_expressions: Number of expressions that are computed at once. It bounds the memory.
        shuffle: Give each object the sentences of another image. A model that ignores the text keeps its score.
        num_workers: Processes that prepare batches.

    Returns:
        One score per sentence, in the order of the rows; the same list in every process.
    """
    kinds = rows["sentence_kinds"]
    scores = []
    options = {"batch_size": batch_size, "max_expressions": max_expressions, "num_workers": num_workers}
    asked = shuffled_sentences(rows) if shuffle else None
    for (row, sentence), truth, predicted, result in answer_sentences(
        model, processor, rows, accelerator, selection, asked, **options
    ):
        scores.append(score_answer(row, sentence, kinds[row][sentence], predicted, truth, result))
    return sorted(gather_object(scores), key=lambda score: (score.row, score.sentence))


def answer_sentences(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    accelerator: Accelerator,
    selection: MaskSelection = PROCESSORS_OWN,
    asked: list[list[str]] | None = None,
    **options: int,
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray, dict]]:
    """This process's share of the answers, image by image. Arguments as in `score_sentences`.

    Args:
        asked: Sentences to ask instead of each row's own; the same number for each row.

    Yields:
        (row, sentence) in the split; the true and the predicted mask, bool (H, W); and the processor's result, with "score".
    """
    for source, truth, (result,) in _answers(model, processor, rows, accelerator, [selection], asked, **options):
        yield source, truth, result["mask"].cpu().numpy(), result


def threshold_curve(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    accelerator: Accelerator,
    selection: MaskSelection = PROCESSORS_OWN,
    **options: int,
) -> dict[float, float]:
    """mIoU of a split at every threshold of CALIBRATION_THRESHOLDS, from one pass over it. Arguments as in `score_sentences`.

    The selection's own threshold is not used. A mask that the presence head leaves empty is empty at every threshold.
    """
    found = []
    selections = [replace(selection, threshold=threshold) for threshold in CALIBRATION_THRESHOLDS]
    for source, truth, results in _answers(model, processor, rows, accelerator, selections, **options):
        ious = []
        for result in results:
            mask = result["mask"].cpu().numpy()
            union = np.count_nonzero(mask | truth)
            ious.append(np.count_nonzero(mask & truth) / union if union else 1.0)
        found.append((source, ious))
    table = np.array([ious for _, ious in sorted(gather_object(found))])
    return {
        threshold: math.fsum(column) / len(column)
        for threshold, column in zip(CALIBRATION_THRESHOLDS, table.T, strict=True)
    }


def best_threshold(curve: dict[float, float]) -> float:
    """The threshold with the highest mIoU. Of equal ones, the one nearest to 0.5."""
    return min(curve, key=lambda threshold: (-curve[threshold], abs(threshold - 0.5)))


def _answers(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    accelerator: Accelerator,
    selections: list[MaskSelection],
    asked: list[list[str]] | None = None,
    **options: int,
) -> Iterator[Answer]:
    """The answers to this process's sentences. The selections differ in what happens after the model."""
    examples = EvaluationExamples(rows, asked)
    numbers = range(accelerator.process_index, len(examples), accelerator.num_processes)
    mine = Subset(examples, numbers)
    # a batch has images of one shape: without padding, an image's answer does not depend on the others
    shapes = [processor.image_processor.frame_of([examples.sizes[number]]) for number in numbers]
    was_training = model.training
    model.eval()
    try:
        yield from _ask(mine, shapes, model, processor, accelerator, selections, **options)
    finally:
        model.train(was_training)


def _ask(
    examples: Dataset,
    shapes: list[tuple[int, int]],
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    accelerator: Accelerator,
    selections: list[MaskSelection],
    *,
    batch_size: int,
    max_expressions: int,
    num_workers: int = 0,
) -> Iterator[Answer]:
    """The model's answers to all sentences of the examples."""
    collator = Collator(processor, with_labels=False)
    batches = ShapeBatches(lambda: shapes, batch_size, shuffle=False)
    workers = {"num_workers": num_workers, "worker_init_fn": end_with_parent}
    loader = DataLoader(examples, batch_sampler=batches, collate_fn=collator, **workers)
    for inputs, batch in tqdm(loader, desc="evaluating", leave=False):
        asked = [
            (source, mask) for example in batch for source, mask in zip(example.sources, example.masks, strict=True)
        ]
        text = [sentence for example in batch for sentence in example.text]
        inputs = inputs.to(accelerator.device)
        one_each = torch.arange(len(inputs["input_ids"]), device=accelerator.device)  # what the processor leaves out
        inputs.setdefault("image_index", one_each)
        with torch.inference_mode(), accelerator.autocast():
            answers, _ = selections[0].ask(model, processor, inputs, text, max_expressions=max_expressions)
        # masks have the size of the image and are far larger than logits, so they are made one at a time
        for n, (source, truth) in enumerate(asked):
            one = slice(n, n + 1)
            own = {name: values[one] for name, values in answers.items()}
            about = {**inputs, "image_index": inputs["image_index"][one]}
            yield source, truth, (selection.results(processor, own, about)[0] for selection in selections)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = evaluation_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.calibrate is not None and options.calibrate not in CALIBRATION_SPLITS:
        parser.error(
            f"--calibrate {options.calibrate}: choose a threshold on a validation split only, "
            f"{' or '.join(CALIBRATION_SPLITS)}."
        )
    if options.calibrate is not None and options.threshold is not None:
        parser.error("--threshold and --calibrate exclude each other; give one of them.")
    if options.expected_iou and (options.calibrate or options.threshold is not None):
        parser.error("--expected_iou gives each answer its own threshold; leave out --threshold and --calibrate.")
    location = locate_model(options.model)
    processor_file = Path(location.source, "processor_config.json")
    if options.fit_scores:
        _check_fit(parser, options, processor_file)
    settings_file = Path(options.settings) if options.settings else location.settings
    if settings_file is not None and settings_file.is_file():
        default_data(parser, settings_file)
        options = parser.parse_args(arguments)
    elif options.settings or options.data == parser.get_defaults().data:
        missing = f"{settings_file} is not there" if settings_file else "A model on the Hub brings no settings.yaml"
        parser.error(f"{missing}; name the run's settings with --settings, or the data with --data.")
    data: DataSettings = parser.instantiate(options).data

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model, processor = load_whole(location.source)
    model.to(accelerator.device)
    rows, *calibration_rows = load_splits(data, [options.split, *([options.calibrate] if options.calibrate else [])])
    output = Path(options.output) if options.output else location.home / f"evaluation-{options.split}.json"
    if accelerator.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)  # if this fails, it must fail before the work

    ask = {"batch_size": options.batch_size, "max_expressions": options.max_expressions}
    ask |= {"num_workers": options.num_workers}
    selection = selection_of(options, processor)
    threshold = threshold_of(selection, is_given=options.threshold is not None)
    if options.calibrate:
        curve = threshold_curve(model, processor, calibration_rows[0], accelerator, selection, **ask)
        here = ", the split scored here," if options.calibrate == options.split else ""
        threshold = Threshold(best_threshold(curve), f"chosen on {options.calibrate}{here} for the highest mIoU", curve)
        selection = replace(selection, threshold=threshold.value)
    calibration = calibration_of(processor)
    if options.fit_scores:
        processor.score_calibration = IDENTITY
    scores = score_sentences(model, processor, rows, accelerator, selection, **ask)
    if options.fit_scores:
        scores = _fit_scores(processor, scores)
        calibration = "estimates of the IoU, fitted on this split"
    shuffled = score_sentences(model, processor, rows, accelerator, selection, shuffle=True, **ask)
    if not accelerator.is_main_process:
        return

    record = evaluation_record(
        model=location.name,
        data=data,
        split=options.split,
        rows=rows,
        scores=scores,
        shuffled=shuffled,
        threshold=threshold,
        selection=selection,
        calibration=calibration,
        weights=checksum(model.state_dict()),
        command=command_line("training/evaluation.py", arguments),
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
    )
    logger.info(f"{options.split}. {selection_note(record)}")
    logger.info(format_table(record["summary"]))
    write_text(output, json.dumps(record, indent=1))
    write_text(output.with_suffix(".md"), format_report(record))
    write_text(output.with_suffix(".yaml"), model_index(record))
    draw_report(model, processor, rows, scores, shuffled, record, output.with_suffix(".png"), selection)
    if options.sheet:
        draw_sheet(model, processor, rows, scores, Path(options.sheet), selection=selection)
    logger.info(f"{output} and, beside it, .md, .png and .yaml (model-index)")
    if options.fit_scores:
        settings = json.loads(processor_file.read_text(encoding="utf-8")) | {
            "mask_threshold": selection.threshold,
            "keep_largest_component": selection.keep_largest_component,
            "score_calibration": processor.score_calibration,
        }
        write_text(processor_file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        logger.info(f"{processor_file.name} of {location.name} has this mask selection and the fitted scores now")


def _check_fit(parser: ArgumentParser, options: Namespace, processor_file: Path) -> None:
    """Refuse what --fit_scores cannot be used with."""
    if options.split.startswith("test"):
        parser.error(f"--fit_scores --split {options.split}: scores are not fitted on a test split.")
    if options.tta:
        parser.error("--fit_scores fits the scores of one pass; leave out --tta.")
    if not processor_file.is_file():
        parser.error(f"--fit_scores writes into the model's folder, and {processor_file} is not there.")


def _fit_scores(processor: SeraProcessor, scores: list[SentenceScore]) -> list[SentenceScore]:
    """Give the processor a calibration of its raw scores. Masks that are empty because of absence have a score of their own.

    Args:
        processor: Its calibration is replaced.
        scores: With raw scores.

    Returns:
        The same with calibrated scores.
    """
    is_absent = [(score.no_target or 0.0) > processor.no_target_threshold for score in scores]
    fitted = [score for score, absent in zip(scores, is_absent, strict=True) if not absent]
    knots = fit_calibration([score.score for score in fitted], [score.iou for score in fitted])
    processor.score_calibration = knots
    return [
        score if absent else replace(score, score=calibrated(score.score, knots))
        for score, absent in zip(scores, is_absent, strict=True)
    ]


def evaluation_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(description="Score a saved SERA on every sentence of a split.")
    parser.add_argument("model", type=str, help="a run's folder, the model's own, or an id on the Hub")
    parser.add_argument("--split", type=str, default="test", help="split to score")
    parser.add_argument(
        "--settings",
        type=str | None,
        default=None,
        help="settings of a run, which name its data (default: the model's settings.yaml); options --data.… override them",
    )
    parser.add_class_arguments(DataSettings, "data")
    parser.add_argument("--batch_size", type=PositiveInt, default=8, help="images per batch")
    parser.add_argument(
        "--max_expressions", type=PositiveInt, default=64, help="expressions computed at once; bounds the memory"
    )
    parser.add_argument("--num_workers", type=NonNegativeInt, default=0, help="processes that prepare batches")
    parser.add_argument(
        "--mixed_precision",
        type=Literal["no", "bf16", "fp16"] | None,
        default=None,
        help="precision of the forward pass (default: the launcher's, else the precision of the weights)",
    )
    parser.add_argument(
        "--threshold",
        type=OpenUnitInterval | None,
        default=None,
        help="probability above which a pixel is in the mask (default: the processor's mask selection)",
    )
    parser.add_argument(
        "--calibrate",
        type=str | None,
        default=None,
        metavar="val",
        help="choose the threshold with the highest mIoU on this validation split",
    )
    parser.add_argument(
        "--expected_iou",
        action="store_true",
        help="use the expected-IoU threshold of each answer instead of one threshold for all",
    )
    parser.add_argument(
        "--tta",
        type=Literal["flip"] | None,
        default=None,
        help="test-time augmentation: average with the answers for the horizontally flipped image (English; twice the time)",
    )
    parser.add_argument(
        "--largest_component",
        action=ActionYesNo,
        default=None,
        help="keep the connected component of each mask with the largest sum of probabilities (default: as the processor does)",
    )
    parser.add_argument(
        "--fit_scores",
        action="store_true",
        help="fit the scores to the IoU on this split, and make them and the mask selection used here the model's own, in its "
        "processor_config.json",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="JSON file; the other files get its name (default: evaluation-SPLIT.json in the folder of the run)",
    )
    parser.add_argument("--sheet", type=str | None, default=None, help="also draw a sheet of examples to this PNG file")
    return parser


if __name__ == "__main__":
    run_command(main, also=(RuntimeError,))
