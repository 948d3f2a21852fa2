"""SERA: from images and expressions to mask logits (arXiv 2603.12538)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, pad
from transformers import AutoConfig, AutoModel, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput, logging

from .adapter_sera import SeraAdapterBoundaryExpert, SeraUpProjection
from .configuration_sera import TOWER_TYPES, SeraConfig
from .decoder_sera import SeraMaskDecoder, SeraSentenceGate
from .fusion_sera import SeraFixedFilters, SeraFusion, SeraSpatialExpert
from .layers_sera import SeraConvUnit
from .routing_sera import SeraRouterScore, SeraRouting, router_auxiliary_loss
from .vision_sera import SeraAdaptedBlock, SeraImages, SeraVisionEncoder

logger = logging.get_logger(__name__)


@dataclass
class SeraModelOutput(ModelOutput):
    """
    Output of [`SeraModel`]. N is the number of expressions.

    Attributes:
        fused_maps: One (N, fusion_dim, H/patch, W/patch) map per tap, refined by SERA-Fusion.
        text_states: (N, L, text hidden size) token features of the expressions.
        text_mask: Attention mask that hides the padding, in the form the attention kernel takes; `None` without padding.
        sentence: (N, projection_dim) sentence features.
        fusion_routings: One [`SeraRouting`] per tap; none where the taps have no experts.
        adapter_router_weights: One (N, 2) per adapter with experts: weights of the spatial and of the boundary expert.
    """

    fused_maps: tuple[Tensor, ...] | None = None
    text_states: Tensor | None = None
    text_mask: Tensor | None = None
    sentence: Tensor | None = None
    fusion_routings: tuple[SeraRouting, ...] | None = None
    adapter_router_weights: tuple[Tensor, ...] | None = None


@dataclass
class SeraReferringSegmentationOutput(ModelOutput):
    """
    Output of [`SeraForReferringSegmentation`]. N is the number of expressions.

    Attributes:
        loss: Scalar, `mask_loss` plus `presence_loss`, if any, plus, in training, `router_aux_loss`. With labels only. With
            `num_items_in_batch`, this batch's share of a step's loss.
        logits: (N, h, w) mask logits over the (letterboxed) input; h and w are four times the grid of patches.
        presence_logits: (N,), positive where the thing meant is in the image. With `config.predict_presence` only.
        mask_loss: Scalar, weighted binary cross-entropy plus Dice. With labels only.
        presence_loss: Scalar, binary cross-entropy of the presence. With labels and `config.predict_presence` only.
        router_aux_loss: Scalar, auxiliary losses of the fusion routers, averaged over the taps. In training only.
        adapter_router_weights: One (N, 2) per adapter, shares of the spatial and boundary expert. On request.
        fusion_router_weights: One (N, 4) per tap, shares of the spatial, context, boundary and shape expert. On request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    presence_logits: Tensor | None = None
    mask_loss: Tensor | None = None
    presence_loss: Tensor | None = None
    router_aux_loss: Tensor | None = None
    adapter_router_weights: tuple[Tensor, ...] | None = None
    fusion_router_weights: tuple[Tensor, ...] | None = None


