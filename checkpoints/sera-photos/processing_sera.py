"""Images and expressions to model inputs; the model's logits to masks of the images' own sizes."""

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TruncationStrategy
from transformers.utils import PaddingStrategy

from .expressions_sera import DEFAULT_MAX_TOKENS, clean_expression, grouped_expressions, shortened
from .flip_averaging_sera import average_answers, swap_left_right
from .image_decoding_sera import ImageLike, as_image_list, as_list
from .mask_selection_sera import EXPECTED_IOU, calibrated, checked_calibration, select_on_grid
from .pipeline_sera import ReferringImageSegmentationPipeline  # so that its file is saved with the processor
from .resampling_sera import image_axis, resampled_bands

UNSET_LENGTH = 10**6  # a tokenizer's model_max_length is far above this where nobody set it
LOADING_OPTIONS = ("dtype", "is_local", "local_files_only")  # transformers keeps these among the tokenizer's settings
TEXT_PADDINGS = (PaddingStrategy.LONGEST.value, PaddingStrategy.MAX_LENGTH.value)
TEXT_OPTIONS = ("padding", "truncation", "max_length", "return_attention_mask")
OPTION_GROUPS = {
    "text_kwargs": (*TEXT_OPTIONS, "return_tensors"),
    "images_kwargs": ("return_tensors",),
    "common_kwargs": ("return_tensors",),
}


class SeraProcessorKwargs(ProcessingKwargs, total=False):
    """The options of a call of `SeraProcessor`, with their defaults."""

    text_kwargs: TextKwargs
    _defaults = {"text_kwargs": {"truncation": True, "return_attention_mask": True}}


def token_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that an expression may have, with start and end: the tokenizer's own limit, or CLIP's where nobody set one."""
    limit = tokenizer.model_max_length
    return limit if limit < UNSET_LENGTH else DEFAULT_MAX_TOKENS


def text_padding_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How expressions are padded for the tower that a tokenizer belongs to: "longest" or "max_length".

    A tower that takes no attention mask reads the padding, and was trained on one length (SigLIP and SigLIP 2).
    """
    has_mask = "attention_mask" in tokenizer.model_input_names and not type(tokenizer).__name__.startswith("Siglip")
    return TEXT_PADDINGS[0] if has_mask else TEXT_PADDINGS[1]


