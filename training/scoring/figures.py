"""Figures of results: the sheet of examples, and curves with the worst and best cases (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import EXPERT_NAMES
from modeling_sera.modeling_sera import SeraReferringSegmentationOutput
from processing_sera import SeraProcessor
from training.examples.batches import image_as_annotated
from training.learning.routing_health import ADAPTER_EXPERTS
from training.scoring.boundary import mask_outline
from training.scoring.mask_selection import PROCESSORS_OWN, MaskSelection
from training.scoring.metric import SentenceScore
from training.scoring.overlay import COLORS, fit_lines, overlay
from training.scoring.reports import threshold_note
from training.sources.masks import decode_mask
from training.support.files import write_binary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

YELLOW = (1.0, 0.85, 0.1)
DPI = 70
SHEET_TITLE = "Held-out data, at evenly spaced ranks of IoU within each kind."
SLICES_DRAWN = ("size", "length", "wording", "targets")


def spotlight(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image, darkened outside of a (H, W) boolean mask, with a yellow outline of the mask."""
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    dimmed = 0.35 * canvas.mean(axis=2, keepdims=True) + 0.15 * canvas
    canvas = np.where(mask[..., None], canvas, dimmed)
    canvas = np.where(mask_outline(mask)[..., None], np.float32(YELLOW), canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


def draw_sheet(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    scores: list[SentenceScore],
    path: Path,
    num_examples: int = 12,
    selection: MaskSelection = PROCESSORS_OWN,
) -> None:
    """Draw a PNG with examples: image, truth, prediction, expression, IoU, and the shares of the experts.

    The examples are at evenly spaced ranks of IoU within each kind of expression, the worst first. None is chosen by hand.
    """
    figure = sheet_figure(model, processor, rows, evenly_ranked(scores, num_examples), selection)
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI))


