"""The optimiser that a run's settings name, as one object whatever it is made of."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from training.configuration import OptimizationSettings


def build_optimizer(model: nn.Module, optimization: OptimizationSettings) -> Optimizer:
    """AdamW on everything that is trained, or Muon on the matrices and AdamW on the rest.

    Matrices and kernels decay, vectors (biases, norms, gains) do not.

    Raises:
        ValueError: Where this torch has no Muon.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learning_rate, decay = (
        float(optimization.learning_rate),
        float(optimization.weight_decay),
    )  # checkpoints admit nothing else
    use_muon = optimization.optimizer == "muon"
    matrices = [p for p in trained if use_muon and p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        fused=True,
    )
    if not use_muon:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optimization.optimizer is 'muon', which torch {torch.__version__} lacks; it needs 2.9 or newer."
        )
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return JointOptimizer([muon, adamw])


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
