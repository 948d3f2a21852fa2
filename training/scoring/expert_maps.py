"""How each fusion expert changes an answer: the same image and expression with and without the expert (ours)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import EXPERT_NAMES
from modeling_sera.routing_sera import SeraRouting
from processing_sera import SeraProcessor
from training.scoring.boundary import mask_outline
from training.scoring.overlay import fit_lines, overlay

# colours: the expert raises a pixel's probability, or lowers it
RAISES, LOWERS = np.array([0.85, 0.1, 0.1]), np.array([0.1, 0.3, 0.9])
# the smallest change of probability that is drawn in full colour; otherwise noise would be visible
LEAST_SCALE = 0.05
CELL, GAP, FONT_SIZE, LINES = 220, 8, 13, 2


@contextmanager
def without_expert(model: SeraForReferringSegmentation, name: str) -> Iterator[None]:
    """Route, in inference, as if the logit of the fusion expert `name` were minus infinity. The top k are those of the others.

    Raises:
        ValueError: The model has no fusion experts, or none of that name.
    """
    if not model.config.fusion_experts:
        raise ValueError("The model has no fusion experts (fusion_experts is False), so there is nothing to leave out.")
    if name not in EXPERT_NAMES:
        raise ValueError(f"There is no fusion expert {name!r}; there are {', '.join(EXPERT_NAMES)}.")
    place = EXPERT_NAMES.index(name)

    def leave_out(router: nn.Module, arguments: tuple, routing: SeraRouting) -> SeraRouting:
        logits = routing.logits.clone()
        logits[:, place] = float("-inf")
        kept = logits.topk(min(router.k, len(EXPERT_NAMES) - 1), dim=-1).indices
        selected = torch.zeros_like(routing.selected).scatter(-1, kept, True)
        weights = logits.masked_fill(~selected, float("-inf")).softmax(dim=-1)
        return SeraRouting(weights=weights, logits=routing.logits, selected=selected)

    with ExitStack() as stack:
        for fusion in model.model.fusions:
            stack.enter_context(fusion.router.register_forward_hook(leave_out))
        yield


@dataclass
class ExpertMaps:
    """How the fusion experts changed the answer for one expression.

    Attributes:
        text: The expression.
        mask: (H, W) bool, the answer.
        shares: Per expert the mean of its routing weights over the taps.
        changes: Per expert (H, W) in [-1, 1]: the probability with the expert minus the probability without it.
    """

    text: str
    mask: np.ndarray
    shares: dict[str, float]
    changes: dict[str, np.ndarray]


def expert_maps(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    image: Image.Image,
    texts: Sequence[str],
    threshold: float | None = None,
) -> Iterator[ExpertMaps]:
    """Yield the maps for each expression about an image. Each costs a forward pass with all experts and one without each expert.

    Raises:
        ValueError: The model has no fusion experts.
    """
    for text in texts:
        inputs = processor(images=[image], text=[[text]], return_tensors="pt").to(model.device)

        def answer(inputs=inputs) -> tuple[dict, list[torch.Tensor]]:
            with torch.inference_mode():
                outputs = model(**inputs, output_router_weights=True)
            results = processor.post_process_referring_segmentation(
                outputs, inputs, threshold, return_probabilities=True
            )
            return results[0], outputs.fusion_router_weights

        changes = {}
        whole, weights = answer()
        for name in EXPERT_NAMES:
            with without_expert(model, name):
                changes[name] = (whole["probabilities"] - answer()[0]["probabilities"]).cpu().numpy()
        shares = torch.cat(list(weights)).float().mean(dim=0).tolist()
        mask = whole["mask"].cpu().numpy()
        yield ExpertMaps(text, mask, dict(zip(EXPERT_NAMES, shares, strict=True)), changes)


def draw_expert_maps(image: Image.Image, maps: Sequence[ExpertMaps]) -> Image.Image:
    """One row per expression: the image with the answer, and a map per expert. Red: it raises the probability. Blue: it lowers it.

    Full colour is the greatest change in the row's four maps, but at least LEAST_SCALE.
    """
    small = ImageOps.contain(image.convert("RGB"), (CELL, CELL))
    width, height = small.size
    font = ImageFont.load_default(size=FONT_SIZE)
    line = FONT_SIZE + 4
    tall = height + (LINES + 1) * line + GAP
    wide = max(width, 3 * CELL // 4) + GAP
    sheet = Image.new("RGB", (wide * (1 + len(EXPERT_NAMES)) + GAP, tall * len(maps) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    grey = 0.6 * np.asarray(small.convert("L"), dtype=np.float32)[..., None] / 255 + 0.35

    def write(text: str, left: int, top: int, lines: int) -> None:
        fitted = fit_lines(text, wide - GAP, lambda part: draw.textlength(part, font=font), lines)
        draw.multiline_text((left, top), fitted, fill="black", font=font, spacing=2)

    for row, found in enumerate(maps):
        top = GAP + row * tall
        scale = max(LEAST_SCALE, *(float(np.abs(change).max()) for change in found.changes.values()))
        sheet.paste(overlay(image, [found.mask]).resize((width, height)), (GAP, top))
        write(f"“{found.text}”", GAP, top + height + 2, LINES + 1)
        for column, (name, change) in enumerate(found.changes.items(), start=1):
            left = GAP + column * wide
            shown = np.asarray(Image.fromarray(change.astype(np.float32)).resize((width, height)))[..., None] / scale
            canvas = grey + np.abs(shown) * (np.where(shown > 0, RAISES, LOWERS) - grey)
            outline = Image.fromarray(mask_outline(found.mask)).resize((width, height), Image.Resampling.NEAREST)
            canvas[np.asarray(outline)] = 1.0
            sheet.paste(Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8)), (left, top))
            write(f"{name}: share {found.shares[name]:.2f}", left, top + height + 2, 1)
            extent = f"changes {change.min():+.2f} to {change.max():+.2f}"
            write(extent, left, top + height + 2 + line, 1)
    return sheet


__all__ = ["ExpertMaps", "draw_expert_maps", "expert_maps", "without_expert"]
