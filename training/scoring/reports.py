"""The files of an evaluation: the record (JSON), its tables (Markdown) and the model card's `model-index` (YAML)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import EvalResult, ModelCardData

from processing_sera import SeraProcessor
from processing_sera.mask_selection_sera import EXPECTED_IOU
from training.configuration import DataSettings
from training.scoring.boundary import TOLERANCE
from training.scoring.calibration import BINS, GOOD_IOU, score_quality
from training.scoring.intervals import LEVEL, RESAMPLES, bootstrap_intervals
from training.scoring.mask_selection import MaskSelection
from training.scoring.metric import SentenceScore, by_kind, format_table, format_value, score_terms, summarize
from training.scoring.slices import slice_scores
from training.sources.published_counts import is_part
from training.support.environment import counted, describe_hardware, library_versions, without_folders

SET_NAMES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg", "grefcoco": "gRefCOCO"}
SLICE_COLUMNS = ("mIoU", "oIoU", "Pr@0.5", "boundary_F")
FLIPPED = (
    " Test-time augmentation: each answer is the mean of those for the image and for the horizontally flipped image."
)
OWN_THRESHOLDS = " Each answer has its own expected-IoU threshold."
LARGEST_COMPONENT = " The largest connected component of each mask is kept."
# the fields of a record that say how masks were selected
SELECTION_FIELDS = ("threshold", "tta", "expected_iou", "largest_component")


@dataclass
class Threshold:
    """The probability above which a pixel is in the mask.

    Attributes:
        value: In (0, 1). `None` if each answer has its own threshold.
        source: How it was chosen.
        curve: The mIoU at each candidate, if it was chosen among candidates.
    """

    value: float | None
    source: str
    curve: dict[float, float] | None = None


def threshold_of(selection: MaskSelection, *, is_given: bool) -> Threshold:
    """The threshold of a completed selection; `is_given`: whether an option named it."""
    if selection.threshold == EXPECTED_IOU:
        return Threshold(None, "each answer's own")
    return Threshold(selection.threshold, "given" if is_given else "the processor's")


def calibration_of(processor: SeraProcessor) -> str | None:
    """Where the calibration of a processor's scores is from, for `evaluation_record`; `None` without one."""
    return None if processor.score_calibration is None else "the processor's estimates of the IoU"


def evaluation_record(
    *,
    model: str,
    data: DataSettings,
    split: str,
    rows: datasets.Dataset,
    scores: list[SentenceScore],
    shuffled: list[SentenceScore] | None,
    threshold: Threshold,
    selection: MaskSelection,
    calibration: str | None = None,
    weights: str | None = None,
    command: str,
    processes: int,
    precision: str = "no",
) -> dict[str, Any]:
    """The results of an evaluation and how it was done, as plain values. Metrics and intervals are shares in [0, 1].

    Args:
        model: The model's name.
        data: The settings of the split's data.
        split: Name of the split.
        rows: The split.
        scores: The score of every sentence.
        shuffled: The scores with each object given the sentences of another. `None`: that was not measured.
        threshold: The threshold of both.
        selection: How masks were selected, without settings that are `None`.
        calibration: Where the calibration of the scores is from. `None`: they are mean probabilities.
        weights: Checksum of the model's weights. Models of the same name may differ.
        command: The command of the evaluation.
        processes: Number of processes that shared the work.
        precision: Precision of the forward pass. "no": the precision of the weights.
    """
    images = rows["image_id"][:]

    def intervals(group: list[SentenceScore]) -> dict[str, tuple[float, float]]:
        shown = [images[score.row] for score in group]
        if len(set(shown)) < 2:
            return {}  # one image does not tell how images differ
        return bootstrap_intervals(score_terms(group), shown)

    quality = {}
    if all(score.score is not None for score in scores):  # predictions of others may be without
        shown = [images[score.row] for score in scores]
        figures = score_quality([score.score for score in scores], [score.iou for score in scores], shown)
        quality = {"score_quality": figures | {"calibration": calibration}}
    return {
        "model": model,
        "weights": weights,
        "split": split,
        "data": {name: without_folders(value) for name, value in asdict(data).items() if value is not None},
        "counts": {
            "images": len(set(images)),
            "objects": len(rows),
            "expressions": len(scores),
            "without_target": sum(score.truth == 0 for score in scores),
        },
        "threshold": {
            "value": threshold.value,
            "source": threshold.source,
            "candidates": None if threshold.curve is None else {f"{k:g}": v for k, v in threshold.curve.items()},
        },
        "tta": "flip" if selection.flip else None,
        "expected_iou": selection.threshold == EXPECTED_IOU,
        "largest_component": selection.keep_largest_component,
        "predicts_presence": any(score.no_target is not None for score in scores),
        "summary": {"as written": summarize(scores)} | ({} if shuffled is None else {"shuffled": summarize(shuffled)}),
        "intervals": {name: intervals(group) for name, group in by_kind(scores).items()},
        "slices": {
            dimension: {
                label: summarize(group)["all"] | {"intervals": intervals(group)} for label, group in groups.items()
            }
            for dimension, groups in slice_scores(rows, scores).items()
        },
        **quality,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "unit": "image", "seed": 0},
        "boundary_tolerance": TOLERANCE,
        "command": command,
        "processes": processes,
        "precision": precision,
        "hardware": describe_hardware(),
        "versions": library_versions(),
        "image_ids": list(images),  # per row
        "scores": [asdict(score) for score in scores],
    }


