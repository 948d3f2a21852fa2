"""The vision tower with a SERA-Adapter in chosen blocks. Feature maps are taken (tapped) at several depths."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter_sera import SeraAdapter
from .configuration_sera import SeraConfig
from .layers_sera import SeraSampleStatistics


class SeraBlockView(NamedTuple):
    """Results of an adapted block for images, before it sees the text.

    Attributes:
        hidden_states: (B, num_prefix + H·W, hidden_size) after the block's attention.
        update: Of the same shape, the feed-forward part's output.
        maps: Results of [`SeraAdapter.look`].
    """

    hidden_states: Tensor
    update: Tensor
    maps: tuple[Tensor, ...]


class SeraImages(NamedTuple):
    """Results of the tower for images, as far as no text is needed; rows are images (B).

    Attributes:
        hidden_states: (B, num_prefix + H·W, hidden_size) before the first adapted block, `None` where `view` or `taps` hold all
            that is needed. Without adapters: after the last block that runs.
        view: Results of the first adapted block; `None` without adapters, and in training from pixels.
        taps: Patch tokens (B, H·W, hidden_size) of the tapped depths before the first adapted block.
        grid_size: (H, W), in patches.
        positions: Further arguments of every block, of [`SeraVisionFamily.positions`].
        num_images: B.
    """

    hidden_states: Tensor | None
    view: SeraBlockView | None
    taps: list[Tensor]
    grid_size: tuple[int, int]
    positions: dict[str, Any]
    num_images: int


class SeraAdaptedBlock(GradientCheckpointingLayer):
    """One transformer block with an adapter on its feed-forward path: `x + LS2(MLP(norm2 x) + s·Adapter(norm2 x, text))`.

    The block itself stays a part of the tower, with the tower's parameter names; it is an argument of every call.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.scale = config.adapter_scale
        self.family = config.vision_family
        self.adapter = SeraAdapter(config)

    def forward(
        self,
        hidden_states: Tensor,
        block: nn.Module,
        positions: dict[str, Any],
        image_index: Tensor | None,
        condition: dict,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (B, num_prefix + H·W, hidden_size). The adapter does not touch the first `num_prefix` tokens.
            block: The tower's block.
            positions: Of [`SeraVisionFamily.positions`].
            image_index: (N,) row of `hidden_states` each expression is about, or `None` where rows are expressions already.
            condition: `grid_size`, `text_states`, `text_mask`, `sentence` and `num_images` for the adapter.

        Returns:
            (N, num_prefix + H·W, hidden_size) and the router weights (N, 2); `None` without experts.
        """
        view = self.look(hidden_states, block, positions, condition["grid_size"])
        return self.attend(view, block, image_index, condition)

    def look(
        self, hidden_states: Tensor, block: nn.Module, positions: dict[str, Any], grid_size: tuple[int, int]
    ) -> SeraBlockView:
        """The part of [`forward`] that does not depend on the text."""
        attended = self.family.attend(block, hidden_states, positions)
        normed = self.family.norm(block, attended)
        update = self.family.feed_forward(block, normed)
        return SeraBlockView(attended, update, self.adapter.look(normed[:, self.family.num_prefix :], grid_size))

    def keep_statistics_when_recomputed(self) -> None:
        """Have the second computation, of activation checkpointing, leave all running statistics alone."""
        checkpoint = self._gradient_checkpointing_func
        given = getattr(checkpoint, "keywords", {}).get("context_fn", lambda: (nullcontext(), nullcontext()))

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            first, second = given()
            return first, self._running_statistics_kept(second)

        self._gradient_checkpointing_func = partial(checkpoint, context_fn=contexts)

    @contextmanager
    def _running_statistics_kept(self, context: AbstractContextManager) -> Iterator[None]:
        norms = [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        samples = [module for module in self.modules() if isinstance(module, SeraSampleStatistics)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # synchronised norms want one
        for statistics in samples:
            statistics.is_kept = True
        try:
            with context:
                yield
        finally:
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count
            for statistics in samples:
                statistics.is_kept = False

    def attend(
        self, view: SeraBlockView, block: nn.Module, image_index: Tensor | None, condition: dict
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of [`forward`]."""
        hidden_states, update, maps = view
        text = {name: value for name, value in condition.items() if name != "grid_size"}
        correction, weights = self.adapter.attend(maps, image_index=image_index, **text)
        if image_index is not None:
            update, hidden_states = update[image_index], hidden_states[image_index]
        prefix = self.family.num_prefix
        update = torch.cat([update[:, :prefix], update[:, prefix:] + self.scale * correction], dim=1)
        return self.family.add(block, hidden_states, update), weights


class SeraVisionEncoder(nn.Module):
    """A vision tower with SERA-Adapters. The part before the first adapter runs once per image, the rest once per expression."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.family = config.vision_family
        self.tower = self.family.build()
        self.adapted_blocks = nn.ModuleDict({str(i): SeraAdaptedBlock(config) for i in config.adapter_layers})
        self.tap_layers = tuple(config.tap_layers)
        self.depth = self.tap_layers[-1]  # nothing uses the blocks after it, so they do not run
        self.first_adapted = min(config.adapter_layers, default=self.depth)
        self.patch_size, self.num_prefix = self.family.patch_size, self.family.num_prefix
        self.family.settle(self.tower)

    @property
    def blocks(self) -> nn.ModuleList:
        """The tower's blocks."""
        return self.family.blocks(self.tower)

    def train(self, mode: bool = True) -> "SeraVisionEncoder":
        """Set the training or the evaluation mode. A frozen tower gives the same features in both."""
        super().train(mode)
        self.family.settle(self.tower)
        return self

    def grid_size(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of (B, 3, H, W) images; `ValueError` where a side is no multiple of the patch."""
        height, width = pixel_values.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values are {height}×{width} pixels; both sides must be multiples of the patch size {self.patch_size}."
            )
        return height // self.patch_size, width // self.patch_size

    def encode_states(self, pixel_values: Tensor) -> Tensor:
        """Compute all that comes before the first adapter, for (B, 3, H, W) images. A frozen tower always gives the same.

        Returns:
            (B, states, num_prefix + H·W, hidden_size). The states are the tapped ones before the first adapted block, then the
            `hidden_states` and the `update` of [`SeraBlockView`] of this block.
        """
        positions = self.family.positions(self.tower, pixel_values)
        hidden_states, kept = self._run_shared(pixel_values, positions)
        if self.adapted_blocks:
            block = self.blocks[self.first_adapted]
            attended = self.family.attend(block, hidden_states, positions)
            kept += [attended, self.family.feed_forward(block, self.family.norm(block, attended))]
        return torch.stack(kept, dim=1)

    def encode_images(self, pixel_values: Tensor, states: Tensor | None = None) -> SeraImages:
        """Compute all that does not depend on the text.

        Args:
            pixel_values: (B, 3, H, W) images, normalised; sides are multiples of the patch.
            states: Cached results of [`encode_states`]. Of the images only the size is then used.
        """
        grid_size = self.grid_size(pixel_values)
        positions = self.family.positions(self.tower, pixel_values)
        if states is not None:
            kept = list(states.unbind(1))
            hidden_states, view = kept[-1], None
            if self.adapted_blocks:
                *kept, attended, update = kept
                normed = self.family.norm(self.blocks[self.first_adapted], attended)
                adapter = self.adapted_blocks[str(self.first_adapted)].adapter
                view = SeraBlockView(attended, update, adapter.look(normed[:, self.num_prefix :], grid_size))
            return SeraImages(hidden_states, view, self._shared_taps(kept), grid_size, positions, pixel_values.shape[0])
        hidden_states, kept = self._run_shared(pixel_values, positions)
        view = None
        if self.adapted_blocks and not self.training:  # in training the whole block's activations can be checkpointed
            adapted = self.adapted_blocks[str(self.first_adapted)]
            view = adapted.look(hidden_states, self.blocks[self.first_adapted], positions, grid_size)
        return SeraImages(hidden_states, view, self._shared_taps(kept), grid_size, positions, pixel_values.shape[0])

    def images_of(
        self, grid_size: tuple[int, int], num_images: int, block_states: tuple[Tensor, ...], maps: tuple[Tensor, ...]
    ) -> SeraImages:
        """What [`encode_images`] gave in inference, without the taps, from the fields of the view that it made."""
        size = [side * self.patch_size for side in grid_size]
        positions = self.family.positions(self.tower, torch.empty(1, 1, 1, 1).expand(num_images, 3, *size))
        view = SeraBlockView(*block_states, maps) if block_states else None
        return SeraImages(None, view, [], grid_size, positions, num_images)

    def forward(
        self, images: SeraImages, *, image_index: Tensor | None, condition: dict
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """
        Args:
            images: From [`encode_images`].
            image_index: (N,) row of `images` each expression is about; `None` means one each.
            condition: What conditions the adapters; see [`SeraAdaptedBlock`].

        Returns:
            Patch tokens (N, H·W, hidden_size) of the depths that `images.taps` does not hold, and per adapter with experts its
            router weights (N, 2).
        """
        hidden_states, router_weights, taps = images.hidden_states, [], []
        for i in range(self.first_adapted, self.depth):
            block = self.blocks[i]
            if str(i) not in self.adapted_blocks:
                hidden_states = block(hidden_states, **images.positions)
            else:
                adapted, is_first = self.adapted_blocks[str(i)], i == self.first_adapted
                context = (image_index if is_first else None, condition)
                if is_first and images.view is not None:
                    hidden_states, weights = adapted.attend(images.view, block, *context)
                else:
                    hidden_states, weights = adapted(hidden_states, block, images.positions, *context)
                if weights is not None:
                    router_weights.append(weights)
            self._tap(hidden_states, i + 1, taps)
        return taps, tuple(router_weights)

    def _run_shared(self, pixel_values: Tensor, positions: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (B, num_prefix + H·W, hidden_size) before the first adapted block, and the tapped ones before it."""
        hidden_states, kept = self.family.embed(self.tower, pixel_values), []
        for i in range(self.first_adapted):
            hidden_states = self.blocks[i](hidden_states, **positions)
            if i + 1 in self.tap_layers:
                kept.append(hidden_states)
        return hidden_states, kept

    def _shared_taps(self, kept: list[Tensor]) -> list[Tensor]:
        """Patch tokens of the hidden states that [`_run_shared`] kept."""
        taps: list[Tensor] = []
        for hidden_states, depth in zip(kept, self.tap_layers, strict=False):
            self._tap(hidden_states, depth, taps)
        return taps

    def _tap(self, hidden_states: Tensor, depth: int, taps: list[Tensor]) -> None:
        """Add the patch tokens after `depth` blocks to `taps`, if `depth` is among the configured depths."""
        if depth in self.tap_layers:
            is_last = depth == self.family.depth
            tapped = self.family.final_norm(self.tower)(hidden_states) if is_last else hidden_states
            taps.append(tapped[:, self.num_prefix :])


__all__ = ["SeraAdaptedBlock", "SeraImages", "SeraVisionEncoder"]
