"""Pictures of results: masks laid over photographs, and the sheet of examples (ours)."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.modeling_sera import SeraReferringSegmentationOutput
from processing_sera import SeraProcessor
from training.batches import picture_as_annotated
from training.data import decode_mask
from training.files import write_binary
from training.metric import SentenceScore

FUSION_EXPERTS = ("spatial", "context", "boundary", "shape")
ADAPTER_EXPERTS = ("spatial", "boundary")
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


def spotlight(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture dimmed outside of a (H, W) boolean mask, the mask outlined in yellow."""
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    dimmed = 0.35 * canvas.mean(axis=2, keepdims=True) + 0.15 * canvas
    canvas = np.where(mask[..., None], canvas, dimmed)
    canvas = np.where(_outline(mask)[..., None], np.float32([1.0, 0.85, 0.1]), canvas)
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
    num_rows = (len(chosen) + 1) // 2
    figure = Figure(figsize=(18, 3.2 * num_rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, 8, squeeze=False, width_ratios=[1, 1, 1, 0.8] * 2)
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
        panels[0].imshow(image)
        panels[1].imshow(spotlight(image, decode_mask(row["mask"])))
        panels[2].imshow(spotlight(image, predicted))
        panels[0].set_title(textwrap.fill(f"“{text}”", 64), loc="left", fontsize=12, parse_math=False)
        for axis, label in zip(panels[1:3], ("truth", f"prediction, IoU {score.iou:.2f}"), strict=True):
            axis.text(0.5, -0.03, label, transform=axis.transAxes, ha="center", va="top", fontsize=10)
        _draw_routing(panels[3], outputs)
    figure.suptitle(
        "Held-out data, from the worst to the best of each kind. Bars: share of each expert, from shallow (light) to deep",
        fontsize=13,
    )
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=70))


def _draw_routing(axis, outputs: SeraReferringSegmentationOutput) -> None:
    """Bars of each expert's share: the fusion experts at every tap, the adapter experts in every adapted block."""
    axis.set_axis_on()
    names = []
    for kind, experts, routed in (
        ("fusion", FUSION_EXPERTS, outputs.fusion_router_weights),
        ("adapter", ADAPTER_EXPERTS, outputs.adapter_router_weights),
    ):
        shares = np.array([weights[0].float().cpu().numpy() for weights in routed])  # (depths, experts)
        height = 0.8 / max(len(shares), 1)
        for depth, share in enumerate(shares):
            positions = len(names) + np.arange(len(experts)) + height * (depth - (len(shares) - 1) / 2)
            axis.barh(positions, share, height=0.9 * height, color=COLORS[1], alpha=(depth + 1.5) / (len(shares) + 0.5))
        names += [f"{kind}: {expert}" for expert in experts]
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.5, 1])
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
