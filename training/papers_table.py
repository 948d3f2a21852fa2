"""The papers' table of a model: `accelerate launch training/papers_table.py MODEL --root REFER`. (Ours.)

It scores every split of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO below the REFER folder. Its output folder gets the predictions of
each split as Parquet parts (`predictions/`), an evaluation of each as `training/evaluation.py` writes it (`evaluations/`), and the
table beside published figures (`table.md`, `table.tex`). A split that was scored with the same weights, settings and data is not
scored again. Images that the model was trained on are not scored.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.configuration import DataSettings, load_settings
from training.evaluation import answer_sentences
from training.examples.mixtures import ReferSet
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.learning.checkpoints import checksum
from training.prediction import OneLineParser, count_argument, probability_argument
from training.scoring.comparison import comparison_table
from training.scoring.kept_predictions import prediction_of, read_split, score_predictions, write_split
from training.scoring.leakage import TrainingImages, image_names, training_images
from training.scoring.mask_selection import MaskSelection, selection_of
from training.scoring.paper_tables import Record, format_latex, format_markdown, in_order, papers_tables
from training.scoring.predictions import Prediction
from training.scoring.published import COLUMNS, Column
from training.scoring.reports import Threshold, calibration_of, evaluation_record, threshold_of
from training.sources.refer import find_refs
from training.support.commands import run_command
from training.support.environment import command_line
from training.support.files import partial_folder, replace_folder, sha256_of, write_text
from training.support.model_location import ModelLocation, locate_model
from training.support.processes import agree

logger = logging.getLogger(__name__)

PREDICTIONS, EVALUATIONS, MANIFEST, FOLDER = "predictions", "evaluations", "manifest.json", "papers-table"
EPILOG = """\
examples:
  accelerate launch training/papers_table.py outputs/refcoco --root refer
  python training/papers_table.py outputs/refcoco --root refer --zero_shot
  python training/papers_table.py --compare outputs/refcoco outputs/other
