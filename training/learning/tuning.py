"""Which parameters are trained (the paper's norm-and-bias tuning of the frozen towers, or others), and in what memory."""

from dataclasses import dataclass

from torch import nn

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.vision_sera import SeraVisionEncoder
from training.configuration import Tuning

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # kinds of norms in towers; all towers known today have layer norms


@dataclass
class TuningReport:
    """Counts of parameters after [`apply_tuning`]. `total` counts include what is frozen."""

    vision_trained: int
    vision_total: int
    text_trained: int
    text_total: int
    added: int

    @property
    def tower_share(self) -> float:
        """Share of the two towers' parameters that is trained, in [0, 1]."""
        return (self.vision_trained + self.text_trained) / (self.vision_total + self.text_total)

    def __str__(self) -> str:
        return (
            f"vision tower: {self.vision_trained:,} of {self.vision_total:,} parameters trained "
            f"({self.vision_trained / self.vision_total:.3%}); text tower: {self.text_trained:,} of {self.text_total:,} "
            f"({self.text_trained / self.text_total:.3%}); both: {self.tower_share:.3%}; added by SERA: {self.added:,}, all trained"
        )


def apply_tuning(model: SeraForReferringSegmentation, *, vision: Tuning, text: Tuning) -> TuningReport:
    """Set `requires_grad` of every parameter (paper: "norm_bias", less than 1 % of the backbone).

    "frozen" trains nothing of a tower, "norm_bias" the weights of its norms and every bias, "full" all of it. What SERA adds to the
    towers is always trained.

    Returns:
        What is trained, counted.
    """
    model.requires_grad_(True)
    towers = {"vision": (model.model.vision.tower, vision), "text": (model.model.text_tower, text)}
    counts = {}
    for name, (tower, tuning) in towers.items():
        _tune(tower, tuning)
        if name == "vision":
            _freeze_what_nothing_reads(model.model.vision)
        parameters = list(tower.parameters())
        counts[f"{name}_trained"] = sum(p.numel() for p in parameters if p.requires_grad)
        counts[f"{name}_total"] = sum(p.numel() for p in parameters)
    total = sum(p.numel() for p in model.parameters())
    return TuningReport(**counts, added=total - counts["vision_total"] - counts["text_total"])


def checkpoint_activations(model: SeraForReferringSegmentation) -> None:
    """Have the blocks of both towers computed again in the backward pass instead of kept."""
    # the newer releases of transformers renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _tune(tower: nn.Module, tuning: Tuning) -> None:
    tower.requires_grad_(tuning == "full")
    if tuning == "norm_bias":
        for module in tower.modules():
            if isinstance(module, NORMS):
                module.requires_grad_(True)
        for name, parameter in tower.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


def _freeze_what_nothing_reads(vision: SeraVisionEncoder) -> None:
    """A parameter that no forward pass uses would stall distributed training."""
    for parameter in vision.family.unread(vision.tower):
        parameter.requires_grad_(False)
    vision.blocks[vision.depth :].requires_grad_(False)
    if vision.depth < vision.family.depth:
        vision.family.final_norm(vision.tower).requires_grad_(False)
