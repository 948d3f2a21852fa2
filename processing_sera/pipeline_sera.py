"""The one-call form: picture and expressions in, masks out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline


class ReferringImageSegmentationPipeline(Pipeline):
    """Segment what expressions refer to.

    `pipe(image, text="left zebra")`, `pipe(image, text=["left zebra", "zebra drinking"])`,
    `pipe({"image": image, "text": ...})`, or a list, generator or dataset of such dictionaries. A list of
    pictures with `text=` asks the same of each. A picture is a PIL image, a path, an array or tensor, or a
    URL.

    For one picture it returns a list with one dictionary per expression: "label", the expression as given;
    "score", see `SeraProcessor.post_process_referring_segmentation`; "mask", a PIL image of mode "L" and the
    picture's own size, 255 on the object. For a list of inputs it returns a list of those, for a generator or
    dataset an iterator.

    Args:
        model: a `SeraForReferringSegmentation`.
        processor: its `SeraProcessor`.
        text: the expressions, unless each input brings its own.
        threshold: the probability above which a pixel is in the mask; by default the processor's.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("The argument processor is missing: give the model's SeraProcessor.")

    def _sanitize_parameters(
        self, text: str | Sequence[str] | None = None, threshold: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_parameters = {} if text is None else {"text": text}
        postprocess_parameters = {} if threshold is None else {"threshold": threshold}
        return preprocess_parameters, {}, postprocess_parameters

    def preprocess(self, inputs: Any, text: str | Sequence[str] | None = None) -> dict[str, Any]:
        image = inputs
        if isinstance(inputs, dict):
            image, text = inputs.get("image"), inputs.get("text", text)
        missing = "image" if image is None else "text" if text is None else None
        if missing:
            usage = 'pipe(image, text="...") or pipe({"image": image, "text": "..."})'
            raise ValueError(f"The argument {missing} is missing: call {usage}.")
        expressions = [text] if isinstance(text, str) else list(text)
        features = self.processor(images=[image], text=[expressions], return_tensors="pt")
        return {"features": dict(features), "text": expressions}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        # the base class collates a batch into lists and takes them apart again, but reshapes tensors it finds in them:
        # the logits travel among the features
        is_batch = isinstance(model_inputs["features"], list)
        items = model_inputs["features"] if is_batch else [model_inputs["features"]]
        features = self._join(items)
        features["pixel_values"] = features["pixel_values"].to(self.model.dtype)
        logits = self.model(**features).logits.split([len(item["input_ids"]) for item in items])
        items = [{**item, "logits": own} for item, own in zip(items, logits, strict=True)]
        return {"text": model_inputs["text"], "features": items if is_batch else items[0]}

    def _join(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The processor's outputs for single pictures, as it would have given them for all at once."""
        longest = max(item["input_ids"].shape[1] for item in items)

        def pad(rows: torch.Tensor, value: int) -> torch.Tensor:
            return torch.nn.functional.pad(rows, (0, longest - rows.shape[1]), value=value)

        pad_token_id = self.processor.tokenizer.pad_token_id
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "original_sizes": torch.cat([item["original_sizes"] for item in items]),
            "input_ids": torch.cat([pad(item["input_ids"], pad_token_id) for item in items]),
            "attention_mask": torch.cat([pad(item["attention_mask"], 0) for item in items]),
            "image_index": torch.cat([item["image_index"] + i for i, item in enumerate(items)]),
        }

    def postprocess(self, model_outputs: dict[str, Any], threshold: float | None = None) -> list[dict[str, Any]]:
        results = self.processor.post_process_referring_segmentation(
            model_outputs["features"], model_outputs["features"], threshold=threshold
        )
        masks = [Image.fromarray(result["mask"].numpy().astype(np.uint8) * 255) for result in results]
        return [
            {"label": label, "score": result["score"], "mask": mask}
            for label, result, mask in zip(model_outputs["text"], results, masks, strict=True)
        ]


__all__ = ["ReferringImageSegmentationPipeline"]