The same command goes on where it was stopped."""


@dataclass(frozen=True)
class Task:
    """One split to score.

    Attributes:
        column: The split.
        kept: The split's rows that are scored.
        num_rows: All rows of the split.
        left_out: Images that are not scored, since the model was trained on them.
        manifest: Everything that the scores depend on, as plain values.
        has_predictions: Whether predictions are there that were made with the same.
        has_scores: Whether they are scored.
    """

    column: Column
    kept: tuple[int, ...]
    num_rows: int
    left_out: int
    manifest: dict[str, Any]
    has_predictions: bool
    has_scores: bool


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = papers_table_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sources = [options.model, options.compare, options.predictions]
    if sum(source is not None for source in sources) != 1:
        parser.error("give a MODEL, or --compare A B, or --predictions DIR")
    if options.compare:
        compare(options)
        return
    if options.root is None:
        parser.error("--root is missing: the folder of the REFER sets")
    if options.expected_iou and options.threshold is not None:
        parser.error("--expected_iou gives each answer its own threshold; leave out --threshold")
    command = command_line("training/papers_table.py", arguments)
    if options.predictions:
        score_folder(options, command)
    else:
        make_table(options, command)


def make_table(options: argparse.Namespace, command: str) -> None:
    """Score a model on every split, and write its tables.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: Where the model, its settings or the data cannot be used.
    """
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while the first writes
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[waiting])
    if not accelerator.is_main_process:
        logger.setLevel(logging.WARNING)
    location = locate_model(options.model)
    output = Path(options.output) if options.output else location.home / FOLDER
    model, processor = load_whole(location.source)
    selection = selection_of(options, processor)

    def decide() -> tuple[TrainingImages | None, list[Task]]:
        trained = find_training_images(options, location)
        made_with = {
            "weights": checksum(model.state_dict()),
            "settings": _digest([_plain(model.config.to_dict()), _plain(processor.to_dict())]),
            "selection": asdict(selection),
            "precision": accelerator.mixed_precision,
        }
        return trained, plan(options, trained, made_with, output)

    trained, tasks = agree(accelerator, decide)
    model.to(accelerator.device)
    for rows, task in _with_rows(tasks, options):
        _score(task, rows, model, processor, selection, accelerator, options, trained, location.name, command, output)
    if accelerator.is_main_process:
        write_tables(read_records(output, [task.column for task in tasks]), output, command, options.zero_shot)


def find_training_images(options: argparse.Namespace, location: ModelLocation) -> TrainingImages | None:
    """The images that a model was trained on, by its settings; `None` where there are no settings.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: Where the settings or their data cannot be read, or --zero_shot needs them.
    """
    settings = Path(options.settings) if options.settings else location.settings
    if settings is None or not settings.is_file():
        if options.settings or options.zero_shot:
            missing = f"{settings} is not there" if settings else f"{location.name} brings no settings.yaml"
            raise ValueError(f"{missing}; name the settings of the model's training with --settings.")
        return None
    try:
        return training_images(load_settings(settings).data, options.root)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"The training data that {settings} names cannot be read, so it is not known which images to leave out: {error} "
            "Name settings with the right folders with --settings."
        ) from error


def plan(
    options: argparse.Namespace, trained: TrainingImages | None, made_with: Mapping[str, Any], output: Path
) -> list[Task]:
    """What there is to score, in the order of the papers.

    Args:
        options: Of the command.
        trained: The images that are not scored.
        made_with: The part of the manifests that all splits share.
        output: The folder of the results.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: Where there is no such split, or nothing to score.
    """
    found: dict[Column, ReferSet] = {}
    for dataset, split_by in dict.fromkeys((column.dataset, column.split_by) for column in COLUMNS):
        if find_refs(Path(options.root).expanduser(), dataset, split_by) is None:
            continue
        member = ReferSet(options.root, dataset, split_by, options.image_dir)
        found |= {Column(dataset, split_by, split): member for split in member.splits if split != "train"}
    if not found:
        raise FileNotFoundError(f"There is no split of RefCOCO, RefCOCO+, RefCOCOg or gRefCOCO below {options.root}.")
    for name in options.only or []:
        if name not in {column.key for column in found}:
            known = ", ".join(column.key for column in in_order(found))
            raise ValueError(f"--only {name}: there is no such split below {options.root}; there are {known}.")
    columns = [column for column in in_order(found) if not options.only or column.key in options.only]
    if options.zero_shot:
        columns = [column for column in columns if _is_zero_shot(column, trained)]
    tasks = []
    for column in columns:
        images = list(found[column].images(column.split))
        kept = tuple(row for row, image in enumerate(images) if trained is None or not trained.has(*image))
        left_out = {image_id for image_id, _ in images} - {images[row][0] for row in kept}
        if not kept:
            logger.info(f"{column.key} is left out: the model was trained on all of its {len(left_out)} images")
            continue
        manifest = {
            **made_with,
            "column": list(column),
            "data": data_checksum(options.root, column, images),
            "kept": None if len(kept) == len(images) else _digest(kept),
        }
        made = _read_json(output / PREDICTIONS / column.key / MANIFEST) == manifest
        scored = made and (_read_json(output / EVALUATIONS / f"{column.key}.json") or {}).get("manifest") == manifest
        tasks.append(Task(column, kept, len(images), len(left_out), manifest, made, scored))
    if not tasks:
        reason = "the model was trained on every set there" if not columns else "its training has every image there"
        raise ValueError(f"There is nothing to score below {options.root}: {reason}.")
    return tasks


def _score(
    task: Task,
    rows: datasets.Dataset,
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    selection: MaskSelection,
    accelerator: Accelerator,
    options: argparse.Namespace,
    trained: TrainingImages | None,
    name: str,
    command: str,
    output: Path,
) -> None:
    """Predict a split, keep the predictions, and write the evaluation of them."""
    folder, kept = output / PREDICTIONS / task.column.key, rows.select(task.kept)
    if not task.has_predictions:
        predictions = predict_rows(kept, task.kept, model, processor, selection, accelerator, options)
        if accelerator.is_main_process:
            keep(folder, predictions, task.num_rows, task.manifest)
    else:
        predictions = agree(accelerator, lambda: list(read_split(folder)))
    share = accelerator.process_index, accelerator.num_processes
    scores = gather_object(score_predictions(kept, predictions, task.kept, share))
    if not accelerator.is_main_process:
        return
    record = evaluation_record(
        model=name,
        data=data_of(options, task.column),
        split=task.column.split,
        rows=kept,
        scores=sorted(scores, key=lambda score: (score.row, score.sentence)),
        shuffled=None,
        threshold=threshold_of(selection, is_given=options.threshold is not None),
        selection=selection,
        calibration=calibration_of(processor),
        weights=task.manifest["weights"],
        command=command,
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
    )
    write_record(output, completed(record, task, rows, trained))


def predict_rows(
    rows: datasets.Dataset,
    numbers: Sequence[int],
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    selection: MaskSelection,
    accelerator: Accelerator,
    options: argparse.Namespace,
) -> list[Prediction]:
    """The predictions for all sentences of the rows, in their order; the same list in every process.

    Args:
        rows: The rows.
        numbers: What predictions call each of them.
        model: The model, on the accelerator's device.
        processor: Its processor.
        selection: How masks are selected.
        accelerator: Gives each process its share of the images.
        options: `batch_size`, `max_expressions` and `num_workers`.
    """
    sentences = rows["sentences"][:]
    names = [Path(image["path"] or "").name for image in rows["image"][:]]
    ask = {name: getattr(options, name) for name in ("batch_size", "max_expressions", "num_workers")}
    made = [
        prediction_of(names[row], numbers[row], sentence, sentences[row][sentence], predicted, result)
        for (row, sentence), _, predicted, result in answer_sentences(
            model, processor, rows, accelerator, selection, **ask
        )
    ]
    return sorted(gather_object(made), key=lambda prediction: (prediction.row, prediction.index))


def keep(folder: Path, predictions: Sequence[Prediction], num_rows: int, manifest: dict[str, Any]) -> None:
    """Write a split's predictions and what they were made with, in the place of others; whole or not at all."""
    partial = partial_folder(folder)
    write_split(partial, predictions, num_rows)
    write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
    replace_folder(folder)


