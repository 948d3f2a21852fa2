"""Masks cut down to one connected part: an expression means one thing; in doubt, models answer with parts of several (ours)."""

import numpy as np
import torch
from torch import Tensor


def most_probable_part(mask: Tensor, probabilities: Tensor) -> Tensor:
    """The connected part of a mask that holds the largest sum of probabilities.

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


__all__ = ["most_probable_part"]