class SeraProcessor(ProcessorMixin):
    """Images and referring expressions to model inputs; logits to masks.

    Args:
        image_processor: a `SeraImageProcessor`.
        tokenizer: the text tower's tokenizer. It says which token pads, and how many tokens are read at most.
        mask_threshold: the probability, within (0, 1), above which a pixel belongs to the predicted mask. Or "expected_iou":
            each answer has its own threshold, that of the mask with the largest expected IoU.
        keep_largest_component: whether only the connected component with the largest sum of probabilities stays of a mask. Leave
            it off where an expression may mean several things.
        no_target_threshold: the probability of absence, within (0, 1), above which a mask is left empty. It has an effect only
            where the model predicts presence.
        score_calibration: pairs [raw score, IoU] that make the score an estimate of the mask's IoU, with rising raw scores. None:
            the score is the mean probability inside the mask. See `post_process_referring_segmentation`.
        text_padding: how expressions are padded where a call does not say it: "longest", or "max_length" for a tower that
            reads expressions of one length only. None: `text_padding_of` the tokenizer.

    All but the first two are saved in `processor_config.json`; most say how the masks of this checkpoint are selected.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        mask_threshold: float | str = 0.5,
        keep_largest_component: bool = False,
        no_target_threshold: float = 0.5,
        score_calibration: Sequence[Sequence[float]] | None = None,
        text_padding: str | None = None,
    ):
        super().__init__(image_processor, tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token; its tokenizer_config.json should name one. CLIP's is '<|endoftext|>'."
            )
        if text_padding is not None and text_padding not in TEXT_PADDINGS:
            raise ValueError(f"text_padding is {text_padding!r}; it must be one of {TEXT_PADDINGS}.")
        self.text_padding = text_padding or text_padding_of(tokenizer)
        self.mask_threshold = _checked_mask_threshold(mask_threshold)
        self.keep_largest_component = bool(keep_largest_component)
        self.no_target_threshold = _checked_threshold(no_target_threshold, "no-target")
        self.score_calibration = checked_calibration(score_calibration)

    valid_processor_kwargs = SeraProcessorKwargs

    @property
    def model_input_names(self) -> list[str]:
        """The names of all inputs of the model that this processor gives, apart from labels."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "image_index"]

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        masks: Any = None,
        **kwargs: Unpack[SeraProcessorKwargs],
    ) -> BatchFeature:
        """Prepare B images and N expressions about them; either may be left out.

        Lists may also be tuples, numpy arrays, Columns of `datasets` or pandas Series.

        Args:
            images: one image or a list of them (see `to_rgb_image`).
            text: a string for one image; a list as long as `images`, one each; a nested list, several each.
                One image with several takes a nested list too: `text=[["left zebra", "zebra drinking"]]`.
            masks: for training: one boolean (H0, W0) array per expression, in its image's own upright
                pixels, nested like `text`. In whole numbers negative pixels are left out of the loss, see `read_masks`.
            kwargs: `return_tensors`: "pt" for tensors, otherwise numpy arrays.
                `padding`: True or "longest", "max_length", or False for lists of unequal length; by default `text_padding`.
                `truncation`: True (default) to cut to `max_length` with a warning, False to keep all tokens.
                `max_length`: tokens, by default and at most `max_tokens`.
                `return_attention_mask`: False to leave it out.
                Also as `text_kwargs={…}`, as in every processor.

        Returns:
            Where images are given, `pixel_values` float32 (B, 3, H, W) and `original_sizes` int64 (B, 2).
            Where text is, `input_ids` and `attention_mask` int64 (N, L), padded on the right. Unless every image has exactly
            one expression, `image_index` int64 (N,), the row of `pixel_values` that each expression is about. Where masks are,
            `labels` float32 (N, H, W) in [0, 1] and -1 where pixels are left out, see `letterbox_masks`.

            Without `image_index` rows can be stored, shuffled and batched again. `SeraDataCollator` does this for rows with it.

        Raises:
            ValueError: an empty expression, more or fewer texts than images, masks that do not match, an
                image that cannot be read, an impossible value of an option.
            TypeError: an expression that is not a string, an image that is none, an unknown option.
            FileNotFoundError: no file at a path.
        """
        if images is None and text is None:
            raise ValueError("Nothing to process: give images, text or both.")
        if masks is not None and (images is None or text is None):
            raise ValueError("masks need the images and the text that they belong to.")
        options, return_tensors = self._checked_options(kwargs)
        images = None if images is None else as_image_list(images)
        data: dict[str, Any] = {}
        index = np.zeros(0, np.int64)
        if text is not None:
            groups, is_nested = grouped_expressions(text, self.max_tokens)
            if images is not None:
                _check_number(len(groups), len(images), is_nested)
            if masks is not None:
                masks = _flattened_masks(masks, groups, is_single=isinstance(text, str), is_nested=is_nested)
            data |= self._tokenize([expression for group in groups for expression in group], **options)
            index = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
            if any(len(group) != 1 for group in groups):
                data["image_index"] = index
        if images is not None:
            data = {**self.image_processor(images), **data}
        if masks is not None:
            sizes, frame = data["original_sizes"][index].tolist(), data["pixel_values"].shape[-2:]
            data["labels"] = self.image_processor.preprocess_masks(masks, sizes, frame)
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def max_tokens(self) -> int:
        """How many tokens of an expression the model reads; a longer one is cut."""
        return token_limit(self.tokenizer)

    def count_tokens(self, expression: str) -> int:
        """How many tokens an expression has, with start and end, before it is cut to `max_tokens`.

        A very long text is cut by cleaning. Then these are the tokens of the rest, which are more than `max_tokens`.

        Raises:
            ValueError: an empty expression.
            TypeError: an expression that is not a string.
        """
        ((cleaned,),), _ = grouped_expressions(expression, self.max_tokens)
        return len(self._token_ids([cleaned])[0])

    def _checked_options(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The options of `_tokenize`, checked, and `return_tensors`."""
        known = (*OPTION_GROUPS["text_kwargs"], *OPTION_GROUPS)
        unknown = [name for name in kwargs if name not in known]
        unknown += [n for group, names in OPTION_GROUPS.items() for n in kwargs.get(group) or () if n not in names]
        if unknown:
            raise TypeError(f"SeraProcessor has no option {unknown[0]!r}; it has {', '.join(known)}.")
        merged = self._merge_kwargs(SeraProcessorKwargs, **{k: v for k, v in kwargs.items() if v is not None})
        text_options, limit = merged["text_kwargs"], self.max_tokens
        return_tensors = text_options.get("return_tensors") or merged["images_kwargs"].get("return_tensors")
        max_length = text_options.get("max_length", limit)
        if not isinstance(max_length, Integral) or not 2 <= max_length <= limit:
            raise ValueError(f"max_length must be an integer from 2 to {limit}, got {max_length!r}.")
        padding, truncation = text_options.get("padding", self.text_padding), text_options["truncation"]
        padding = {True: "longest", False: "do_not_pad"}.get(padding, padding)
        truncation = {True: "longest_first", False: "do_not_truncate"}.get(truncation, truncation)
        if truncation == TruncationStrategy.ONLY_SECOND:
            raise ValueError("truncation='only_second' needs pairs of texts; give True or False.")
        options = {
            "padding": PaddingStrategy(padding),
            "is_cut": TruncationStrategy(truncation) != TruncationStrategy.DO_NOT_TRUNCATE,
            "max_length": int(max_length),
            "with_mask": bool(text_options["return_attention_mask"]),
        }
        return options, return_tensors

    def _token_ids(self, expressions: list[str]) -> list[list[int]]:
        return self.tokenizer(
            expressions,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            split_special_tokens=True,  # a "<|endoftext|>" inside an expression is text
            verbose=False,
        )["input_ids"]

    def _tokenize(
        self, expressions: list[str], padding: PaddingStrategy, is_cut: bool, max_length: int, with_mask: bool
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, int64 (N, L), or lists of unequal length where they are not padded.

        The padding token may be the end-of-text token, so the mask is made from the lengths. Padding and
        truncation are done here because the tokenizer would keep them as settings and save them.
        """
        ids = self._token_ids(expressions)
        for i, row in enumerate(ids):
            if is_cut and len(row) > max_length:
                shown = shortened(expressions[i])
                warnings.warn(
                    f"The expression {shown!r} has {len(row)} tokens and is cut to {max_length}.", stacklevel=3
                )
                ids[i] = [*row[: max_length - 1], row[-1]]
        lengths = [len(row) for row in ids]
        fill = {PaddingStrategy.LONGEST: max(lengths), PaddingStrategy.MAX_LENGTH: max_length}.get(padding, 0)
        masks = [[1] * length + [0] * (fill - length) for length in lengths]
        pad = [self.tokenizer.pad_token_id]
        ids = [row + pad * (fill - len(row)) for row in ids]
        found = {"input_ids": ids, "attention_mask": masks} if with_mask else {"input_ids": ids}
        if len({len(row) for row in ids}) == 1:
            return {name: np.array(rows, np.int64) for name, rows in found.items()}
        return found

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
        """Save image processor, tokenizer, mask selection and text padding.

        The tokenizer's last padding and truncation are cleared first, because after loading they would outrank what a caller
        asks for. What loading left among its settings is cleared too, so that a loaded processor is saved as it was.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # a tokenizer in plain Python keeps neither
            backend.no_padding()
            backend.no_truncation()
        for name in LOADING_OPTIONS:
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def post_process_referring_segmentation(
        self,
        outputs: Any,
        inputs: Any,
        threshold: float | str | None = None,
        return_probabilities: bool = False,
        no_target_threshold: float | None = None,
        keep_largest_component: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Masks of the images' own sizes from logits that cover the frame.

        What is not given is the processor's own. Threshold and component are found on the logits' grid, on the cells that the image
        covers. Then the logits are interpolated bilinearly to the image's pixels, in bands of rows and one expression at a time.
        Pixels at the image's border take the nearest logit that lies completely inside the image. The next logit covers padding
        too.

        Args:
            outputs: what the model returned, with `logits` (N, h, w); h x w need not be H x W; and, from a model
                that predicts presence, `presence_logits` (N,).
            inputs: what this processor returned: `original_sizes`, `pixel_values` and, unless there is one
                expression per image, `image_index`.
            threshold: probability above which a pixel is in the mask, or "expected_iou". A number takes the place of the
                expected-IoU threshold of the processor; the component is kept as the processor says.
            return_probabilities: also return the probabilities, as "probabilities": float32 (H0, W0).
            no_target_threshold: probability of absence, within (0, 1), above which the mask is left empty.
            keep_largest_component: whether only the largest connected component of the mask stays.

        Returns:
            Per expression {"mask": bool (H0, W0), "score": float}. With `presence_logits` also {"no_target": float},
            the probability in [0, 1] that the expression refers to nothing in the image.

            Without `score_calibration` the score is the mean probability inside the mask; for an empty mask the highest anywhere.
            With it the score estimates the IoU of the mask: it is the calibrated expected IoU of the mask, times the probability of
            presence where the model predicts it. For a mask that is left empty it is the probability of absence. The calibration
            is fitted to the processor's own mask selection. For another threshold the score still ranks masks, but it may be too
            high or too low.

        Raises:
            ValueError: no `original_sizes`, or logits, index and sizes that do not fit each other; a threshold
                outside (0, 1).
        """
        threshold = self.mask_threshold if threshold is None else _checked_mask_threshold(threshold)
        keep = self.keep_largest_component if keep_largest_component is None else keep_largest_component
        limit = self.no_target_threshold
        limit = limit if no_target_threshold is None else _checked_threshold(no_target_threshold, "no-target")
        found = _named_outputs(outputs)
        logits = found["logits"]
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
        frame = self.image_processor.frame_of(sizes) if pixel_values is None else tuple(pixel_values.shape[-2:])
        presence = found.get("presence_logits")
        absences = [None] * len(index) if presence is None else (-presence.float()).sigmoid().tolist()
        results = []
        for own, i, absence in zip(logits.detach().float(), index, absences, strict=True):
            is_absent = absence is not None and absence > limit
            result = self._answer(own, sizes[i], frame, threshold, keep, is_absent, return_probabilities)
            if self.score_calibration is not None:
                raw = result["score"] * (1 - (absence or 0.0))
                result["score"] = absence if is_absent else calibrated(raw, self.score_calibration)
            if absence is not None:
                result["no_target"] = absence
            results.append(result)
        return results

    def _answer(
        self,
        logits: Tensor,
        original_size: tuple[int, int],
        frame: tuple[int, int],
        threshold: float | str,
        keep_largest_component: bool,
        is_absent: bool,
        return_probabilities: bool,
    ) -> dict[str, Any]:
        """The answer to one expression, with the raw score, from float32 logits (h, w) of the frame."""
        top, left, height, width = self.image_processor.box(original_size, frame)
        rows = image_axis(logits.shape[0], original_size[0], top / frame[0], height / frame[0])
        columns = image_axis(logits.shape[1], original_size[1], left / frame[1], width / frame[1])
        logits = chosen = logits[rows.cells, columns.cells]
        expected = None
        if keep_largest_component or threshold == EXPECTED_IOU or self.score_calibration is not None:
            selected = select_on_grid(logits.cpu().numpy(), threshold, keep_largest_component)
            threshold, expected = selected.threshold, selected.expected_iou
            chosen = torch.as_tensor(selected.logits, device=logits.device)
        mask = torch.zeros(original_size, dtype=torch.bool, device=logits.device)
        total, highest, count = logits.new_zeros(()), logits.new_zeros(()), 0
        for band, values in resampled_bands(chosen, rows, columns):
            probabilities = values.sigmoid_()
            highest = torch.maximum(highest, probabilities.max())
            if not is_absent:
                torch.gt(probabilities, threshold, out=mask[band])
                count += int(mask[band].sum())
                total = total + torch.threshold_(probabilities, threshold, 0).sum()  # what the mask keeps, in one pass
        score = expected if self.score_calibration is not None else (total / count if count else highest).item()
        result = {"mask": mask, "score": score}
        if return_probabilities:
            result["probabilities"] = logits.new_empty(original_size)
            for band, values in resampled_bands(logits, rows, columns):
                result["probabilities"][band] = values.sigmoid_()
        return result

    def flipped_inputs(self, inputs: Mapping[str, Any], text: Sequence[str]) -> dict[str, Any]:
        """Inputs for the horizontally flipped images, with "left" and "right" swapped in the (English) expressions.

        The frames are flipped, so the model's logits for them are those of the images with their columns turned.

        Args:
            inputs: what this processor returned for the images and the expressions, as tensors.
            text: the N expressions, in the order of `input_ids`.

        Returns:
            The same names, on the same devices. The expressions may have another number of tokens.
        """
        pixel_values = inputs["pixel_values"].flip(-1)
        swapped = self(text=[swap_left_right(expression) for expression in text], return_tensors="pt")
        return {**inputs, "pixel_values": pixel_values, **swapped.to(pixel_values.device)}

    def average_flipped(self, outputs: Any, flipped_outputs: Any) -> dict[str, Tensor]:
        """The model's answers for images and for their flipped images, averaged: test-time augmentation.

        Args:
            outputs: what the model returned for the images.
            flipped_outputs: what it returned for `flipped_inputs`.

        Returns:
            What `post_process_referring_segmentation` takes as `outputs`: the logits of the mean probabilities.
        """
        return average_answers(_named_outputs(outputs), _named_outputs(flipped_outputs))


def _named_outputs(outputs: Any) -> dict[str, Tensor]:
    """`logits` and, where there are any, `presence_logits`, of a model's output, a dictionary or the logits alone."""
    if isinstance(outputs, Mapping):
        found = {name: outputs.get(name) for name in ("logits", "presence_logits")}
    else:
        found = {
            "logits": getattr(outputs, "logits", outputs),
            "presence_logits": getattr(outputs, "presence_logits", None),
        }
    return {name: values for name, values in found.items() if values is not None}


def _check_number(texts: int, images: int, is_nested: bool) -> None:
    """Raise where there are not as many texts as images."""
    if texts != images:
        relation = "more texts than images" if texts > images else "fewer texts than images"
        hint = "" if is_nested else '; nest them to give an image several: text=[["left zebra", "zebra drinking"]]'
        raise ValueError(f"{relation}: {texts} for {images} image(s){hint}.")


def _flattened_masks(masks: Any, groups: list[list[str]], is_single: bool, is_nested: bool) -> list[Any]:
    """One mask per expression, in the expressions' order."""
    if is_single:
        return [masks]
    found = list(masks) if isinstance(masks, Tensor) else as_list(masks)
    if found is None:
        raise TypeError(f"masks must be a list like text, got {type(masks).__name__}.")
    if is_nested:
        nested = [list(group) if isinstance(group, Tensor) else as_list(group) for group in found]
        if [None if group is None else len(group) for group in nested] != [len(group) for group in groups]:
            raise ValueError("masks must be nested like text: one list per image, one mask per expression.")
        return [mask for group in nested for mask in group]
    if len(found) != len(groups):
        raise ValueError(f"{len(found)} masks for {len(groups)} expressions: give one per expression.")
    return found


def _checked_mask_threshold(threshold: float | str) -> float | str:
    return (
        threshold if threshold == EXPECTED_IOU else _checked_threshold(threshold, "mask", f', or be "{EXPECTED_IOU}"')
    )


def _checked_threshold(threshold: float, name: str, other: str = "") -> float:
    if not isinstance(threshold, Real) or not 0 < threshold < 1:
        raise ValueError(f"The {name} threshold must lie between 0 and 1{other}, got {threshold!r}.")
    return float(threshold)


__all__ = ["ReferringImageSegmentationPipeline", "SeraProcessor", "clean_expression", "text_padding_of", "token_limit"]
