"""What the model refuses, each with a sentence that names the value."""

import torch
from torch import Tensor


def check_batch(
    pixel_values: Tensor, input_ids: Tensor, image_index: Tensor | None, image_states: Tensor | None = None
) -> None:
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}; expected (images, 3, height, width).")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected (expressions, tokens).")
    if not torch.compiler.is_compiling() and 0 in input_ids.shape:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; there must be an expression.")
    if image_states is not None and image_states.shape[0] != pixel_values.shape[0]:
        raise ValueError(f"image_states are of {len(image_states)} images, pixel_values of {len(pixel_values)}.")
    if image_index is None:
        if input_ids.shape[0] != pixel_values.shape[0]:  # len() would make a constant of it in a traced graph
            raise ValueError(
                f"{len(input_ids)} expressions for {len(pixel_values)} images need image_index, which says the image that "
                "each expression is about."
            )
    elif image_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"image_index is of {image_index.dtype}; it must be of torch.int64 or torch.int32.")
    elif image_index.shape != input_ids.shape[:1]:
        raise ValueError(f"image_index has shape {tuple(image_index.shape)}; expected ({len(input_ids)},).")
    elif (
        not torch.compiler.is_compiling() and image_index.device.type == "cpu"
    ):  # elsewhere reading it would stall the device
        low, high = int(image_index.min()), int(image_index.max())
        if low < 0 or high >= len(pixel_values):
            raise ValueError(f"image_index holds {low if low < 0 else high}; there are {len(pixel_values)} images.")


__all__ = ["check_batch"]
