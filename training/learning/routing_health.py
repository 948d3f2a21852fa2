"""How the routers decide and what their experts add, with a warning where a part does nothing (ours).

The scores of a model do not show a router that decides the same for every sample, or an expert that adds next to nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.adapter_sera import BOUNDARY_GAIN, SPATIAL_GAIN
from modeling_sera.configuration_sera import NUM_FUSION_EXPERTS
from modeling_sera.fusion_sera import EXPERT_NAMES
from modeling_sera.routing_sera import SeraRouting

ADAPTER_EXPERTS = ("spatial", "boundary")

# A hidden unit is dead below this standard deviation of its output. A fresh unit has about 0.6: its input has unit variance.
DEAD_UNIT_DEVIATION = 0.01
# A router is dead if no logit has a greater standard deviation. A logit that moves by 0.01 moves a weight by 0.0025 at most.
DEAD_LOGIT_DEVIATION = 0.01
# A sample is saturated if one expert has more of the probability. The softmax then passes on less than a fifth of its greatest
# gradient, and a router that is saturated for nearly all samples learns no more.
SATURATED_PROBABILITY = 0.95
SATURATED_SAMPLES = 0.95
# An expert is idle below this norm of what it adds, as a share of the map's norm. With the weight of an equal share (1/4), it
# then moves the map by less than 3 %.
IDLE_ADDITION = 0.1
# An expert is idle below the first mean weight. Above the second, it leaves the others idle. A balanced expert has 25 % or 50 %.
IDLE_WEIGHTS = (0.05, 0.9)


def routers_of(model: SeraForReferringSegmentation) -> dict[str, nn.Module]:
    """The routers by name: "tap 4" with the depth of the tap, "adapter 3" with the number of the block. Taps come first."""
    taps = {
        f"tap {depth}": fusion.router
        for depth, fusion in zip(model.config.tap_layers, model.model.fusions, strict=True)
        if fusion.router is not None
    }
    adapters = {
        f"adapter {name}": block.adapter.router
        for name, block in model.model.vision.adapted_blocks.items()
        if block.adapter.router is not None
    }
    return taps | adapters


def experts_of(router: str) -> tuple[str, ...]:
    """The names of the experts of a router of [`routers_of`], in the order of its weights."""
    return EXPERT_NAMES if router.startswith("tap") else ADAPTER_EXPERTS


class RoutingHealth:
    """Sums over all samples that the routers and the experts of a model see while [`watch`] lasts.

    A sample of a router is an image where the router's input does not depend on the text, and an expression elsewhere.
    """

    def __init__(self, model: SeraForReferringSegmentation):
        """
        Args:
            model: The model whose routers are watched.
        """
        self.config = model.config
        self.routers = routers_of(model)
        self.experts: dict[
            str, list[tuple[nn.Module, float | None]]
        ] = {}  # with the gain; `None`: the result holds the map
        for name, fusion in zip(model.config.tap_layers, model.model.fusions, strict=True):
            if fusion.router is not None:
                self.experts[f"tap {name}"] = [(expert, None) for expert in fusion.experts.values()]
        for name, block in model.model.vision.adapted_blocks.items():
            if block.adapter.router is not None:
                adapter = block.adapter
                self.experts[f"adapter {name}"] = [
                    (adapter.spatial_expert, SPATIAL_GAIN),
                    (adapter.boundary_expert, BOUNDARY_GAIN),
                ]
        # in float64: the deviation of a router that hardly decides is a small difference of large sums
        self.sums = {
            name: {
                field: torch.zeros(size, device=model.device, dtype=torch.float64)
                for field, size in self._fields(name).items()
            }
            for name in self.routers
        }

    def _fields(self, name: str) -> dict[str, int]:
        """What is summed for a router, with the number of values."""
        experts = len(experts_of(name))
        fields = {"samples": 1, "weights": experts, "weight_squares": experts, "entropy": 1}
        fields |= {"added": experts, "maps": experts}
        if self.config.routing == "learned":
            fields |= {"logits": experts, "logit_squares": experts, "saturated": 1}
        if name.startswith("tap"):
            fields |= {"selected": experts, "probabilities": experts, "excess": experts}
            if self.config.routing == "learned":
                units = self.config.router_hidden_dim
                fields |= {"units": units, "unit_squares": units}
        return fields

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count every decision of the routers and what the experts add, meanwhile."""
        with ExitStack() as stack:

            def listen(module: nn.Module, add, *names) -> None:
                stack.enter_context(
                    module.register_forward_hook(lambda module, args, result: add(*names, args[0], result))
                )

            for name, router in self.routers.items():
                listen(router, self._add_decision, name)
                if "units" in self.sums[name]:
                    listen(router.activation, self._add_units, name)
                for place, (expert, gain) in enumerate(self.experts[name]):
                    listen(expert, self._add_map, name, place, gain)
            yield

    def _add_decision(self, name: str, _: Tensor, decision: SeraRouting | Tensor) -> None:
        """Count a router's result."""
        sums, is_tap = self.sums[name], isinstance(decision, SeraRouting)
        weights = (decision.weights if is_tap else decision).double()
        # an adapter's router does not return its logits; the logarithms of its weights differ from them by a constant
        logits = decision.logits.double() if is_tap else weights.clamp_min(1e-300).log()
        probabilities = logits.softmax(dim=-1)
        found = {
            "samples": weights.new_tensor([len(weights)]),
            "weights": weights.sum(0),
            "weight_squares": weights.square().sum(0),
            "entropy": torch.special.entr(weights).sum()[None],
        }
        if is_tap:
            excess = (logits.abs() - self.config.router_logit_bound).relu().square()
            found |= {"selected": decision.selected.double().sum(0), "probabilities": probabilities.sum(0)}
            found["excess"] = excess.sum(0)
        if "logits" in sums:
            centred = logits - logits.mean(dim=-1, keepdim=True)  # what the softmax sees of them
            found |= {"logits": centred.sum(0), "logit_squares": centred.square().sum(0)}
            found["saturated"] = (probabilities.amax(dim=-1) > SATURATED_PROBABILITY).sum()[None]
        for field, value in found.items():
            sums[field] += value

    def _add_units(self, name: str, _: Tensor, units: Tensor) -> None:
        """Count the outputs of a router's hidden units, (N, router_hidden_dim)."""
        self.sums[name]["units"] += units.double().sum(0)
        self.sums[name]["unit_squares"] += units.double().square().sum(0)

    def _add_map(self, name: str, place: int, gain: float | None, grid: Tensor, result: Tensor) -> None:
        """Count what an expert adds to its maps, (B, C, H, W)."""
        added = (result - grid if gain is None else gain * result).flatten(1).double().norm(dim=1)
        self.sums[name]["added"][place] += (added / grid.flatten(1).double().norm(dim=1).clamp_min(1e-12)).sum()
        self.sums[name]["maps"][place] += len(grid)

    def summary(self, accelerator: Accelerator) -> dict[str, dict[str, dict]]:
        """The figures of all processes together. Every process calls this.

        Returns:
            `{"taps": {depth: figures}, "adapters": {block: figures}}`. The figures of a router:

            - "shares": {expert: mean weight}, in [0, 1].
            - "deviation": standard deviation of the weights between samples, of the expert that has the greatest; at most 0.5.
            - "mutual_information": of sample and expert, in nats: the entropy of the mean weights minus the mean entropy of the
              weights. It is 0 if all samples have the same weights, and at most log 4 (taps) or log 2 (adapters).
            - "entropy": mean entropy of the weights in nats.
            - "added": {expert: norm of what the expert adds before its weight, as a share of its map's norm, mean over maps}, of
              the experts that ran.
            - "samples": their number.
            - "logit_deviation" (learned routing): as "deviation", of the logits minus their mean over experts.
            - "saturated" (learned routing): share of samples that give one expert more than SATURATED_PROBABILITY. It is that of
              a softmax over all experts, also where only k of them are used.
            - "dead_units" (taps, learned routing): share of hidden units whose output does not vary.
            - "selected" (taps): {expert: share of samples}.
            - "logit_loss", "balance_loss", "token_loss" (taps): auxiliary losses of all samples as one batch, times their weights.
              The last is 0 where all experts are used.
        """
        flat = [value for fields in self.sums.values() for value in fields.values()]
        if flat:
            flat = accelerator.reduce(torch.cat(flat), "sum").split([len(value) for value in flat])
        totals = iter(flat)
        found: dict[str, dict[str, dict]] = {"taps": {}, "adapters": {}}
        for name, fields in self.sums.items():
            kind, place = name.split()
            found[f"{kind}s"][place] = self._figures(name, {field: next(totals).cpu() for field in fields})
        return found

    def _figures(self, name: str, sums: dict[str, Tensor]) -> dict:
        experts, count = experts_of(name), sums["samples"]

        def by_expert(values: Tensor) -> dict[str, float]:
            return dict(zip(experts, values.tolist(), strict=True))

        def deviation(field: str, squares: str) -> Tensor:
            return (sums[squares] / count - (sums[field] / count).square()).clamp_min(0).sqrt()

        shares, entropy = sums["weights"] / count, sums["entropy"] / count
        added = by_expert(sums["added"] / sums["maps"])
        figures = {
            "shares": by_expert(shares),
            "deviation": deviation("weights", "weight_squares").max().item(),
            "mutual_information": (torch.special.entr(shares).sum() - entropy).clamp_min(0).item(),
            "entropy": entropy.item(),
            "added": {expert: added[expert] for expert, maps in by_expert(sums["maps"]).items() if maps},
            "samples": int(count.item()),
        }
        if "logits" in sums:
            figures["logit_deviation"] = deviation("logits", "logit_squares").max().item()
            figures["saturated"] = (sums["saturated"] / count).item()
        if "units" in sums:
            is_dead = deviation("units", "unit_squares") < DEAD_UNIT_DEVIATION
            figures["dead_units"] = is_dead.double().mean().item()
        if "selected" in sums:
            figures |= {"selected": by_expert(sums["selected"] / count)} | self._losses(sums, shares)
        return figures

    def _losses(self, sums: dict[str, Tensor], shares: Tensor) -> dict[str, float]:
        config, count = self.config, sums["samples"]
        token_weight = config.router_token_loss_weight * (config.num_selected_experts < NUM_FUSION_EXPERTS)
        token = len(shares) * (sums["selected"] / count * sums["probabilities"] / count).sum()
        return {
            "logit_loss": (config.router_logit_loss_weight * (sums["excess"] / count).mean()).item(),
            "balance_loss": (
                config.router_balance_loss_weight * shares.var(unbiased=False) / shares.mean() ** 2
            ).item(),
            "token_loss": (token_weight * token).item(),
        }


def named_routers(summary: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The figures of a [`RoutingHealth.summary`] by the names of [`routers_of`]."""
    return {f"{kind[:-1]} {place}": figures for kind in summary for place, figures in summary[kind].items()}


def routing_warnings(summary: dict[str, dict[str, dict]]) -> list[str]:
    """One sentence for each router that is dead or saturated, or that has an idle expert. It names the router and the figures.

    Args:
        summary: Of [`RoutingHealth.summary`].
    """
    warnings = []
    for name, figures in named_routers(summary).items():
        faults = []
        if _is_dead(figures):
            units = (
                f", {100 * figures['dead_units']:.0f} % of its hidden units are dead" if "dead_units" in figures else ""
            )
            faults.append(
                f"is dead: it decides the same for every sample (its logits deviate by {figures['logit_deviation']:.2g}{units})"
            )
        elif figures.get("saturated", 0) >= SATURATED_SAMPLES:
            faults.append(
                f"is saturated: one expert has more than {100 * SATURATED_PROBABILITY:.0f} % for "
                f"{100 * figures['saturated']:.0f} % of the samples"
            )
        idle = _idle_experts(figures)
        if idle:
            noun = "expert" if len(idle) == 1 else "experts"
            listed = ", ".join(f"{expert} ({why})" for expert, why in idle.items())
            faults.append(f"has {len(idle)} idle {noun}: {listed}")
        if faults:
            warnings.append(f"The router of {name} {', and it '.join(faults)}.")
    return warnings


def _is_dead(figures: dict) -> bool:
    if "logit_deviation" not in figures or figures["samples"] < 2:  # equal weights are meant, or nothing can vary
        return False
    return figures["logit_deviation"] < DEAD_LOGIT_DEVIATION or figures.get("dead_units") == 1


def _idle_experts(figures: dict) -> dict[str, str]:
    """The idle experts of a router, with the reason in a few words."""
    idle, (least, most) = {}, IDLE_WEIGHTS
    greatest = max(figures["shares"].values())
    for expert, share in figures["shares"].items():
        added = figures["added"].get(expert, 1.0)
        if share < least or (greatest > most and share < greatest):
            idle[expert] = f"mean weight {100 * share:.1f} %"
        elif added < IDLE_ADDITION:
            idle[expert] = f"adds {100 * added:.1f} % of the map's norm"
    return idle


__all__ = [
    "ADAPTER_EXPERTS",
    "SATURATED_PROBABILITY",
    "RoutingHealth",
    "experts_of",
    "named_routers",
    "routers_of",
    "routing_warnings",
]
