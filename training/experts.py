"""Measure and draw what the experts of a trained model do: `python training/experts.py RUN --split test`. (Ours.)

It writes `experts.md` and `experts.json` into the run's folder: the routers' health, the scores with other routing weights and
without each fusion expert, and the weights by group of expressions and by word. It also draws `experts-routing.png`,
`experts-words.png`, `experts-pairs.png` (expressions about one image that are routed differently) and `experts-maps.png` (where an
expert changes the answer). docs/evaluation.md explains every figure.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import EXPERT_NAMES
from processing_sera import SeraProcessor
from training.configuration import DataSettings, default_data
from training.evaluation import score_sentences
from training.examples.batches import image_as_annotated
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.learning.routing_health import RoutingHealth
from training.scoring.expert_maps import draw_expert_maps, expert_maps, without_expert
from training.scoring.figures import DPI, sheet_figure
from training.scoring.intervals import paired_intervals
from training.scoring.metric import SentenceScore, score_terms
from training.scoring.routing_exchange import RoutingExchange, asked_samples
from training.scoring.routing_report import COMPARED, Comparison, draw_routing, draw_words, format_experts
from training.scoring.routing_words import (
    explained_variance,
    frequent_words,
    indicators,
    mean_weights,
    most_different_pairs,
    word_effects,
)
from training.scoring.slices import size_of, thickness_of, wording_of
from training.sources.masks import decode_mask
from training.support.commands import run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_binary, write_text
from training.support.model_location import locate_model

logger = logging.getLogger(__name__)

PAIRS_TITLE = "Held-out data, two expressions about each image that are routed most differently."
COCO_AREA = 640 * 480  # pixels


@dataclass
class Routed:
    """How the N expressions of a split were routed and scored.

    Attributes:
        scores: Of each expression.
        weights: Per router (N, experts), in the order of `scores`.
        images: (N,) the image of each expression in the order of an evaluation, as `RoutingExchange` numbers them.
        exchange: Has recorded the weights.
        health: See `RoutingHealth.summary`.
    """

    scores: list[SentenceScore]
    weights: dict[str, np.ndarray]
    images: np.ndarray
    exchange: RoutingExchange
    health: dict[str, Any]


def route(
    model: SeraForReferringSegmentation, processor: SeraProcessor, rows: datasets.Dataset, **options: int
) -> Routed:
    """Score a split once and keep all that the routers decide. Options as in `score_sentences`."""
    health, exchange = RoutingHealth(model), RoutingExchange(model)
    accelerator = Accelerator()
    with health.watch(), exchange.record():
        scores = score_sentences(model, processor, rows, accelerator, **options)
    sources, images = asked_samples(rows)
    order = sorted(range(len(sources)), key=sources.__getitem__)  # scores are in the order of the rows
    weights = {name: table[order] for name, table in exchange.by_expression(images).items()}
    return Routed(scores, weights, images, exchange, health.summary(accelerator))


def groups_of(rows: datasets.Dataset, scores: list[SentenceScore]) -> dict[str, list[str]]:
    """The kind of each expression, and the size and the thickness of what it means.

    The kinds are the split's own. If the split has only one kind, they are those of `training.scoring.slices.wording_of`. Sizes are
    COCO's in an image that is scaled to the area of most of COCO's. So small images have objects of all sizes, too.
    """
    sentences, masks = rows["sentences"][:], rows["mask"][:]
    has_kinds = len({score.kind for score in scores}) > 1
    thicknesses = [thickness_of(decode_mask(mask)) for mask in masks]
    scales = [COCO_AREA / math.prod(mask["size"]) for mask in masks]
    return {
        "kind": [score.kind if has_kinds else wording_of(sentences[score.row][score.sentence]) for score in scores],
        "size": [size_of(score.truth * scales[score.row]) for score in scores],
        "thickness": [thicknesses[score.row] for score in scores],
    }


def scores_with_other_weights(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    routed: Routed,
    **options: int,
) -> Comparison:
    """The scores with the weights exchanged at all routers, in each way of EXCHANGES, compared with those as decided.

    Options as given to [`route`], so that the pass meets the same samples in the same order.
    """
    found = {}
    for kind, weights in routed.exchange.exchanged(routed.images).items():
        with routed.exchange.give(weights):
            scores = score_sentences(model, processor, rows, Accelerator(), **options)
        found[kind] = compare(rows, scores, routed.scores)
    return found


def scores_without_experts(
    model: SeraForReferringSegmentation, processor: SeraProcessor, rows: datasets.Dataset, whole: list[SentenceScore]
) -> Comparison:
    """The scores without each fusion expert, compared with the `whole` model's."""
    found = {}
    for name in EXPERT_NAMES:
        with without_expert(model, name):
            found[name] = compare(rows, score_sentences(model, processor, rows, Accelerator()), whole)
    return found


