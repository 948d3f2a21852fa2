"""What SERA needs of a text tower: one class for each family of towers, found by `model_type` in [`TEXT_FAMILIES`].

As for vision towers, the classes hold a configuration and no weights; the tower stays a model of transformers.
"""

from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    BertModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextModel,
    SiglipTextModel,
)

from .vision_towers_sera import refuse_missing


class SeraTextFamily:
    """A transformer that gives a feature of every token, from which the subclass makes one of the whole expression.

    Args:
        config: The tower's configuration.
    """

    name: str  # of the family, in messages and on model cards
    model_class: type[PreTrainedModel]
    options: ClassVar[dict[str, Any]] = {}  # of the class, beside the configuration
    fixed_length: int | None = None  # number of tokens, padding included, if the tower reads no other number

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @property
    def width(self) -> int:
        """Channels of a token's feature."""
        return self.config.hidden_size

    @property
    def sentence_width(self) -> int:
        """Channels of the sentence feature before SERA's projection."""
        return self.width

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens, with start and end."""
        return self.config.max_position_embeddings

    @property
    def last_token(self) -> int:
        """Id of the token that may fill an expression from its end on: the end of the text, or padding."""
        return self.config.pad_token_id

    def check(self) -> None:
        """Raise a `ValueError` for a configuration that SERA cannot use."""

    def check_vocabulary(self, size: int | None) -> None:
        """Raise a `ValueError` if the token embeddings cannot be resized to `size`."""

    def build(self) -> PreTrainedModel:
        """A tower with fresh weights."""
        return self.model_class._from_config(self.config, **self.options)

    def length_of_projection(self, whole: PreTrainedConfig) -> int:
        """The `projection_dim` that fits a checkpoint with the configuration `whole`: the tower's, or one that holds it."""
        return getattr(whole, "projection_dim", self.sentence_width)

    def load(
        self, checkpoint: str | PathLike, dtype: torch.dtype, projection_dim: int
    ) -> tuple[PreTrainedModel, Tensor | None]:
        """The tower of a checkpoint, and the weight (·, sentence_width) of a projection of the sentence feature.

        A family without a projection of its own gives the identity: SERA then starts from the tower's sentence feature. `None`
        where `projection_dim` is of another length, or the checkpoint lacks its projection: it starts from random weights.

        Raises:
            ValueError: Where weights of the tower are missing.
        """
        tower, info = self.model_class.from_pretrained(
            checkpoint, config=self.config, dtype=dtype, output_loading_info=True, **self.options
        )
        refuse_missing(info["missing_keys"], checkpoint, f"{self.name} text tower")
        return tower, torch.eye(projection_dim, dtype=dtype) if projection_dim == self.sentence_width else None

    def encode(self, tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N, L) token ids, and 1 for tokens and 0 for padding, to features (N, L, width) and (N, sentence_width)."""
        raise NotImplementedError

    def blank(self) -> Tensor:
        """Token ids (1, L) of an expression without words."""
        return torch.full((1, self.fixed_length or 2), self.last_token)


class SeraClipText(SeraTextFamily):
    """CLIP's text tower. The sentence feature is the end-of-text token's; a whole CLIP also holds a projection of it."""

    name = "CLIP"
    model_class = CLIPTextModel

    @property
    def last_token(self) -> int:
        """See the base class. CLIP finds the end of the text by it."""
        return self.config.eos_token_id

    def check_vocabulary(self, size: int | None) -> None:
        """See the base class."""
        if self.config.eos_token_id == 2 and (size or 0) > self.config.vocab_size:
            raise ValueError(
                "text_config.eos_token_id is 2; CLIP then takes the token of the highest id for the end of the text, which "
                "would be a new one. Set it to the tokenizer's eos_token_id and load the model with this configuration."
            )

    def length_of_projection(self, whole: PreTrainedConfig) -> int:
        """See the base class. A whole CLIP knows it; what its `text_config` says has no effect there."""
        self.config.projection_dim = whole.projection_dim
        return whole.projection_dim

    def load(
        self, checkpoint: str | PathLike, dtype: torch.dtype, projection_dim: int
    ) -> tuple[PreTrainedModel, Tensor | None]:
        """See the base class."""
        options = {"config": self.config, "dtype": dtype, "output_loading_info": True}
        whole, info = CLIPTextModelWithProjection.from_pretrained(checkpoint, **options)
        tower, projection = whole.text_model, None if info["missing_keys"] else whole.text_projection.weight
        if set(info["missing_keys"]) - {"text_projection.weight"}:
            # some releases of transformers find the weights of a tower without projection only in this class
            tower, info = self.model_class.from_pretrained(checkpoint, **options)
            refuse_missing(info["missing_keys"], checkpoint, f"{self.name} text tower")
        return tower, projection

    def encode(self, tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See the base class."""
        encoded = tower(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return encoded.last_hidden_state, encoded.pooler_output


class SeraSiglipText(SeraTextFamily):
    """The text towers of SigLIP and SigLIP 2. They were trained on expressions padded to one length, and read the padding.

    The sentence feature is the last position's, after the tower's own projection. SERA's other parts do not see the padding.
    """

    name = "SigLIP"

    @property
    def fixed_length(self) -> int:
        """See the base class."""
        return self.config.max_position_embeddings

    @property
    def sentence_width(self) -> int:
        """See the base class."""
        return self.config.projection_size

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class in transformers."""
        return Siglip2TextModel if self.config.model_type == "siglip2_text_model" else SiglipTextModel

    def encode(self, tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See the base class; `ValueError` for expressions of another length."""
        if input_ids.shape[1] != self.fixed_length:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} tokens in a row, but a {self.name} text tower reads expressions padded to "
                f"{self.fixed_length}. Make the processor with text_padding='max_length'; its tokenizer's model_max_length "
                f"must be {self.fixed_length}."
            )
        encoded = tower(input_ids=input_ids, return_dict=True)
        return encoded.last_hidden_state, encoded.pooler_output


class SeraBertText(SeraTextFamily):
    """A sentence encoder of BERT's type, such as MiniLM. The sentence feature is the mean of its tokens' features."""

    name = "BERT"
    model_class = BertModel
    options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}  # the pooling layer is for other tasks

    def check(self) -> None:
        """See the base class."""
        if self.config.is_decoder:
            raise ValueError("text_config.is_decoder is True; SERA takes a BERT that is an encoder.")

    def encode(self, tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See the base class."""
        states = tower(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        if attention_mask is None:
            return states, states.mean(dim=1)
        weights = attention_mask[..., None].to(states.dtype)
        return states, (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


TEXT_FAMILIES: dict[str, type[SeraTextFamily]] = {
    "clip_text_model": SeraClipText,
    "siglip_text_model": SeraSiglipText,
    "siglip2_text_model": SeraSiglipText,
    "bert": SeraBertText,
}

__all__ = ["TEXT_FAMILIES", "SeraBertText", "SeraClipText", "SeraSiglipText", "SeraTextFamily"]
