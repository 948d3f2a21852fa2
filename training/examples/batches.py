"""From rows (one referred object each) to batches that the model takes: grouping by image, drawing sentences, collating."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NoReturn
from weakref import WeakSet

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from transformers import BatchFeature

from processing_sera import SeraProcessor
from processing_sera.image_processing_sera import to_rgb_image
from training.configuration import AugmentationSettings
from training.examples.augmentation import augment
from training.examples.draws import SET_COLUMN, weighted_draws
from training.sources.images import check_size, is_same_image, is_upright, open_upright
from training.sources.masks import decode_mask


@dataclass
class ImageExample:
    """One image with its expressions.

    Attributes:
        image: PIL image. None after a batch was made of it.
        masks: One (H, W) mask per expression, in the image's own pixels: boolean, or int8 with -1 for pixels that the loss
            leaves out.
        text: The expressions.
        sources: (row, sentence) number of each expression in the split.
    """

    image: Image.Image | None
    masks: list[np.ndarray]
    text: list[str]
    sources: list[tuple[int, int]]


def group_by_image(rows: datasets.Dataset, objects_per_image: int | None) -> list[list[int]]:
    """Row numbers grouped by image, in the order of the rows.

    Rows of a weighted mixture are grouped within their set: each set is drawn by itself.

    Args:
        rows: Rows of REFER_FEATURES.
        objects_per_image: Most rows in a group. None: all rows of an image.

    Raises:
        ValueError: Where rows of one `image_id` hold different images.
    """
    keys = rows["image_id"][:]
    if SET_COLUMN in rows.column_names:
        keys = list(zip(rows[SET_COLUMN][:], keys, strict=True))
    by_image: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        by_image[key].append(row)
    if rows not in _CHECKED and "image" in rows.column_names:
        _refuse_other_images(rows, keys, by_image)
        _CHECKED.add(rows)
    size = objects_per_image or len(rows)
    return [group[i : i + size] for group in by_image.values() for i in range(0, len(group), size)]


# Rows whose images were compared; they are grouped again and again.
_CHECKED: WeakSet[datasets.Dataset] = WeakSet()


def _refuse_other_images(rows: datasets.Dataset, keys: list[Hashable], groups: dict[Hashable, list[int]]) -> None:
    """`ValueError` where rows of one key hold different images. Nothing is decoded; most rows are like the one before."""
    first: dict[Hashable, tuple[int, str]] = {}  # a row of the key, and the path or the hash of its image
    previous, row = None, -1
    for table in rows.select_columns("image").with_format("arrow").iter(batch_size=64):
        images = table["image"].combine_chunks()
        for path, embedded in zip(images.field("path").to_pylist(), images.field("bytes"), strict=True):
            row += 1
            if len(groups[keys[row]]) == 1:
                continue
            current = keys[row], embedded.as_buffer() if embedded.is_valid else path
            if current != previous:
                mark = hashlib.sha256(current[1]).hexdigest() if embedded.is_valid else path
                other, known = first.setdefault(keys[row], (row, mark))
                if known != mark and not is_same_image(rows[other]["image"], rows[row]["image"]):
                    refuse_one_id(rows[other], rows[row])
            previous = current


def refuse_one_id(*rows: dict) -> NoReturn:
    """`ValueError` about two rows that have one id and different images."""
    files = " and ".join(row["image"]["path"] or "an image without a file name" for row in rows)
    refs = " and ".join(str(row["ref_id"]) for row in rows)
    raise ValueError(
        f"the rows with ref_id {refs} have the image_id {rows[0]['image_id']} and hold different images, {files}: give every image "
        "an id of its own."
    )


def is_drawn_upright(row: dict) -> bool:
    """Whether a row's mask is drawn on its image as viewers show it, whatever its orientation tag says.

    The row's own `upright` tells, where the settings chose it, otherwise the name of the image's file, see [`is_upright`].
    """
    return is_upright(row["image"]["path"], row.get("upright"))


def image_as_annotated(row: dict) -> Image.Image:
    """A row's image on the pixel grid that its mask is drawn on: RGB, (W, H) the mask's, without an orientation tag.

    Raises:
        ValueError: Where the image cannot be read, or is of another size than its mask.
    """
    image, _ = open_as_annotated(row)
    return Image.fromarray(np.asarray(to_rgb_image(image)))  # a fresh image carries no tag at all


def open_as_annotated(row: dict) -> tuple[Image.Image, int]:
    """As [`image_as_annotated`], in the file's own mode, with the orientation tag that it had, 1 to 8."""
    upright = is_drawn_upright(row)
    image, tag = open_upright(row["image"], upright)
    name = row["image"]["path"] or "without a file name"
    check_size(name, (image.height, image.width), tuple(row["mask"]["size"]), tag, upright)
    return image, tag


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

    What is drawn depends on (seed, epoch, index) alone: not on the order of access, the worker or the process. Of a weighted
    mixture the images themselves are drawn, see [`WeightedDraws`].
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
        self.draws = weighted_draws(rows, self.groups, seed)
        self.sentences_per_object = sentences_per_object
        self.augmentation = augmentation
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose sentences and variations are drawn and, of a weighted mixture, whose images."""
        self.epoch = epoch
        self.drawn = np.arange(len(self.groups)) if self.draws is None else self.draws.epoch(epoch)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageExample:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        numbers = self.groups[self.drawn[index]]
        rows = [self.rows[row] for row in numbers]
        return draw_example(rows, numbers, self.sentences_per_object, self.augmentation, rng)


class EvaluationExamples(Dataset):
    """Images of a split, each with every sentence of every object; nothing drawn, nothing varied."""

    def __init__(self, rows: datasets.Dataset, sentences: list[list[str]] | None = None):
        """
        Args:
            rows: The split.
            sentences: Sentences to use instead of each row's own, for example shuffled ones; the same number for each row.
        """
        self.rows = rows
        self.groups = group_by_image(rows, None)
        masks = rows.select_columns("mask")
        self.sizes = [tuple(masks[group[0]]["mask"]["size"]) for group in self.groups]  # of the images, (H, W)
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
    """The text-blind control: every sentence is given to another object, of another image where there is one.

    The images are put in a random order, and all sentences move on by one number of places. So each sentence is used exactly once.
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
        # the images are not needed any more, and a worker would send them through a pipe
        return inputs, [replace(example, image=None) for example in examples]


__all__ = [
    "Collator",
    "EvaluationExamples",
    "ImageExample",
    "TrainingExamples",
    "draw_example",
    "group_by_image",
    "image_as_annotated",
    "is_drawn_upright",
    "open_as_annotated",
    "refuse_one_id",
    "shuffled_sentences",
]
