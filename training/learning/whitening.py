"""A start for the layers that read the vision tower: principal directions of its features, scaled to unit variance (ours).

The features of a tower vary much along a few directions, often those that separate figure and ground. They vary little along
the directions that separate kinds of things. Layers that start with random weights need many steps before they use these.
Labels play no part.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from modeling_sera import SeraForReferringSegmentation

LEAST = 0.05  # share of the largest deviation: directions that vary less are scaled as if they had this deviation


def whiten_projections(model: SeraForReferringSegmentation, sample: Iterable[tuple[Tensor, tuple[int, int]]]) -> None:
    """Set the first projection of every fusion and adapter of a new model, in place.

    Where a projection has more outputs than inputs, the further rows of its weight stay as they are.

    Args:
        model: The model. The up-projections of its adapters are still zero, so that no feature depends on the text.
        sample: For some training images, states (M, states, num_prefix + H·W, hidden_size) that `SeraVisionEncoder.encode_states`
            gave, and height and width in pixels.
    """
    read: dict[nn.Linear, list[Tensor]] = {layer: [] for layer in projections(model)}
    was_training = model.training
    model.eval()
    with torch.no_grad(), ExitStack() as hooks:
        for layer in read:
            handle = layer.register_forward_pre_hook(lambda layer, inputs: read[layer].append(inputs[0].flatten(0, 1)))
            hooks.callback(handle.remove)
        text = model.config.text_family.blank()
        for states, size in sample:
            pixels = torch.zeros(1, 1, 1, 1).expand(len(states), 3, *size)
            model(pixels, text.expand(len(states), -1), image_states=states.float())
        for layer, features in read.items():
            _whiten(layer, torch.cat(features))
    model.train(was_training)


def projections(model: SeraForReferringSegmentation) -> Iterator[nn.Linear]:
    """The layers that read the vision tower's features."""
    yield from (fusion.project for fusion in model.model.fusions)
    yield from (block.adapter.down_proj for block in model.model.vision.adapted_blocks.values())


def _whiten(layer: nn.Linear, features: Tensor) -> None:
    """Set a layer so that its outputs for (n, channels) features are uncorrelated, with mean 0 and variance 1.

    Outputs of directions with a small deviation (`LEAST`) have a smaller variance.
    """
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))  # the largest last
    deviations = variances.clamp(min=0).sqrt().flip(0)[: layer.out_features]
    directions = directions.T.flip(0)[: layer.out_features]
    layer.weight[: len(directions)] = directions / deviations.clamp(min=LEAST * deviations[0].item())[:, None]
    layer.bias.copy_(-(layer.weight @ mean))


__all__ = ["projections", "whiten_projections"]