def completed(record: Record, task: Task, rows: datasets.Dataset, trained: TrainingImages | None) -> Record:
    """An evaluation with what a table and a comparison need beside it.

    Args:
        record: The evaluation.
        task: What was scored.
        rows: All rows of the split.
        trained: The images that were left out.
    """
    sentences = sum(map(len, rows["sentences"][:]))
    return record | {
        "column": list(task.column),
        "manifest": task.manifest,
        "data_checksum": task.manifest["data"],
        "rows": None if len(task.kept) == task.num_rows else list(task.kept),
        "left_out": {
            "images": task.left_out,
            "objects": task.num_rows - len(task.kept),
            "expressions": sentences - record["counts"]["expressions"],
        },
        "trained_on": None if trained is None else sorted(trained.sets),
        "zero_shot": None if trained is None else _is_zero_shot(task.column, trained),
    }


def score_folder(options: argparse.Namespace, command: str) -> None:
    """Score the predictions of one split, whoever made them, and write a table of them.

    Raises:
        ValueError, OSError: Where the predictions are not those of the split that `--only` names.
    """
    known = {column.key: column for column in COLUMNS}
    if not options.only or len(options.only) != 1 or options.only[0] not in known:
        raise ValueError(f"--predictions needs --only with the split that they are about, one of {', '.join(known)}.")
    folder, column = Path(options.predictions), known[options.only[0]]
    data = data_of(options, column)
    (rows,) = load_splits(data, [column.split])
    scores = score_predictions(rows, read_split(folder))
    made_with = _read_json(folder / MANIFEST) or {}
    record = evaluation_record(
        model=folder.absolute().name,
        data=data,
        split=column.split,
        rows=rows,
        scores=scores,
        shuffled=None,
        threshold=Threshold(None, "that of the predictions"),
        selection=MaskSelection(),
        weights=made_with.get("weights"),
        command=command,
        processes=1,
    )
    images = zip(rows["image_id"], rows["image"], strict=True)
    manifest = {"column": list(column), "data": data_checksum(options.root, column, images)}
    record = completed(record, Task(column, tuple(range(len(rows))), len(rows), 0, manifest, True, True), rows, None)
    output = Path(options.output) if options.output else folder
    write_record(output, record)
    write_tables({column: record}, output, command, False)


def compare(options: argparse.Namespace) -> None:
    """Print, and with `--output` write, the comparison of two tables.

    Raises:
        ValueError, OSError: Where there are no two tables, or they are about other data.
    """
    table = comparison_table(*(read_records(find_results(folder)) for folder in options.compare))
    logger.info(table.markdown())
    if options.output:
        write_text(Path(options.output) / "comparison.md", table.markdown() + "\n")
        write_text(Path(options.output) / "comparison.tex", table.latex() + "\n")


def find_results(folder: str) -> Path:
    """The output folder of this command: the one given, or the one of the run or model given.

    Raises:
        FileNotFoundError: There is none.
    """
    places = [Path(folder), Path(folder) / FOLDER, Path(folder).absolute().parent / FOLDER]
    for place in places[: 3 if Path(folder).name == "model" else 2]:
        if (place / EVALUATIONS).is_dir():
            return place
    raise FileNotFoundError(f"{folder} holds no table: make it first, with papers_table.py {folder} --root REFER.")


def read_records(output: Path, columns: Sequence[Column] | None = None) -> dict[Column, Record]:
    """The evaluations in an output folder, of the columns (`None`: of all), in the order of the papers."""
    records = {}
    for path in sorted((output / EVALUATIONS).glob("*.json")):
        record = _read_json(path) or {}
        if "column" in record:
            records[Column(*record["column"])] = record
    return {column: records[column] for column in (in_order(records) if columns is None else columns)}


def write_record(output: Path, record: Record) -> None:
    """Write an evaluation, and say its score."""
    column = Column(*record["column"])
    write_text(output / EVALUATIONS / f"{column.key}.json", json.dumps(record, indent=1))
    logger.info(f"{column.key}: mIoU {100 * record['summary']['as written']['all']['mIoU']:.1f}")


