"""The processor and the model that the settings of a run describe, and those of a saved model."""

from pathlib import Path

import datasets
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.configuration_sera import DEFAULT_TOWERS, FAMILIES
from modeling_sera.text_towers_sera import SeraTextFamily
from modeling_sera.vision_towers_sera import SeraVisionFamily
from processing_sera import SeraImageProcessor, SeraProcessor
from processing_sera.processing_sera import token_limit
from training.configuration import TrainingSettings
from training.sources.scenes.dataset import train_tokenizer
from training.support.commands import in_one_line
from training.support.hub_ids import folder_or_id
from training.support.model_location import locate_model

IMAGE_SIZE = (448, 448)  # the paper's
NUM_BYTES = 256  # a vocabulary of fewer tokens is no real one; CLIP's holds each of the bytes
# fields of a saved model's configuration that cannot be changed: its weights depend on them, and image_size follows the data
KEPT_FIELDS = {"vision_config", "text_config", "tap_layers", "image_size"}
# fields of SeraProcessor that the settings may choose
PROCESSOR_FIELDS = (
    "mask_threshold",
    "keep_largest_component",
    "no_target_threshold",
    "score_calibration",
    "text_padding",
)


def build_processor(settings: TrainingSettings, train_rows: datasets.Dataset) -> SeraProcessor:
    """The processor: that of `model.pretrained`, or a letterbox to `data.image_size` with the tokenizer that the settings name.

    It fits the towers: their patch, the number of tokens that they read, and how they want expressions padded.

    Raises:
        ValueError: Where the settings name no tokenizer (only scenes need none), or a tower that SERA does not know.
    """
    model = settings.model
    if model.pretrained:
        source = locate_model(model.pretrained).source
        processor = SeraProcessor.from_pretrained(source)
        processor.image_processor.patch_size = SeraConfig.from_pretrained(source).patch_size  # older folders lack it
        if settings.data.image_size:
            processor.image_processor.size = _size(settings.data.image_size)
        if settings.data.padding is not None:
            processor.image_processor.do_pad = settings.data.padding
        if model.processor:
            known = {name: getattr(processor, name) for name in PROCESSOR_FIELDS}
            return SeraProcessor(processor.image_processor, processor.tokenizer, **known | _processor_fields(settings))
        return processor
    vision, text = _family(settings, "vision"), _family(settings, "text")
    image_processor = SeraImageProcessor(
        size=_size(settings.data.image_size or IMAGE_SIZE),
        do_pad=settings.data.padding is not False,
        patch_size=vision.patch_size,
    )
    source = model.tokenizer or model.text_model
    if source:
        tokenizer = load_tokenizer(source)
    elif settings.data.source == "scenes":
        tokenizer = train_tokenizer([sentence for group in train_rows["sentences"] for sentence in group])
    else:
        raise ValueError("Name a tokenizer: set model.tokenizer, or model.text_model to a folder that holds one.")
    if model.text_model or "max_position_embeddings" in model.config.get("text_config", {}) or text.fixed_length:
        tokenizer.model_max_length = text.fixed_length or min(token_limit(tokenizer), text.max_tokens)
    padding = "max_length" if text.fixed_length else "longest"
    return SeraProcessor(image_processor, tokenizer, **{"text_padding": padding} | _processor_fields(settings))


