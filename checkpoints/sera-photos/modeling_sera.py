"""SERA: from images and expressions to mask logits (arXiv 2603.12538)."""

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import can_return_tuple, logging

from .adapter_sera import SeraAdapterBoundaryExpert, SeraUpProjection
from .checks_sera import check_batch, check_finite, check_pixels, check_requested_outputs
from .configuration_sera import FAMILIES, SeraConfig
from .decoder_sera import SeraMaskDecoder, SeraMerge, SeraOpenGate, SeraSentenceGate
from .features_sera import SeraFeatureCache, SeraImageFeatures
from .fusion_sera import SeraFixedFilters, SeraFusion, SeraFusionView, SeraSpatialExpert
from .layers_sera import SeraConvUnit, SeraSampleNorm, SeraSampleStatistics
from .loss_sera import mask_segmentation_loss, presence_detection_loss
from .outputs_sera import SeraModelOutput, SeraReferringSegmentationOutput
from .routing_sera import SeraAdapterRouter, SeraRouterScore, SeraRouting, SeraTopKRouter, mean_router_loss
from .statistics_sera import freeze_statistics
from .vision_sera import SeraAdaptedBlock, SeraImages, SeraVisionEncoder

logger = logging.get_logger(__name__)

# classes of transformers that load a SERA; the last two are those of its task "image-segmentation"
AUTO_CLASSES = ("AutoModel", "AutoModelForImageSegmentation", "AutoModelForUniversalSegmentation")


