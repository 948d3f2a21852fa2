"""Test-time augmentation with a horizontal flip: answers averaged over an image and its flipped image (ours)."""

from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps
from transformers import BatchFeature

from training.examples.augmentation import swap_left_right
from training.examples.batches import Collator, ImageExample


def flip_image(image: Image.Image, text: list[str]) -> tuple[Image.Image, list[str]]:
    """The horizontally flipped image, and the expressions with "left" and "right" swapped. English only."""
    return ImageOps.mirror(image), [swap_left_right(expression) for expression in text]


class FlipCollator(Collator):
    """Adds the flipped image after each image, with the same sources. The masks stay those of the unflipped image."""

    def __call__(self, examples: list[ImageExample]) -> tuple[BatchFeature, list[ImageExample]]:
        """Model inputs and examples, with two images for each of `examples`."""
        both = []
        for example in examples:
            image, text = flip_image(example.image, example.text)
            both += [example, replace(example, image=image, text=text)]
        return super().__call__(both)


def average_answers(answer: dict[str, Any], flipped: dict[str, Any]) -> dict[str, Any]:
    """The mean of the answers for an image and for its flipped image. The columns of the second are turned back first.

    Args:
        answer: What `post_process_referring_segmentation` returned, with "probabilities" (H, W).
        flipped: The same for the flipped image.

    Returns:
        {"probabilities": float32 (H, W), their mean} and, from a model that predicts presence, the mean "no_target" in [0, 1].
    """
    averaged = {"probabilities": (answer["probabilities"] + flipped["probabilities"].flip(-1)) / 2}
    if "no_target" in answer:
        averaged["no_target"] = (answer["no_target"] + flipped["no_target"]) / 2
    return averaged
