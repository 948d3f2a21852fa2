"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .routing_sera import SeraRouting


@dataclass
class SeraModelOutput(ModelOutput):
    """
    Output of [`SeraModel`]. N is the number of expressions.

    Attributes:
        fused_maps: One (N, fusion_dim, H/patch, W/patch) map per tap, refined by SERA-Fusion.
        text_states: (N, L, text hidden size) token features of the expressions.
        text_mask: Attention mask that hides the padding, in the form that the attention kernel takes. `None` without padding.
        sentence: (N, projection_dim) sentence features.
        fusion_routings: One [`SeraRouting`] per tap, of N rows; none where the taps have no experts.
        decided_routings: The same, but with one row per image where the routing is the same for all expressions about it.
        adapter_router_weights: One (N, 2) per adapter with experts: weights of the spatial and of the boundary expert.
    """

    fused_maps: tuple[Tensor, ...] | None = None
    text_states: Tensor | None = None
    text_mask: Tensor | None = None
    sentence: Tensor | None = None
    fusion_routings: tuple[SeraRouting, ...] | None = None
    decided_routings: tuple[SeraRouting, ...] | None = None
    adapter_router_weights: tuple[Tensor, ...] | None = None


@dataclass
class SeraReferringSegmentationOutput(ModelOutput):
    """
    Output of [`SeraForReferringSegmentation`]. N is the number of expressions.

    Attributes:
        loss: Scalar, the sum of the three losses below that are there. With labels only. With `num_items_in_batch`, this batch's
            share of a step's loss.
        logits: (N, h, w) mask logits over the (letterboxed) input; h and w are four times the grid of patches.
        presence_logits: (N,), positive where the image holds what the expression means. With `config.predict_presence` only.
        mask_loss: Scalar, weighted binary cross-entropy plus Dice. With labels only.
        presence_loss: Scalar, binary cross-entropy of `presence_logits`. With labels and `config.predict_presence` only.
        router_aux_loss: Scalar, auxiliary losses of the fusion routers, averaged over the taps. In training only.
        adapter_router_weights: One (N, 2) per adapter: weights of the spatial and the boundary expert. With
            `output_router_weights` only.
        fusion_router_weights: One (N, 4) per tap: weights of the spatial, context, boundary and shape expert. With
            `output_router_weights` only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    presence_logits: Tensor | None = None
    mask_loss: Tensor | None = None
    presence_loss: Tensor | None = None
    router_aux_loss: Tensor | None = None
    adapter_router_weights: tuple[Tensor, ...] | None = None
    fusion_router_weights: tuple[Tensor, ...] | None = None


__all__ = ["SeraModelOutput", "SeraReferringSegmentationOutput"]
