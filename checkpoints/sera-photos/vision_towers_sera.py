"""What SERA needs of a vision tower: one class for each family of towers, found by `model_type` in [`VISION_FAMILIES`].

The classes hold a configuration and no weights. The tower itself stays a model of transformers, with the names that transformers
gives to its weights, and is an argument of the methods. They call the tower's own layers, so the interface adds no operator.
"""

import math
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


class SeraVisionFamily:
    """A vision transformer with patch tokens behind `num_prefix` others. The defaults fit a tower with DINOv2's names of layers.

    A block computes `x + LS1(attention(norm1 x))`, then `x + LS2(MLP(norm2 x))`. The adapters work on the second part.

    Args:
        config: The tower's configuration.
    """

    name: str  # of the family, in messages and on model cards

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config.hidden_size

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    @property
    def patch_size(self) -> int:
        """Side in pixels of the square patches."""
        patch = self.config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    @property
    def num_prefix(self) -> int:
        """Number of class and register tokens, which stand before the patch tokens."""
        return 1 + getattr(self.config, "num_register_tokens", 0)

    def check(self) -> None:
        """Raise a `ValueError` for a configuration that SERA cannot use."""
        sides = self.config.patch_size
        if not isinstance(sides, int) and len(set(sides)) != 1:
            raise ValueError(f"vision_config.patch_size is {list(sides)}; SERA takes square patches only.")
        if self.config.num_channels != 3:
            raise ValueError(
                f"vision_config.num_channels is {self.config.num_channels}; SERA's images have 3 channels."
            )

    def build(self) -> PreTrainedModel:
        """A tower with fresh weights."""
        return AutoModel.from_config(self.config)

    def load(self, checkpoint: str | PathLike, dtype: torch.dtype) -> PreTrainedModel:
        """The tower of a checkpoint; `ValueError` where weights are missing."""
        tower, info = AutoModel.from_pretrained(checkpoint, config=self.config, dtype=dtype, output_loading_info=True)
        refuse_missing(info["missing_keys"], checkpoint, self.name)
        return tower

    def settle(self, tower: PreTrainedModel) -> None:
        """Called whenever the model's mode is set: a tower gives the same features in training as in inference."""

    def embed(self, tower: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) images to the first hidden states (B, num_prefix + patches, width)."""
        return tower.embeddings(pixel_values)

    def positions(self, tower: PreTrainedModel, pixel_values: Tensor) -> dict[str, Any]:
        """Further arguments of every block. They depend on the size of the (B, 3, H, W) images alone."""
        return {}

    def blocks(self, tower: PreTrainedModel) -> nn.ModuleList:
        """The blocks, in their order. Called with hidden states and [`positions`], a block gives the next hidden states."""
        return tower.encoder.layer

    def final_norm(self, tower: PreTrainedModel) -> nn.Module:
        """The norm after the last block."""
        return tower.layernorm

    def attend(self, block: nn.Module, hidden_states: Tensor, positions: dict[str, Any]) -> Tensor:
        """The first part of a block: hidden states after its attention, of the same shape."""
        attended = block.attention(block.norm1(hidden_states), **positions)
        if isinstance(attended, tuple):  # transformers 5.20 and later also return the attention weights
            attended, _ = attended
        return block.drop_path(block.layer_scale1(attended)) + hidden_states

    def norm(self, block: nn.Module, attended: Tensor) -> Tensor:
        """The input of the feed-forward part, from what [`attend`] gave."""
        return block.norm2(attended)

    def feed_forward(self, block: nn.Module, normed: Tensor) -> Tensor:
        """The feed-forward part's output, to which an adapter adds its correction."""
        return block.mlp(normed)

    def add(self, block: nn.Module, attended: Tensor, update: Tensor) -> Tensor:
        """The hidden states after the block, from what [`attend`] gave and the (corrected) output of [`feed_forward`]."""
        return block.drop_path(block.layer_scale2(update)) + attended

    def unread(self, tower: PreTrainedModel) -> Iterator[nn.Parameter]:
        """Parameters that no forward pass uses. They are never trained."""
        mask_token = getattr(tower.embeddings, "mask_token", None)
        if mask_token is not None:
            yield mask_token


class SeraDinov2(SeraVisionFamily):
    """DINOv2, with or without register tokens: learned positions, interpolated to the size of the image."""

    name = "DINOv2"

    @property
    def has_registers(self) -> bool:
        """Whether the tower has register tokens."""
        return self.config.model_type == "dinov2_with_registers"

    @property
    def num_prefix(self) -> int:
        """See the base class."""
        return 1 + (self.config.num_register_tokens if self.has_registers else 0)

    def embed(self, tower: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """See the base class."""
        embeddings = tower.embeddings
        if not torch.compiler.is_compiling():
            return embeddings(pixel_values)
        # The same without `int()` of the grid's size, which would make the size a constant of a traced graph.
        positions = embeddings.position_embeddings
        side = math.isqrt(positions.shape[1] - 1)
        resized = interpolate(
            positions[:, 1:].float().transpose(1, 2).unflatten(2, (side, side)),
            size=tuple(length // self.patch_size for length in pixel_values.shape[-2:]),
            mode="bicubic",
            align_corners=False,
            antialias=self.has_registers,
        ).to(positions.dtype)
        patches = embeddings.patch_embeddings(pixel_values.to(positions.dtype)) + resized.flatten(2).transpose(1, 2)
        prefix = embeddings.cls_token + positions[:, :1]
        if self.has_registers:
            prefix = torch.cat([prefix, embeddings.register_tokens], dim=1)
        return embeddings.dropout(torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1))


class SeraDinov3(SeraVisionFamily):
    """DINOv3: rotary positions, which every block gets. They are computed anew for every size of image."""

    name = "DINOv3"

    def settle(self, tower: PreTrainedModel) -> None:
        """Positions are never rescaled at random, as DINOv3's own training does: a cached tower could not follow."""
        tower.rope_embeddings.eval()

    def positions(self, tower: PreTrainedModel, pixel_values: Tensor) -> dict[str, Any]:
        """See the base class."""
        like = tower.embeddings.patch_embeddings.weight.new_empty(1, 1, 1, 1)  # of the pixels the size alone is used
        return {"position_embeddings": tower.rope_embeddings(like.expand(1, 1, *pixel_values.shape[-2:]))}

    def blocks(self, tower: PreTrainedModel) -> nn.ModuleList:
        """See the base class."""
        return getattr(tower, "model", tower).layer  # older releases of transformers have no encoder inside

    def final_norm(self, tower: PreTrainedModel) -> nn.Module:
        """See the base class."""
        return tower.norm


VISION_FAMILIES: dict[str, type[SeraVisionFamily]] = {
    "dinov2": SeraDinov2,
    "dinov2_with_registers": SeraDinov2,
    "dinov3_vit": SeraDinov3,
}


def refuse_missing(keys: set[str], checkpoint: str | PathLike, tower: str) -> None:
    """Raise a `ValueError` if a checkpoint of a `tower` lacks weights."""
    if keys:
        raise ValueError(f"{checkpoint} lacks weights of the {tower}, the first being {sorted(keys)[0]!r}.")


__all__ = ["VISION_FAMILIES", "SeraDinov2", "SeraDinov3", "SeraVisionFamily", "refuse_missing"]