def compare(rows: datasets.Dataset, scores: list[SentenceScore], whole: list[SentenceScore]) -> dict[str, Any]:
    """Per metric of COMPARED its "value", the "difference" from `whole`, and the "interval" of the difference."""
    image_ids = rows["image_id"][:]
    terms, before = score_terms(scores), score_terms(whole)
    intervals = paired_intervals(terms, before, [image_ids[score.row] for score in whole])
    found = {}
    for metric in COMPARED:
        value, was = (over.sum() / max(under.sum(), 1) for over, under in (terms[metric], before[metric]))
        found[metric] = {
            "value": float(value),
            "difference": float(value - was),
            "interval": intervals[metric],
        }
    return found


def draw_pairs(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    routed: Routed,
    number: int,
    path: Path,
) -> bool:
    """Draw images with two expressions each that are routed most differently. `False` if all are routed alike."""
    image_ids = np.unique(np.asarray(rows["image_id"][:]), return_inverse=True)[1]
    images = image_ids[[score.row for score in routed.scores]]
    pairs = most_different_pairs(images, routed.weights, number)
    if pairs:
        chosen = [routed.scores[place] for pair in pairs for place in pair]
        figure = sheet_figure(model, processor, rows, chosen, title=PAIRS_TITLE)
        write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI))
    return bool(pairs)


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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Measure and draw what the experts of a trained SERA do on a split.")
    parser.add_argument("model", type=str, help="a run's folder, or its model's")
    parser.add_argument("--split", type=str, default="test", help="split to measure on")
    parser.add_class_arguments(DataSettings, "data")  # the defaults are the run's
    parser.add_argument("--output", type=str | None, default=None, help="folder for the files (default: the run's)")
    parser.add_argument(
        "--pairs", type=NonNegativeInt, default=6, help="images with two differently routed expressions to draw"
    )
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

    routed = route(model, processor, rows)
    scores, weights = routed.scores, routed.weights
    texts = rows["sentences"][:]
    sentences = [texts[score.row][score.sentence] for score in scores]
    groups = groups_of(rows, scores)
    has_word = frequent_words(sentences)
    explained = {"kind": explained_variance(indicators(groups["kind"]), weights)}
    if has_word:
        explained["words"] = explained_variance(np.stack(list(has_word.values()), axis=1).astype(float), weights)
    record = {
        "model": location.name,
        "split": options.split,
        "expressions": len(scores),
        "routing": mean_weights(weights, groups),
        "health": routed.health,
        "exchange": scores_with_other_weights(model, processor, rows, routed),
        "without": scores_without_experts(model, processor, rows, scores) if model.config.fusion_experts else {},
        "words": word_effects(sentences, weights),
        "explained": explained,
        "command": command_line("training/experts.py", arguments),
        "hardware": describe_hardware(),
        "versions": library_versions(),
    }
    write_text(output / "experts.json", json.dumps(record, indent=1))
    write_text(output / "experts.md", format_experts(record))
    draw_routing(record["routing"], output / "experts-routing.png")
    draw_words(record["words"], list(weights), output / "experts-words.png")
    if options.pairs and not draw_pairs(model, processor, rows, routed, options.pairs, output / "experts-pairs.png"):
        logger.info("experts-pairs.png is not drawn: the expressions about each image are routed alike.")
    if model.config.fusion_experts:
        draw_maps(model, processor, rows, scores, output / "experts-maps.png")
    logger.info(format_experts(record))


if __name__ == "__main__":
    run_command(main, also=(RuntimeError,))
