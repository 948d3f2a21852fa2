"""Mask decoder: gate the fused maps by the sentence, merge them, decode against the text, project to mask logits (ours)."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, interpolate

from .configuration_sera import SeraConfig
from .layers_sera import (
    SeraAttention,
    SeraConvUnit,
    SeraFeedForward,
    SeraGridCache,
    SeraSampleNorm,
    coordinate_grid,
    grid_to_tokens,
    sine_positions,
    tokens_to_grid,
)


class SeraSentenceGate(nn.Linear):
    """Sentence (N, projection_dim) to one factor per channel of a map F: cross-attention to the sentence as a single key gives
    `F · (W·sentence + b)`. b starts at one, but with W's random start a fresh factor is far from one: the sentence features of
    a CLIP have a norm of 10 to 20.

    `forward` is that of a linear layer, so that LoRA can be put on it.
    """


class SeraOpenGate(SeraSentenceGate):
    """A gate whose W starts at zero, too: its fresh factors are exactly one."""


class SeraMerge(nn.Module):
    """Maps of all taps to one map: sentence gates (if any) → concat → 1×1 → coordinate convolution, residual."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        num_taps = len(config.tap_layers)
        kind = {"standardized": SeraOpenGate, "linear": SeraSentenceGate, "none": None}[config.sentence_gate]
        self.gates = self.sentence_norm = None
        if kind is not None:
            self.gates = nn.ModuleList(kind(config.projection_dim, config.fusion_dim) for _ in range(num_taps))
        if config.sentence_gate == "standardized":
            self.sentence_norm = SeraSampleNorm(config.projection_dim)
        self.reduce = SeraConvUnit(num_taps * config.fusion_dim, config.decoder_dim, 1)
        self.coordinate_conv = SeraConvUnit(config.decoder_dim + 2, config.decoder_dim, 3)
        self.coordinates = SeraGridCache(coordinate_grid)

    def forward(self, maps: list[Tensor], sentence: Tensor) -> Tensor:
        """Maps (N, fusion_dim, H, W) and sentence (N, projection_dim) to (N, decoder_dim, H, W)."""
        if self.gates is not None:
            seen = sentence if self.sentence_norm is None else self.sentence_norm(sentence)
            maps = [grid * gate(seen)[:, :, None, None] for grid, gate in zip(maps, self.gates, strict=True)]
        merged = self.reduce(torch.cat(list(maps), dim=1))
        coordinates = self.coordinates(*merged.shape[-2:], merged).expand(merged.shape[0], -1, -1, -1)
        coordinates = coordinates.contiguous(memory_format=torch.channels_last)  # as `merged` lies, or both are copied
        return merged + self.coordinate_conv(torch.cat([merged, coordinates], dim=1))

    def fold(self) -> None:
        """Take the norm of the sentence, as in inference, into the gates, for good."""
        if self.sentence_norm is not None:
            for gate in self.gates:
                self.sentence_norm.fold_into(gate, gate.bias)
            self.sentence_norm = None


