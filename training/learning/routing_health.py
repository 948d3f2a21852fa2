"""How the routers share the work among their experts. No other figure shows a router that never uses one of them (ours)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.configuration_sera import NUM_FUSION_EXPERTS
from modeling_sera.fusion_sera import EXPERT_NAMES
from modeling_sera.routing_sera import SeraRouting

ADAPTER_EXPERTS = ("spatial", "boundary")


class RoutingHealth:
    """Sums over all samples that the routers of a model see while [`watch`] lasts.

    A sample is an image where the router's input does not depend on the text, and an expression elsewhere.
    """

    def __init__(self, model: SeraForReferringSegmentation):
        """
        Args:
            model: The model whose routers are watched.
        """
        self.config = model.config
        self.fusions = {
            str(depth): fusion.router
            for depth, fusion in zip(model.config.tap_layers, model.model.fusions, strict=True)
            if fusion.router is not None
        }
        self.adapters = {
            name: block.adapter.router
            for name, block in model.model.vision.adapted_blocks.items()
            if block.adapter.router is not None
        }
        # for each tap: weights, selections, probabilities and squared excess logits of all experts, then entropy and number of
        # samples
        device = model.device
        self.fusion_sums = {tap: torch.zeros(4 * len(EXPERT_NAMES) + 2, device=device) for tap in self.fusions}
        self.adapter_sums = {block: torch.zeros(len(ADAPTER_EXPERTS) + 1, device=device) for block in self.adapters}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count every decision of the routers meanwhile."""
        hooks = [
            router.register_forward_hook(lambda module, args, routing, tap=tap: self._add_fusion(tap, routing))
            for tap, router in self.fusions.items()
        ]
        hooks += [
            router.register_forward_hook(lambda module, args, weights, block=block: self._add_adapter(block, weights))
            for block, router in self.adapters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add_fusion(self, tap: str, routing: SeraRouting) -> None:
        weights, logits = routing.weights.float(), routing.logits.float()
        excess = (logits.abs() - self.config.router_logit_bound).relu().square()
        per_expert = torch.cat([weights, routing.selected.float(), logits.softmax(-1), excess], dim=1)
        entropy = torch.special.entr(weights).sum()
        count = weights.new_tensor(len(weights))
        self.fusion_sums[tap] += torch.cat([per_expert.sum(0), torch.stack([entropy, count])])

    def _add_adapter(self, block: str, weights: Tensor) -> None:
        self.adapter_sums[block] += torch.cat([weights.float().sum(0), weights.new_tensor([len(weights)])])

    def summary(self, accelerator: Accelerator) -> dict:
        """The counts of all processes together. Every process calls this.

        Returns:
            `{"taps": {depth: {"shares": {expert: mean weight}, "selected": {expert: share of samples}, "entropy": mean entropy of
            the weights in nats, at most log 4, "logit_loss", "balance_loss", "token_loss": auxiliary losses of all samples as one
            batch, times their weights; the last is 0 where all experts are used}}, "adapters": {block: {expert: mean weight}}}`.
            Shares are in [0, 1].
        """
        taps = {tap: self._tap(accelerator.reduce(sums, "sum")) for tap, sums in self.fusion_sums.items()}
        adapters = {}
        for block, sums in self.adapter_sums.items():
            total = accelerator.reduce(sums, "sum")
            adapters[block] = dict(zip(ADAPTER_EXPERTS, (total[:-1] / total[-1]).tolist(), strict=True))
        return {"taps": taps, "adapters": adapters}

    def _tap(self, sums: Tensor) -> dict:
        means = sums[:-1] / sums[-1]
        shares, selected, probability, excess = means[:-1].view(4, -1)
        config = self.config
        token_weight = config.router_token_loss_weight * (config.num_selected_experts < NUM_FUSION_EXPERTS)
        losses = {
            "logit_loss": config.router_logit_loss_weight * excess.mean(),
            "balance_loss": config.router_balance_loss_weight * shares.var(unbiased=False) / shares.mean() ** 2,
            "token_loss": token_weight * len(selected) * (selected * probability).sum(),
        }
        return {
            "shares": dict(zip(EXPERT_NAMES, shares.tolist(), strict=True)),
            "selected": dict(zip(EXPERT_NAMES, selected.tolist(), strict=True)),
            "entropy": means[-1].item(),
        } | {name: loss.item() for name, loss in losses.items()}
