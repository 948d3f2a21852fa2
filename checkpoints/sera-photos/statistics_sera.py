"""Running statistics of normalisation layers, which training moves: they are frozen where the weights around them are."""

from torch import nn
from transformers import PreTrainedModel

from .configuration_sera import SeraConfig
from .layers_sera import SeraSampleStatistics

STATISTICS = (nn.modules.batchnorm._BatchNorm, SeraSampleStatistics)  # layers with running statistics


def freeze_statistics(layer: nn.Module) -> bool:
    """Put [`STATISTICS`] into evaluation mode in every layer that has a frozen parameter outside the towers.

    Returns:
        Whether `layer` has no frozen parameter outside the towers.
    """
    is_trained = all(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    inside = []
    for child in layer.children():
        if isinstance(child, PreTrainedModel) and not isinstance(child.config, SeraConfig):
            continue  # a tower: most of all layers are there, and none has running statistics
        is_trained = freeze_statistics(child) and is_trained
        if isinstance(child, STATISTICS):
            inside.append(child)
    if not is_trained:
        for child in inside:
            child.eval()
    return is_trained


__all__ = ["freeze_statistics"]