class SeraPreTrainedModel(PreTrainedModel):
    """What the SERA models have in common: configuration, initialisation, supported attention kernels."""

    config: SeraConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # These stay on one device: an adapted block calls parts of the tower's block, and a tensor of indices picks shared maps.
    _no_split_modules = ["SeraModel", "SeraMaskDecoder"]
    _supports_sdpa = True
    # No flash attention: the one of transformers unpads queries by the mask of the keys, which are other tokens here.
    _supports_attention_backend = True
    accepts_loss_kwargs = True  # Trainer then tells the size of a step, in which every expression weighs the same

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint holds, constant buffers included. The towers initialise themselves."""
        super()._init_weights(module)
        # Only modules with parameters or buffers of their own arrive here, so each rule is about the class of such a module.
        if isinstance(module, (SeraUpProjection, SeraRouterScore, SeraOpenGate)):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.lecun_normal_(
                module.weight
            )  # the base class's fixed 0.02 is too small for layers as narrow as the adapters'
        elif isinstance(module, SeraSpatialExpert):
            init.constant_(module.alpha, module.ALPHA)
        elif isinstance(module, SeraFixedFilters):
            module.reset_kernels()
        elif isinstance(module, SeraSampleStatistics):
            module.reset()
        if isinstance(module, SeraSentenceGate):
            init.ones_(module.bias)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint,
        **options,
    ) -> None:
        """Switch activation checkpointing on or off, as in every model; only in modes that leave the gradients as they are.

        A block that is computed again does not move the running statistics of its batch norms a second time.

        Raises:
            ValueError: For a mode that changes gradients.
        """
        if enable:
            settings = getattr(gradient_checkpointing_func, "keywords", {})
            if settings.get("use_reentrant"):
                raise ValueError(
                    "use_reentrant is True, which loses gradients where a tower is frozen; leave it out or set it to False."
                )
            if not settings.get("preserve_rng_state", True):
                raise ValueError(
                    "preserve_rng_state is False, which changes the gradients under dropout; leave it out or set it to True."
                )
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
        if enable:
            for module in self.modules():
                if isinstance(module, SeraAdaptedBlock):
                    module.keep_statistics_when_recomputed()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Change the number of the text tower's token embeddings, as in every model, and `config.text_config.vocab_size`.

        Raises:
            ValueError: For new tokens in a tower that would take one for the end of the text.
        """
        self.config.text_family.check_vocabulary(new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def train(self, mode: bool = True) -> "SeraPreTrainedModel":
        """Set the training or the evaluation mode. A batch norm in a frozen layer always stays in evaluation mode.

        Its running statistics are then as constant as the layer's weights. A LoRA does not save them, so it gives the same
        masks after loading only if they are constant.
        """
        super().train(mode)
        freeze_statistics(self)
        return self


class SeraModel(SeraPreTrainedModel):
    """SERA without the mask decoder: images and expressions to fused feature maps that depend on the expression."""

    def __init__(self, config: SeraConfig):
        super().__init__(config)
        self.text_family = config.text_family
        self.text_tower = self.text_family.build()
        self.text_projection = nn.Linear(self.text_family.sentence_width, config.projection_dim, bias=False)
        self.vision = SeraVisionEncoder(config)
        self.fusions = nn.ModuleList(SeraFusion(config) for _ in config.tap_layers)
        self.sentence_norm = SeraSampleNorm(config.projection_dim) if config.routers_see_sentence else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding."""
        return self.text_tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the text tower another token embedding."""
        self.text_tower.set_input_embeddings(value)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, L) token ids to token features (N, L, text hidden size) and sentence features (N, projection_dim).

        The sentence feature is the projection of the one that the tower's family makes (CLIP: the end-of-text token's).
        """
        states, sentence = self.text_family.encode(self.text_tower, input_ids, attention_mask)
        return states, self.text_projection(sentence)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        image_states: Tensor | None = None,
        image_features: SeraImageFeatures | None = None,
        **kwargs,
    ) -> SeraModelOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised with the ImageNet mean and standard deviation; H and W are multiples of the
                patch.
            input_ids: (N, L) token ids of the text tower's tokenizer; required.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which is on the right. `None` means no padding.
            image_index: (N,) row of `pixel_values` that each expression is about; each image needs an expression. `None`
                means N = B: one expression for each image.
            image_states: (B, states, num_prefix + H·W, hidden_size), cached features of `SeraVisionEncoder.encode_states`. Of
                `pixel_values` only the size is then used. `None`: the images are encoded.
            image_features: Of [`get_image_features`], in the place of `pixel_values`. `image_index` then names its rows, and images
                without an expression are allowed. In inference only.
            **kwargs: `return_dict=False` gives a tuple. Other names are ignored, so that `model(**inputs)` works with all that
                the processor returns.

        Raises:
            ValueError: Where inputs do not fit each other or the patch, and for outputs that SERA does not return.
        """
        check_requested_outputs(self.config, kwargs)
        check_batch(self, pixel_values, input_ids, attention_mask, image_index, image_states, image_features)
        images = self.encode_images(pixel_values, image_states, image_features)
        return self.condition(*images, input_ids, attention_mask, image_index)

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> SeraImageFeatures:
        """Encode images once, for any number of calls `model(image_features=…, input_ids=…)`. In inference only (ours).

        Args:
            pixel_values: (B, 3, H, W), as the processor makes them; H and W are multiples of the patch.

        Returns:
            All that does not depend on the text, without gradients. A call with it gives what a call with the images gives. What
            is made under `torch.inference_mode()` must be used under it or under `torch.no_grad()`.

        Raises:
            ValueError: In training mode, and for images of a wrong shape.
        """
        check_pixels(pixel_values)
        if self.training:
            raise ValueError(
                "get_image_features is for inference, but the model is in training mode; call model.eval()."
            )
        images, views = self.encode_images(pixel_values)
        packed = [fusion.pack(view) for fusion, view in zip(self.fusions, views, strict=False)]
        states, maps = ((), ()) if images.view is None else (images.view[:2], images.view.maps)
        return SeraImageFeatures(
            grid_size=images.grid_size,
            block_states=states,
            adapter_maps=maps,
            fusion_maps=tuple(maps for maps, _ in packed),
            fusion_means=tuple(mean for _, mean in packed if mean is not None),
        )

    def encode_images(
        self,
        pixel_values: Tensor | None,
        image_states: Tensor | None = None,
        image_features: SeraImageFeatures | None = None,
    ) -> tuple[SeraImages, list[SeraFusionView]]:
        """Compute all that does not depend on the text: the expressions share it. Arguments as of [`forward`].

        Returns:
            The results of the vision tower, and those of SERA-Fusion for every tap before the first adapter.
        """
        if image_features is not None:
            kept, means = image_features, iter(image_features.fusion_means)
            images = self.vision.images_of(kept.grid_size, kept.batch_size, kept.block_states, kept.adapter_maps)
            shared = zip(self.fusions, kept.fusion_maps, strict=False)
            return images, [fusion.unpack(maps, next(means, None)) for fusion, maps in shared]
        images = self.vision.encode_images(pixel_values, image_states)
        views = [
            fusion.look(tokens, images.grid_size) for fusion, tokens in zip(self.fusions, images.taps, strict=False)
        ]
        return images, views

    def condition(
        self,
        images: SeraImages,
        views: list[SeraFusionView],
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
        routed = {
            "sentence": sentence if self.sentence_norm is None else self.sentence_norm(sentence),
            "num_images": images.num_images,
        }
        condition = {"grid_size": grid_size, "text_states": text_states, "text_mask": text_mask, **routed}
        taps, adapter_weights = self.vision(images, image_index=image_index, condition=condition)
        fusions = list(self.fusions)
        shared, others = fusions[: len(views)], fusions[len(views) :]
        fused = [
            fusion.mix(view, image_index=image_index, **routed) for fusion, view in zip(shared, views, strict=True)
        ]
        fused += [fusion(tap, grid_size=grid_size, **routed) for fusion, tap in zip(others, taps, strict=True)]
        decided = [routing for _, routing in fused if routing is not None]
        per_image = 0 if image_index is None or self.config.routers_see_sentence else len(views)
        return SeraModelOutput(
            fused_maps=tuple(grid for grid, _ in fused),
            text_states=text_states,
            text_mask=text_mask,
            sentence=sentence,
            fusion_routings=tuple(
                routing.take(image_index) if i < per_image else routing for i, routing in enumerate(decided)
            ),
            decided_routings=tuple(decided),
            adapter_router_weights=adapter_weights,
        )


class SeraForReferringSegmentation(SeraPreTrainedModel):
    """SERA with its mask decoder: an image and an expression to the mask of the one thing that the expression means."""

    is_fused = False  # True after `fuse_for_inference`

    def __init__(self, config: SeraConfig):
        super().__init__(config)
        self.model = SeraModel(config)
        self.decoder = SeraMaskDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the text tower another token embedding."""
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> SeraImageFeatures:
        """See [`SeraModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values)

    @property
    def modules_to_save_for_lora(self) -> list[str]:
        """Names of the modules that SERA adds to its towers, for `peft.LoraConfig(modules_to_save=…)`.

        PEFT then trains these modules whole, beside the LoRA, and saves them with the running statistics of their batch norms.
        """
        adapters = [f"model.vision.adapted_blocks.{i}.adapter" for i in self.config.adapter_layers]
        fusions = [f"model.fusions.{i}" for i in range(len(self.config.tap_layers))]
        norms = [] if self.model.sentence_norm is None else ["model.sentence_norm"]
        return ["model.text_projection", *norms, *adapters, *fusions, "decoder"]

    def fuse_for_inference(self) -> "SeraForReferringSegmentation":
        """Change this model, in place and for good, so that it predicts a little faster; results differ by rounding only.

        Batch norms and norms over samples are taken into the layers beside them, and convolutions keep their weights
        channels-last, as feature maps lie here. Call it before a cast to bfloat16, so that the folding is done in float32.
        Afterwards the model can neither be trained nor saved.

        Returns:
            The model itself.

        Raises:
            ValueError: In training mode.
        """
        if self.training:
            raise ValueError("The model is in training mode; call eval() before fuse_for_inference().")
        for module in self.modules():
            if isinstance(module, (SeraConvUnit, SeraAdapterBoundaryExpert, SeraMerge)):
                module.fold()
            elif isinstance(module, (SeraAdapterRouter, SeraTopKRouter)):
                module.fold(self.model.sentence_norm)
        self.model.sentence_norm = None
        self.requires_grad_(False)
        self.is_fused = True
        return self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "SeraForReferringSegmentation":
        """As in the base class; `ValueError` for the training mode after [`fuse_for_inference`]."""
        if mode and self.is_fused:
            raise ValueError("fuse_for_inference() has folded this model's batch norms; load it again to train it.")
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as every model does; `ValueError` after [`fuse_for_inference`], since the folder could not be loaded."""
        if self.is_fused:
            raise ValueError(
                "fuse_for_inference() has folded this model's batch norms; save it before, or load it again."
            )
        if self._auto_class is not None:  # by itself transformers writes one class, the last that was registered
            reference = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | dict.fromkeys(
                AUTO_CLASSES, reference
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
        """Build a SERA with pretrained towers and fresh other parts, in evaluation mode as `from_pretrained` gives it.

        Args:
            vision_model: Folder or Hub id of a vision tower (a DINOv2, with or without register tokens, or a DINOv3), or of a
                SERA, of whose parts the vision tower alone is taken. `None`: a fresh tower of the configuration
                `vision_config`.
            text_model: Folder or Hub id of a text tower (CLIP, SigLIP, SigLIP 2, BERT), of a whole CLIP or SigLIP, or of a
                SERA. The text projection of a CLIP or SERA is taken too; in the place of a missing one a CLIP's starts fresh.
                Of other towers the sentence feature is taken as it is, unless `projection_dim` asks for another length.
                `None`: a fresh tower of the configuration `text_config`.
            dtype: Type of all weights, or its name such as "bfloat16".
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
                    f"{name}_config and the pretrained {name} tower {checkpoint} are both given; leave one out."
                )
            whole = AutoConfig.from_pretrained(checkpoint)
            config = getattr(whole, f"{name}_config", whole)  # a whole CLIP or SERA holds two
            if config.model_type not in FAMILIES[name]:
                raise ValueError(
                    f"{checkpoint} is a {config.model_type!r}; the {name} tower must be one of {tuple(FAMILIES[name])}."
                )
            if name == "text":
                family = FAMILIES[name][config.model_type](config)
                fields.setdefault("projection_dim", family.length_of_projection(whole))
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
        vision = self.model.vision
        if _is_sera(checkpoint):
            pretrained = type(self).from_pretrained(checkpoint, dtype=self.dtype).model.vision.tower
        else:
            pretrained = vision.family.load(checkpoint, self.dtype)
        vision.tower.load_state_dict(pretrained.state_dict())

    def _load_text_tower(self, checkpoint: str | PathLike) -> None:
        if _is_sera(checkpoint):
            whole = type(self).from_pretrained(checkpoint, dtype=self.dtype).model
            tower, projection = whole.text_tower, whole.text_projection.weight
        else:
            tower, projection = self.model.text_family.load(checkpoint, self.dtype, self.config.projection_dim)
        self.model.text_tower.load_state_dict(tower.state_dict())
        if projection is None:
            logger.warning(
                f"{checkpoint} has no text projection to {self.config.projection_dim} features; it starts from random weights."
            )
        elif projection.shape == self.model.text_projection.weight.shape:
            with torch.no_grad():
                self.model.text_projection.weight.copy_(projection)
        else:
            raise ValueError(
                f"projection_dim is {self.config.projection_dim}, but the text projection of {checkpoint} gives "
                f"{projection.shape[0]} features; leave projection_dim out to take it."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_weights: bool = False,
        max_expressions: int | None = None,
        image_states: Tensor | None = None,
        image_features: SeraImageFeatures | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> SeraReferringSegmentationOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), as the processor makes them; H and W are multiples of the patch.
            input_ids: (N, L) token ids of the text tower's tokenizer; required.
            attention_mask: (N, L), 1 for tokens and 0 for padding, which is on the right. `None` means no padding.
            image_index: (N,) row of `pixel_values` that each expression is about; each image needs an expression. `None`
                means N = B: one expression for each image.
            labels: (N, H, W) masks over the input in [0, 1], of any dtype; all zero where the image does not hold what is
                meant. Pixels with a negative label do not count in the mask's loss.
            output_router_weights: Whether to return the experts' weights.
            max_expressions: Expressions that are computed at once, to limit the memory; the images' part still runs once.
                `None` means all. In inference only. Each takes about 90 MiB beside the model's weights (SERA-B, 448×448,
                float32), and more with more patches.
            image_states: (B, states, num_prefix + H·W, hidden_size), cached features of `SeraVisionEncoder.encode_states`, so
                that training does not run frozen blocks again. Of `pixel_values` only the size is then used.
            image_features: Of [`get_image_features`], in the place of `pixel_values`. `image_index` then names its rows, and images
                without an expression are allowed. In inference only, without labels.
            num_items_in_batch: Number of label values in all batches that make one step, as `Trainer` counts them. `loss` is then
                this batch's share of the step's loss: the shares add up to the mean over all expressions of the step. `None`:
                `loss` is the mean over this batch's expressions.
            **kwargs: `return_dict=False` gives a tuple. Other names are ignored, so that `model(**inputs)` works with all that
                the processor returns, such as `original_sizes`.

        Raises:
            ValueError: Where inputs do not fit each other or the patch, for outputs that SERA does not return, for
                `max_expressions` below 1 or in training and, in inference on a CPU, for logits that are not finite.
        """
        check_requested_outputs(self.config, kwargs)
        check_batch(self, pixel_values, input_ids, attention_mask, image_index, image_states, image_features, labels)
        if self.training and not torch.compiler.is_compiling():
            freeze_statistics(self)  # what is frozen may have changed since train() was called
        if max_expressions is not None:
            if max_expressions < 1:
                raise ValueError(f"max_expressions is {max_expressions}; it must be 1 or more, or None for all.")
            if self.training:
                raise ValueError(
                    "max_expressions is for inference, but the model is in training mode; call model.eval()."
                )
            images = self.model.encode_images(pixel_values, image_states, image_features)
            logits, presence_logits, adapter_weights, fusion_weights = self._in_parts(
                images, input_ids, attention_mask, image_index, max_expressions
            )
            router_aux_loss = None
        else:
            encoded = self.model(
                pixel_values,
                input_ids,
                attention_mask,
                image_index,
                image_states,
                image_features,
                return_dict=True,
                **kwargs,
            )
            logits, presence_logits = self._decode(encoded)
            adapter_weights = encoded.adapter_router_weights
            fusion_weights = tuple(routing.weights for routing in encoded.fusion_routings)
            router_aux_loss = self._router_loss(encoded.decided_routings, logits) if self.training else None

        if not (self.training or torch.compiler.is_compiling()) and logits.device.type == "cpu":
            # elsewhere the check would have to wait for the device; in training the loss shows it
            check_finite(logits, presence_logits, self, pixel_values, image_states, image_features)

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
        images: tuple[SeraImages, list[SeraFusionView]],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_index: Tensor | None,
        max_expressions: int,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits, presence logits, and the routers' weights of adapters and fusions, `max_expressions` rows at a time."""
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        parts = []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(max_expressions):
            encoded = self.model.condition(
                *images, input_ids[rows], None if attention_mask is None else attention_mask[rows], image_index[rows]
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
        return mean_router_loss(routings, self.config)


def _is_sera(checkpoint: str | PathLike) -> bool:
    return AutoConfig.from_pretrained(checkpoint).model_type == SeraConfig.model_type


__all__ = ["SeraFeatureCache", "SeraForReferringSegmentation", "SeraImageFeatures", "SeraModel", "SeraPreTrainedModel"]
