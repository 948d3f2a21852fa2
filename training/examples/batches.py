"""From rows (one referred object each) to batches that the model takes: grouping by image, drawing sentences, collating."""

from collections import defaultdict
from dataclasses import dataclass, replace

import datasets
import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset
from transformers import BatchFeature

from processing_sera import SeraProcessor
from processing_sera.image_processing_sera import to_rgb_image
from training.configuration import AugmentationSettings
from training.examples.augmentation import augment
from training.sources.images import open_image
from training.sources.masks import decode_mask


@dataclass
class ImageExample:
    """One image with what is asked about it.

    Attributes:
        image: PIL image; `None` once a batch has been made of it.
        masks: One (H, W) mask per expression, in the image's own pixels: boolean, or int8 with -1 where the loss is to leave a
            pixel out.
        text: The expressions.
        sources: (row, sentence) number of each expression in the split.
    """

    image: Image.Image | None
    masks: list[np.ndarray]
    text: list[str]
    sources: list[tuple[int, int]]


def group_by_image(rows: datasets.Dataset, objects_per_image: int | None) -> list[list[int]]:
    """Row numbers grouped by `image_id`, at most `objects_per_image` (`None`: all) in a group, in the order of the rows."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for row, image_id in enumerate(rows["image_id"]):
        by_image[image_id].append(row)
    size = objects_per_image or len(rows)
    return [group[i : i + size] for group in by_image.values() for i in range(0, len(group), size)]


def image_as_annotated(row: dict) -> Image.Image:
    """A row's image on the pixel grid that its annotations use: the file's own, whatever an orientation tag says."""
    image = open_image(row["image"])
    image.getexif().pop(ExifTags.Base.Orientation, None)
    height, width = row["mask"]["size"]
    if image.size != (width, height):
        raise ValueError(
            f"the image {row['image']['path']} is {image.width}×{image.height}, its mask {width}×{height} pixels."
        )
    return Image.fromarray(np.asarray(to_rgb_image(image)))  # a fresh image carries no tag at all


def draw_example(
    rows: list[dict],
    numbers: list[int],
    sentences_per_object: int,
    augmentation: AugmentationSettings,
    rng: np.random.Generator,
) -> ImageExample:
    """One image's objects with sentences and variations drawn from `rng`.

    Args:
        rows: Rows of one image; the image of the first is opened.
        numbers: What `ImageExample.sources` calls each row.
        sentences_per_object: Sentences drawn for each row, without repetition.
        augmentation: How image, masks and sentences are varied.
        rng: Source of all randomness.
    """
    drawn = [rng.permutation(len(row["sentences"]))[:sentences_per_object].tolist() for row in rows]
    image, masks, sentences = augment(
        image_as_annotated(rows[0]),
        [decode_mask(row["mask"]) for row in rows],
        [[row["sentences"][i] for i in chosen] for row, chosen in zip(rows, drawn, strict=True)],
        augmentation,
        rng,
    )
    return ImageExample(
        image=image,
        masks=[mask for mask, group in zip(masks, sentences, strict=True) for _ in group],
        text=[sentence for group in sentences for sentence in group],
        sources=[(number, i) for number, chosen in zip(numbers, drawn, strict=True) for i in chosen],
    )


class TrainingExamples(Dataset):
    """Images of a split with freshly drawn sentences and variations.

    What is drawn depends on (seed, epoch, image) alone: not on the order of access, the worker or the process.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        objects_per_image: int,
        sentences_per_object: int,
        augmentation: AugmentationSettings,
        seed: int,
    ):
        """
        Args:
            rows: The split.
            objects_per_image: Objects of an image in one example at most.
            sentences_per_object: Sentences drawn for each in an epoch.
            augmentation: How images, masks and sentences are varied.
            seed: Of all that is drawn.
        """
        self.rows = rows
        self.groups = group_by_image(rows, objects_per_image)
        self.sentences_per_object = sentences_per_object
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose sentences and variations are drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageExample:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        numbers = self.groups[index]
        rows = [self.rows[row] for row in numbers]
        return draw_example(rows, numbers, self.sentences_per_object, self.augmentation, rng)


class EvaluationExamples(Dataset):
    """Images of a split, each with every sentence of every object; nothing drawn, nothing varied."""

    def __init__(self, rows: datasets.Dataset, sentences: list[list[str]] | None = None):
        """
        Args:
            rows: The split.
            sentences: Sentences to ask instead of each row's own (as many), such as shuffled ones.
        """
        self.rows = rows
        self.groups = group_by_image(rows, None)
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageExample:
        numbers = self.groups[index]
        rows = [self.rows[row] for row in numbers]
        asked = [
            row["sentences"] if self.sentences is None else self.sentences[n]
            for n, row in zip(numbers, rows, strict=True)
        ]
        masks = [decode_mask(row["mask"]) for row in rows]
        return ImageExample(
            image=image_as_annotated(rows[0]),
            masks=[mask for mask, group in zip(masks, asked, strict=True) for _ in group],
            text=[sentence for group in asked for sentence in group],
            sources=[(n, i) for n, group in zip(numbers, asked, strict=True) for i in range(len(group))],
        )


def shuffled_sentences(rows: datasets.Dataset, seed: int = 0) -> list[list[str]]:
    """Every sentence handed to another object, of another image where there is one: the text-blind control.

    Sentences are moved among all places by one rotation of a random order of the images, so each is asked exactly once.
    """
    order = np.random.default_rng(seed).permutation(len(groups := group_by_image(rows, None)))
    sentences = rows["sentences"]
    places = [(row, i) for g in order for row in groups[g] for i in range(len(sentences[row]))]
    largest = max(sum(len(sentences[row]) for row in group) for group in groups)
    shift = min(largest, len(places) - 1)  # past every sentence of one's own image
    shuffled = [list(group) for group in sentences]
    for k, (row, i) in enumerate(places):
        source_row, source_i = places[(k + shift) % len(places)]
        shuffled[row][i] = sentences[source_row][source_i]
    return shuffled


class Collator:
    """Examples to model inputs, through the processor, once for each distinct image."""

    def __init__(self, processor: SeraProcessor, with_labels: bool):
        self.processor = processor
        self.with_labels = with_labels

    def __call__(self, examples: list[ImageExample]) -> tuple[BatchFeature, list[ImageExample]]:
        """Model inputs (with `labels` in training) and the examples they come from, without their images."""
        inputs = self.processor(
            images=[example.image for example in examples],
            text=[example.text for example in examples],
            masks=[example.masks for example in examples] if self.with_labels else None,
            return_tensors="pt",
        )
        # a worker that prepares batches would send the images through a pipe to a process that has no use for them
        return inputs, [replace(example, image=None) for example in examples]


__all__ = [
    "Collator",
    "EvaluationExamples",
    "ImageExample",
    "TrainingExamples",
    "draw_example",
    "group_by_image",
    "shuffled_sentences",
]