class SeraPreTrainedModel(PreTrainedModel):
    """What the SERA models have in common: configuration, initialisation, supported attention kernels."""

    config: SeraConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # over several devices: an adapted block calls parts of the tower's block, and shared maps are picked by a tensor of indices
    _no_split_modules = ["SeraModel", "SeraMaskDecoder"]
    _supports_sdpa = True
    # no flash attention: transformers' unpads queries by the mask of the keys, which are other tokens here
    _supports_attention_backend = True
    accepts_loss_kwargs = True  # Trainer then tells the size of a step, in which every expression weighs the same

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint holds; also called for buffers that are constants. The towers initialise themselves."""
        super()._init_weights(module)
        # Only modules with parameters or buffers of their own arrive here, so each rule hangs on such a module's class.
        if isinstance(module, (SeraUpProjection, SeraRouterScore)):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.lecun_normal_(module.weight)  # the base class's fixed 0.02 starves layers as narrow as the adapters'
            if isinstance(module, SeraSentenceGate):
                init.ones_(module.bias)
        elif isinstance(module, SeraSpatialExpert):
            init.constant_(module.alpha, 0.1)
        elif isinstance(module, SeraFixedFilters):
            module.reset_kernels()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint,
        **options,
    ) -> None:
        """As of every model, but a block's second computation leaves batch norm's running statistics alone, which would otherwise
        move twice a step. (With `use_reentrant`, which torch gives up, it does not.)"""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
        if enable and not getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
            for module in self.modules():
                if isinstance(module, SeraAdaptedBlock):
                    module.keep_statistics_when_recomputed()


class SeraModel(SeraPreTrainedModel):
    """Images and expressions to fused, expression-conditioned feature maps: all of SERA but the mask decoder."""

    def __init__(self, config: SeraConfig):
        super().__init__(config)
        self.text_tower = AutoModel.from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.vision = SeraVisionEncoder(config)
        self.fusions = nn.ModuleList(SeraFusion(config) for _ in config.tap_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding."""
        return self.text_tower.embeddings.token_embedding

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, L) token ids to token features (N, L, text hidden size) and sentence features (N, projection_dim).

        The sentence feature is the projection of the end-of-text token's feature.
        """
        encoded = self.text_tower(input_ids=input_ids, attention_mask=attention_mask)
        return encoded.last_hidden_state, self.text_projection(encoded.pooler_output)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_states: Tensor | None = None,
        **kwargs,
    ) -> SeraModelOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised with the ImageNet mean and standard deviation; H and W are multiples of the
                patch.
            input_ids: (N, L) CLIP token ids.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which is on the right. `None` means no padding.
            image_index: (N,) row of `pixel_values` that each expression is about. `None` means N = B, one each.
            image_states: (B, states, num_prefix + H·W, hidden_size) that `SeraVisionEncoder.encode_states` gave for the
                images before. `pixel_values` then says their size alone. `None`: the images are encoded.
            **kwargs: Ignored, so that everything the processor returns can be handed on.

        Raises:
            ValueError: Where sizes do not fit each other or the patch.
        """
        _check_batch(pixel_values, input_ids, image_index, image_states)
        images = self.encode_images(pixel_values, image_states)
        return self.condition(*images, input_ids, attention_mask, image_index)

    def encode_images(
        self, pixel_values: Tensor, image_states: Tensor | None = None
    ) -> tuple[SeraImages, list[tuple[Tensor, SeraRouting | None]] | None]:
        """All that does not depend on the text, of (B, 3, H, W) images: what their expressions share.

        Returns:
            What the vision tower makes of them, and the fused map and the routing of every tap that no text has reached; `None`
            for the latter where routers see the sentence.
        """
        images = self.vision.encode_images(pixel_values, image_states)
        if self.config.expression_aware_routing:
            return images, None
        fused = [
            fusion(tokens, grid_size=images.grid_size, sentence=None)
            for fusion, tokens in zip(self.fusions, images.taps, strict=False)
        ]
        return images, fused

    def condition(
        self,
        images: SeraImages,
        fused_images: list[tuple[Tensor, SeraRouting | None]] | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> SeraModelOutput:
        """The rest of [`forward`], from what [`encode_images`] returned; for all of the expressions or for a part of them."""
        grid_size = images.grid_size
        text_states, sentence = self.encode_text(input_ids, attention_mask)
        text_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=text_states[:, :1].expand(-1, grid_size[0] * grid_size[1], -1),
            attention_mask=attention_mask,
            encoder_hidden_states=text_states,
        )
        condition = {
            "grid_size": grid_size,
            "text_states": text_states,
            "text_mask": text_mask,
            "sentence": sentence,
        }
        taps, adapter_weights = self.vision(images, image_index=image_index, condition=condition)
        fused = []
        for grid, routing in fused_images or ():
            if image_index is not None:
                grid, routing = grid[image_index], None if routing is None else routing.take(image_index)
            fused.append((grid, routing))
        for fusion, tap in list(zip(self.fusions, taps, strict=True))[len(fused) :]:
            index = image_index if tap.shared else None
            fused.append(fusion(tap.tokens, grid_size=grid_size, sentence=sentence, image_index=index))
        return SeraModelOutput(
            fused_maps=tuple(grid for grid, _ in fused),
            text_states=text_states,
            text_mask=text_mask,
            sentence=sentence,
            fusion_routings=tuple(routing for _, routing in fused if routing is not None),
            adapter_router_weights=adapter_weights,
        )


class SeraForReferringSegmentation(SeraPreTrainedModel):
    """SERA with its mask decoder: the mask of the one thing that an expression means."""

    is_fused = False  # by `fuse_for_inference`

    def __init__(self, config: SeraConfig):
        super().__init__(config)
        self.model = SeraModel(config)
        self.decoder = SeraMaskDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding."""
        return self.model.get_input_embeddings()

    def fuse_for_inference(self) -> "SeraForReferringSegmentation":
        """Make this model, in place and for good, one that only predicts, a little faster: same results but for rounding.

        Batch norms are taken into their convolutions, and convolutions keep their weights channels-last, as feature maps lie
        here. To be called before a cast to bfloat16, so that the folding is done in float32. What is left can neither be
        trained nor saved.

        Returns:
            The model itself.

        Raises:
            ValueError: In training mode.
        """
        if self.training:
            raise ValueError("The model is in training mode; call eval() before fuse_for_inference().")
        for module in self.modules():
            if isinstance(module, (SeraConvUnit, SeraAdapterBoundaryExpert)):
                module.fold()
        self.requires_grad_(False)
        self.is_fused = True
        return self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "SeraForReferringSegmentation":
        """As of every module; `ValueError` for the training mode of a model that [`fuse_for_inference`] has changed."""
        if mode and self.is_fused:
            raise ValueError("fuse_for_inference() has folded this model's batch norms; load it again to train it.")
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs) -> None:
        """As of every model; `ValueError` for one that [`fuse_for_inference`] has changed: it would not load again."""
        if self.is_fused:
            raise ValueError(
                "fuse_for_inference() has folded this model's batch norms; save it before, or load it again."
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | PathLike | None,
        text_model: str | PathLike | None,
        *,
        dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        **config_overrides,
    ) -> "SeraForReferringSegmentation":
        """A SERA whose towers are pretrained and whose other parts are fresh, in evaluation mode as from `from_pretrained`.

        Args:
            vision_model: Folder or Hub id of a DINOv2, with or without register tokens, or of a SERA, whose tower is taken.
                `None`: a fresh tower of the configuration given as `vision_config`.
            text_model: Folder or Hub id of a CLIP text tower, of a whole CLIP, or of a SERA. Where the checkpoint has a
                text projection, it is taken too; else the projection starts fresh. `None`: a fresh tower of the
                configuration given as `text_config`.
            dtype: Of all weights, also by name, such as "bfloat16".
            attn_implementation: Attention kernel of all parts, such as "eager" or "sdpa".
            **config_overrides: Fields of [`SeraConfig`].

        Raises:
            ValueError: Where a checkpoint is of another kind, a field is unknown, or a tower is described twice.
        """
        fields = dict(config_overrides)
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; it must be one of torch's, such as 'float32' or 'bfloat16'.")
        unknown = sorted(set(fields) - set(SeraConfig.__annotations__))
        if unknown:
            raise ValueError(f"SeraConfig has no field {unknown[0]!r}; it has {', '.join(SeraConfig.__annotations__)}.")
        for name, checkpoint in (("vision", vision_model), ("text", text_model)):
            if checkpoint is None:
                continue
            if f"{name}_config" in fields:
                raise ValueError(
                    f"{name}_config is given beside the pretrained {name} tower {checkpoint}; leave one out."
                )
            whole = AutoConfig.from_pretrained(checkpoint)
            config = getattr(whole, f"{name}_config", whole)  # a whole CLIP or SERA holds two
            if config.model_type not in TOWER_TYPES[name]:
                raise ValueError(
                    f"{checkpoint} is a {config.model_type!r}; the {name} tower must be one of {TOWER_TYPES[name]}."
                )
            if name == "text":
                config.projection_dim = whole.projection_dim
                fields.setdefault("projection_dim", whole.projection_dim)
            fields[f"{name}_config"] = config.to_dict()

        model = cls(SeraConfig(**fields)).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        if vision_model is not None:
            model._load_vision_tower(vision_model)
        if text_model is not None:
            model._load_text_tower(text_model)
        return model

    def _load_vision_tower(self, checkpoint: str | PathLike) -> None:
        tower = self.model.vision.tower
        if _is_sera(checkpoint):
            pretrained = type(self).from_pretrained(checkpoint, dtype=self.dtype).model.vision.tower
        else:
            pretrained, info = AutoModel.from_pretrained(
                checkpoint, config=tower.config, dtype=self.dtype, output_loading_info=True
            )
            _refuse_missing(info["missing_keys"], checkpoint, "DINOv2")
        tower.load_state_dict(pretrained.state_dict())

    def _load_text_tower(self, checkpoint: str | PathLike) -> None:
        if _is_sera(checkpoint):
            whole = type(self).from_pretrained(checkpoint, dtype=self.dtype).model
            tower, projection = whole.text_tower, whole.text_projection.weight
        else:
            pretrained, info = CLIPTextModelWithProjection.from_pretrained(
                checkpoint, config=self.config.text_config, dtype=self.dtype, output_loading_info=True
            )
            tower = pretrained.text_model
            projection = None if info["missing_keys"] else pretrained.text_projection.weight
            if set(info["missing_keys"]) - {"text_projection.weight"}:
                # some releases of transformers find the names of a bare tower as a bare tower alone
                tower, info = CLIPTextModel.from_pretrained(
                    checkpoint, config=self.config.text_config, dtype=self.dtype, output_loading_info=True
                )
                _refuse_missing(info["missing_keys"], checkpoint, "CLIP text tower")
        self.model.text_tower.load_state_dict(tower.state_dict())
        if projection is None:
            logger.warning(f"{checkpoint} has no text projection; the sentence feature starts from a random one.")
        elif projection.shape == self.model.text_projection.weight.shape:
            with torch.no_grad():
                self.model.text_projection.weight.copy_(projection)
        else:
            raise ValueError(
                f"projection_dim is {self.config.projection_dim}, but the text projection of {checkpoint} gives "
                f"{projection.shape[0]} features; leave projection_dim out to take it."
            )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_weights: bool = False,
        max_expressions: int | None = None,
        image_states: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> SeraReferringSegmentationOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), as the processor makes them; H and W are multiples of the patch.
            input_ids: (N, L) CLIP token ids.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which is on the right. `None` means no padding.
            image_index: (N,) row of `pixel_values` that each expression is about. `None` means N = B, one each.
            labels: (N, H, W) masks over the input in [0, 1], of any dtype; all zero where nothing in the image is meant. Where
                they are negative, the mask's loss leaves the pixel out.
            output_router_weights: Whether to return what the routers decided.
            max_expressions: How many expressions are worked on at once, to bound the memory; the images' part still runs once.
                `None` means all. In inference only. Memory beside the weights is about 90 MiB per expression at once
                (SERA-B, 448×448, float32) and grows with the number of patches.
            image_states: (B, states, num_prefix + H·W, hidden_size) that `SeraVisionEncoder.encode_states` gave for the
                images before, so that training need not run frozen blocks again. `pixel_values` then says their size alone.
            num_items_in_batch: Number of label values of all batches that make one step, as `Trainer` counts them. `loss` is then
                this batch's share of the step's loss: the shares add up to the mean over all expressions of the step. `None`:
                `loss` is the mean over this batch's expressions.
            **kwargs: Ignored, so that everything the processor returns (such as `original_sizes`) can be handed on.

        Raises:
            ValueError: Where sizes do not fit each other or the patch, and for `max_expressions` below 1 or in training.
        """
        if labels is not None and labels.shape != (len(input_ids), *pixel_values.shape[-2:]):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected {(len(input_ids), *pixel_values.shape[-2:])}, one mask per "
                "expression over the input image."
            )
        if max_expressions is not None:
            if max_expressions < 1:
                raise ValueError(f"max_expressions is {max_expressions}; it must be 1 or more, or None for all.")
            if self.training:
                raise ValueError(
                    "max_expressions is for inference, but the model is in training mode; call model.eval()."
                )
            logits, presence_logits, adapter_weights, fusion_weights = self._in_parts(
                pixel_values, input_ids, attention_mask, image_index, image_states, max_expressions
            )
            router_aux_loss = None
        else:
            encoded = self.model(pixel_values, input_ids, attention_mask, image_index, image_states)
            logits, presence_logits = self._decode(encoded)
            adapter_weights = encoded.adapter_router_weights
            fusion_weights = tuple(routing.weights for routing in encoded.fusion_routings)
            router_aux_loss = self._router_loss(encoded.fusion_routings, logits) if self.training else None

        loss = mask_loss = presence_loss = None
        if labels is not None:
            mask_loss = mask_segmentation_loss(logits, labels, self.config)
            if presence_logits is not None:
                presence_loss = presence_detection_loss(presence_logits, labels)
            loss = sum(part for part in (mask_loss, presence_loss, router_aux_loss) if part is not None)
            if num_items_in_batch is not None:
                loss = loss * (labels.numel() / num_items_in_batch)
        return SeraReferringSegmentationOutput(
            loss=loss,
            logits=logits,
            presence_logits=presence_logits,
            mask_loss=mask_loss,
            presence_loss=presence_loss,
            router_aux_loss=router_aux_loss,
            adapter_router_weights=adapter_weights if output_router_weights else None,
            fusion_router_weights=fusion_weights if output_router_weights else None,
        )

    def _decode(self, encoded: SeraModelOutput) -> tuple[Tensor, Tensor | None]:
        return self.decoder(encoded.fused_maps, encoded.text_states, encoded.text_mask, encoded.sentence)

    def _in_parts(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_index: Tensor | None,
        image_states: Tensor | None,
        max_expressions: int,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits, presence logits and the adapters' and the fusions' router weights, of so many expressions at once."""
        _check_batch(pixel_values, input_ids, image_index)
        shared = self.model.encode_images(pixel_values, image_states)
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        parts = []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(max_expressions):
            encoded = self.model.condition(
                *shared, input_ids[rows], None if attention_mask is None else attention_mask[rows], image_index[rows]
            )
            routings = tuple(routing.weights for routing in encoded.fusion_routings)
            logits, presence = self._decode(encoded)
            parts.append((logits, presence, encoded.adapter_router_weights, routings))
        logits, presence, adapters, fusions = zip(*parts, strict=True)
        return (
            torch.cat(logits),
            None if presence[0] is None else torch.cat(presence),
            tuple(torch.cat(weights) for weights in zip(*adapters, strict=True)),
            tuple(torch.cat(weights) for weights in zip(*fusions, strict=True)),
        )

    def _router_loss(self, routings: Sequence[SeraRouting], like: Tensor) -> Tensor:
        if not routings:
            return like.new_zeros((), dtype=torch.float32)
        losses = [
            router_auxiliary_loss(
                routing,
                logit_weight=self.config.router_logit_loss_weight,
                balance_weight=self.config.router_balance_loss_weight,
                token_weight=self.config.router_token_loss_weight,
            )
            for routing in routings
        ]
        return torch.stack(losses).mean()


def mask_segmentation_loss(logits: Tensor, labels: Tensor, config: SeraConfig) -> Tensor:
    """Weighted binary cross-entropy plus Dice on area-averaged targets (ours).

    Both are means over the expressions of a mean over each expression's own pixels, so that all expressions weigh the same.

    Args:
        logits: (N, h, w).
        labels: (N, H, W) masks in [0, 1], negative where a pixel does not count; each logit's target is their mean over the area
            that it covers or, with `mask_targets="nearest"`, their value at one of its pixels. A logit counts by its share of
            pixels that do.
        config: For the two weights and the kind of target.

    Returns:
        A scalar in float32.
    """
    logits, labels = logits.float(), labels.float()
    parts = torch.stack([labels.clamp(min=0), (labels >= 0).float()], dim=1)
    size = logits.shape[-2:]
    shrunk = (
        interpolate(parts, size=size, mode="nearest") if config.mask_targets == "nearest" else area_average(parts, size)
    )
    covered, counted = shrunk.unbind(1)
    targets = (covered / counted.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    bce = (binary_cross_entropy_with_logits(logits, targets, reduction="none") * counted).sum(dim=(1, 2))
    bce = bce / counted.sum(dim=(1, 2)).clamp(min=1)
    probability = logits.sigmoid() * counted
    overlap = (probability * targets).sum(dim=(1, 2))
    total = probability.sum(dim=(1, 2)) + covered.sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return config.bce_loss_weight * bce.mean() + config.dice_loss_weight * dice.mean()


def area_average(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of (..., H, W) float32 masks over the h × w equal rectangles that tile them, pixels counted by their share in each.

    `interpolate(mode="area")` gives the same where the sides are multiples; elsewhere (448 to 128) its windows overlap.
    """
    for dim, length in ((-2, size[0]), (-1, size[1])):
        masks = masks.transpose(dim, -1)
        edges = torch.linspace(0, masks.shape[-1], length + 1, device=masks.device)
        whole = edges.floor().clamp(max=masks.shape[-1] - 1).long()  # the last edge lies at the end of the last pixel
        before = pad(masks.cumsum(-1), (1, 0))[..., whole] + (edges - whole) * masks[..., whole]
        masks = (before.diff(dim=-1) * (length / masks.shape[-1])).transpose(dim, -1)
    return masks


def presence_detection_loss(presence_logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of presence logits (N,) against whether each of the masks (N, H, W) holds anything (ours).

    The labels are taken as they come, before any shrinking, so that no object is too small to count.
    """
    present = (labels > 0).flatten(1).any(dim=1)
    return binary_cross_entropy_with_logits(presence_logits.float(), present.float())


def _is_sera(checkpoint: str | PathLike) -> bool:
    return AutoConfig.from_pretrained(checkpoint).model_type == SeraConfig.model_type


def _refuse_missing(keys: set[str], checkpoint: str | PathLike, tower: str) -> None:
    if keys:
        raise ValueError(f"{checkpoint} lacks weights of the {tower}, the first being {sorted(keys)[0]!r}.")


def _check_batch(
    pixel_values: Tensor, input_ids: Tensor, image_index: Tensor | None, image_states: Tensor | None = None
) -> None:
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}; expected (images, 3, height, width).")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected (expressions, tokens).")
    if not torch.compiler.is_compiling() and 0 in input_ids.shape:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; there must be an expression.")
    if image_states is not None and image_states.shape[0] != pixel_values.shape[0]:
        raise ValueError(f"image_states are of {len(image_states)} images, pixel_values of {len(pixel_values)}.")
    if image_index is None:
        if input_ids.shape[0] != pixel_values.shape[0]:  # len() would make a constant of it in a traced graph
            raise ValueError(
                f"{len(input_ids)} expressions for {len(pixel_values)} images need image_index, which says the image that "
                "each expression is about."
            )
    elif image_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"image_index is of {image_index.dtype}; it must be of torch.int64 or torch.int32.")
    elif image_index.shape != input_ids.shape[:1]:
        raise ValueError(f"image_index has shape {tuple(image_index.shape)}; expected ({len(input_ids)},).")
    elif (
        not torch.compiler.is_compiling() and image_index.device.type == "cpu"
    ):  # elsewhere reading it would stall the device
        low, high = int(image_index.min()), int(image_index.max())
        if low < 0 or high >= len(pixel_values):
            raise ValueError(f"image_index holds {low if low < 0 else high}; there are {len(pixel_values)} images.")


__all__ = ["SeraForReferringSegmentation", "SeraModel", "SeraPreTrainedModel"]
