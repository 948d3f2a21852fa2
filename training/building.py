"""Processor and model as a run's settings describe them."""

import datasets
from transformers import CLIPTokenizer

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraImageProcessor, SeraProcessor
from training.configuration import TrainingSettings
from training.scenes import train_tokenizer


def build_processor(settings: TrainingSettings, train_rows: datasets.Dataset) -> SeraProcessor:
    """The processor: a saved one, or a letterbox to `data.image_size` and the tokenizer that the settings name.

    Raises:
        ValueError: Where the settings name no tokenizer for data that does not bring one.
    """
    model = settings.model
    if model.pretrained:
        return SeraProcessor.from_pretrained(model.pretrained)
    height, width = settings.data.image_size
    image_processor = SeraImageProcessor(size={"height": height, "width": width})
    source = model.tokenizer or model.text_model
    if source:
        tokenizer = CLIPTokenizer.from_pretrained(source)
    elif settings.data.source == "scenes":
        tokenizer = train_tokenizer([sentence for group in train_rows["sentences"] for sentence in group])
    else:
        raise ValueError("Name a CLIP tokenizer: set model.tokenizer, or model.text_model to a folder that holds one.")
    return SeraProcessor(image_processor, tokenizer)


def build_model(settings: TrainingSettings, processor: SeraProcessor) -> SeraForReferringSegmentation:
    """The model: a saved SERA, or pretrained or fresh towers with fresh experts around them."""
    model = settings.model
    if model.pretrained:
        return SeraForReferringSegmentation.from_pretrained(model.pretrained)
    overrides = {"image_size": max(settings.data.image_size)} | model.config
    if not model.text_model:
        overrides["text_config"] = _text_config(overrides.get("text_config", {}), processor.tokenizer)
    built = SeraForReferringSegmentation.from_vision_text_pretrained(model.vision_model, model.text_model, **overrides)
    if any(side % built.config.patch_size for side in settings.data.image_size):
        raise ValueError(
            f"data.image_size is {settings.data.image_size}; both sides must be multiples of the patch, {built.config.patch_size}."
        )
    return built


def _text_config(overrides: dict, tokenizer: CLIPTokenizer) -> dict:
    """A fresh text tower's configuration, its vocabulary and special tokens those of the tokenizer."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": tokenizer.model_max_length,
    } | overrides
