"""What the model refuses to take or to give; each refusal names the value and what is accepted."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_sera import SeraConfig
from .features_sera import SeraImageFeatures, check_features, tensors_in


def check_pixels(pixel_values: Tensor) -> None:
    """Raise a `ValueError` for images that are no tensor (B, 3, H, W)."""
    _check_tensor("pixel_values", pixel_values)
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}; expected (images, 3, height, width).")


def check_batch(
    model: PreTrainedModel,
    pixel_values: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    image_index: Tensor | None,
    image_states: Tensor | None,
    image_features: SeraImageFeatures | None,
    labels: Tensor | None = None,
) -> None:
    """Refuse inputs of the `forward` of a model that do not fit each other.

    The values of `image_index` are checked on CPUs alone: elsewhere the check would have to wait for the device.

    Raises:
        ValueError: Where an input is missing, is no tensor or has a wrong shape or dtype, where `image_index` names an image that
            is not there, where an image in `pixel_values` has no expression, and for image features that cannot be used.
    """
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_index": image_index,
        "image_states": image_states,
        "labels": labels,
    }
    for name, value in inputs.items():
        if value is not None:
            _check_tensor(name, value)
    if (pixel_values is None) == (image_features is None):
        both = "both" if image_features is not None else "neither"
        raise ValueError(f"The model takes either pixel_values or image_features; {both} of them are given.")
    if input_ids is None:
        raise ValueError("input_ids are missing; the processor makes them of text.")
    if image_features is None:
        check_pixels(pixel_values)
        num_images = pixel_values.shape[0]
    else:
        _check_use_of_features(model, image_states, labels)
        check_features(image_features, model.config, model.dtype)
        num_images = image_features.batch_size
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected (expressions, tokens).")
    if not torch.compiler.is_compiling() and 0 in input_ids.shape:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; there must be an expression.")
    if image_states is not None and image_states.shape[0] != num_images:
        raise ValueError(f"image_states are of {len(image_states)} images, pixel_values of {num_images}.")
    if labels is not None and labels.shape != (len(input_ids), *pixel_values.shape[-2:]):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected {(len(input_ids), *pixel_values.shape[-2:])}, one mask per "
            "expression over the input image."
        )
    if image_index is None:
        if input_ids.shape[0] != num_images:  # len() would make a constant of it in a traced graph
            raise ValueError(
                f"{len(input_ids)} expressions for {num_images} images need image_index, which names the image of "
                "each expression."
            )
    elif image_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"image_index is of {image_index.dtype}; it must be of torch.int64 or torch.int32.")
    elif image_index.shape != input_ids.shape[:1]:
        raise ValueError(f"image_index has shape {tuple(image_index.shape)}; expected ({len(input_ids)},).")
    elif not torch.compiler.is_compiling() and image_index.device.type == "cpu":
        _check_index(image_index, num_images, is_whole=image_features is None)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}; the model takes torch tensors, as the processor gives them with "
            "return_tensors='pt'."
        )


def _check_use_of_features(model: nn.Module, image_states: Tensor | None, labels: Tensor | None) -> None:
    """Raise where features are given to training, or beside another input that stands for the images."""
    if image_states is not None:
        raise ValueError("image_states and image_features are both given; image_states go with pixel_values.")
    if model.training or labels is not None:
        given = "labels are given" if labels is not None else "the model is in training mode"
        raise ValueError(f"image_features are for inference, but {given}; give pixel_values to train or to get a loss.")


def _check_index(image_index: Tensor, num_images: int, is_whole: bool) -> None:
    low, high = int(image_index.min()), int(image_index.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"image_index holds {low if low < 0 else high}; there are {num_images} images.")
    if not is_whole:
        return
    unused = image_index.bincount(minlength=num_images) == 0
    if unused.any():
        # rows of several calls of the processor, batched anew, arrive here: their masks would be of other images
        raise ValueError(
            f"image_index gives no expression to image {int(unused.nonzero()[0])} of {num_images}; each image in pixel_values "
            "needs one. An image_index is valid only in the batch that the processor made it for."
        )


def check_requested_outputs(config: SeraConfig, requested: dict[str, Any]) -> None:
    """Refuse outputs that other models of transformers give and SERA does not.

    Args:
        config: Gives the value of an option that `requested` does not hold.
        requested: Further keyword arguments of `forward`.

    Raises:
        ValueError: For `output_hidden_states` and `output_attentions`.
    """
    for name in ("output_hidden_states", "output_attentions"):
        given = requested.get(name)
        value = getattr(config, name) if given is None else given
        if value:
            raise ValueError(
                f"{name} is {value}, but SERA does not return them; leave it False. SeraModel returns the fused maps and the "
                "text features."
            )


def check_finite(
    logits: Tensor,
    presence_logits: Tensor | None,
    model: nn.Module,
    pixel_values: Tensor | None,
    image_states: Tensor | None,
    image_features: SeraImageFeatures | None,
) -> None:
    """Refuse logits that are not finite; every mask made of them would be wrong.

    Args:
        logits: (N, h, w).
        presence_logits: (N,), where the model gives them.
        model: The model that gave them, searched for weights that are not finite.
        pixel_values: (B, 3, H, W) that it was given, searched next.
        image_states: Searched after these.
        image_features: Searched last.

    Raises:
        ValueError: With the cause, as far as it can be told.
    """
    finite = logits.isfinite().flatten(1).all(dim=1)
    if presence_logits is not None:
        finite = finite & presence_logits.isfinite()
    if finite.all():
        return
    cause = f"The weights and the inputs are finite; the numbers overflow in {logits.dtype}."
    inputs = {"pixel_values": pixel_values, "image_states": image_states, "image_features": image_features}
    for name, value in [*model.state_dict().items(), *inputs.items()]:
        if not all(tensor.isfinite().all() for tensor in tensors_in(value)):
            is_input = name in inputs
            cause = (
                f"{name} are not finite." if is_input else f"The weights {name!r} are not finite: training diverged."
            )
            break
    raise ValueError(
        f"The logits of {int((~finite).sum())} of {len(finite)} expressions are not finite (nan or infinite). {cause}"
    )


__all__ = ["check_batch", "check_finite", "check_pixels", "check_requested_outputs"]