def write_tables(records: Mapping[Column, Record], output: Path, command: str, zero_shot: bool) -> None:
    """Write the tables as Markdown and LaTeX, and print the former."""
    tables, name = papers_tables(records, zero_shot), "zero-shot" if zero_shot else "table"
    text = format_markdown(tables, records, command, zero_shot)
    write_text(output / f"{name}.md", text)
    write_text(output / f"{name}.tex", format_latex(tables, records, zero_shot))
    logger.info(text)
    logger.info(f"{output / name}.md and .tex; the evaluations in {output / EVALUATIONS} are for push.py --evaluation")


def data_of(options: argparse.Namespace, column: Column) -> DataSettings:
    """The data of a column: a set below the REFER folder, or a prepared folder."""
    if find_refs(Path(options.root).expanduser(), column.dataset, column.split_by) is None:
        return DataSettings(source="folder", root=options.root, image_dir=options.image_dir)
    return DataSettings(
        source="refer",
        root=options.root,
        image_dir=options.image_dir,
        dataset=column.dataset,
        split_by=column.split_by,
    )


def data_checksum(root: str, column: Column, images: Iterable[tuple[int, Mapping[str, Any]]]) -> str:
    """A checksum of all that a split's masks are compared with: its files of refs or rows, and its images.

    Args:
        root: The REFER folder, or a prepared one.
        column: The split.
        images: Image id and image of every row.
    """
    refs = find_refs(Path(root).expanduser(), column.dataset, column.split_by)
    prepared = Path(root).expanduser().glob(f"data/{column.split}-*")
    files = [refs, refs.with_name("instances.json")] if refs else sorted(prepared)
    names = {image_id: list(map(str, image_names(image_id, image))) for image_id, image in images}
    return _digest([list(map(sha256_of, files)), sorted(names.items())])


def _with_rows(tasks: Sequence[Task], options: argparse.Namespace) -> Iterator[tuple[datasets.Dataset, Task]]:
    """The tasks that are not done, each with all rows of its split. A set is read once for all its splits."""
    for task in tasks:
        if task.has_scores:
            logger.info(f"{task.column.key}: scored before")
    waiting = (task for task in tasks if not task.has_scores)
    for _, group in groupby(waiting, key=lambda task: task.column[:2]):
        group = list(group)
        rows = load_splits(data_of(options, group[0].column), [task.column.split for task in group])
        yield from zip(rows, group, strict=True)


def _is_zero_shot(column: Column, trained: TrainingImages | None) -> bool:
    return trained is not None and column.dataset not in trained.sets


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what tells only where and by which version they were saved."""
    return {name: value for name, value in settings.items() if name not in ("transformers_version", "_name_or_path")}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    """The content of a JSON file; `None` where there is none, or none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def papers_table_parser() -> OneLineParser:
    """The options of the command."""
    parser = OneLineParser(
        prog="papers_table.py",
        usage="accelerate launch training/papers_table.py MODEL --root REFER [options]",
        description="Score a model on all splits of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, as the papers' table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a run's folder, the model's own, or an id on the Hub")
    add("--root", metavar="REFER", help="folder of the REFER sets")
    add("--output", metavar="DIR", help=f"folder for the results (default: {FOLDER} in the run's folder)")
    add("--zero_shot", action="store_true", help="only sets that the model was not trained on")
    add("--only", nargs="+", metavar="SPLIT", help="these splits, such as refcoco-unc-val")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two models that have their tables")
    add("--predictions", metavar="DIR", help="score these predictions of the split of --only; no model is run")
    add("--settings", metavar="FILE", help="settings of the model's training (default: its settings.yaml)")
    add("--image_dir", metavar="DIR", help="folder of the images, if not below --root")
    masks = parser.add_argument_group("masks (default: as the processor does)")
    masks.add_argument("--threshold", type=probability_argument, metavar="P", help="probability at a mask's edge")
    masks.add_argument("--expected_iou", action="store_true", help="the expected-IoU threshold of each answer")
    masks.add_argument(
        "--largest_component", action="store_true", default=None, help="keep the largest connected component"
    )
    masks.add_argument(
        "--no_largest_component", action="store_false", dest="largest_component", help="keep all of a mask"
    )
    masks.add_argument("--tta", choices=("flip",), help="average with the answers for the flipped image")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--batch_size", type=count_argument, default=8, metavar="N", help="images at once (default: 8)")
    speed.add_argument(
        "--max_expressions", type=count_argument, default=64, metavar="N", help="phrases at once (default: 64)"
    )
    speed.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes that prepare batches")
    speed.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="precision of the forward pass")
    return parser


if __name__ == "__main__":
    run_command(main, also=(RuntimeError,))
