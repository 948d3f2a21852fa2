"""From rows (one referred object each) to batches that the model takes: grouping by picture, drawing sentences, collating."""

from collections import defaultdict
from dataclasses import dataclass, replace

import datasets
import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset
from transformers import BatchFeature

from processing_sera import SeraProcessor
from processing_sera.image_processing_sera import to_rgb_image
from training.augmentation import augment
from training.configuration import AugmentationSettings
from training.data import decode_mask, open_image


@dataclass
class PictureExample:
    """One picture with what is asked about it.

    Attributes:
        image: PIL picture; `None` once a batch has been made of it.
        masks: One (H, W) mask per expression, in the picture's own pixels: boolean, or int8 with -1 where the loss is to leave a
            pixel out.
        text: The expressions.
        sources: (row, sentence) number of each expression in the split.
    """

    image: Image.Image | None
    masks: list[np.ndarray]
    text: list[str]
    sources: list[tuple[int, int]]


def group_by_picture(rows: datasets.Dataset, objects_per_picture: int | None) -> list[list[int]]:
    """Row numbers grouped by `image_id`, at most `objects_per_picture` (`None`: all) in a group, in the order of the rows."""
    by_picture: dict[int, list[int]] = defaultdict(list)
    for row, image_id in enumerate(rows["image_id"]):
        by_picture[image_id].append(row)
    size = objects_per_picture or len(rows)
    return [group[i : i + size] for group in by_picture.values() for i in range(0, len(group), size)]


def picture_as_annotated(row: dict) -> Image.Image:
    """A row's picture on the pixel grid that its annotations use: the file's own, whatever an orientation tag says."""
    image = open_image(row["image"])
    image.getexif().pop(ExifTags.Base.Orientation, None)
    height, width = row["mask"]["size"]
    if image.size != (width, height):
        raise ValueError(
            f"the picture {row['image']['path']} is {image.width}×{image.height}, its mask {width}×{height} pixels."
        )
    return Image.fromarray(np.asarray(to_rgb_image(image)))  # a fresh picture carries no tag at all


def draw_example(
    rows: list[dict],
    numbers: list[int],
    sentences_per_object: int,
    augmentation: AugmentationSettings,
    rng: np.random.Generator,
) -> PictureExample:
    """One picture's objects with sentences and variations drawn from `rng`.

    Args:
        rows: Rows of one picture; the picture of the first is opened.
        numbers: What `PictureExample.sources` calls each row.
        sentences_per_object: Sentences drawn for each row, without repetition.
        augmentation: How picture, masks and sentences are varied.
        rng: Source of all randomness.
    """
    drawn = [rng.permutation(len(row["sentences"]))[:sentences_per_object].tolist() for row in rows]
    image, masks, sentences = augment(
        picture_as_annotated(rows[0]),
        [decode_mask(row["mask"]) for row in rows],
        [[row["sentences"][i] for i in chosen] for row, chosen in zip(rows, drawn, strict=True)],
        augmentation,
        rng,
    )
    return PictureExample(
        image=image,
        masks=[mask for mask, group in zip(masks, sentences, strict=True) for _ in group],
        text=[sentence for group in sentences for sentence in group],
        sources=[(number, i) for number, chosen in zip(numbers, drawn, strict=True) for i in chosen],
    )


class TrainingExamples(Dataset):
    """Pictures of a split with freshly drawn sentences and variations.

    What is drawn depends on (seed, epoch, picture) alone: not on the order of access, the worker or the process.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        objects_per_picture: int,
        sentences_per_object: int,
        augmentation: AugmentationSettings,
        seed: int,
    ):
        """
        Args:
            rows: The split.
            objects_per_picture: Objects of a picture in one example at most.
            sentences_per_object: Sentences drawn for each in an epoch.
            augmentation: How pictures, masks and sentences are varied.
            seed: Of all that is drawn.
        """
        self.rows = rows
        self.groups = group_by_picture(rows, objects_per_picture)
        self.sentences_per_object = sentences_per_object
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose sentences and variations are drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PictureExample:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        numbers = self.groups[index]
        rows = [self.rows[row] for row in numbers]
        return draw_example(rows, numbers, self.sentences_per_object, self.augmentation, rng)


class EvaluationExamples(Dataset):
    """Pictures of a split, each with every sentence of every object; nothing drawn, nothing varied."""

    def __init__(self, rows: datasets.Dataset, sentences: list[list[str]] | None = None):
        """
        Args:
            rows: The split.
            sentences: Sentences to ask instead of each row's own (as many), such as shuffled ones.
        """
        self.rows = rows
        self.groups = group_by_picture(rows, None)
        self.sentences = sentences

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PictureExample:
        numbers = self.groups[index]
        rows = [self.rows[row] for row in numbers]
        asked = [
            row["sentences"] if self.sentences is None else self.sentences[n]
            for n, row in zip(numbers, rows, strict=True)
        ]
        masks = [decode_mask(row["mask"]) for row in rows]
        return PictureExample(
            image=picture_as_annotated(rows[0]),
            masks=[mask for mask, group in zip(masks, asked, strict=True) for _ in group],
            text=[sentence for group in asked for sentence in group],
            sources=[(n, i) for n, group in zip(numbers, asked, strict=True) for i in range(len(group))],
        )


def shuffled_sentences(rows: datasets.Dataset, seed: int = 0) -> list[list[str]]:
    """Every sentence handed to another object, of another picture where there is one: the text-blind control.

    Sentences are moved among all places by one rotation of a random order of the pictures, so each is asked exactly once.
    """
    order = np.random.default_rng(seed).permutation(len(groups := group_by_picture(rows, None)))
    sentences = rows["sentences"]
    places = [(row, i) for g in order for row in groups[g] for i in range(len(sentences[row]))]
    largest = max(sum(len(sentences[row]) for row in group) for group in groups)
    shift = min(largest, len(places) - 1)  # past every sentence of one's own picture
    shuffled = [list(group) for group in sentences]
    for k, (row, i) in enumerate(places):
        source_row, source_i = places[(k + shift) % len(places)]
        shuffled[row][i] = sentences[source_row][source_i]
    return shuffled


class Collator:
    """Examples to model inputs, through the processor, once for each distinct picture."""

    def __init__(self, processor: SeraProcessor, with_labels: bool):
        self.processor = processor
        self.with_labels = with_labels

    def __call__(self, examples: list[PictureExample]) -> tuple[BatchFeature, list[PictureExample]]:
        """Model inputs (with `labels` in training) and the examples they come from, without their pictures."""
        inputs = self.processor(
            images=[example.image for example in examples],
            text=[example.text for example in examples],
            masks=[example.masks for example in examples] if self.with_labels else None,
            return_tensors="pt",
        )
        # a worker that prepares batches would send the pictures through a pipe to a process that has no use for them
        return inputs, [replace(example, image=None) for example in examples]


__all__ = [
    "Collator",
    "EvaluationExamples",
    "PictureExample",
    "TrainingExamples",
    "draw_example",
    "group_by_picture",
    "shuffled_sentences",
]