def format_report(record: dict[str, Any]) -> str:
    """An [`evaluation_record`] as Markdown: how it was scored, the metrics with their intervals, and the slices."""
    counts, bootstrap = record["counts"], record["bootstrap"]
    hardware = record["hardware"]
    lines = [
        f"# {record['model']} on {data_name(record)}, split {record['split']}",
        "",
        f"{counts['expressions']} expressions about {counts['objects']} objects ({counts['without_target']} expressions without a "
        f"target) in {counts['images']} images. Every mask is compared at the size of its image. "
        f"{selection_note(record)} All values are percentages. In brackets: "
        f"{bootstrap['level']:.0%} bootstrap intervals from {bootstrap['resamples']} resamples of images.",
        "",
        "mIoU is the mean over expressions. oIoU is total intersection / total union. Pr@X is the share of expressions with "
        "IoU > X. boundary_F is the mean boundary F-score within "
        f"{record['boundary_tolerance']:g} of the image's diagonal."
        + (" Shuffled: each object was given the sentences of another." if "shuffled" in record["summary"] else ""),
        "",
        format_table(record["summary"], record["intervals"]),
        "",
        *([scores_note(record["score_quality"]), ""] if "score_quality" in record else []),  # older records lack it
        "| | | expressions | " + " | ".join(SLICE_COLUMNS) + " |",
        "|---|---|--:|" + "--:|" * len(SLICE_COLUMNS),
    ]
    for dimension, groups in record["slices"].items():
        for label, group in groups.items():
            cells = [format_value(group[column], group["intervals"].get(column)) for column in SLICE_COLUMNS]
            lines.append(f"| {dimension} | {label} | {group['num_expressions']} | " + " | ".join(cells) + " |")
    devices = ", ".join(hardware["gpus"]) or "no GPU"
    lines += ["", f"`{record['command']}`", ""]
    cores, processes = counted(hardware["cores"], "core"), counted(record["processes"], "process")
    precision = record.get("precision", "no")  # older records lack it
    arithmetic = "" if precision == "no" else f", forward pass in {precision}"
    lines += [f"{hardware['processor']}, {cores}, {devices}; {processes}{arithmetic}. "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + "."
    return "\n".join(lines) + "\n"


def model_index(record: dict[str, Any]) -> str:
    """The `model-index` of a model card: every metric over all expressions, in percent, with threshold and interval."""
    data, metrics, intervals = record["data"], record["summary"]["as written"]["all"], record["intervals"]["all"]
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Referring image segmentation",
            dataset_type=data["dataset"] if data["source"] == "refer" else data_name(record).replace(" ", "-"),
            dataset_name=data_name(record),
            # the Hub's libraries join results of equal type, configuration and split; RefCOCOg has two splits called val
            dataset_config=data["split_by"] if data["source"] == "refer" else None,
            dataset_split=record["split"],
            dataset_args=record["counts"],
            metric_type=name,
            metric_name=f"{name} (%)",
            metric_value=round(100 * value, 2),
            metric_args={
                "threshold": record["threshold"]["value"],
                "threshold_source": record["threshold"]["source"],
            }
            | ({"expected_iou": True} if record.get("expected_iou") else {})
            | ({"tta": record["tta"]} if record.get("tta") else {})
            | ({"largest_component": True} if record.get("largest_component") else {})
            | ({"interval": [round(100 * end, 2) for end in intervals[name]]} if intervals else {}),
        )
        for name, value in metrics.items()
        if name != "num_expressions"
    ]
    card = ModelCardData(model_name=record["model"], eval_results=results)
    return card.to_yaml() + "\n"


def data_name(record: dict[str, Any]) -> str:
    """The usual name of a data set. One that has not all objects of the published split is called a part of it."""
    data = record["data"]
    if data["source"] == "refer":
        key = data["dataset"], data["split_by"], record.get("split")
        part = "a part of " if "counts" in record and is_part(*key, record["counts"]["objects"]) else ""
        return f"{part}{SET_NAMES.get(data['dataset'], data['dataset'])} ({data['split_by']})"
    return "embedded scenes" if data["source"] == "scenes" else Path(data.get("root") or data["source"]).name


def selection_note(record: dict[str, Any]) -> str:
    """How masks were selected, in whole sentences."""
    notes = {"tta": FLIPPED, "expected_iou": OWN_THRESHOLDS, "largest_component": LARGEST_COMPONENT}
    return threshold_note(record) + "." + "".join(note for name, note in notes.items() if record.get(name))


def scores_note(quality: dict[str, Any]) -> str:
    """What the scores say about the masks, in whole sentences."""
    kind = "mean probabilities inside the masks" if quality["calibration"] is None else quality["calibration"]
    area = "not defined" if quality["AUC"] is None else f"{quality['AUC']:.2f}"
    return (
        f"Scores: {kind}. As estimates of the IoU they have an expected calibration error of {quality['ECE']:.3f} in {BINS} bins "
        f"of equal mass (a perfect estimate: about {quality['ECE_by_chance']:.3f}, by chance). Area under the ROC curve for IoU > "
        f"{GOOD_IOU:g}: {area}."
    )


def threshold_note(record: dict[str, Any]) -> str:
    """The threshold of an evaluation and its source, as the beginning of a sentence."""
    value, source = record["threshold"]["value"], record["threshold"]["source"]
    return f"Threshold: {source}" if value is None else f"Threshold {value:g}, {source}"
