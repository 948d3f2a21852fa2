"""Routers: how much each expert counts for a sample, and the auxiliary losses that keep the routing healthy."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_sera import NUM_FUSION_EXPERTS, SeraConfig


class SeraRouting(NamedTuple):
    """What a fusion router decided.

    Attributes:
        weights: (N, E) in [0, 1], rows sum to 1, at most k entries of a row are non-zero.
        logits: (N, E) routing logits r before the training noise.
        selected: (N, E) bool, the k experts kept for each sample.
    """

    weights: Tensor
    logits: Tensor
    selected: Tensor

    def take(self, rows: Tensor) -> "SeraRouting":
        """The routing of the given samples, (M,) row numbers."""
        return SeraRouting(*(field[rows] for field in self))


class SeraRouterScore(nn.Linear):
    """Scores of an adapter's experts. Starts at zero: the experts start equal, and neither is lost before it has learnt."""


class SeraAdapterRouter(nn.Module):
    """Soft router of an adapter: `[w_s, w_b] = softmax(Linear(mean over positions of G))` (paper, SERA-Adapter).

    With `routing="uniform"` it holds no parameters and both weights are 1/2.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.score = SeraRouterScore(config.adapter_dim, 2) if config.routing == "learned" else None
        self.score_sentence = (
            SeraRouterScore(config.projection_dim, 2, bias=False) if config.expression_aware_routing else None
        )

    def forward(self, grid: Tensor, sentence: Tensor | None = None) -> Tensor:
        """
        Args:
            grid: (N, d, H, W), the enriched map G.
            sentence: (N, projection_dim), used with `expression_aware_routing` only.

        Returns:
            (N, 2): the weights of the spatial and of the boundary expert; each row sums to 1.
        """
        if self.score is None:
            return grid.new_full((grid.shape[0], 2), 1 / 2)
        logits = self.score(grid.mean(dim=(2, 3)))
        if self.score_sentence is not None:
            logits = logits + self.score_sentence(sentence)
        return logits.softmax(dim=-1)


class SeraTopKRouter(nn.Module):
    """Sparse router of SERA-Fusion: `r = W2·σ(W1·z)`, noise in training, top k, softmax over those kept (paper).

    With `routing="uniform"` it holds no parameters, its logits are zero and every weight is 1/4.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.k = config.num_selected_experts
        self.noise_std = config.router_noise_std
        self.hidden_sentence = None
        self.is_uniform = config.routing == "uniform"
        if self.is_uniform:
            return
        self.hidden = nn.Linear(config.fusion_dim, config.router_hidden_dim)
        self.hidden_sentence = (
            nn.Linear(config.projection_dim, config.router_hidden_dim, bias=False)
            if config.expression_aware_routing
            else None
        )
        self.activation = nn.ReLU()
        self.score = nn.Linear(config.router_hidden_dim, NUM_FUSION_EXPERTS)

    def forward(self, pooled: Tensor, sentence: Tensor | None = None) -> SeraRouting:
        """
        Args:
            pooled: (N, fusion_dim), z: the mean over positions.
            sentence: (N, projection_dim), used with `expression_aware_routing` only.
        """
        if self.is_uniform:
            shape = (pooled.shape[0], NUM_FUSION_EXPERTS)
            return SeraRouting(
                weights=pooled.new_full(shape, 1 / NUM_FUSION_EXPERTS, dtype=torch.float32),
                logits=pooled.new_zeros(shape, dtype=torch.float32),
                selected=pooled.new_ones(shape, dtype=torch.bool),
            )
        hidden = self.hidden(pooled)
        if self.hidden_sentence is not None:
            hidden = hidden + self.hidden_sentence(sentence)
        logits = self.score(self.activation(hidden)).float()
        noisy = logits + self.noise_std * torch.randn_like(logits) if self.training else logits
        selected = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.k, dim=-1).indices, True)
        weights = noisy.masked_fill(~selected, float("-inf")).softmax(dim=-1)
        return SeraRouting(weights=weights, logits=logits, selected=selected)


def router_auxiliary_loss(
    routing: SeraRouting, *, logit_weight: float, balance_weight: float, token_weight: float
) -> Tensor:
    """Auxiliary loss of one fusion router (paper): `λz·mean(r²) + λb·CV(u)² + λt·E·Σ fᵢ·pᵢ`.

    `u` is each expert's mean routing weight over the batch, `f` the share of samples whose top k hold the expert, `p` its mean
    probability under a softmax over all experts. The form of the last term is ours (the paper names it only).

    Returns:
        A scalar.
    """
    usage = routing.weights.mean(dim=0)
    variation = usage.var(unbiased=False) / usage.mean() ** 2
    probability = routing.logits.softmax(dim=-1).mean(dim=0)
    share = routing.selected.to(probability.dtype).mean(dim=0)
    return (
        logit_weight * routing.logits.square().mean()
        + balance_weight * variation
        + token_weight * share.numel() * (share * probability).sum()
    )


__all__ = ["SeraAdapterRouter", "SeraRouterScore", "SeraRouting", "SeraTopKRouter", "router_auxiliary_loss"]
