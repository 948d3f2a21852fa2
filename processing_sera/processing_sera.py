"""Images and expressions to what the model reads; its logits to masks of the images' own sizes."""

import html
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .image_processing_sera import ImageLike, as_image_list, letterbox_box
from .pipeline_sera import ReferringImageSegmentationPipeline  # so that the file is saved with the processor

CLIP_MAX_TOKENS = 77
NO_TARGET_THRESHOLD = 0.5  # probability of absence above which a mask is left empty
UNSET_LENGTH = 10**6  # a tokenizer's model_max_length is astronomical where nobody set it
LOADING_OPTIONS = ("dtype", "is_local", "local_files_only")  # transformers keeps these among the tokenizer's settings

HTML_ENTITY = re.compile(r"&#?\w+;")
PLAIN_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "…": "...",
    }
)
# The byte behind each character when UTF-8 is read as Windows-1252. Five bytes have no character there: they,
# like all of 0x80-0x9f in Latin-1, come out as the control character of the same number.
BYTE_OF_CHARACTER = {chr(byte): byte for byte in range(0x80, 0x100)} | {
    character: byte for byte in range(0x80, 0xA0) if (character := bytes([byte]).decode("cp1252", errors="ignore"))
}
_CONTINUATION = "[" + "".join(re.escape(c) for c, byte in BYTE_OF_CHARACTER.items() if byte < 0xC0) + "]"
# Leading bytes of accented Latin letters, punctuation and emoji only: with all of them, real text such as an
# upper-case accented letter before a closing quote would be "repaired" too.
MOJIBAKE = re.compile(f"[\xc2\xc3]{_CONTINUATION}|[\xe2\xef]{_CONTINUATION}{{2}}|\xf0{_CONTINUATION}{{3}}")


def clean_expression(text: str) -> str:
    """Repair what web text suffers from, without changing what it says; idempotent.

    HTML entities are resolved (escaped twice too), UTF-8 that was read as Windows-1252 or Latin-1 is read
    again, characters are composed (NFC), curly quotes and dashes made plain, control and zero-width
    characters removed, white space collapsed. Case is left to the tokenizer. (Ours, for what CLIP's first
    tokenizer left to ftfy.)
    """
    while (cleaned := _clean_once(text)) != text:
        text = cleaned
    return text


