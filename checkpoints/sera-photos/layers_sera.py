"""Layers that several parts of SERA use: attention, feed-forward, convolution units, statistics over samples, coordinates."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sera import SeraConfig


def tokens_to_grid(tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Lay patch tokens (B, H·W, C) on their grid: (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid_size)


def grid_to_tokens(grid: Tensor) -> Tensor:
    """Flatten a feature map (B, C, H, W) to tokens (B, H·W, C), row by row."""
    return grid.flatten(2).transpose(1, 2)


def coordinate_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Centres of the grid's cells in [-1, 1] (`align_corners=False`), (2, H, W): x first, then y. The paper's grid G."""
    y = (torch.arange(height, device=like.device, dtype=torch.float32) * 2 + 1) / height - 1
    x = (torch.arange(width, device=like.device, dtype=torch.float32) * 2 + 1) / width - 1
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).to(like.dtype)


def sine_positions(height: int, width: int, like: Tensor, *, dim: int) -> Tensor:
    """Sine-cosine position encoding of a grid, (H·W, dim): half of the channels for y, half for x (ours).

    Positions are counted in cells, so that neighbouring cells are equally far apart at every image size.
    """
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, device=like.device, dtype=torch.float32) / (dim // 4))
    angle_y = torch.arange(height, device=like.device, dtype=torch.float32)[:, None] * frequencies
    angle_x = torch.arange(width, device=like.device, dtype=torch.float32)[:, None] * frequencies
    encoded_y = torch.cat([angle_y.sin(), angle_y.cos()], dim=-1)[:, None].expand(height, width, -1)
    encoded_x = torch.cat([angle_x.sin(), angle_x.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([encoded_y, encoded_x], dim=-1).flatten(0, 1).to(like.dtype)


class SeraGridCache(nn.Module):
    """Remembers a tensor that depends on a grid's size alone, so that it is made once per size and not once per call.

    It holds no buffer: what is kept can always be made again, so nothing of it is saved or has to be loaded.
    """

    MAX_SIZES = 8  # images of many sizes must not fill the memory

    def __init__(self, make: Callable[[int, int, Tensor], Tensor]):
        super().__init__()
        self.make = make
        self.made: dict[tuple, Tensor] = {}

    def forward(self, height: int, width: int, like: Tensor) -> Tensor:
        """The tensor for a height × width grid on the device and in the dtype of `like`."""
        if torch.compiler.is_compiling():
            return self.make(height, width, like)  # a traced graph folds or recomputes it; a dict lookup would break it
        key = (height, width, like.device, like.dtype)
        if key not in self.made:
            if len(self.made) >= self.MAX_SIZES:
                self.made.pop(next(iter(self.made)))
            with torch.inference_mode(False), torch.no_grad():  # must stay usable in training after an inference call
                self.made[key] = self.make(height, width, like.new_empty(0))
        return self.made[key]

    def __getstate__(self):
        return self.__dict__ | {"made": {}}  # copies and pickles of a model start empty


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention written out: (B, heads, Q, D) queries to (B, Q, heads, D) values and the weights."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = torch.einsum("bhqk,bhkd->bqhd", nn.functional.dropout(weights, dropout, module.training), value)
    return mixed, weights


class SeraAttention(nn.Module):
    """Multi-head attention over tokens; self-attention, or cross-attention to tokens of another width.

    The kernel is the one `config._attn_implementation` names (eager, sdpa …).
    """

    is_causal = False

    def __init__(self, config: SeraConfig, *, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = (dim // num_heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(context_dim or dim, dim)
        self.v_proj = nn.Linear(context_dim or dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self,
        queries: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            queries: (B, Q, dim).
            context: (N, K, context_dim) to attend to; `None` means the queries themselves.
            attention_mask: As `transformers.masking_utils` makes it for the chosen kernel, for (N, 1, Q, K).
            positions: (Q, dim) added to queries and keys, not to values; self-attention only.
            query_index: (N,) the row of `queries` that each row of `context` belongs to. The query projection is then
                computed once per row of `queries`. `None` means one each.

        Returns:
            (N, Q, dim).
        """
        located = queries if positions is None else queries + positions
        query = self._heads(self.q_proj(located))
        key = self._heads(self.k_proj(located if context is None else context))
        value = self._heads(self.v_proj(queries if context is None else context))
        if query_index is not None:
            query = query[query_index]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(mixed.flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SeraFeedForward(nn.Sequential):
    """Linear, GELU, linear on tokens (…, dim)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))


class SeraConvUnit(nn.Sequential):
    """Convolution, batch norm, ReLU on (B, C, H, W), spatial size kept: φ(Conv(·)) with φ = ReLU∘BN of the equations."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def fold(self) -> None:
        """Take the batch norm of inference into the convolution, for good."""
        if isinstance(self[1], nn.BatchNorm2d):
            self[0], self[1] = fuse_conv_bn_eval(self[0], self[1]), nn.Identity()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


@torch.compiler.disable
def _sum_over_processes(tensor: Tensor) -> Tensor:
    return _SumOverProcesses.apply(tensor)


class SeraSampleStatistics(nn.Module):
    """Running mean and variance of samples. They are in float32 in a model of any dtype, and common to all processes (ours).

    The weight of a step follows its number of samples, so that steps of one sample measure as well as steps of many. The first
    samples all count alike, so that the start, mean 0 and variance 1, is forgotten at once.
    """

    MOMENTUM = 0.1  # weight of a step of ENOUGH samples or more, as in batch norms
    ENOUGH = 8  # with fewer samples, the statistics of a step are too rough to normalise by

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float32))
        self.register_buffer("num_samples", torch.zeros((), dtype=torch.long))
        self.is_kept = False  # True while activation checkpointing computes a block a second time

    def reset(self) -> None:
        """Set the statistics to their start: mean 0, variance 1, no samples."""
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)
        init.zeros_(self.num_samples)

    def observe(self, rows: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Move the running statistics by the samples of a training step. Every process must call this.

        Args:
            rows: (N, dim), the samples of this process.
            num_samples: Number of independent samples among the rows, for example the number of images of N expressions; `None`
                means N.

        Returns:
            The number of samples (a scalar), and the mean and the variance over the rows, both (dim,) in float32 and with
            gradients; all three over all processes.
        """
        rows = rows.float()
        before = self.running_mean.clone()  # differences from it are small, so that their squares lose few digits
        shifted = rows - before
        counts = torch.stack(
            [torch.full((), float(n), device=rows.device) for n in (len(rows), num_samples or len(rows))]
        )
        sums = torch.cat([counts, shifted.sum(dim=0), shifted.square().sum(dim=0)])
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            sums = _sum_over_processes(sums)
        (total, count), first, second = sums[:2], *sums[2:].chunk(2)
        shift = first / total
        mean, var = before + shift, (second / total - shift.square()).clamp(min=0)
        if not self.is_kept:
            self._move(count, shift, var)
        return count, mean, var

    @torch.no_grad()
    def _move(self, count: Tensor, shift: Tensor, var: Tensor) -> None:
        self.num_samples += count.long()
        share = torch.maximum(self.MOMENTUM * (count / self.ENOUGH).clamp(max=1), count / self.num_samples)
        # the variance of the mixture of old and new: it is right even for a step of one sample, whose own variance is 0
        self.running_var.copy_((1 - share) * (self.running_var + share * shift.square()) + share * var)
        self.running_mean.add_(share * shift)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SeraSampleStatistics":
        """Move or cast the buffers as in every module, but leave them in float32 in a cast to half precision."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class SeraSampleNorm(SeraSampleStatistics):
    """A batch norm without parameters: every channel to mean 0 and variance 1 over samples (ours).

    Training normalises by the statistics of the step, over all processes. Inference, and a step of fewer than ENOUGH samples,
    normalise by the running statistics.
    """

    EPSILON = 1e-5

    def forward(self, rows: Tensor, num_samples: int | None = None) -> Tensor:
        """(N, dim) to the same shape and dtype. `num_samples` is that of [`observe`]."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            count, own_mean, own_var = self.observe(rows, num_samples)
            is_enough = count >= self.ENOUGH
            # `where` makes copies: a later step moves the buffers, while the gradient of this step needs the old values
            mean, var = torch.where(is_enough, own_mean, mean), torch.where(is_enough, own_var, var)
        return ((rows.float() - mean) * (var + self.EPSILON).rsqrt()).to(rows.dtype)

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear, bias: Tensor) -> None:
        """Take this norm, as in inference, into the layer that follows it, for good.

        Args:
            linear: The layer; its weight is changed.
            bias: Bias that is added to the layer's output, its own or another's; changed, too.
        """
        weight = linear.weight.float() * (self.running_var + self.EPSILON).rsqrt()
        bias.sub_((weight @ self.running_mean).to(bias.dtype))
        linear.weight.copy_(weight)


__all__ = [
    "SeraAttention",
    "SeraConvUnit",
    "SeraFeedForward",
    "SeraGridCache",
    "SeraSampleNorm",
    "SeraSampleStatistics",
]