def _processor_fields(settings: TrainingSettings) -> dict:
    unknown = sorted(set(settings.model.processor) - set(PROCESSOR_FIELDS))
    if unknown:
        raise ValueError(f"model.processor has {unknown[0]!r}; it may have {', '.join(PROCESSOR_FIELDS)}.")
    return settings.model.processor


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id: of a tokenizer alone, of a text tower, or of a SERA. No code of the folder is run.

    Raises:
        OSError, ValueError: Where there is none.
    """
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def build_model(settings: TrainingSettings, processor: SeraProcessor) -> SeraForReferringSegmentation:
    """The model, for images of the processor's size: a saved SERA, or towers, pretrained or new, with new experts.

    Raises:
        ValueError: Where a side is no multiple of the patch, the tokenizer has more tokens than the text tower, or the settings do
            not fit together.
    """
    model = settings.model
    height, width = processor.image_processor.frame_size
    if model.pretrained:
        built = _go_on(locate_model(model.pretrained).source, model.config)
        _check_sides(height, width, built.config.patch_size)
        built.config.image_size = max(height, width)
    else:
        _check_sides(height, width, _family(settings, "vision").patch_size)
        overrides = {"image_size": max(height, width)} | model.config
        if not model.text_model:
            overrides["text_config"] = _text_config(overrides.get("text_config", {}), processor.tokenizer)
        built = SeraForReferringSegmentation.from_vision_text_pretrained(
            model.vision_model, model.text_model, **overrides
        )
    size = built.config.text_config.vocab_size
    if len(processor.tokenizer) > size:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, but the text tower knows {size}; model.tokenizer must be the "
            "one that belongs to model.text_model."
        )
    return built


def load_whole(
    source: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[SeraForReferringSegmentation, SeraProcessor]:
    """The model, in evaluation mode, and the processor of a folder or Hub id.

    Raises:
        FileNotFoundError: Where there is no such folder.
        ValueError: Where a part is missing or damaged, or the weights are not safetensors. transformers would fill missing weights
            with random numbers.
    """
    source = folder_or_id(source)
    try:
        model, loading = SeraForReferringSegmentation.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        processor = SeraProcessor.from_pretrained(source)
    except Exception as error:  # damaged files make transformers raise errors of many kinds
        raise ValueError(f"{source} holds no whole model: {in_one_line(error)}") from error
    if len(processor.tokenizer) < NUM_BYTES:  # transformers makes an empty tokenizer where there is no file
        raise ValueError(f"{source} holds no whole model: its tokenizer has no vocabulary; is tokenizer.json missing?")
    missing = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if missing:
        raise ValueError(f"{source} holds no whole model: its weights lack {missing[0]} and {len(missing) - 1} more.")
    return model.eval(), processor


def _go_on(pretrained: str, overrides: dict) -> SeraForReferringSegmentation:
    """A saved SERA with some fields of its configuration changed (ours).

    It may gain decoder layers, adapters, routers that see the sentence, and a presence head. All of these begin without effect.
    """
    saved = SeraConfig.from_pretrained(pretrained)
    changeable = set(SeraConfig.__annotations__) - KEPT_FIELDS
    unknown = sorted(set(overrides) - changeable)
    if unknown:
        raise ValueError(
            f"model.config has {unknown[0]!r}, which cannot be changed in a saved model; {', '.join(sorted(changeable))} can be."
        )
    config = SeraConfig.from_dict(saved.to_dict() | overrides)
    # float32, whatever it was saved in: the small steps of training are lost in half precision
    built, info = SeraForReferringSegmentation.from_pretrained(
        pretrained,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    gains = [f"decoder.layers.{i}." for i in range(saved.decoder_num_layers, config.decoder_num_layers)]
    gains += [f"model.vision.adapted_blocks.{i}." for i in set(config.adapter_layers) - set(saved.adapter_layers)]
    gains += ["decoder.presence_head."] if config.predict_presence and not saved.predict_presence else []
    gains += [".hidden_sentence.", ".score_sentence.", ".sentence_norm."] if not saved.expression_aware_routing else []
    unfit = [name for name in sorted(info["missing_keys"]) if not any(gain in name for gain in gains)]
    unfit += [*(key[0] for key in info["mismatched_keys"]), *info["unexpected_keys"]]
    if unfit:
        raise ValueError(
            f"{len(unfit)} weights of {pretrained}, such as {unfit[0]}, do not fit"
            + (f" with model.config {overrides}" if overrides else "")
            + ". A saved model may gain decoder layers, adapters, expression_aware_routing and predict_presence, but lose nothing."
        )

    # a new adapter needs nothing: its last layer and its router's input start at zero
    ends = [
        last
        for layer in built.decoder.layers[saved.decoder_num_layers :]
        for last in (layer.self_attention.o_proj, layer.text_attention.o_proj, layer.ffn[-1])
    ]
    if not saved.expression_aware_routing:
        ends += [module for name, module in built.named_modules() if name.endswith(".hidden_sentence")]
    if not saved.predict_presence and config.predict_presence:
        ends.append(built.decoder.presence_head.score)
    for last in ends:
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    return built


def _check_sides(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise ValueError(f"data.image_size is {[height, width]}; both sides must be multiples of the patch, {patch}.")


def _size(image_size: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("height", "width"), image_size, strict=True))


def _family(settings: TrainingSettings, tower: str) -> SeraVisionFamily | SeraTextFamily:
    """What SERA knows of a tower that the settings name or describe."""
    source = getattr(settings.model, f"{tower}_model")
    if source:
        whole = AutoConfig.from_pretrained(source)
        config = getattr(whole, f"{tower}_config", whole)
    else:
        default = DEFAULT_TOWERS[f"{tower}_config"]
        fields = {"model_type": default["model_type"]} | settings.model.config.get(f"{tower}_config", default)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    if config.model_type not in FAMILIES[tower]:
        named = f"model.{tower}_model {source}" if source else f"model.config.{tower}_config"
        raise ValueError(
            f"{named} is a {config.model_type!r}; the {tower} tower must be one of {tuple(FAMILIES[tower])}."
        )
    return FAMILIES[tower][config.model_type](config)


def _text_config(overrides: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The configuration of a new text tower, with the vocabulary and the special tokens of the tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        **DEFAULT_TOWERS["text_config"],
        "vocab_size": len(tokenizer),
        **{name: token for name, token in special.items() if token is not None},
        "max_position_embeddings": token_limit(tokenizer),
    } | overrides
