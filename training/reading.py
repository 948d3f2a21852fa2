"""How masks are read from a model's answers: at a threshold or for the greatest expected IoU, whole or cut to one part (ours)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from processing_sera.processing_sera import NO_TARGET_THRESHOLD


@dataclass(frozen=True)
class Reading:
    """A way to read masks. The default is that of `post_process_referring_segmentation`.

    Attributes:
        threshold: Probability above which a pixel is in the mask, in (0, 1). `None`: the processor's own.
        expected_iou: Of each answer read the mask of the greatest expected IoU, see `likeliest_mask`; there is no threshold then.
        mirror: Average with the answers about the mirror image.
        connected: Keep of each mask its most probable connected part.

    Raises:
        ValueError: Where a threshold is given beside `expected_iou`.
    """

    threshold: float | None = None
    expected_iou: bool = False
    mirror: bool = False
    connected: bool = False

    def __post_init__(self):
        if self.expected_iou and self.threshold is not None:
            raise ValueError(
                f"threshold is {self.threshold} beside expected_iou, by which each answer has a threshold of its own."
            )

    @property
    def needs_probabilities(self) -> bool:
        """Whether a mask alone is too little to read from."""
        return self.expected_iou or self.mirror or self.connected

    def mask(self, answer: dict[str, Any], default: float) -> Tensor:
        """The mask of an answer, bool (H, W); empty where the answer is that nothing is meant.

        Args:
            answer: That of `post_process_referring_segmentation` or `average_answers`: "probabilities"; or, where they are not
                needed, "mask" alone, made with the reading's threshold; from a model that predicts presence, "no_target".
            default: Threshold where the reading has none: the processor's.
        """
        if "probabilities" not in answer:
            return answer["mask"]
        probabilities = answer["probabilities"]
        threshold = default if self.threshold is None else self.threshold
        mask = likeliest_mask(probabilities) if self.expected_iou else probabilities > threshold
        mask &= answer.get("no_target", 0.0) <= NO_TARGET_THRESHOLD
        return most_probable_part(mask, probabilities) if self.connected else mask


PLAIN = Reading()


def likeliest_mask(probabilities: Tensor) -> Tensor:
    """Of all masks the one with the greatest ratio of expected intersection to expected union, pixels taken to be independent.

    A pixel raises a ratio J where its probability is above J / (1 + J). So the mask is what lies above one threshold: low where the
    answer is uncertain, a half where the model is sure of every pixel.

    Args:
        probabilities: (H, W), in [0, 1].

    Returns:
        bool (H, W); without a pixel only where all probabilities are 0.
    """
    values = probabilities.flatten().sort(descending=True).values
    intersection = values.cumsum(0, dtype=torch.float64)
    sizes = torch.arange(1, len(values) + 1, device=values.device)
    edge = values[(intersection / (sizes + intersection[-1] - intersection)).argmax()]
    return (probabilities >= edge) & (probabilities > 0)


def most_probable_part(mask: Tensor, probabilities: Tensor) -> Tensor:
    """The connected part of a mask that holds the largest sum of probabilities: an expression means one thing.

    Args:
        mask: bool (H, W). Pixels are connected over their sides, not over their corners.
        probabilities: (H, W), in [0, 1].

    Returns:
        bool (H, W); of an empty mask the mask itself.
    """
    from scipy.ndimage import label, sum_labels  # of the extra "train"; who asks for whole masks can do without

    parts, number = label(mask.cpu().numpy())
    if number < 2:
        return mask
    held = sum_labels(probabilities.float().cpu().numpy(), parts, np.arange(1, number + 1))
    return torch.from_numpy(parts == 1 + held.argmax()).to(mask.device)


__all__ = ["PLAIN", "Reading", "likeliest_mask", "most_probable_part"]
