"""The one-call form: image and expressions in, masks out."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline

from .collation_sera import join_rows
from .image_decoding_sera import as_image_list, as_list, is_undecoded


@dataclass
class PreparedImage:
    """An image that the model has encoded, from `ReferringImageSegmentationPipeline.prepare`; for any number of calls.

    Attributes:
        pixel_values: (1, 3, H, W), as the processor makes them.
        original_sizes: (1, 2), height and width of the upright image.
        features: the model's features of the image.
        flipped: those of the horizontally flipped image; made by the first call with `tta="flip"`.
    """

    pixel_values: torch.Tensor
    original_sizes: torch.Tensor
    features: Any
    flipped: Any = None


class ReferringImageSegmentationPipeline(Pipeline):
    """Segment what expressions refer to in images.

    `pipe(image, "left zebra")`, `pipe(image, ["left zebra", "zebra drinking"])`, `pipe({"image": image, "text": ...})`, or
    a list, generator or dataset of such dictionaries. With a list of images, one `text` goes to each of them.

    `prepared = pipe.prepare(image)` encodes an image once. `pipe(prepared, "left zebra")` then takes it in every place of an image,
    and computes only what depends on the expression.

    Args:
        model: a `SeraForReferringSegmentation`.
        processor: its `SeraProcessor`.
        text: the expressions, unless each call or input brings its own.
        threshold: the probability, within (0, 1), above which a pixel is in the mask; by default masks are selected as the
            processor says.
        tta: "flip" for test-time augmentation: the answer is averaged with that for the horizontally flipped image, with "left" and
            "right" swapped in the (English) expressions. It takes twice the time.
        max_expressions: how many expressions go through the model at once, as memory allows. Small models gain from
            many; on a CPU a large one is fastest with about four.

    Raises:
        ValueError: no processor, a threshold outside (0, 1), another `tta` than "flip", `max_expressions` below 1.
        TypeError: an unknown argument.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("The argument processor is missing: give the model's SeraProcessor.")
        self.model.eval()  # in training mode the model refuses `max_expressions`

    def __call__(self, inputs: Any, text: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Masks for the expressions about one image or many.

        Args:
            inputs: an image (see `to_rgb_image`) or a prepared one, a dictionary {"image": image, "text": expressions}, or several
                of either: a list, tuple, array of paths, pandas Series, generator, dataset or Column of a dataset.
            text: one expression or several in a list, tuple, array, Column or Series, about every image that comes without
                its own.
            kwargs: `threshold`, `tta` and `max_expressions` as at construction; `batch_size`, how many images are processed at
                once with all their expressions; `num_workers`, as in every pipeline.

        Returns:
            For one image a list with one dictionary per expression: "label", the expression as given; "score" in [0, 1],
            see `SeraProcessor.post_process_referring_segmentation`; "mask", a PIL image of mode "L" and the image's own
            size, 255 on the object. From a model that predicts presence also "no_target", the probability that nothing
            in the image is meant. Where that is likely, the mask is empty. For a list, tuple, array or Series of inputs a list
            of those, for a generator, dataset or Column an iterator.

        Raises:
            ValueError: no expression or an empty one, no image or one that cannot be read.
            TypeError: an expression that is not a string, an image of a type that is not accepted.
            FileNotFoundError: no file at a path.
        """
        if text is not None:
            kwargs["text"] = text
        inputs = _several(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def prepare(self, image: Any) -> PreparedImage:
        """Encode one image for any number of calls.

        Args:
            image: an image (see `to_rgb_image`).

        Returns:
            What calls of this pipeline take in the place of the image. It stays on the model's device.

        Raises:
            ValueError: an image that cannot be read.
            TypeError: an image of a type that is not accepted.
            FileNotFoundError: no file at a path.
        """
        inputs = self.processor(images=[image], return_tensors="pt")
        with self.device_placement(), self.get_inference_context()():
            features = self._encode(inputs["pixel_values"])
        return PreparedImage(inputs["pixel_values"], inputs["original_sizes"], features)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor, with their code; the base class would save parts of the processor only."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        text: str | Sequence[str] | None = None,
        threshold: float | None = None,
        tta: str | None = None,
        max_expressions: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if threshold is not None and not (isinstance(threshold, Real) and 0 < threshold < 1):
            raise ValueError(f"threshold must be a number between 0 and 1, got {threshold!r}.")
        if tta not in (None, "flip"):
            raise ValueError(f'tta must be "flip" or None, got {tta!r}.')
        if max_expressions is not None and not (isinstance(max_expressions, Integral) and max_expressions > 0):
            raise ValueError(f"max_expressions must be a positive integer, got {max_expressions!r}.")
        preprocess_parameters = ({} if text is None else {"text": text}) | ({} if tta is None else {"tta": tta})
        forward_parameters = {} if max_expressions is None else {"max_expressions": max_expressions}
        postprocess_parameters = {} if threshold is None else {"threshold": threshold}
        return preprocess_parameters, forward_parameters, postprocess_parameters

    def preprocess(
        self, inputs: Any, text: str | Sequence[str] | None = None, tta: str | None = None
    ) -> dict[str, Any]:
        image = inputs
        if isinstance(inputs, Mapping) and not is_undecoded(inputs):
            image, text = inputs.get("image"), text if inputs.get("text") is None else inputs["text"]
        missing = "image" if image is None else "text" if text is None else None
        if missing:
            usage = 'pipe(image, text="left zebra") or pipe({"image": image, "text": ["left zebra", "zebra drinking"]})'
            purpose = " (the phrases for what to find in the image)" if missing == "text" else ""
            raise ValueError(f"The argument {missing} is missing{purpose}: call {usage}.")
        expressions = [text] if isinstance(text, str) else as_list(text)
        if expressions is None:
            raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}.")
        if isinstance(image, PreparedImage):
            images = {"pixel_values": image.pixel_values, "original_sizes": image.original_sizes, "prepared": image}
            features = images | dict(self.processor(text=[expressions], return_tensors="pt"))
        else:
            features = dict(self.processor(images=[image], text=[expressions], return_tensors="pt"))
        flipped = {} if tta is None else {"flipped": self.processor.flipped_inputs(features, expressions)}
        return {"features": features, "text": expressions, **flipped}

    def _forward(self, model_inputs: dict[str, Any], max_expressions: int = 32) -> dict[str, Any]:
        # The base class collates a batch into lists and takes them apart again, but reshapes the tensors in them. So the
        # model's outputs are kept among the features.
        is_batch = isinstance(model_inputs["features"], list)
        items, *flipped = (
            list(model_inputs[name]) if is_batch else [model_inputs[name]]
            for name in ("features", "flipped")
            if name in model_inputs
        )
        # Images without padding keep their shapes in a batch. Prepared images go through the model one by one.
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, item in enumerate(items):
            key = (number,) if "prepared" in item else tuple(item["pixel_values"].shape[-2:])
            groups.setdefault(key, []).append(number)
        for numbers in groups.values():
            outputs = self._run_model(self._join([items[number] for number in numbers]), max_expressions)
            if flipped:
                turned = self._join([flipped[0][number] for number in numbers], is_flipped=True)
                outputs = self.processor.average_flipped(outputs, self._run_model(turned, max_expressions))
            counts = [len(items[number]["input_ids"]) for number in numbers]
            for name, values in outputs.items():
                for number, own in zip(numbers, values.split(counts), strict=True):
                    items[number] = {**items[number], name: own}
        return {"text": model_inputs["text"], "features": items if is_batch else items[0]}

    def _join(self, items: list[dict[str, Any]], is_flipped: bool = False) -> dict[str, Any]:
        """The model's inputs for one batch, from those for single images; or for one prepared image (flipped, if it is)."""
        batch = join_rows(items, self.processor)
        pixel_values = batch.pop("pixel_values")
        prepared = items[0].get("prepared")
        if prepared is None:
            return {**batch, "pixel_values": pixel_values.to(self.model.dtype)}
        if is_flipped and prepared.flipped is None:
            prepared.flipped = self._encode(pixel_values)
        return {**batch, "image_features": prepared.flipped if is_flipped else prepared.features}

    def _encode(self, pixel_values: torch.Tensor) -> Any:
        """The model's features of images (B, 3, H, W)."""
        return self.model.get_image_features(pixel_values.to(self.device, self.model.dtype))

    def _run_model(self, features: dict[str, Any], max_expressions: int) -> dict[str, torch.Tensor]:
        """`logits` (N, h, w) and, where the model gives them, `presence_logits` (N,)."""
        outputs = self.model(**features, max_expressions=max_expressions)
        return {name: outputs[name] for name in ("logits", "presence_logits") if name in outputs}

    def postprocess(self, model_outputs: dict[str, Any], threshold: float | None = None) -> list[dict[str, Any]]:
        features = model_outputs["features"]
        found = self.processor.post_process_referring_segmentation(features, features, threshold=threshold)
        results = []
        for label, result in zip(model_outputs["text"], found, strict=True):
            mask = Image.fromarray(result.pop("mask").numpy().astype(np.uint8) * 255)
            results.append({"label": label, "mask": mask, **result})  # the rest: score and, if predicted, no_target
        return results


def _several(inputs: Any) -> Any:
    """What the base class takes: several inputs as a list, those of a dataset as a generator, and one input as it is."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        images = as_image_list(inputs)
        return inputs if images[0] is inputs else images
    whole = (
        str,
        bytes,
        bytearray,
        memoryview,
        os.PathLike,
        Mapping,
        Image.Image,
        list,
        GeneratorType,
        torch.utils.data.Dataset,
    )
    if isinstance(inputs, whole) or hasattr(inputs, "read"):
        return inputs
    if isinstance(inputs, tuple) or hasattr(inputs, "__array__"):  # a Series, say: it is in memory already
        return inputs if (items := as_list(inputs)) is None else items
    if hasattr(inputs, "__iter__"):
        return (item for item in inputs)
    is_indexed = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
    return (inputs[i] for i in range(len(inputs))) if is_indexed else inputs


__all__ = ["PreparedImage", "ReferringImageSegmentationPipeline"]