class SeraDecoderLayer(nn.Module):
    """Self-attention over positions, cross-attention to the text tokens, feed-forward; pre-norm residual branches."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        dim, heads = config.decoder_dim, config.decoder_num_heads
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = SeraAttention(config, dim=dim, num_heads=heads)
        self.text_norm = nn.LayerNorm(dim)
        self.text_attention = SeraAttention(config, dim=dim, num_heads=heads, context_dim=config.text_family.width)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = SeraFeedForward(dim, config.decoder_ffn_dim)
        self.dropout = nn.Dropout(config.decoder_dropout)

    def forward(self, tokens: Tensor, positions: Tensor, text_states: Tensor, text_mask: Tensor | None) -> Tensor:
        """(N, H·W, decoder_dim) to the same shape; `positions` (H·W, decoder_dim), `text_states` (N, L, text hidden size)."""
        tokens = tokens + self.dropout(self.self_attention(self.self_norm(tokens), positions=positions))
        tokens = tokens + self.dropout(self.text_attention(self.text_norm(tokens) + positions, text_states, text_mask))
        return tokens + self.dropout(self.ffn(self.ffn_norm(tokens)))


class SeraProjector(nn.Module):
    """Two ×2 upsamplings, then a 3×3 kernel predicted from the sentence: mask logits at four times the grid."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        dim = config.decoder_dim
        self.channels = dim // 8
        self.reduce = SeraConvUnit(dim, dim // 2, 1)
        self.refine = nn.ModuleList([SeraConvUnit(dim // 2, dim // 4, 3), SeraConvUnit(dim // 4, dim // 8, 3)])
        self.predict_kernel = nn.Linear(config.projection_dim, 9 * self.channels + 1)

    def forward(self, grid: Tensor, sentence: Tensor) -> Tensor:
        """Map (N, decoder_dim, H, W) and sentence (N, projection_dim) to logits (N, 4H, 4W)."""
        grid = self.reduce(grid)
        for refine in self.refine:
            doubled = [2 * side for side in grid.shape[-2:]]  # a factor would become a float in a traced graph
            grid = refine(interpolate(grid, size=doubled, mode="bilinear", align_corners=False))
        predicted = self.predict_kernel(sentence)
        # scaled so that logits of a fresh model have unit size whatever the width
        kernel = predicted[:, :-1].unflatten(1, (9, self.channels)) * (9 * self.channels) ** -0.5
        return self._convolve(grid, kernel) + predicted[:, -1, None, None]

    @staticmethod
    def _convolve(grid: Tensor, kernel: Tensor) -> Tensor:
        """3×3 convolution (zeros around) of each (C, H, W) row of `grid` with its own (9, C) kernel: (N, H, W).

        One matrix product gives what every position contributes to its nine neighbours; `fold` adds the contributions up.
        A grouped convolution with one group per sample is several times slower.
        """
        size = grid.shape[-2:]
        contributions = torch.einsum("nkc,ncp->nkp", kernel, grid.flatten(2))
        return fold(contributions, size, kernel_size=3, padding=1)[:, 0]


class SeraPresenceHead(nn.Module):
    """Is the thing meant in the image at all: the decoded map, gated by the sentence, pooled to one logit.

    The mean over positions alone would drown a small object, so the maximum stands beside it.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.gate = SeraSentenceGate(config.projection_dim, config.decoder_dim)
        self.score = nn.Linear(2 * config.decoder_dim, 1)

    def forward(self, grid: Tensor, sentence: Tensor) -> Tensor:
        """Map (N, decoder_dim, H, W) and sentence (N, projection_dim) to logits (N,), positive for "it is there"."""
        gated = grid * self.gate(sentence)[:, :, None, None]
        return self.score(torch.cat([gated.mean(dim=(2, 3)), gated.amax(dim=(2, 3))], dim=1))[:, 0]


class SeraMaskDecoder(nn.Module):
    """Fused maps, text tokens and sentence to mask logits and, where the configuration asks for it, a presence logit."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        dim = config.decoder_dim
        self.merge = SeraMerge(config)
        self.positions = SeraGridCache(partial(sine_positions, dim=dim))
        self.layers = nn.ModuleList(SeraDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.norm = nn.LayerNorm(dim)
        self.projector = SeraProjector(config)
        self.presence_head = SeraPresenceHead(config) if config.predict_presence else None

    def forward(
        self, maps: list[Tensor], text_states: Tensor, text_mask: Tensor | None, sentence: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            maps: One (N, fusion_dim, H, W) per tap.
            text_states: (N, L, text hidden size).
            text_mask: Attention mask that hides the padding, for (N, 1, H·W, L).
            sentence: (N, projection_dim).

        Returns:
            Mask logits (N, 4H, 4W), and presence logits (N,) or `None`.
        """
        grid = self.merge(maps, sentence)
        grid_size = grid.shape[-2:]
        tokens, positions = grid_to_tokens(grid), self.positions(*grid_size, grid)
        for layer in self.layers:
            tokens = layer(tokens, positions, text_states, text_mask)
        grid = tokens_to_grid(self.norm(tokens), grid_size)
        presence = None if self.presence_head is None else self.presence_head(grid, sentence)
        return self.projector(grid, sentence), presence


__all__ = ["SeraMaskDecoder"]
