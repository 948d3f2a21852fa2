"""Mask selection: from a model's probabilities to a mask, by a fixed or by an expected-IoU threshold (ours)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from processing_sera.processing_sera import NO_TARGET_THRESHOLD


@dataclass(frozen=True)
class MaskSelection:
    """How a mask is selected. The default is that of `post_process_referring_segmentation`.

    Attributes:
        threshold: Probability in (0, 1) above which a pixel is in the mask. `None`: the processor's.
        expected_iou: Use the expected-IoU threshold of each answer, see `expected_iou_mask`. There is no fixed threshold then.
        flip: Test-time augmentation: average the probabilities with those of the horizontally flipped image.
        largest_component: Keep the connected component of each mask with the largest sum of probabilities.

    Raises:
        ValueError: A threshold is given together with `expected_iou`.
    """

    threshold: float | None = None
    expected_iou: bool = False
    flip: bool = False
    largest_component: bool = False

    def __post_init__(self):
        if self.expected_iou and self.threshold is not None:
            raise ValueError(f"threshold is {self.threshold}, but expected_iou gives each answer its own threshold.")

    @property
    def needs_probabilities(self) -> bool:
        """Whether the selection needs probabilities, not a mask alone."""
        return self.expected_iou or self.flip or self.largest_component

    def mask(self, answer: dict[str, Any], default: float) -> Tensor:
        """The mask of an answer, bool (H, W). It is empty if the model predicts no target.

        Args:
            answer: An answer of `post_process_referring_segmentation` or `average_answers`. It holds "probabilities" (H, W), or
                only "mask" if the selection needs no probabilities and its threshold made the mask. A model that predicts
                presence adds "no_target".
            default: The processor's threshold, which is used if the selection has none.
        """
        if "probabilities" not in answer:
            return answer["mask"]
        probabilities = answer["probabilities"]
        threshold = default if self.threshold is None else self.threshold
        mask = expected_iou_mask(probabilities) if self.expected_iou else probabilities > threshold
        mask &= answer.get("no_target", 0.0) <= NO_TARGET_THRESHOLD
        return largest_component(mask, probabilities) if self.largest_component else mask


FIXED_THRESHOLD = MaskSelection()


def expected_iou_mask(probabilities: Tensor) -> Tensor:
    """The mask with the largest ratio of expected intersection to expected union, if pixels are independent.

    A pixel raises a ratio J if its probability is above J / (1 + J). So the mask consists of the pixels above one threshold.
    The threshold is low if the model is uncertain, and 0.5 if the model is sure of every pixel.

    Args:
        probabilities: (H, W), in [0, 1].

    Returns:
        bool (H, W). It is empty only if all probabilities are 0.
    """
    values = probabilities.flatten().sort(descending=True).values
    intersection = values.cumsum(0, dtype=torch.float64)
    sizes = torch.arange(1, len(values) + 1, device=values.device)
    edge = values[(intersection / (sizes + intersection[-1] - intersection)).argmax()]
    return (probabilities >= edge) & (probabilities > 0)


def largest_component(mask: Tensor, probabilities: Tensor) -> Tensor:
    """The connected component of a mask with the largest sum of probabilities. An expression means one thing.

    Args:
        mask: bool (H, W). Pixels are connected over their sides, not over their corners.
        probabilities: (H, W), in [0, 1].

    Returns:
        bool (H, W); of an empty mask the mask itself.
    """
    from scipy.ndimage import label, sum_labels  # part of the extra "train"; only this option needs it

    components, number = label(mask.cpu().numpy())
    if number < 2:
        return mask
    sums = sum_labels(probabilities.float().cpu().numpy(), components, np.arange(1, number + 1))
    return torch.from_numpy(components == 1 + sums.argmax()).to(mask.device)


__all__ = ["FIXED_THRESHOLD", "MaskSelection", "expected_iou_mask", "largest_component"]
