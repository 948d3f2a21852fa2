"""Measure and draw what the experts of a trained model do: `python training/experts.py RUN --split test`. (Ours.)

It writes `experts.md` and `experts.json` into the run's folder: the routing weights by kind of expression, how evenly the experts
are used, and the scores without each fusion expert. It also draws `experts-routing.png`, and `experts-maps.png`, which shows where
an expert changes the answer.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import EXPERT_NAMES
from processing_sera import SeraProcessor
from training.configuration import DataSettings, default_data
from training.evaluation import score_sentences
from training.examples.batches import Collator, EvaluationExamples, image_as_annotated
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.learning.routing_health import ADAPTER_EXPERTS, RoutingHealth
from training.scoring.expert_maps import draw_expert_maps, expert_maps, without_expert
from training.scoring.figures import new_figure
from training.scoring.intervals import LEVEL, RESAMPLES, paired_intervals
from training.scoring.metric import SentenceScore, format_value, score_terms
from training.scoring.slices import wording_of
from training.support.commands import run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_binary, write_text
from training.support.model_location import locate_model

logger = logging.getLogger(__name__)

METRICS = ("mIoU", "oIoU", "boundary_F")
Weights = dict[str, dict[str, float]]  # per router the mean weight of each expert


def routing_by_kind(
    model: SeraForReferringSegmentation, processor: SeraProcessor, rows: datasets.Dataset, batch_size: int = 8
) -> tuple[dict[str, Weights], dict[str, Any]]:
    """The mean weight of every expert over the expressions of each kind, and the routers' health over all expressions.

    The kinds are the split's own. If the split has only one kind, they are those of `training.scoring.slices.wording_of`.

    Returns:
        The experts' weights per kind ("all" first) and per router ("tap 2" with its depth, "adapter 3" with its block), and the
        result of `RoutingHealth.summary`.
    """
    kinds, sentences = rows["sentence_kinds"][:], rows["sentences"][:]
    has_kinds = len({kind for group in kinds for kind in group}) > 1
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, int] = defaultdict(int)
    health = RoutingHealth(model)
    collator = Collator(processor, with_labels=False)
    with health.watch(), torch.inference_mode():
        for inputs, batch in tqdm(DataLoader(EvaluationExamples(rows), batch_size, collate_fn=collator), leave=False):
            outputs = model(**inputs.to(model.device), output_router_weights=True, max_expressions=64)
            routed = {
                f"{name} {place}": weights.float().cpu().numpy().astype(np.float64)
                for name, places, found in (
                    ("tap", health.fusions, outputs.fusion_router_weights),
                    ("adapter", health.adapters, outputs.adapter_router_weights),
                )
                for place, weights in zip(places, found, strict=True)
            }
            for i, (row, sentence) in enumerate(source for example in batch for source in example.sources):
                kind = kinds[row][sentence] if has_kinds else wording_of(sentences[row][sentence])
                for group in ("all", kind):
                    counts[group] += 1
                    for router, weights in routed.items():
                        sums[group][router] = sums[group][router] + weights[i]
    means = {
        kind: {
            router: dict(zip(_experts(router), (total / counts[kind]).tolist(), strict=True))
            for router, total in sums[kind].items()
        }
        for kind in sorted(sums, key=lambda kind: (kind != "all", kind))
    }
    return means, health.summary(Accelerator())


def scores_without_experts(
    model: SeraForReferringSegmentation, processor: SeraProcessor, rows: datasets.Dataset, whole: list[SentenceScore]
) -> dict[str, Any]:
    """Per fusion expert the METRICS without it: "value", "difference" from `whole`, and the "interval" of the difference."""
    image_ids = rows["image_id"][:]
    images = [image_ids[score.row] for score in whole]
    found = {}
    for name in EXPERT_NAMES:
        with without_expert(model, name):
            terms = score_terms(score_sentences(model, processor, rows, Accelerator()))
        before = score_terms(whole)
        intervals = paired_intervals(terms, before, images)
        values = {
            metric: [over.sum() / max(under.sum(), 1) for over, under in (t[metric] for t in (terms, before))]
            for metric in METRICS
        }
        found[name] = {
            metric: {"value": float(v), "difference": float(v - was), "interval": intervals[metric]}
            for metric, (v, was) in values.items()
        }
    return found


def format_experts(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        f"# Experts of {record['model']}, split {record['split']}",
        "",
        "Mean routing weight in percent, by kind of expression.",
    ]
    lines += ["", f"{record['expressions']} expressions.", ""]
    routers = [(router, expert) for router, weights in record["routing"]["all"].items() for expert in weights]
    lines.append("| | " + " | ".join(f"{router}: {expert}" for router, expert in routers) + " |")
    lines.append("|---|" + "--:|" * len(routers))
    for kind, weights in record["routing"].items():
        lines.append(
            f"| {kind} | " + " | ".join(format_value(weights[router][expert]) for router, expert in routers) + " |"
        )
    if record["health"]["taps"]:
        lines += [
            "",
            "How evenly the fusion experts are used. Entropy: entropy of the weights, mean over samples; 100 if all are equal. "
            "Selected: share of samples that have the expert among their top k.",
            "",
        ]
        lines += ["| tap | least share | greatest share | least selected | entropy |", "|---|--:|--:|--:|--:|"]
        for tap, health in record["health"]["taps"].items():
            shares, selected = health["shares"].values(), health["selected"].values()
            cells = (min(shares), max(shares), min(selected), health["entropy"] / math.log(len(EXPERT_NAMES)))
            lines.append(f"| {tap} | " + " | ".join(map(format_value, cells)) + " |")
    if record["without"]:
        lines += [
            "",
            f"Scores without one fusion expert at every tap. The other experts are routed as before. In brackets: {LEVEL:.0%} of "
            f"the differences in {RESAMPLES} paired resamples of images. A model that is trained without the expert may be better.",
            "",
        ]
        lines += [
            "| without | " + " | ".join(f"{metric} | Δ" for metric in METRICS) + " |",
            "|---|" + "--:|--:|" * len(METRICS),
        ]
        found = next(iter(record["without"].values()))
        whole = [format_value(found[metric]["value"] - found[metric]["difference"]) for metric in METRICS]
        lines.append("| none | " + " | ".join(f"{value} | " for value in whole) + "|")
        for name, found in record["without"].items():
            cells = []
            for metric in METRICS:
                low, high = (100 * end for end in found[metric]["interval"])
                cells += [
                    format_value(found[metric]["value"]),
                    f"{100 * found[metric]['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{record['command']}`"]) + "\n"


def draw_routing(routing: dict[str, Weights], path: Path) -> None:
    """One panel per router. Rows are kinds of expression, columns are experts; numbers and shades show the mean weights."""
    routers = list(routing["all"])
    figure = new_figure(1.5 + sum(0.9 * len(_experts(router)) for router in routers), 1.6 + 0.35 * len(routing))
    panels = figure.subplots(
        1, len(routers), squeeze=False, width_ratios=[len(_experts(router)) for router in routers]
    )[0]
    for axis, router in zip(panels, routers, strict=True):
        table = np.array([list(weights[router].values()) for weights in routing.values()])
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for place, value in np.ndenumerate(table):
            axis.text(*place[::-1], f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axis.set_title(router, fontsize=10)
        axis.set_xticks(range(table.shape[1]), _experts(router), rotation=30, ha="right", fontsize=9)
        axis.set_yticks(range(len(routing)), list(routing) if axis is panels[0] else [""] * len(routing), fontsize=9)
    figure.tight_layout()
    write_binary(path, lambda partial: figure.savefig(partial, format="png"))


def draw_maps(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    scores: list[SentenceScore],
    path: Path,
    number: int = 6,
) -> None:
    """Draw what each fusion expert changes, for answers at evenly spaced ranks of IoU, the worst at the top."""
    ranked = sorted(scores, key=lambda score: score.iou)
    number = min(number, len(ranked))
    sheets = []
    for rank in ((np.arange(number) + 0.5) * len(ranked) / number).astype(int):
        row = rows[ranked[rank].row]
        image, text = image_as_annotated(row), row["sentences"][ranked[rank].sentence]
        sheets.append(draw_expert_maps(image, list(expert_maps(model, processor, image, [text]))))
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    write_binary(path, lambda partial: whole.save(partial, format="png"))


def _experts(router: str) -> tuple[str, ...]:
    return EXPERT_NAMES if router.startswith("tap") else ADAPTER_EXPERTS


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Measure and draw what the experts of a trained SERA do on a split.")
    parser.add_argument("model", type=str, help="a run's folder, or its model's")
    parser.add_argument("--split", type=str, default="test", help="split to measure on")
    parser.add_class_arguments(DataSettings, "data")  # the defaults are the run's
    parser.add_argument("--output", type=str | None, default=None, help="folder for the files (default: the run's)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    location = locate_model(options.model)
    if location.settings is None or not location.settings.is_file():
        missing = location.settings or f"the settings.yaml of {location.name}"
        parser.error(f"{missing} is not there; it names the data that the model was trained on.")
    default_data(parser, location.settings)
    data: DataSettings = parser.instantiate(parser.parse_args(arguments)).data
    device = Accelerator().device
    model, processor = load_whole(location.source)
    model.to(device)
    if not (model.config.fusion_experts or (model.config.adapter_experts and model.config.adapter_layers)):
        raise ValueError(f"{location.source} has no experts.")
    (rows,) = load_splits(data, [options.split])
    output = Path(options.output) if options.output else location.home

    routing, health = routing_by_kind(model, processor, rows)
    scores = score_sentences(model, processor, rows, Accelerator())
    record = {
        "model": location.name,
        "split": options.split,
        "expressions": len(scores),
        "routing": routing,
        "health": health,
        "without": scores_without_experts(model, processor, rows, scores) if model.config.fusion_experts else {},
        "command": command_line("training/experts.py", arguments),
        "hardware": describe_hardware(),
        "versions": library_versions(),
    }
    write_text(output / "experts.json", json.dumps(record, indent=1))
    write_text(output / "experts.md", format_experts(record))
    draw_routing(routing, output / "experts-routing.png")
    if model.config.fusion_experts:
        draw_maps(model, processor, rows, scores, output / "experts-maps.png")
    logger.info(format_experts(record))


if __name__ == "__main__":
    run_command(main, also=(RuntimeError,))
