"""Tiny towers of every family, tokenizers as their checkpoints hold them, and folders in the checkpoints' format."""

from pathlib import Path

import torch
from builders import tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
)

LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = ["<pad>", "<eos>", "<unk>", "a", "left", "right", "zebra", "cup", "the"] + [f"word{i}" for i in range(300)]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
VOCABULARY = {"vocab_size": len(TOKENS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def word_tokenizer(*, is_siglip: bool, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """Whole words in lower case and an end token. SigLIP's own takes no attention mask."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = ["input_ids"] if is_siglip else ["input_ids", "attention_mask"]
    options = {"model_max_length": model_max_length, "model_input_names": names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **options)


def tokenizer_for(text_type: str) -> PreTrainedTokenizerBase:
    """The kind of tokenizer that belongs to a text tower's type."""
    if text_type == "clip_text_model":
        return tiny_tokenizer()
    return word_tokenizer(is_siglip=text_type.startswith("siglip"), model_max_length=16)


def text_values(text_type: str) -> dict:
    """Values of a tiny text tower that fits [`tokenizer_for`] its type."""
    tokenizer = tokenizer_for(text_type)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = {"max_position_embeddings": tokenizer.model_max_length}
    return {"model_type": text_type, "vocab_size": len(tokenizer), **special, **length}


def save_dinov3(folder: Path) -> DINOv3ViTModel:
    """A DINOv3 with four register tokens and patches of 16 pixels."""
    torch.manual_seed(1)
    model = DINOv3ViTModel(DINOv3ViTConfig(**LAYERS, image_size=64, num_register_tokens=4, layerscale_value=0.7))
    model.eval().save_pretrained(folder)
    return model


def save_siglip(folder: Path, kind: str = "siglip") -> torch.nn.Module:
    """A whole "siglip" or "siglip2", or a "text" tower alone, for 16 tokens, with its tokenizer."""
    torch.manual_seed(2)
    text = LAYERS | VOCABULARY | {"max_position_embeddings": 16}
    vision = LAYERS | {"image_size": 32, "patch_size": 16}
    if kind == "text":
        model = SiglipTextModel(SiglipTextConfig(**text))
    elif kind == "siglip2":
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=LAYERS | {"num_patches": 4}))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.eval().save_pretrained(folder)
    word_tokenizer(is_siglip=True, model_max_length=int(1e30)).save_pretrained(folder)
    return model


def save_bert(folder: Path) -> BertModel:
    """A BERT with its pooling layer, for 24 tokens, with its tokenizer."""
    torch.manual_seed(3)
    model = BertModel(BertConfig(**LAYERS | VOCABULARY, max_position_embeddings=24)).eval()
    model.save_pretrained(folder)
    word_tokenizer(is_siglip=False, model_max_length=512).save_pretrained(folder)
    return model
