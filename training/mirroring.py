"""Answers averaged over a picture and its mirror image, in which "left" and "right" change places (ours)."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import BatchFeature

from processing_sera.processing_sera import NO_TARGET_THRESHOLD
from training.augmentation import swap_left_right
from training.batches import Collator, PictureExample


def mirror(image: Image.Image, text: list[str]) -> tuple[Image.Image, list[str]]:
    """The mirrored picture, and what then is true of the same things there; English alone is understood."""
    return ImageOps.mirror(image), [swap_left_right(expression) for expression in text]


class MirroringCollator(Collator):
    """Puts behind each picture its mirror image, with the same sources; masks stay those of the picture as it was."""

    def __call__(self, examples: list[PictureExample]) -> tuple[BatchFeature, list[PictureExample]]:
        """Model inputs and examples of twice as many pictures as there are examples."""
        both = []
        for example in examples:
            image, text = mirror(example.image, example.text)
            both += [example, replace(example, image=image, text=text)]
        return super().__call__(both)


def average_answers(answer: dict[str, Any], mirrored: dict[str, Any], threshold: float) -> dict[str, Any]:
    """One answer of two: that about a picture and that about its mirror image, whose columns run the other way.

    Args:
        answer: What `post_process_referring_segmentation` returned, with "probabilities" (H, W).
        mirrored: The same about the mirror image.
        threshold: Mean probability above which a pixel is in the mask.

    Returns:
        {"probabilities": float32 (H, W), their mean; "mask": bool (H, W)} and, from a model that predicts presence, the mean
        "no_target" in [0, 1]; above NO_TARGET_THRESHOLD the mask is empty.
    """
    probabilities = (answer["probabilities"] + mirrored["probabilities"].flip(-1)) / 2
    averaged = {"probabilities": probabilities, "mask": probabilities > threshold}
    if "no_target" in answer:
        averaged["no_target"] = (answer["no_target"] + mirrored["no_target"]) / 2
        if averaged["no_target"] > NO_TARGET_THRESHOLD:
            averaged["mask"] = torch.zeros_like(averaged["mask"])
    return averaged