def sheet_figure(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    chosen: Sequence[SentenceScore],
    selection: MaskSelection = PROCESSORS_OWN,
    title: str = SHEET_TITLE,
) -> Figure:
    """The sheet of the given examples, two in a row. An expression that is too long for its place ends in "…"."""
    num_rows = (len(chosen) + 1) // 2
    height = 3.05 * num_rows + 0.5
    figure = new_figure(18, height)
    grid = figure.add_gridspec(
        num_rows, 2, left=0.01, right=0.99, top=1 - 0.9 / height, bottom=0.3 / height, hspace=0.34, wspace=0.04
    )
    for i, score in enumerate(chosen):
        place = grid[i // 2, i % 2]
        # an empty column leaves room for the experts' names
        panels = place.subgridspec(1, 5, width_ratios=[1, 1, 1, 0.5, 0.3], wspace=0.04)
        axes = [figure.add_subplot(panels[column]) for column in (0, 1, 2, 4)]
        row = rows[score.row]
        image, text = image_as_annotated(row), row["sentences"][score.sentence]
        predicted, outputs = _predict(model, processor, image, text, selection)
        for axis, shown, label in (
            (axes[0], image, ""),
            (axes[1], spotlight(image, decode_mask(row["mask"])), "truth"),
            (axes[2], spotlight(image, predicted), f"prediction, IoU {score.iou:.2f}"),
        ):
            axis.imshow(shown)
            axis.set_axis_off()
            axis.set_anchor("N")
            axis.text(0.5, -0.03, label, transform=axis.transAxes, ha="center", va="top", fontsize=10)
        _write_above(figure, place, f"“{text}”", fontsize=12)
        _draw_routing(axes[3], outputs)
    figure.suptitle(
        f"{title} Bars: share of each expert, shallow (light) to deep (dark)",
        fontsize=13,
        y=1 - 0.1 / height,
    )
    return figure


def draw_report(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    scores: list[SentenceScore],
    shuffled: list[SentenceScore],
    record: dict[str, Any],
    path: Path,
    selection: MaskSelection = PROCESSORS_OWN,
    num_cases: int = 5,
) -> None:
    """Draw a PNG of an evaluation: Pr@X over X, a histogram of IoU, mIoU by slice, and the worst, median and best cases.

    Args:
        model: The model that was scored.
        processor: Its processor.
        rows: The split.
        scores: The scores of its sentences.
        shuffled: The scores with each object given the sentences of another.
        record: See `training.scoring.reports.evaluation_record`.
        path: The PNG file.
        selection: How masks were selected.
        num_cases: Number of worst cases, of median cases and of best cases. Each is from a different image.
    """
    figure = new_figure(3.6 * num_cases, 15.6)
    figure.suptitle(
        f"{record['model']}, {record['split']}: {len(scores)} expressions. {threshold_note(record)}",
        fontsize=13,
        parse_math=False,
    )
    candidates = record["threshold"]["candidates"]
    curves = figure.add_gridspec(1, 4 if candidates else 3, left=0.05, right=0.98, top=0.945, bottom=0.76, wspace=0.6)
    _draw_precisions(
        figure.add_subplot(curves[0]), {"as written": scores, "shuffled": shuffled}, record["summary"]["as written"]
    )
    _draw_histogram(figure.add_subplot(curves[1]), scores)
    _draw_slices(figure.add_subplot(curves[2]), record)
    if candidates:
        axis = figure.add_subplot(curves[3])
        axis.plot([float(name) for name in candidates], list(candidates.values()), marker="o", color=COLORS[1])
        axis.axvline(record["threshold"]["value"], color="grey", linestyle=":")
        axis.set(title="calibration", xlabel="threshold", ylabel="mIoU")
    ranked = sorted(scores, key=lambda score: score.iou)
    middle = ranked[len(ranked) // 2].iou
    at_median = sorted(ranked, key=lambda score: abs(score.iou - middle))
    cases = figure.add_gridspec(3, num_cases, left=0.01, right=0.99, top=0.67, bottom=0.02, hspace=0.4, wspace=0.06)
    for line, (name, order) in enumerate((("worst", ranked), ("median", at_median), ("best", ranked[::-1]))):
        for column, score in enumerate(_one_per_image(order, rows)[:num_cases]):
            row = rows[score.row]
            image, text = image_as_annotated(row), row["sentences"][score.sentence]
            predicted, _ = _predict(model, processor, image, text, selection)
            canvas = np.asarray(overlay(image, [predicted])).copy()
            canvas[mask_outline(decode_mask(row["mask"]))] = np.uint8(255 * np.array(YELLOW))
            axis = figure.add_subplot(cases[line, column])
            axis.imshow(canvas)
            axis.set_axis_off()
            axis.set_anchor("NW")
            _write_above(figure, cases[line, column], f"{name}, IoU {score.iou:.2f}: “{text}”", fontsize=10)
    figure.text(0.01, 0.715, "Red: prediction. Yellow outline: truth. One expression per image.", fontsize=10)
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI))


