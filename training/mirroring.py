"""Answers averaged over an image and its mirror image, in which "left" and "right" change places (ours)."""

from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps
from transformers import BatchFeature

from training.augmentation import swap_left_right
from training.batches import Collator, ImageExample


def mirror(image: Image.Image, text: list[str]) -> tuple[Image.Image, list[str]]:
    """The mirrored image, and what then is true of the same things there; English alone is understood."""
    return ImageOps.mirror(image), [swap_left_right(expression) for expression in text]


class MirroringCollator(Collator):
    """Puts behind each image its mirror image, with the same sources; masks stay those of the image as it was."""

    def __call__(self, examples: list[ImageExample]) -> tuple[BatchFeature, list[ImageExample]]:
        """Model inputs and examples of twice as many images as there are examples."""
        both = []
        for example in examples:
            image, text = mirror(example.image, example.text)
            both += [example, replace(example, image=image, text=text)]
        return super().__call__(both)


def average_answers(answer: dict[str, Any], mirrored: dict[str, Any]) -> dict[str, Any]:
    """One answer of two: that about an image and that about its mirror image, whose columns run the other way.

    Args:
        answer: What `post_process_referring_segmentation` returned, with "probabilities" (H, W).
        mirrored: The same about the mirror image.

    Returns:
        {"probabilities": float32 (H, W), their mean} and, from a model that predicts presence, the mean "no_target" in [0, 1].
    """
    averaged = {"probabilities": (answer["probabilities"] + mirrored["probabilities"].flip(-1)) / 2}
    if "no_target" in answer:
        averaged["no_target"] = (answer["no_target"] + mirrored["no_target"]) / 2
    return averaged
