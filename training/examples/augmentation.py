"""Variations of training examples that keep an expression true of its object (ours)."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from processing_sera.flip_averaging_sera import swap_left_right
from training.configuration import AugmentationSettings


def drop_words(sentence: str, probability: float, rng: np.random.Generator) -> str:
    """Drop each word with a probability; one word stays where all would be dropped."""
    words = sentence.split()
    kept = [word for word in words if rng.random() >= probability]
    return " ".join(kept) if kept else words[rng.integers(len(words))]


def augment(
    image: Image.Image,
    masks: list[np.ndarray],
    sentences: list[list[str]],
    settings: AugmentationSettings,
    rng: np.random.Generator,
) -> tuple[Image.Image, list[np.ndarray], list[list[str]]]:
    """Vary one image with its objects.

    Args:
        image: The image (W, H).
        masks: One (H, W) mask per object: boolean, or int8 with -1 for pixels that the loss leaves out.
        sentences: The sentences of each object.
        settings: How much.
        rng: Source of all randomness.

    Returns:
        Image, masks and sentences, in new objects; every mask keeps all pixels of its object.
    """
    if settings.flip and rng.random() < settings.flip:
        image, masks = ImageOps.mirror(image), [mask[:, ::-1] for mask in masks]
        sentences = [[swap_left_right(sentence) for sentence in group] for group in sentences]
    if settings.min_crop:
        left, top, right, bottom = _random_crop(np.greater(masks, 0).any(axis=0), settings.min_crop, rng)
        image = image.crop((left, top, right, bottom))
        masks = [mask[top:bottom, left:right] for mask in masks]
    if settings.color_jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            change = settings.color_jitter * rng.uniform(-1, 1)
            image = enhance(image.convert("RGB")).enhance(1 + change)
    if settings.word_dropout:
        sentences = [[drop_words(sentence, settings.word_dropout, rng) for sentence in group] for group in sentences]
    return image, masks, sentences


def _random_crop(covered: np.ndarray, min_share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop that holds all covered pixels and at least `min_share` of each side."""
    bounds = []
    for axis in (0, 1):  # first the columns, then the rows
        size = covered.shape[1 - axis]
        used = np.flatnonzero(covered.any(axis=axis))
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (size // 2, size // 2 + 1)
        length = max(round(size * rng.uniform(min_share, 1)), last - first)
        start = int(rng.integers(max(last - length, 0), min(first, size - length) + 1))
        bounds.append((start, start + length))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom
