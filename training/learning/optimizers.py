"""The optimiser that a run's settings name, as one object whatever it is made of."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modeling_sera.routing_sera import SeraAdapterRouter, SeraTopKRouter
from training.configuration import OptimizationSettings

TOWERS = ("model.vision.tower.", "model.text_tower.")  # names of their parameters begin so


def build_optimizer(model: nn.Module, optimization: OptimizationSettings) -> Optimizer:
    """AdamW on everything that is trained, or Muon on the matrices and AdamW on the rest.

    Matrices and kernels decay, vectors (biases, norms, gains) do not. Routers are always AdamW's, in groups of their own with
    `optimization.router_rate` times the learning rate: Muon moves all directions of a matrix alike, and most inputs of a router
    say nothing about the experts. The towers' parameters have groups of their own too, with `optimization.tower_rate` times the
    learning rate.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_towers = {id(p) for name, p in model.named_parameters() if name.startswith(TOWERS)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learning_rate, decay = (
        float(optimization.learning_rate),
        float(optimization.weight_decay),
    )  # checkpoints admit nothing else
    use_muon = optimization.optimizer == "muon"
    routers = [module for module in model.modules() if isinstance(module, (SeraAdapterRouter, SeraTopKRouter))]
    of_routers = {id(p) for router in routers for p in router.parameters()}
    matrices = [p for p in trained if use_muon and p.ndim == 2 and id(p) not in embeddings | of_routers]
    chosen = {id(p) for p in matrices}
    tower_rate, router_rate = (
        learning_rate * float(factor) for factor in (optimization.tower_rate, optimization.router_rate)
    )
    groups = []
    for rate, members in (
        (learning_rate, [p for p in trained if id(p) not in chosen | of_towers | of_routers]),
        (tower_rate, [p for p in trained if id(p) in of_towers - chosen]),
        (router_rate, [p for p in trained if id(p) in of_routers]),
    ):
        groups.append({"params": [p for p in members if p.ndim >= 2], "weight_decay": decay, "lr": rate})
        groups.append({"params": [p for p in members if p.ndim < 2], "weight_decay": 0.0, "lr": rate})
    adamw = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if not use_muon:
        return adamw
    orthogonalized = [
        {"params": [p for p in matrices if id(p) not in of_towers], "lr": learning_rate},
        {"params": [p for p in matrices if id(p) in of_towers], "lr": tower_rate},
    ]
    return JointOptimizer([Muon(orthogonalized, lr=learning_rate, weight_decay=decay), adamw])


def cosine_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Rates that rise over the first 25th of the steps and then fall to zero as a cosine."""
    warmup = max(steps // 25, 1)
    return LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


class Muon(Optimizer):
    """Momentum whose steps are orthogonalised matrices (Muon, Jordan et al. 2024), in the precision of the weights.

    A step has the root mean square that AdamW's have, so that one learning rate serves both. torch.optim.Muon computes the same
    in bfloat16, which processors without units for it multiply many times more slowly, and one matrix after the other; here
    matrices of one shape are orthogonalised together.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that draws all singular values near one, by its authors
    ITERATIONS = 5
    STEP_SIZE = 0.2  # root mean square of AdamW's steps, about

    def __init__(
        self, matrices: list[nn.Parameter] | list[dict], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        """
        Args:
            matrices: Parameters of two dimensions, or groups of them.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            momentum: Share of the running mean of the gradients that a step keeps; in [0, 1).
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
            for matrices in alike.values():
                directions = []
                for matrix in matrices:
                    state = self.state[matrix]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(matrix)
                    mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(mean, group["momentum"]))  # Nesterov's
                rate = group["lr"] * self.STEP_SIZE * max(matrices[0].shape) ** 0.5
                for matrix, update in zip(matrices, self.orthogonalized(torch.stack(directions)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    @classmethod
    def orthogonalized(cls, matrices: Tensor) -> Tensor:
        """(B, m, n) matrices with about the same singular vectors and singular values between 0.7 and 1.2."""
        is_tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if is_tall else matrices  # the products below are of the smaller side
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if is_tall else x


class JointOptimizer(Optimizer):
    """Several optimisers over different parameters that step together: one schedule, one state dict (ours)."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Show the parts' own groups and states, so that whoever changes a rate here changes it there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """The parts' state dicts, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """What [`state_dict`] gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
