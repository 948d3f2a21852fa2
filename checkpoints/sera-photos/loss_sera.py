"""The losses of masks and of presence (ours). The routers' losses are in the file of the routers."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, pad

from .configuration_sera import SeraConfig


def mask_segmentation_loss(logits: Tensor, labels: Tensor, config: SeraConfig) -> Tensor:
    """Weighted binary cross-entropy plus Dice on area-averaged targets (ours).

    Both are means over the expressions of a mean over each expression's own pixels, so that all expressions weigh the same.

    Args:
        logits: (N, h, w).
        labels: (N, H, W) masks in [0, 1], negative where a pixel does not count. The target of a logit is the mean of the labels
            over the area that the logit covers or, with `mask_targets="nearest"`, the label of one of its pixels. The weight of
            a logit is the share of its pixels that count.
        config: Gives the two weights and the kind of target.

    Returns:
        A scalar in float32.
    """
    logits, labels = logits.float(), labels.float()
    parts = torch.stack([labels.clamp(min=0), (labels >= 0).float()], dim=1)
    size = logits.shape[-2:]
    shrunk = (
        interpolate(parts, size=size, mode="nearest") if config.mask_targets == "nearest" else area_average(parts, size)
    )
    covered, counted = shrunk.unbind(1)
    targets = (covered / counted.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    bce = (binary_cross_entropy_with_logits(logits, targets, reduction="none") * counted).sum(dim=(1, 2))
    bce = bce / counted.sum(dim=(1, 2)).clamp(min=1)
    probability = logits.sigmoid() * counted
    overlap = (probability * targets).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + covered.sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return config.bce_loss_weight * bce.mean() + config.dice_loss_weight * dice.mean()


def area_average(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of (..., H, W) float32 masks over h × w equal rectangles that tile them.

    A pixel on an edge counts in each rectangle by its share there. `interpolate(mode="area")` gives the same where the sides are
    multiples; elsewhere (448 to 128) its windows overlap.
    """
    for dim, length in ((-2, size[0]), (-1, size[1])):
        masks = masks.transpose(dim, -1)
        edges = torch.linspace(0, masks.shape[-1], length + 1, device=masks.device)
        whole = edges.floor().clamp(max=masks.shape[-1] - 1).long()  # the last edge lies at the end of the last pixel
        before = pad(masks.cumsum(-1), (1, 0))[..., whole] + (edges - whole) * masks[..., whole]
        masks = (before.diff(dim=-1) * (length / masks.shape[-1])).transpose(dim, -1)
    return masks


def presence_detection_loss(presence_logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of presence logits (N,); a target is 1 where the mask (N, H, W) is not empty (ours).

    The labels are used at their full size, so that no object is too small to count.
    """
    present = (labels > 0).flatten(1).any(dim=1)
    return binary_cross_entropy_with_logits(presence_logits.float(), present.float())


__all__ = ["area_average", "mask_segmentation_loss", "presence_detection_loss"]
