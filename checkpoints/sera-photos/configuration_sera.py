"""Configuration of SERA: which towers, where the experts sit, how wide everything is."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .text_towers_sera import TEXT_FAMILIES, SeraTextFamily
from .vision_towers_sera import VISION_FAMILIES, SeraVisionFamily

PIPELINE_TASKS = ("image-segmentation", "referring-image-segmentation")
PIPELINE_CLASS = "pipeline_sera.ReferringImageSegmentationPipeline"  # in a file that the processor's code brings along
FAMILIES = {"vision": VISION_FAMILIES, "text": TEXT_FAMILIES}  # what SERA knows of towers, by their `model_type`
DEFAULT_TOWERS = {
    "vision_config": {
        "model_type": "dinov2_with_registers",
        "image_size": 518,
        "patch_size": 14,
        "num_register_tokens": 4,
    },
    "text_config": {"model_type": "clip_text_model"},
}
NUM_FUSION_EXPERTS = 4  # spatial, context, boundary, shape: the set is the architecture's, so its size is no option


@strict
class SeraConfig(PreTrainedConfig):
    r"""
    Configuration of [`SeraModel`] and [`SeraForReferringSegmentation`]. `SeraConfig()` is SERA-B: DINOv2-B/14 with four
    register tokens, the CLIP-B text tower, 448×448 images. Values come from the paper where it states them; the rest are
    ours.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            A configuration of a type in `VISION_FAMILIES`: `dinov2`, `dinov2_with_registers` or `dinov3_vit`. Default:
            DINOv2-B/14 with registers.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            A configuration of a type in `TEXT_FAMILIES`: `clip_text_model`, `siglip_text_model`, `siglip2_text_model` or
            `bert`. Default: CLIP-B.
        image_size (`int`, *optional*, defaults to 448):
            Side in pixels that the model is meant for, a multiple of the vision tower's patch; the processor that training
            builds letterboxes to it. Any image whose sides are multiples of the patch works.
        projection_dim (`int`, *optional*, defaults to 512):
            Length of the sentence feature, the projection of the text tower's (CLIP: of the end-of-text token's feature).
        adapter_layers (`list[int]`, *optional*):
            Blocks, counted from 0, that carry a SERA-Adapter. Default: six spread evenly (1, 3, 5, 7, 9, 11 of 12 blocks;
            2, 6, 10, 14, 18, 22 of 24), half as many as blocks in towers of fewer than twelve. `[]` means none.
        adapter_dim (`int`, *optional*, defaults to 128): Width `d` inside an adapter; a multiple of four.
        adapter_num_heads (`int`, *optional*, defaults to 8): Heads of the adapters' attention to the text.
        adapter_scale (`float`, *optional*, defaults to 0.2): Factor `s` on an adapter's output.
        tap_layers (`list[int]`, *optional*):
            Depths, as a number of blocks passed, whose feature maps are fused and decoded. Default: a third, two thirds and
            all of the blocks. The last depth gives the normed output.
        fusion_dim (`int`, *optional*, defaults to 256): Channels of the fused feature maps.
        fusion_num_heads (`int`, *optional*, defaults to 8): Heads of the context expert.
        num_selected_experts (`int`, *optional*, defaults to 4): `k`, how many of the four fusion experts a sample uses.
        router_hidden_dim (`int`, *optional*, defaults to 128): Hidden width of the fusion routers.
        router_noise_std (`float`, *optional*, defaults to 0.1): Standard deviation of the noise on routing logits in training.
        expression_aware_routing (`bool`, *optional*, defaults to `True`):
            Whether both kinds of router see the sentence feature beside the pooled image. Without it they follow the expression
            as far as adapters in earlier blocks have brought it into the image's features.
        routing (`str`, *optional*, defaults to `"learned"`):
            `"uniform"` gives every expert the same fixed weight for every sample and has no routers, so that nothing sees the
            sentence in their place: the control of an ablation that says whether routing itself helps.
        adapter_experts (`bool`, *optional*, defaults to `True`):
            Whether adapters hold their two experts. Without them an adapter projects, enriches and attends to the text: the
            uniform baseline that SERA-Adapter is measured against.
        fusion_experts (`bool`, *optional*, defaults to `True`):
            Whether taps are refined by the four fusion experts. Without them a tap is projected and normalised only.
        router_logit_loss_weight (`float`, *optional*, defaults to 1e-3):
            λz, weight of the mean square of what a routing logit exceeds the bound by.
        router_logit_bound (`float`, *optional*, defaults to 3.0):
            Absolute value up to which a routing logit costs nothing. 0: the paper's term, which pulls logits to zero.
        router_balance_loss_weight (`float`, *optional*, defaults to 1e-2): λb, weight of the squared coefficient of variation.
        router_token_loss_weight (`float`, *optional*, defaults to 1e-2):
            λt, weight of the selection-times-probability term. It stands where `num_selected_experts` is below four alone.
        sentence_gate (`str`, *optional*, defaults to `"standardized"`):
            How the decoder multiplies the channels of each tap's map by factors from the sentence. `"standardized"`: a linear
            function of the sentence feature standardised over samples, which starts at exactly one. `"linear"`: a linear function
            of the feature itself, which starts at random. `"none"`: no factors; the routers alone then weigh the taps' maps by
            the sentence.
        decoder_dim (`int`, *optional*, defaults to 512): Width of the mask decoder; a multiple of eight.
        decoder_num_layers (`int`, *optional*, defaults to 3): Decoder layers.
        decoder_num_heads (`int`, *optional*, defaults to 8): Heads of the decoder's attentions.
        decoder_ffn_dim (`int`, *optional*, defaults to 1024): Hidden width of the decoder's feed-forward parts.
        decoder_dropout (`float`, *optional*, defaults to 0.1): Dropout on the decoder's residual branches.
        mask_targets (`str`, *optional*, defaults to `"area"`):
            What a mask logit learns: `"area"`, the mean of the mask over the area that the logit covers, or `"nearest"`, the
            mask at one of them, as the field does it.
        bce_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the binary cross-entropy.
        dice_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the Dice loss.
        predict_presence (`bool`, *optional*, defaults to `False`):
            Whether a head also says if the thing meant is in the image at all, for data that holds expressions without a
            target. Its binary cross-entropy is added to the loss with weight one.
    """

    model_type = "sera"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["mask_loss", "presence_loss", "router_aux_loss"]  # no predictions, for the Trainer

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_size: int = 448
    projection_dim: int = 512
    adapter_layers: list[int] | None = None
    adapter_dim: int = 128
    adapter_num_heads: int = 8
    adapter_scale: float | int = 0.2
    tap_layers: list[int] | None = None
    fusion_dim: int = 256
    fusion_num_heads: int = 8
    num_selected_experts: int = NUM_FUSION_EXPERTS
    router_hidden_dim: int = 128
    router_noise_std: float | int = 0.1
    expression_aware_routing: bool = True
    routing: Literal["learned", "uniform"] = "learned"
    adapter_experts: bool = True
    fusion_experts: bool = True
    router_logit_loss_weight: float | int = 1e-3
    router_logit_bound: float | int = 3.0
    router_balance_loss_weight: float | int = 1e-2
    router_token_loss_weight: float | int = 1e-2
    sentence_gate: Literal["standardized", "linear", "none"] = "standardized"
    decoder_dim: int = 512
    decoder_num_layers: int = 3
    decoder_num_heads: int = 8
    decoder_ffn_dim: int = 1024
    decoder_dropout: float | int = 0.1
    mask_targets: Literal["area", "nearest"] = "area"
    bce_loss_weight: float | int = 1.0
    dice_loss_weight: float | int = 1.0
    predict_presence: bool = False

    def __post_init__(self, **kwargs):
        kwargs.pop("custom_pipelines", None)  # of a saved configuration; the property gives it
        for name, default in DEFAULT_TOWERS.items():  # transformers does so by itself, but only from 5.20 on
            given = default if getattr(self, name) is None else getattr(self, name)
            if isinstance(given, dict):
                kind = given.get("model_type", default["model_type"])
                given = AutoConfig.for_model(kind, **{key: given[key] for key in given.keys() - {"model_type"}})
            setattr(self, name, given)
        self._validate_tower_types()
        super().__post_init__(**kwargs)
        depth = self.vision_family.depth
        if self.adapter_layers is None:
            count = 6 if depth >= 12 else max(depth // 2, 1)
            step = depth // count
            self.adapter_layers = [step // 2 + step * i for i in range(count)]
            if self.tap_layers:
                self.adapter_layers = [i for i in self.adapter_layers if i < max(self.tap_layers)]
        if self.tap_layers is None:
            self.tap_layers = [max(round(depth / 3), 1), max(round(2 * depth / 3), 1), depth]
        # what the tower gives follows its depth
        self.adapter_layers, self.tap_layers = sorted(set(self.adapter_layers)), sorted(set(self.tap_layers))

    def validate_architecture(self) -> None:
        """Called by `@strict` after initialisation: refuses what cannot be built, naming the value and what is accepted."""
        if isinstance(self.vision_config, PreTrainedConfig):
            self._validate_towers()
        if not 1 <= self.num_selected_experts <= NUM_FUSION_EXPERTS:
            raise ValueError(
                f"num_selected_experts is {self.num_selected_experts}; it must lie in 1..{NUM_FUSION_EXPERTS}."
            )
        if self.routing == "uniform" and self.num_selected_experts < NUM_FUSION_EXPERTS:
            raise ValueError(
                f"num_selected_experts is {self.num_selected_experts}, but routing is 'uniform', which uses every expert; leave "
                f"it {NUM_FUSION_EXPERTS}."
            )
        for width, heads in (
            ("adapter_dim", "adapter_num_heads"),
            ("fusion_dim", "fusion_num_heads"),
            ("decoder_dim", "decoder_num_heads"),
        ):
            if getattr(self, heads) < 1:
                raise ValueError(f"{heads} is {getattr(self, heads)}; it must be 1 or more.")
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} ({getattr(self, width)}) must be a multiple of {heads} ({getattr(self, heads)})."
                )
        if self.adapter_dim % 4:
            raise ValueError(
                f"adapter_dim is {self.adapter_dim}; it must be a multiple of 4 (d/2 + d/4 + d/4 channels)."
            )
        if self.decoder_dim % 8:
            raise ValueError(
                f"decoder_dim is {self.decoder_dim}; it must be a multiple of 8 (the projector's channels)."
            )

    def _validate_tower_types(self):
        for tower, families in FAMILIES.items():
            kind = getattr(getattr(self, f"{tower}_config"), "model_type", None)
            if kind not in families:
                raise ValueError(
                    f"{tower}_config is a {kind!r} configuration; SERA takes {' or '.join(map(repr, families))}."
                )

    def _validate_towers(self):
        self.vision_family.check()
        self.text_family.check()
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size is {self.image_size}; it must be a multiple of the vision tower's patch, {self.patch_size}."
            )
        depth = self.vision_family.depth
        if self.adapter_layers is not None and not all(0 <= i < depth for i in self.adapter_layers):
            raise ValueError(
                f"adapter_layers {self.adapter_layers} must lie in 0..{depth - 1}: the vision tower has {depth} blocks."
            )
        if self.tap_layers is not None and (not self.tap_layers or not all(1 <= i <= depth for i in self.tap_layers)):
            raise ValueError(f"tap_layers {self.tap_layers} must be one or more depths in 1..{depth}.")
        if self.adapter_layers and self.tap_layers and self.adapter_layers[-1] >= self.tap_layers[-1]:
            raise ValueError(
                f"adapter_layers {self.adapter_layers} must lie below the last of tap_layers, {self.tap_layers[-1]}: what comes "
                "after it is not read."
            )

    @classmethod
    def default_config_fields(cls) -> dict:
        """The fields' defaults, among which transformers looks for the towers: of these it then saves what is their own."""
        return super().default_config_fields() | DEFAULT_TOWERS

    @property
    def custom_pipelines(self) -> dict[str, dict]:
        """What `transformers.pipeline` runs for a saved model, by task: a class from the folder's own code.

        Made anew at each reading: transformers puts classes in the place of the names, which could then not be saved.
        """
        return {task: {"impl": PIPELINE_CLASS, "pt": ["AutoModel"]} for task in PIPELINE_TASKS}

    def to_dict(self) -> dict:
        """All fields as plain data, and the `custom_pipelines` that `transformers.pipeline` looks for in `config.json`.

        The towers' `dtype`, which loading sets, is left out: it is the whole model's, and saving again changes nothing.
        """
        fields = super().to_dict() | {"custom_pipelines": self.custom_pipelines}
        for tower in self.sub_configs:
            fields[tower].pop("dtype", None)
        return fields

    @property
    def routers_see_sentence(self) -> bool:
        """Whether there is a router that the sentence reaches."""
        has_routers = self.fusion_experts or (self.adapter_experts and bool(self.adapter_layers))
        return self.expression_aware_routing and self.routing == "learned" and has_routers

    @property
    def patch_size(self) -> int:
        """Side in pixels of the vision tower's (square) patches."""
        return self.vision_family.patch_size

    @property
    def vision_family(self) -> SeraVisionFamily:
        """What SERA knows of the vision tower."""
        return VISION_FAMILIES[self.vision_config.model_type](self.vision_config)

    @property
    def text_family(self) -> SeraTextFamily:
        """What SERA knows of the text tower."""
        return TEXT_FAMILIES[self.text_config.model_type](self.text_config)

    @classmethod
    def tiny(cls, **overrides) -> "SeraConfig":
        """A configuration of about 0.2 M parameters with every part present, for tests and first steps.

        Args:
            **overrides: Any field of the configuration; `vision_config` and `text_config` are dicts that update the tiny
                towers' own values. Their `model_type` may be any that SERA takes.
        """
        vision = {
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "intermediate_size": 64,
            "image_size": 56,
            "patch_size": 14,
            "num_register_tokens": 2,
        }
        text = {
            "model_type": "clip_text_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 24,
            "vocab_size": 1000,
            "bos_token_id": 998,
            "eos_token_id": 999,
            "pad_token_id": 999,
        }
        vision, text = (
            _changed(values, overrides.pop(f"{tower}_config", {}))
            for tower, values in (("vision", vision), ("text", text))
        )
        small = {
            "image_size": 56,
            "projection_dim": 24,
            "adapter_dim": 16,
            "adapter_num_heads": 4,
            "fusion_dim": 16,
            "fusion_num_heads": 4,
            "router_hidden_dim": 8,
            "decoder_dim": 32,
            "decoder_num_layers": 1,
            "decoder_num_heads": 4,
            "decoder_ffn_dim": 64,
        }
        return cls(vision_config=vision, text_config=text, **(small | overrides))


def _changed(values: dict, changes: dict) -> dict:
    """A tiny tower's values with some changed, and without those that a tower of its type does not have."""
    kind = changes.get("model_type", values["model_type"])
    if kind not in CONFIG_MAPPING:
        return values | changes  # which is refused
    return {name: value for name, value in values.items() if hasattr(CONFIG_MAPPING[kind], name)} | changes


__all__ = ["SeraConfig"]