def evenly_ranked(scores: list[SentenceScore], number: int) -> list[SentenceScore]:
    """`number` scores at evenly spaced ranks of IoU, in equal numbers from each kind of expression. One of a kind is its median."""
    kinds = sorted({score.kind for score in scores})
    chosen = []
    for i, kind in enumerate(kinds):
        ranked = sorted((score for score in scores if score.kind == kind), key=lambda score: score.iou)
        wanted = min(number // len(kinds) + (i < number % len(kinds)), len(ranked))
        chosen += [ranked[int((part + 0.5) * len(ranked) / wanted)] for part in range(wanted)]
    return chosen


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches. It is drawn in memory, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and most commands draw no figure
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _predict(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    image: Image.Image,
    text: str,
    selection: MaskSelection,
) -> tuple[np.ndarray, SeraReferringSegmentationOutput]:
    """The mask, bool (H, W), and the model's outputs for the unflipped image."""
    inputs = processor(images=[image], text=[[text]], return_tensors="pt").to(model.device)
    with torch.inference_mode():
        answers, outputs = selection.ask(model, processor, inputs, [text], output_router_weights=True)
    (result,) = selection.results(processor, answers, inputs)
    return result["mask"].cpu().numpy(), outputs


def _write_above(figure: Figure, place: SubplotSpec, text: str, fontsize: float) -> None:
    """Write a text above a place of the grid, within its width."""
    box = place.get_position(figure)
    width = box.width * figure.bbox.width
    written = figure.text(box.x0, box.y1 + 0.06 / figure.get_figheight(), "", va="bottom", fontsize=fontsize)
    written.set_parse_math(False)  # a dollar sign does not begin a formula
    renderer = figure.canvas.get_renderer()

    def measure(line: str) -> float:
        written.set_text(line)
        return written.get_window_extent(renderer).width

    written.set_text(fit_lines(text, width, measure))


def _draw_routing(axis: Axes, outputs: SeraReferringSegmentationOutput) -> None:
    """Bars with the share of each fusion expert at every tap and of each adapter expert in every adapted block."""
    names = []
    for kind, experts, routed in (
        ("fusion", EXPERT_NAMES, outputs.fusion_router_weights),
        ("adapter", ADAPTER_EXPERTS, outputs.adapter_router_weights),
    ):
        shares = np.array([weights[0].float().cpu().numpy() for weights in routed])  # (depths, experts)
        height = 0.8 / max(len(shares), 1)
        for depth, share in enumerate(shares):
            positions = len(names) + np.arange(len(experts)) + height * (depth - (len(shares) - 1) / 2)
            axis.barh(positions, share, height=0.9 * height, color=COLORS[1], alpha=(depth + 1.5) / (len(shares) + 0.5))
        names += [f"{kind}: {expert}" for expert in experts]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 1])
    axis.tick_params(axis="x", labelsize=8)
    axis.invert_yaxis()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_precisions(axis, asked: dict[str, list[SentenceScore]], summary: dict[str, dict[str, float]]) -> None:
    limits = np.linspace(0, 1, 101)
    for (name, scores), color in zip(asked.items(), (COLORS[1], "grey"), strict=True):
        ious = np.array([score.iou for score in scores])
        axis.plot(limits, (ious[:, None] > limits).mean(axis=0), label=name, color=color)
    marked = [float(name.removeprefix("Pr@")) for name in summary["all"] if name.startswith("Pr@")]
    axis.plot(marked, [summary["all"][f"Pr@{x}"] for x in marked], "o", color=COLORS[1])
    axis.set(title="Pr@X", xlabel="X", ylabel="share of expressions with IoU > X", ylim=(0, 1))
    axis.legend()


def _draw_histogram(axis: Axes, scores: list[SentenceScore]) -> None:
    axis.hist([score.iou for score in scores], bins=20, range=(0, 1), color=COLORS[1])
    axis.set(title="IoU", xlabel="IoU", ylabel="expressions")


def _draw_slices(axis: Axes, record: dict[str, Any]) -> None:
    """mIoU of each slice with its interval."""
    names, values, ends = [], [], []
    for dimension in SLICES_DRAWN:
        for label, group in record["slices"].get(dimension, {}).items():
            names.append(f"{label} ({group['num_expressions']})")
            values.append(group["mIoU"])
            ends.append(group["intervals"].get("mIoU", (group["mIoU"],) * 2))
    places, low_high = np.arange(len(names)), np.array(ends).T
    axis.barh(places, values, color=COLORS[2], height=0.7)
    axis.hlines(places, *low_high, color="black")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title=f"mIoU with {record['bootstrap']['level']:.0%} intervals", xlim=(0, 1))


def _one_per_image(scores: list[SentenceScore], rows: datasets.Dataset) -> list[SentenceScore]:
    images, first = rows["image_id"][:], {}
    for score in scores:
        first.setdefault(images[score.row], score)
    return list(first.values())
