"""Pictures of results: masks laid over photographs, and the sheet of examples (ours)."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.batches import picture_as_annotated
from training.data import decode_mask
from training.files import write_binary
from training.metric import SentenceScore

FUSION_EXPERTS = ("spatial", "context", "boundary", "shape")
COLORS = (
    (0.90, 0.20, 0.20),
    (0.15, 0.45, 0.90),
    (0.10, 0.65, 0.35),
    (0.95, 0.60, 0.10),
    (0.60, 0.30, 0.80),
    (0.0, 0.65, 0.70),
)


def overlay(image: Image.Image, masks: Sequence[np.ndarray], opacity: float = 0.55) -> Image.Image:
    """The picture with each (H, W) boolean mask tinted in a colour of its own and outlined in white."""
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    for i, mask in enumerate(masks):
        color = np.asarray(COLORS[i % len(COLORS)], dtype=np.float32)
        canvas = np.where(mask[..., None], (1 - opacity) * canvas + opacity * color, canvas)
        canvas = np.where(_outline(mask)[..., None], 1.0, canvas)
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch a pixel outside of it."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def draw_sheet(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    scores: list[SentenceScore],
    path: Path,
    num_examples: int = 12,
) -> None:
    """One PNG with examples: picture, truth, prediction, expression, IoU, and the shares of the fusion experts.

    The examples stand at evenly spaced ranks of IoU within each kind of expression, from the worst to the best: nothing is picked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = _evenly_ranked(scores, num_examples)
    figure = Figure(figsize=(18, 3.1 * ((len(chosen) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots((len(chosen) + 1) // 2, 8, squeeze=False, width_ratios=[1, 1, 1, 0.8] * 2)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, score in enumerate(chosen):
        row = rows[score.row]
        image, text = picture_as_annotated(row), row["sentences"][score.sentence]
        inputs = processor(images=[image], text=[[text]], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            outputs = model(**inputs, output_router_weights=True)
        predicted = processor.post_process_referring_segmentation(outputs, inputs)[0]["mask"].cpu().numpy()
        panels = axes[i // 2, 4 * (i % 2) : 4 * (i % 2) + 4]
        truth = decode_mask(row["mask"])
        for axis, picture in zip(panels, (image, overlay(image, [truth]), overlay(image, [predicted])), strict=False):
            axis.imshow(picture, interpolation="nearest")
        panels[0].set_title(f"“{text}”", loc="left", fontsize=11)
        panels[2].set_title(f"IoU {score.iou:.2f}", loc="right", fontsize=11)
        panels[1].text(0.02, 0.02, "truth", transform=panels[1].transAxes, color="white", fontsize=9)
        panels[2].text(0.02, 0.02, "prediction", transform=panels[2].transAxes, color="white", fontsize=9)
        _draw_routing(panels[3], outputs)
    figure.suptitle(
        "SERA on held-out data: picture, truth, prediction; bars: share of each fusion expert (three depths, shallow to deep)",
        fontsize=13,
    )
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=80))


def _draw_routing(axis, outputs) -> None:
    """Bars of the fusion experts' shares, one bar per tap within each expert."""
    axis.set_axis_on()
    for tap, weights in enumerate(outputs.fusion_router_weights):
        positions = np.arange(len(FUSION_EXPERTS)) + 0.25 * (tap - 1)
        axis.barh(positions, weights[0].cpu().numpy(), height=0.22, color=COLORS[1], alpha=0.45 + 0.27 * tap)
    axis.set_yticks(range(len(FUSION_EXPERTS)), FUSION_EXPERTS, fontsize=9)
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=8)
    axis.invert_yaxis()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _evenly_ranked(scores: list[SentenceScore], number: int) -> list[SentenceScore]:
    kinds = sorted({score.kind for score in scores})
    chosen = []
    for i, kind in enumerate(kinds):
        ranked = sorted((score for score in scores if score.kind == kind), key=lambda score: score.iou)
        wanted = min(number // len(kinds) + (i < number % len(kinds)), len(ranked))
        chosen += [ranked[rank] for rank in np.linspace(0, len(ranked) - 1, wanted).round().astype(int)]
    return chosen
