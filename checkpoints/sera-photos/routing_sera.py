"""Routers: how much each expert counts for a sample, and the auxiliary losses that keep the routing healthy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_sera import NUM_FUSION_EXPERTS, SeraConfig
from .layers_sera import SeraSampleNorm, SeraSampleStatistics


class SeraRouting(NamedTuple):
    """What a fusion router decided.

    Attributes:
        weights: (N, E) in [0, 1], rows sum to 1, at most k entries of a row are non-zero.
        logits: (N, E) routing logits r before the training noise.
        selected: (N, E) bool, the k experts kept for each sample.
        usage: In training (2, E): each expert's mean weight, and the share of samples that select it. The values are running
            means over steps and processes, the gradients are those of this step's means. Else `None`.
    """

    weights: Tensor
    logits: Tensor
    selected: Tensor
    usage: Tensor | None = None

    def take(self, rows: Tensor) -> "SeraRouting":
        """The routing of the given samples, (M,) row numbers."""
        return SeraRouting(self.weights[rows], self.logits[rows], self.selected[rows], self.usage)


class SeraRouterScore(nn.Linear):
    """Scores of experts. Starts at zero: the experts start with equal weights, and none is lost before it has learnt."""


class SeraAdapterRouter(nn.Module):
    """Soft router of an adapter: `[w_s, w_b] = softmax(Linear(mean over positions of G))` (paper, SERA-Adapter).

    The mean is standardised over samples, and the standardised sentence is a second input (both ours). Without the first, the
    router saturates. With `routing="uniform"` it holds no parameters and both weights are 1/2.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.norm = self.score = self.score_sentence = None
        if config.routing == "learned":
            self.norm = SeraSampleNorm(config.adapter_dim)
            self.score = SeraRouterScore(config.adapter_dim, 2)
            if config.expression_aware_routing:
                self.score_sentence = SeraRouterScore(config.projection_dim, 2, bias=False)

    @property
    def sees_sentence(self) -> bool:
        """Whether expressions about one image can be routed differently."""
        return self.score_sentence is not None

    def forward(
        self,
        grid: Tensor,
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """
        Args:
            grid: (B, d, H, W), the enriched map G.
            sentence: (N, projection_dim), standardised; needed by a router that sees it.
            image_index: (N,) row of `grid` that each sentence is about; `None` means N = B, one each. A router that does not
                see the sentence ignores it.
            num_samples: Number of images among the rows of `grid`; `None` means each row is another image.

        Returns:
            (N, 2), or (B, 2) of a router that does not see the sentence: the weights of the spatial and of the boundary expert;
            each row sums to 1.
        """
        if self.score is None:
            return grid.new_full((grid.shape[0], 2), 1 / 2)
        pooled = grid.mean(dim=(2, 3))
        logits = self.score(pooled if self.norm is None else self.norm(pooled, num_samples))
        if self.score_sentence is not None:
            logits = (logits if image_index is None else logits[image_index]) + self.score_sentence(sentence)
        return logits.softmax(dim=-1)

    def fold(self, sentence_norm: SeraSampleNorm | None) -> None:
        """Take the norms of the inputs, as in inference, into the scores, for good."""
        if self.norm is not None:
            self.norm.fold_into(self.score, self.score.bias)
            self.norm = None
            if self.score_sentence is not None:
                sentence_norm.fold_into(self.score_sentence, self.score.bias)


class SeraTopKRouter(nn.Module):
    """Sparse router of SERA-Fusion: `r = W2·σ(W1·z)`, noise in training, top k, softmax over those kept (paper).

    z is standardised over samples, and the standardised sentence is a second input of the hidden layer. σ is a GELU: the units
    of a ReLU can be off for every sample, and then they never learn again. (All ours.) With `routing="uniform"` the router
    holds no parameters, its logits are zero and every weight is 1/4.
    """

    def __init__(self, config: SeraConfig):
        super().__init__()
        self.k = config.num_selected_experts
        self.noise_std = config.router_noise_std
        self.norm = self.hidden_sentence = None
        self.is_uniform = config.routing == "uniform"
        if self.is_uniform:
            return
        self.norm = SeraSampleNorm(config.fusion_dim)
        self.hidden = nn.Linear(config.fusion_dim, config.router_hidden_dim)
        if config.expression_aware_routing:
            self.hidden_sentence = nn.Linear(config.projection_dim, config.router_hidden_dim, bias=False)
        self.activation = nn.GELU()
        self.score = SeraRouterScore(config.router_hidden_dim, NUM_FUSION_EXPERTS)
        self.usage = SeraSampleStatistics(2 * NUM_FUSION_EXPERTS)

    @property
    def sees_sentence(self) -> bool:
        """Whether expressions about one image can be routed differently."""
        return self.hidden_sentence is not None

    def forward(
        self,
        pooled: Tensor,
        sentence: Tensor | None = None,
        image_index: Tensor | None = None,
        num_samples: int | None = None,
    ) -> SeraRouting:
        """
        Args:
            pooled: (B, fusion_dim), z: the mean over positions.
            sentence: (N, projection_dim), standardised; needed by a router that sees it.
            image_index: (N,) row of `pooled` that each sentence is about; `None` means N = B, one each. A router that does not
                see the sentence ignores it.
            num_samples: Number of images among the rows of `pooled`; `None` means each row is another image.

        Returns:
            The routing of N samples, or of B by a router that does not see the sentence.
        """
        if self.is_uniform:
            shape = (pooled.shape[0], NUM_FUSION_EXPERTS)
            return SeraRouting(
                weights=pooled.new_full(shape, 1 / NUM_FUSION_EXPERTS, dtype=torch.float32),
                logits=pooled.new_zeros(shape, dtype=torch.float32),
                selected=pooled.new_ones(shape, dtype=torch.bool),
            )
        hidden = self.hidden(pooled if self.norm is None else self.norm(pooled, num_samples))
        if self.hidden_sentence is not None:
            hidden = (hidden if image_index is None else hidden[image_index]) + self.hidden_sentence(sentence)
        logits = self.score(self.activation(hidden)).float()
        noisy = logits + self.noise_std * torch.randn_like(logits) if self.training else logits
        selected = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, noisy.topk(self.k, dim=-1).indices, True)
        weights = noisy.masked_fill(~selected, float("-inf")).softmax(dim=-1)
        usage = self._count(weights, selected) if self.usage.training else None
        return SeraRouting(weights=weights, logits=logits, selected=selected, usage=usage)

    def _count(self, weights: Tensor, selected: Tensor) -> Tensor:
        """The field `usage` of a [`SeraRouting`] for (N, E) weights and selections."""
        _, mean, _ = self.usage.observe(torch.cat([weights, selected.to(weights.dtype)], dim=1))
        return (self.usage.running_mean + (mean - mean.detach())).unflatten(0, (2, NUM_FUSION_EXPERTS))

    def fold(self, sentence_norm: SeraSampleNorm | None) -> None:
        """Take the norms of the inputs, as in inference, into the hidden layer, for good."""
        if self.norm is not None:
            self.norm.fold_into(self.hidden, self.hidden.bias)
            self.norm = None
            if self.hidden_sentence is not None:
                sentence_norm.fold_into(self.hidden_sentence, self.hidden.bias)