def token_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that an expression may have, start and end among them: the tokenizer's own limit, or CLIP's where nobody set one."""
    limit = tokenizer.model_max_length
    return limit if limit < UNSET_LENGTH else CLIP_MAX_TOKENS


def _clean_once(text: str) -> str:
    text = HTML_ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = MOJIBAKE.sub(_read_again, text)
    text = unicodedata.normalize("NFC", text).translate(PLAIN_CHARACTERS)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join(text.split())


def _read_again(match: re.Match) -> str:
    try:
        return bytes(BYTE_OF_CHARACTER[c] for c in match[0]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]


class SeraProcessor(ProcessorMixin):
    """Images and referring expressions to model inputs; logits to masks.

    Args:
        image_processor: a `SeraImageProcessor`.
        tokenizer: a `CLIPTokenizer`.
        mask_threshold: the probability, within (0, 1), above which a pixel belongs to the predicted mask.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, mask_threshold: float = 0.5):
        super().__init__(image_processor, tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token, which its tokenizer_config.json should name; CLIP's is '<|endoftext|>'."
            )
        self.mask_threshold = _checked_threshold(mask_threshold)

    @property
    def model_input_names(self) -> list[str]:
        """The names of all that `model(**inputs)` may be given from here, labels aside."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "image_index"]

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        masks: Any = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Prepare B images and N expressions about them; either may be left out.

        Args:
            images: one image or a list of them (see `to_rgb_image`).
            text: a string for one image; a list as long as `images`, one each; a nested list, several each.
                One image with several takes a nested list too: `text=[["left zebra", "zebra drinking"]]`.
            masks: for training: one boolean (H0, W0) array per expression, in its image's own upright
                pixels, nested like `text`. Integers say more: negative pixels are left out of the loss.
            return_tensors: "pt" for tensors, otherwise numpy arrays.

        Returns:
            Where images are given, `pixel_values` float32 (B, 3, H, W) and `original_sizes` int64 (B, 2).
            Where text is, `input_ids` and `attention_mask` int64 (N, L), padded on the right to the longest;
            and, with images or with several expressions in one list, `image_index` int64 (N,), the row of
            `pixel_values` that each expression is about. Where masks are, `labels` float32 (N, H, W) in
            [0, 1] and -1 where pixels are left out, see `letterbox_masks`.

        Raises:
            ValueError: an empty expression, more or fewer texts than images, masks that do not match, a
                image that cannot be read.
            TypeError: an expression that is not a string, an image that is none.
            FileNotFoundError: no file at a path.
        """
        if images is None and text is None:
            raise ValueError("Nothing to process: give images, text or both.")
        if masks is not None and (images is None or text is None):
            raise ValueError("masks need the images and the text that they belong to.")
        images = None if images is None else as_image_list(images)
        data: dict[str, Any] = {}
        if text is not None:
            groups = _grouped_expressions(text, None if images is None else len(images))
            expressions = [expression for group in groups for expression in group]
            masks = None if masks is None else _flattened_masks(masks, text, len(expressions))
            data["input_ids"], data["attention_mask"] = self._tokenize(expressions)
            if images is not None or len(expressions) != len(groups):
                data["image_index"] = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        if images is not None:
            data = {**self.image_processor(images), **data}
        if masks is not None:
            sizes = data["original_sizes"][data["image_index"]].tolist()
            data["labels"] = self.image_processor.preprocess_masks(masks, sizes)
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def max_tokens(self) -> int:
        """How many tokens of an expression the model reads; what is longer is cut."""
        return token_limit(self.tokenizer)

    def count_tokens(self, expression: str) -> int:
        """How many tokens an expression has, start and end among them, before it is cut to `max_tokens`.

        Raises:
            ValueError: an empty expression.
            TypeError: an expression that is not a string.
        """
        ((cleaned,),) = _grouped_expressions(expression, None)
        return len(self._token_ids([cleaned])[0])

    def _token_ids(self, expressions: list[str]) -> list[list[int]]:
        return self.tokenizer(
            expressions,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            split_special_tokens=True,  # a "<|endoftext|>" inside an expression is text
            verbose=False,
        )["input_ids"]

    def _tokenize(self, expressions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int64 (N, L).

        The padding token is the end-of-text token, so the mask is made from the lengths. Padding and
        truncation are done here because the tokenizer would keep them as settings and save them.
        """
        ids, limit = self._token_ids(expressions), self.max_tokens
        for i, row in enumerate(ids):
            if len(row) > limit:
                message = f"The expression {expressions[i]!r} has {len(row)} tokens and is cut to {limit}."
                warnings.warn(message, stacklevel=3)
                ids[i] = [*row[: limit - 1], row[-1]]
        lengths = np.array([len(row) for row in ids])
        attention_mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        input_ids = np.full(attention_mask.shape, self.tokenizer.pad_token_id, np.int64)
        input_ids[attention_mask == 1] = np.concatenate(ids)
        return input_ids, attention_mask

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        # The tokenizer's own file names its class. Without a configuration transformers would load the model's, and ask
        # whether to run its code where `modeling_sera` is not imported.
        kwargs.setdefault("config", PreTrainedConfig())
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save image processor, tokenizer and threshold.

        Padding and truncation that the tokenizer was last called with are cleared: after loading they would
        outrank what its caller asks for. So is what its loading left there, so that a loaded processor is saved
        as it was.
        """
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.backend_tokenizer.no_truncation()
        for name in LOADING_OPTIONS:
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def post_process_referring_segmentation(
        self,
        outputs: Any,
        inputs: Any,
        threshold: float | None = None,
        return_probabilities: bool = False,
        no_target_threshold: float = NO_TARGET_THRESHOLD,
    ) -> list[dict[str, Any]]:
        """Masks of the images' own sizes from logits that cover the letterboxed frame.

        Logits are interpolated once, bilinearly, straight to the image's pixels, one expression at a time.
        Pixels at the image's border take the nearest logit that lies wholly inside it: the next is partly
        about padding.

        Args:
            outputs: what the model returned, with `logits` (N, h, w); h x w need not be H x W; and, from a model
                that predicts presence, `presence_logits` (N,).
            inputs: what this processor returned: `original_sizes`, `pixel_values` and, unless there is one
                expression per image, `image_index`.
            threshold: probability above which a pixel is in the mask; None for the processor's
                `mask_threshold`.
            return_probabilities: also return the probabilities, as "probabilities": float32 (H0, W0).
            no_target_threshold: probability of absence, within (0, 1), above which the mask is left empty. It
                matters to a model that predicts presence only.

        Returns:
            Per expression {"mask": bool (H0, W0), "score": float}. The score is the mean probability inside
            the mask; for an empty mask the highest anywhere. With `presence_logits` also {"no_target": float},
            the probability in [0, 1] that nothing in the image is meant.

        Raises:
            ValueError: no `original_sizes`, or logits, index and sizes that do not fit each other; a threshold
                outside (0, 1).
        """
        threshold = self.mask_threshold if threshold is None else _checked_threshold(threshold)
        no_target_threshold = _checked_threshold(no_target_threshold, "no-target")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
        if isinstance(outputs, Mapping):
            presence_logits = outputs.get("presence_logits")
        else:
            presence_logits = getattr(outputs, "presence_logits", None)
        if logits.ndim != 3:
            raise ValueError(f"logits must have shape (expressions, height, width), got {tuple(logits.shape)}.")
        if inputs.get("original_sizes") is None:
            raise ValueError("inputs has no original_sizes: give what the processor returned for the images.")
        sizes = [tuple(size) for size in inputs["original_sizes"].tolist()]
        index = inputs.get("image_index")
        index = list(range(len(sizes))) if index is None else index.tolist()
        if len(index) != len(logits) or not all(0 <= i < len(sizes) for i in index):
            raise ValueError(f"{len(logits)} logits do not fit image_index {index} and {len(sizes)} original_sizes.")
        pixel_values = inputs.get("pixel_values")
        frame = self.image_processor.frame_size if pixel_values is None else tuple(pixel_values.shape[-2:])
        absence = None if presence_logits is None else (-presence_logits.float()).sigmoid().tolist()
        results = []
        for n, (expression_logits, i) in enumerate(zip(logits, index, strict=True)):
            probabilities = _resample(expression_logits.float(), sizes[i], frame).sigmoid()
            mask = probabilities > threshold
            if absence is not None and absence[n] > no_target_threshold:
                mask = torch.zeros_like(mask)
            count = int(mask.sum())
            # `torch.threshold` keeps what the mask keeps, in one pass
            score = torch.threshold(probabilities, threshold, 0).sum() / count if count else probabilities.max()
            results.append({"mask": mask, "score": score.item()})
            if absence is not None:
                results[-1]["no_target"] = absence[n]
            if return_probabilities:
                results[-1]["probabilities"] = probabilities
        return results


def _resample(values: Tensor, original_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
    """Interpolate values (h, w) that cover the frame to the pixels (H0, W0) of the image in it."""
    top, left, height, width = letterbox_box(original_size, frame_size)
    values = _resample_axis(values, 0, original_size[0], top / frame_size[0], height / frame_size[0])
    return _resample_axis(values, 1, original_size[1], left / frame_size[1], width / frame_size[1])


def _resample_axis(values: Tensor, axis: int, length: int, start: float, extent: float) -> Tensor:
    """Interpolate one axis linearly to `length` pixels over a stretch of it, given as shares of the axis."""
    n = values.shape[axis]
    # an image smaller than its share of the logits takes averages of several samples per pixel
    samples = max(1, round(n * extent / length))
    position = (start + (np.arange(length * samples) + 0.5) / (length * samples) * extent) * n - 0.5
    first, last = np.ceil(start * n - 1e-6), np.floor((start + extent) * n + 1e-6) - 1
    position = position.clip(first, last) if first <= last else position.clip(0, n - 1)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, n - 1)
    share = torch.as_tensor(position - before, dtype=values.dtype, device=values.device)
    resampled = torch.lerp(
        values.index_select(axis, torch.as_tensor(before, device=values.device)),
        values.index_select(axis, torch.as_tensor(after, device=values.device)),
        share[:, None] if axis == 0 else share,
    )
    return resampled.unflatten(axis, (length, samples)).mean(axis + 1) if samples > 1 else resampled


def _grouped_expressions(text: Any, image_count: int | None) -> list[list[str]]:
    """Check the expressions and clean them: one list per image."""
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(f"text must be a string, a list of strings or of such lists, got {type(text).__name__}.")
    if not text and not isinstance(text, str):
        raise ValueError("text is empty: give at least one expression.")
    is_nested = not isinstance(text, str) and all(isinstance(item, (list, tuple)) for item in text)
    nested = [[text]] if isinstance(text, str) else text if is_nested else [[item] for item in text]
    groups: list[list[str]] = []
    for i, group in enumerate(nested):
        if not group:
            raise ValueError(f"text[{i}] is empty: every image needs at least one expression.")
        groups.append([])
        for j, expression in enumerate(group):
            place = "text" if isinstance(text, str) else f"text[{i}][{j}]" if is_nested else f"text[{i}]"
            if not isinstance(expression, str):
                raise TypeError(f"{place} must be a string, got {type(expression).__name__}.")
            groups[-1].append(clean_expression(expression))
            if not groups[-1][-1]:
                raise ValueError(f"{place} is an empty expression: {expression!r}.")
    if image_count is not None and len(groups) != image_count:
        relation = "more texts than images" if len(groups) > image_count else "fewer texts than images"
        hint = "" if is_nested else '; nest them to give an image several: text=[["left zebra", "zebra drinking"]]'
        raise ValueError(f"{relation}: {len(groups)} for {image_count} image(s){hint}.")
    return groups


def _flattened_masks(masks: Any, text: Any, count: int) -> list[Any]:
    """One mask per expression, in the expressions' order."""
    if isinstance(text, str):
        return [masks]
    if isinstance(text[0], str):
        flat = list(masks)
    else:
        if [len(group) for group in masks] != [len(group) for group in text]:
            raise ValueError("masks must be nested like text: one list per image, one mask per expression.")
        flat = [mask for group in masks for mask in group]
    if len(flat) != count:
        raise ValueError(f"{len(flat)} masks for {count} expressions: give one per expression.")
    return flat


def _checked_threshold(threshold: float, name: str = "mask") -> float:
    if not 0 < threshold < 1:
        raise ValueError(f"The {name} threshold must lie between 0 and 1, got {threshold}.")
    return float(threshold)


__all__ = ["ReferringImageSegmentationPipeline", "SeraProcessor", "clean_expression", "token_limit"]
