"""SERA-Fusion: four geometry-preserving experts on a tapped feature map, mixed by a sparse router (paper, Figure 4)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from transformers import initialization as init

from .configuration_sera import SeraConfig
from .layers_sera import (
    SeraAttention,
    SeraConvUnit,
    SeraFeedForward,
    SeraGridCache,
    coordinate_grid,
    grid_to_tokens,
    tokens_to_grid,
)
from .routing_sera import SeraRouting, SeraTopKRouter

EXPERT_NAMES = ("spatial", "context", "boundary", "shape")


def replicate_border(grid: Tensor, radius: int) -> Tensor:
    """(B, C, H, W) with its border repeated `radius` times on every side."""
    if not torch.compiler.is_dynamo_compiling():
        return pad(grid, (radius,) * 4, mode="replicate")
    # torch.compile's code for the CPU stops in that padding's backward pass (torch 2.13). Outside of a compiled graph, where
    # they become one loop, these copies would take several times as long.
    for dim in (2, 3):
        first, last = grid.narrow(dim, 0, 1), grid.narrow(dim, grid.shape[dim] - 1, 1)
        grid = torch.cat([first] * radius + [grid] + [last] * radius, dim)
    return grid


class SeraFixedFilters(nn.Module):
    """A bank of fixed kernels applied to every channel alike. Borders are replicated, so that they are no edges.

    The kernels are a non-persistent buffer: constants of the architecture, not weights.
    """

    def __init__(self, kernels: list[list[list[float]]]):
        super().__init__()
        self.values = kernels
        self.register_buffer("kernels", torch.tensor(kernels)[:, None], persistent=False)

    def reset_kernels(self) -> None:
        """Write the constants again: a buffer made while a checkpoint loads holds no values yet."""
        init.copy_(self.kernels, torch.tensor(self.values)[:, None])

    def forward(self, grid: Tensor) -> list[Tensor]:
        """(B, C, H, W) to one such map per kernel; cross-correlation, as in a convolution layer."""
        channels, radius = grid.shape[1], self.kernels.shape[-1] // 2
        padded = replicate_border(grid, radius)
        kernels = self.kernels.to(grid.dtype)[:, None]
        return [conv2d(padded, kernel.expand(channels, -1, -1, -1), groups=channels) for kernel in kernels]


class SeraSpatialExpert(nn.Module):
    """`X + α·Conv1×1(G)`, G the coordinate grid in [-1, 1], α learnable from 1 (paper; α's start ours).

    X has unit variance at every position, and the fresh expert adds a map of more than half its size. With α from 0.1, the
    expert still adds next to nothing after training.
    """

    ALPHA = 1.0

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), self.ALPHA))
        self.conv = nn.Conv2d(2, config.fusion_dim, 1)
        self.coordinates = SeraGridCache(coordinate_grid)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return grid + self.alpha * self.conv(self.coordinates(*grid.shape[-2:], grid)[None])


class SeraContextExpert(nn.Module):
    """Multi-head self-attention over positions and a feed-forward part, each with a residual (paper; pre-norm ours)."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        dim = config.fusion_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SeraAttention(config, dim=dim, num_heads=config.fusion_num_heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = SeraFeedForward(dim, 2 * dim)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        tokens = grid_to_tokens(grid)
        tokens = tokens + self.attention(self.attention_norm(tokens))
        tokens = tokens + self.ffn(self.ffn_norm(tokens))
        return tokens_to_grid(tokens, grid.shape[-2:])


class SeraBoundaryExpert(nn.Module):
    """`X + φ(Conv1×1([X, |∇X|, ∂x X + ∂y X]))` with fixed Sobel kernels (paper; φ = ReLU∘BN ours)."""

    EPSILON = 1e-6  # keeps the gradient of the magnitude finite where the map is flat

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.sobel = SeraFixedFilters(
            [
                [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]],
                [[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]],
            ]
        )
        self.mix = SeraConvUnit(3 * config.fusion_dim, config.fusion_dim, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        along_x, along_y = self.sobel(grid)
        magnitude = (along_x.square() + along_y.square() + self.EPSILON).sqrt()
        return grid + self.mix(torch.cat([grid, magnitude, along_x + along_y], dim=1))


class SeraShapeExpert(nn.Module):
    """Low frequencies (fixed blur) and high frequencies (fixed Laplacian), mixed back by a 1×1 convolution, residual (paper).

    The Laplacian is divided by four: the difference between a cell and the mean of its neighbours (ours). Both parts then have
    the scale of X.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        binomial = (1, 4, 6, 4, 1)
        self.blur = SeraFixedFilters([[[a * b / 256 for a in binomial] for b in binomial]])
        self.laplacian = SeraFixedFilters([[[0.0, 0.25, 0.0], [0.25, -1.0, 0.25], [0.0, 0.25, 0.0]]])
        self.mix = nn.Conv2d(2 * config.fusion_dim, config.fusion_dim, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return grid + self.mix(torch.cat([self.blur(grid)[0], self.laplacian(grid)[0]], dim=1))


@dataclass
class SeraFusionView:
    """A tapped map with the results of its experts: all that the expressions about an image can share.

    Attributes:
        grid: (B, fusion_dim, H, W), projected and normalised. `None` where `refined` or `fused` holds all that is needed.
        mean: (B, fusion_dim), its mean over positions, the router's input z. `None` without experts.
        refined: Results of the experts, (B, fusion_dim, H, W) by name; each is added when it is first used.
        fused: Weighted sum (B, fusion_dim, H, W), once computed, of a router that does not see the sentence. Without experts
            the grid itself.
    """

    grid: Tensor | None
    mean: Tensor | None = None
    refined: dict[str, Tensor] = field(default_factory=dict)
    fused: Tensor | None = None


class SeraFusion(nn.Module):
    """One tapped map to one refined map of the same spatial size: project, route, weighted sum of the experts chosen."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.project = nn.Linear(config.vision_family.width, config.fusion_dim)
        self.norm = nn.LayerNorm(config.fusion_dim)
        self.router = None
        if config.fusion_experts:
            self.router = SeraTopKRouter(config)
            self.experts = nn.ModuleDict(
                {
                    "spatial": SeraSpatialExpert(config),
                    "context": SeraContextExpert(config),
                    "boundary": SeraBoundaryExpert(config),
                    "shape": SeraShapeExpert(config),
                }
            )

    def forward(
        self,
        tokens: Tensor,
        *,
        grid_size: tuple[int, int],
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_images: int | None = None,
    ) -> tuple[Tensor, SeraRouting | None]:
        """
        Args:
            tokens: (B, H·W, hidden_size), a tap.
            grid_size: (H, W).
            sentence: (N, projection_dim), standardised; needed by a router that sees it.
            image_index: (N,) row of `tokens` each expression is about; the experts then run once per row of `tokens`. `None` means
                N = B.
            num_images: Number of images among the rows of `tokens`; `None` means each row is another image.

        Returns:
            The refined map (N, fusion_dim, H, W) and the routing, `None` without experts: of the N expressions or, by a router
            that does not see the sentence, of the B rows.
        """
        return self.mix(self.look(tokens, grid_size), sentence, image_index, num_images)

    def look(self, tokens: Tensor, grid_size: tuple[int, int]) -> SeraFusionView:
        """What does not depend on the sentence, for one or more calls of [`mix`]; arguments as of [`forward`]."""
        grid = tokens_to_grid(self.norm(self.project(tokens)), grid_size)
        return SeraFusionView(grid, fused=grid) if self.router is None else SeraFusionView(grid, grid.mean(dim=(2, 3)))

    def pack(self, view: SeraFusionView) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """All that [`mix`] may need of a view for any sentence, in inference: maps (B, fusion_dim, H, W) and the view's `mean`.

        The maps are those of all experts, or one where the sentence does not reach the router.
        """
        if self.router is not None and self.router.sees_sentence:
            return tuple(self._refine(view, name) for name in self.experts), view.mean
        fused, _ = self.mix(view)
        return (fused,), view.mean

    def unpack(self, maps: tuple[Tensor, ...], mean: Tensor | None) -> SeraFusionView:
        """The view of which [`pack`] made the maps and the mean."""
        if self.router is not None and self.router.sees_sentence:
            return SeraFusionView(None, mean, refined=dict(zip(self.experts, maps, strict=True)))
        return SeraFusionView(None, mean, fused=maps[0])

    def mix(
        self,
        view: SeraFusionView,
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_images: int | None = None,
    ) -> tuple[Tensor, SeraRouting | None]:
        """The rest of [`forward`], whose arguments and result it has, from what [`look`] gave."""
        routing = None
        if self.router is not None:
            routing = self.router(view.mean, sentence, image_index, num_images)
            if self.router.sees_sentence:
                return self._weigh(view, routing, image_index), routing
            if view.fused is None:
                view.fused = self._weigh(view, routing)
        return (view.fused if image_index is None else view.fused[image_index]), routing

    def _weigh(self, view: SeraFusionView, routing: SeraRouting, image_index: Tensor | None = None) -> Tensor:
        weights = routing.weights.to(view.mean.dtype)
        # In training every expert runs, so that each has a gradient (zero where unchosen) in every process.
        skip_unchosen = not (self.training or torch.compiler.is_compiling()) and self.router.k < len(self.experts)
        chosen = routing.selected.any(dim=0).tolist() if skip_unchosen else [True] * len(self.experts)
        fused = 0
        for i, name in enumerate(self.experts):
            if chosen[i]:
                refined = self._refine(view, name)
                refined = refined if image_index is None else refined[image_index]
                fused = fused + weights[:, i, None, None, None] * refined
        return fused

    def _refine(self, view: SeraFusionView, name: str) -> Tensor:
        """An expert's map (B, fusion_dim, H, W), computed once."""
        if name not in view.refined:
            view.refined[name] = self.experts[name](view.grid)
        return view.refined[name]


__all__ = ["EXPERT_NAMES", "SeraFusion"]