def router_auxiliary_loss(
    routing: SeraRouting, *, logit_weight: float, logit_bound: float, balance_weight: float, token_weight: float
) -> Tensor:
    """Auxiliary loss of one fusion router (paper): `λz·mean(max(|r| - bound, 0)²) + λb·CV(u)² + λt·E·Σ fᵢ·pᵢ`.

    `u` is each expert's mean routing weight, and `f` the share of samples whose top k hold the expert. Both come from `usage`
    of the routing; without it they are means over the rows. `p` is the expert's mean probability in a softmax over all experts.

    The bound is ours, and 0 gives the paper's term, which pulls all logits to zero. Running means are ours, too: in a small
    batch, a balance of the batch alone would make every sample use all experts alike. The form of the last term is ours (the
    paper gives its name alone).

    Returns:
        A scalar.
    """
    usage, share = routing.weights.mean(dim=0), routing.selected.to(routing.weights.dtype).mean(dim=0)
    if routing.usage is not None:
        usage, share = routing.usage
    variation = usage.var(unbiased=False) / usage.mean() ** 2
    probability = routing.logits.softmax(dim=-1).mean(dim=0)
    return (
        logit_weight * (routing.logits.abs() - logit_bound).relu().square().mean()
        + balance_weight * variation
        + token_weight * share.numel() * (share * probability).sum()
    )


def mean_router_loss(routings: Sequence[SeraRouting], config: SeraConfig) -> Tensor:
    """[`router_auxiliary_loss`] with a configuration's weights, averaged over the taps; a scalar in float32.

    The token term needs `num_selected_experts` below four: where every sample uses all experts, it is a constant.
    """
    losses = [
        router_auxiliary_loss(
            routing,
            logit_weight=config.router_logit_loss_weight,
            logit_bound=config.router_logit_bound,
            balance_weight=config.router_balance_loss_weight,
            token_weight=config.router_token_loss_weight if config.num_selected_experts < NUM_FUSION_EXPERTS else 0.0,
        )
        for routing in routings
    ]
    return torch.stack(losses).mean()


__all__ = [
    "SeraAdapterRouter",
    "SeraRouterScore",
    "SeraRouting",
    "SeraTopKRouter",
    "mean_router_loss",
    "router_auxiliary_loss",
]
