"""Answers averaged over a picture and its mirror image, in which "left" and "right" change places (ours)."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from processing_sera.processing_sera import NO_TARGET_THRESHOLD
from training.augmentation import swap_left_right
from training.batches import PictureExample


def mirror(image: Image.Image, text: list[str]) -> tuple[Image.Image, list[str]]:
    """The mirrored picture, and what then is true of the same things there; English alone is understood."""
    return ImageOps.mirror(image), [swap_left_right(expression) for expression in text]


class MirroredExamples(Dataset):
    """Examples whose pictures and expressions are mirrored; their masks stay those of the pictures as they were."""

    def __init__(self, examples: Dataset):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> PictureExample:
        example = self.examples[index]
        image, text = mirror(example.image, example.text)
        return replace(example, image=image, text=text)


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
