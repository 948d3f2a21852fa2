"""SERA-Adapter: expert-guided, expression-conditioned refinement inside the vision tower (paper, Figure 3)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .configuration_sera import SeraConfig
from .layers_sera import SeraAttention, SeraConvUnit, grid_to_tokens, tokens_to_grid
from .routing_sera import SeraAdapterRouter

SPATIAL_GAIN = 0.25  # of the spatial expert in G_corr (paper)
BOUNDARY_GAIN = 0.15  # of the boundary expert in G_corr (paper)


class SeraMultiScaleConv(nn.Module):
    """Parallel 1×1, 3×3 and 5×5 convolutions joined along channels, plus the input, normalised: `G_rich` (paper).

    The widths are ours, and so is the normalisation: the channels of every position to mean 0 and variance 1, without
    parameters. The experts end in batch norms, so their maps have a fixed scale. `G_rich` would grow in training, until the
    experts' shares of 0.25 and 0.15 are nothing beside it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 2, 1)
        self.conv3 = nn.Conv2d(dim, dim // 4, 3, padding=1)
        self.conv5 = nn.Conv2d(dim, dim // 4, 5, padding=2)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, d, H, W) to the same shape."""
        rich = grid + torch.cat([self.conv1(grid), self.conv3(grid), self.conv5(grid)], dim=1)
        return tokens_to_grid(layer_norm(grid_to_tokens(rich), rich.shape[1:2]), rich.shape[-2:])


class SeraAdapterSpatialExpert(nn.Module):
    """`E_s = φ(DWConv3×3(G)) + 0.3·G`, φ = ReLU∘BN (paper; φ ours)."""

    def __init__(self, dim: int):
        super().__init__()
        self.unit = SeraConvUnit(dim, dim, 3, groups=dim)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, d, H, W) to the same shape."""
        return self.unit(grid) + 0.3 * grid


class SeraAdapterBoundaryExpert(nn.Module):
    """`E_b = ReLU(BN(G + 0.1·DWConv3×3(G)))` (paper)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, d, H, W) to the same shape."""
        if isinstance(self.norm, nn.Identity):
            return self.conv(grid).relu()
        return self.norm(grid + 0.1 * self.conv(grid)).relu()

    @torch.no_grad()
    def fold(self) -> None:
        """Take the sum and the batch norm of inference into the convolution, for good."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv.weight.mul_(0.1)
            self.conv.weight[:, :, 1, 1] += 1  # the kernel's centre passes the map itself
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class SeraUpProjection(nn.Linear):
    """Back to the tower's width. Starts at zero, so that a fresh SERA's tower computes exactly what the pretrained one does."""


class SeraAdapter(nn.Module):
    """Patch tokens to a correction of the same shape: project down, enrich, two routed experts, attend to the text, project up."""

    def __init__(self, config: SeraConfig):
        super().__init__()
        dim = config.adapter_dim
        self.down_proj = nn.Linear(config.vision_family.width, dim)
        self.enrich = SeraMultiScaleConv(dim)
        self.router = None
        if config.adapter_experts:
            self.spatial_expert = SeraAdapterSpatialExpert(dim)
            self.boundary_expert = SeraAdapterBoundaryExpert(dim)
            self.router = SeraAdapterRouter(config)
        self.text_norm = nn.LayerNorm(dim)
        self.text_attention = SeraAttention(
            config, dim=dim, num_heads=config.adapter_num_heads, context_dim=config.text_family.width
        )
        self.up_proj = SeraUpProjection(dim, config.vision_family.width)

    def forward(
        self,
        patches: Tensor,
        *,
        grid_size: tuple[int, int],
        text_states: Tensor,
        text_mask: Tensor | None,
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_images: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            patches: (B, H·W, hidden_size) patch tokens, without class and register tokens.
            grid_size: (H, W).
            text_states: (N, L, text hidden size) token features.
            text_mask: Attention mask that hides the padding, for (N, 1, H·W, L).
            sentence: (N, projection_dim), standardised; needed by a router that sees it.
            image_index: (N,) row of `patches` that each expression is about; `None` means N = B, one each. The part that does
                not depend on the text is then computed once per row of `patches`.
            num_images: Number of images among the rows of `patches`; `None` means each row is another image.

        Returns:
            The correction (N, H·W, hidden_size), to be scaled and added by the caller, and the router weights (N, 2) of the
            spatial and the boundary expert; `None` without experts.
        """
        return self.attend(
            self.look(patches, grid_size),
            text_states=text_states,
            text_mask=text_mask,
            sentence=sentence,
            image_index=image_index,
            num_images=num_images,
        )

    def look(self, patches: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """What does not depend on the text: the enriched map and, scaled, each expert's, all (B, d, H, W)."""
        grid = self.enrich(tokens_to_grid(self.down_proj(patches), grid_size))
        if self.router is None:
            return (grid,)
        return grid, SPATIAL_GAIN * self.spatial_expert(grid), BOUNDARY_GAIN * self.boundary_expert(grid)

    def attend(
        self,
        maps: tuple[Tensor, ...],
        *,
        text_states: Tensor,
        text_mask: Tensor | None,
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_images: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of [`forward`], whose arguments and result it has, from the maps that [`look`] made."""
        grid, *experts = maps
        weights = None
        if self.router is not None:
            spatial, boundary = experts
            weights = self.router(grid, sentence, image_index, num_images)
            if self.router.sees_sentence and image_index is not None:
                # the weights differ between expressions of one image, so only the experts themselves can be shared
                grid, spatial, boundary = grid[image_index], spatial[image_index], boundary[image_index]
                image_index = None
            share = weights[..., None, None, None]
            grid = grid + share[:, 0] * spatial + share[:, 1] * boundary
        refined = grid_to_tokens(grid)

        attended = self.text_attention(self.text_norm(refined), text_states, text_mask, query_index=image_index)
        if image_index is not None:
            refined = refined[image_index]
            weights = None if weights is None else weights[image_index]
        return self.up_proj(refined + attended), weights


__all__ = ["SeraAdapter", "SeraAdapterBoundaryExpert"]
