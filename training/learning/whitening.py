"""A start for what reads the vision tower: principal directions of its features, each scaled to unit variance (ours).

A tower's features vary much along a few directions (of a tower made for saliency, figure against ground) and little along those
that tell one kind of thing from another; from a random start many steps pass before these are heard. Labels play no part.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from modeling_sera import SeraForReferringSegmentation

LEAST = 0.05  # of the first direction's deviation: directions that vary less are scaled as if they varied so much
BATCH = 16  # images at once


def whiten_projections(model: SeraForReferringSegmentation, states: Tensor, size: tuple[int, int]) -> None:
    """Set the first projection of every fusion and adapter of a fresh model, in place.

    Where a projection is wider than its input, its further rows stay as they are.

    Args:
        model: Its adapters' up-projections are still zero, so that what is read does not depend on the text.
        states: (M, states, num_prefix + H·W, hidden_size), of `SeraVisionEncoder.encode_states`, of some training images.
        size: Height and width of the images in pixels.
    """
    read: dict[nn.Linear, list[Tensor]] = {layer: [] for layer in projections(model)}
    was_training = model.training
    model.eval()
    with torch.no_grad(), ExitStack() as hooks:
        for layer in read:
            handle = layer.register_forward_pre_hook(lambda layer, inputs: read[layer].append(inputs[0].flatten(0, 1)))
            hooks.callback(handle.remove)
        text = torch.tensor([[model.config.text_config.bos_token_id, model.config.text_config.eos_token_id]])
        for part in states.split(BATCH):
            pixels = torch.zeros(1, 1, 1, 1).expand(len(part), 3, *size)
            model(pixels, text.expand(len(part), -1), image_states=part.float())
        for layer, features in read.items():
            _whiten(layer, torch.cat(features))
    model.train(was_training)


def projections(model: SeraForReferringSegmentation) -> Iterator[nn.Linear]:
    """The layers that read the vision tower's features."""
    yield from (fusion.project for fusion in model.model.fusions)
    yield from (block.adapter.down_proj for block in model.model.vision.adapted_blocks.values())


def _whiten(layer: nn.Linear, features: Tensor) -> None:
    """Have a layer give uncorrelated channels of mean 0 and variance 1 (the least directions less) on (n, channels) features."""
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))  # the largest last
    deviations = variances.clamp(min=0).sqrt().flip(0)[: layer.out_features]
    directions = directions.T.flip(0)[: layer.out_features]
    layer.weight[: len(directions)] = directions / deviations.clamp(min=LEAST * deviations[0].item())[:, None]
    layer.bias.copy_(-(layer.weight @ mean))


__all__ = ["projections", "whiten_projections"]
