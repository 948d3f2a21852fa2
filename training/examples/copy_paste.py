"""Copy-paste augmentation: images of cut-out training objects, with sentences that are true by construction (ours).

A small set of images says little about "left" or "second from right", since only the object that is meant is annotated in each.
Here the places of all objects are known, so many sentences about them can be written. Objects also keep their own sentences, but
not those that name a place.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from processing_sera.flip_averaging_sera import swap_left_right
from training.examples.batches import ImageExample, image_as_annotated
from training.sources.masks import decode_mask

SIZES = ((448, 336), (448, 298), (400, 400), (336, 448))  # width, height in pixels
SIZE_SHARES = (0.5, 0.2, 0.15, 0.15)
COUNTS, COUNT_SHARES = (2, 3, 4), (0.4, 0.4, 0.2)  # objects in an image
# share of further objects that are of the first one's category: what tells them apart is then the place
SAME_CATEGORY = 0.75
STACKED = 0.2  # share of images whose objects stand above each other
MIN_COVERED = 0.01  # share of its image that an object must cover to be cut out
MIN_SHOWN = 0.55  # share of an object that others may not hide
MIN_AREA = 0.006  # share of the image that an object must cover
APART = 0.08  # share of the width; centres that are nearer are not called left and right of each other
LARGER = 1.6  # ratio of areas from which objects are called big and small
ATTEMPTS = 100  # layouts that are drawn before a set of objects is given up as unfit

# Sentences with these words may be false of an object that stands elsewhere, in other company.
_PLACE_WORD = re.compile(
    r"\b(left\w*|right\w*|middle|mid|cent(er|re)|top|bottom|upper|lower|front|back|behind|close(st|r)?|near(est|er)?|far"
    r"|farthest|further|furthest|next|beside|between|side|corner|edge|first|second|third|last|\d(st|nd|rd)|above|below|under|over"
    r"|on|big(ger|gest)?|small(er|est)?|large(r|st)?|tall(er|est)?|other|another|both|most|pic|picture|photo|image|screen|facing"
    r"|looking)\b",
    re.IGNORECASE,
)
# What sentences call a person; the category of people is only "person".
_PEOPLE = (
    "man",
    "guy",
    "woman",
    "girl",
    "boy",
    "kid",
    "lady",
    "child",
    "dude",
    "player",
    "baby",
    "batter",
    "catcher",
    "umpire",
)


@dataclass
class CutOut:
    """An object that was cut out of its image.

    Attributes:
        image: (W, H), its bounding box.
        alpha: (W, H), 255 on the object and 0 beside it.
        category: Its category, for example "dog".
        nouns: What it may be called. The last one is true of every object of its category.
        sentences: Its own sentences that name no place.
    """

    image: Image.Image
    alpha: Image.Image
    category: str
    nouns: list[str]
    sentences: list[str]


class CopyPaste:
    """Draws copy-paste images of the objects of a split."""

    def __init__(self, rows: datasets.Dataset):
        """
        Args:
            rows: The split. Its images are opened when they are needed.

        Raises:
            ValueError: Where fewer than two rows have a category and one object that is large enough to be cut out.
        """
        self.rows = rows
        can_be_named = [bool(c) and len(ids) == 1 for c, ids in zip(rows["category"], rows["ann_ids"], strict=True)]
        self.usable = [
            i for i, mask in enumerate(rows["mask"]) if can_be_named[i] and decode_mask(mask).mean() >= MIN_COVERED
        ]
        if len(self.usable) < 2:
            raise ValueError(
                "data.copy_paste: fewer than two objects of the training split have a category and are large enough to be cut out."
            )
        self.by_category: dict[str, list[int]] = defaultdict(list)
        categories = rows["category"]
        for i in self.usable:
            self.by_category[categories[i]].append(i)

    def draw(self, rng: np.random.Generator) -> ImageExample:
        """An image with its objects and all sentences about each; `sources` are (-1, number of the object)."""
        while True:
            cut_outs = [self._cut_out(i) for i in self._choose(rng)]
            background = image_as_annotated(self.rows[int(rng.integers(len(self.rows)))])
            for _ in range(ATTEMPTS):
                if (laid_out := _lay_out(cut_outs, background, rng)) is None:
                    continue
                image, masks = laid_out
                described = describe(cut_outs, masks, rng)
                pairs = [(k, text) for k, sentences in enumerate(described) for text in sentences]
                if pairs:
                    return ImageExample(
                        image=image,
                        masks=[masks[k] for k, _ in pairs],
                        text=[text for _, text in pairs],
                        sources=[(-1, k) for k, _ in pairs],
                    )

    def _choose(self, rng: np.random.Generator) -> list[int]:
        """Different rows, many of one category."""
        chosen = [self.usable[rng.integers(len(self.usable))]]
        alike = self.by_category[self.rows[chosen[0]]["category"]]
        for _ in range(min(int(rng.choice(COUNTS, p=COUNT_SHARES)), len(self.usable)) - 1):
            pool = [i for i in alike if i not in chosen] if rng.random() < SAME_CATEGORY else []
            pool = pool or [i for i in self.usable if i not in chosen]
            chosen.append(pool[rng.integers(len(pool))])
        return chosen

    def _cut_out(self, number: int) -> CutOut:
        row = self.rows[number]
        mask = decode_mask(row["mask"])
        down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
        return CutOut(
            image=image_as_annotated(row).crop(box),
            alpha=Image.fromarray(mask.astype(np.uint8) * 255).crop(box),
            category=row["category"],
            nouns=nouns(row["category"], row["sentences"]),
            sentences=[text for text in row["sentences"] if len(text.split()) > 1 and not names_a_place(text)],
        )


def names_a_place(sentence: str) -> bool:
    """Whether a sentence may become false where its object stands elsewhere, among other objects."""
    return bool(_PLACE_WORD.search(sentence)) or swap_left_right(sentence) != sentence  # which knows misspellings


def nouns(category: str, sentences: Sequence[str]) -> list[str]:
    """What an object may be called, by its category and, for a person, by its own sentences.

    The last noun is true of every object of the category.
    """
    words = {word for text in sentences for word in text.lower().split()}
    if category == "person":
        return [noun for noun in _PEOPLE if noun in words] + ["person"]
    return [category.split()[-1], category]


def describe(cut_outs: Sequence[CutOut], masks: Sequence[np.ndarray], rng: np.random.Generator) -> list[list[str]]:
    """Sentences that are true of each object of an image and of no other of its category.

    Args:
        cut_outs: The objects.
        masks: What of each is seen, (H, W) boolean.
        rng: Chooses among the wordings.
    """
    height, width = masks[0].shape
    centres = np.array([[np.nonzero(mask)[1].mean() / width, np.nonzero(mask)[0].mean() / height] for mask in masks])
    areas = np.array([mask.sum() for mask in masks])
    described = []
    for i, cut_out in enumerate(cut_outs):

        def noun(names: list[str] = cut_out.nouns) -> str:
            return names[rng.integers(len(names))]

        alike = np.array([k != i and other.category == cut_out.category for k, other in enumerate(cut_outs)])
        others = np.arange(len(cut_outs)) != i
        texts = []
        for axis, sign, words in (
            (0, -1, ("left",)),
            (0, 1, ("right",)),
            (1, -1, ("top", "upper")),
            (1, 1, ("bottom", "lower")),
        ):
            lead = sign * (centres[i, axis] - centres[:, axis])  # how much further out than each of the others
            margin = APART * (1 if axis == 0 else 2)
            if alike.any() and (lead[alike] > margin).all():
                of_all = (lead[others] > margin).all()
                texts += _some(_outermost(words[rng.integers(len(words))], noun, axis == 0, of_all), rng)
        across = centres[i, 0] - centres[alike, 0]
        if (np.abs(across) > APART).all() and len(across) >= 2:
            if len(across) == 2 and across.min() < 0 < across.max():
                texts += _some(_middle(noun), rng)
            for side, before in (("left", int((across > 0).sum())), ("right", int((across < 0).sum()))):
                if before in (1, 2):
                    texts.append(f"{('second', 'third')[before - 1]} {cut_out.nouns[-1]} from {side}")
        if not alike.any():
            texts += [noun(), f"the {noun()}"]
        elif areas[i] > LARGER * areas[alike].max():
            texts.append(f"{('big', 'biggest', 'larger')[rng.integers(3)]} {noun()}")
        elif LARGER * areas[i] < areas[alike].min():
            texts.append(f"{('small', 'smallest', 'smaller')[rng.integers(3)]} {noun()}")
        described.append(texts + 2 * cut_out.sentences)  # own sentences are people's: drawn twice as often
    return described


def _outermost(word: str, noun: Callable[[], str], is_side: bool, of_all: bool) -> list[str]:
    wordings = [
        f"{word} {noun()}",
        f"{noun()} on {word}",
        f"{noun()} on the {word}",
        f"{noun()} {word}",
        f"the {word} {noun()}",
    ]
    if is_side:
        wordings += [
            f"{word}most {noun()}",
            f"far {word} {noun()}",
            f"{noun()} on {word} side",
            f"{noun()} to the {word}",
        ]
    if of_all:
        wordings += [word, f"{word} one"] + ([f"far {word}"] if is_side else [])
    return wordings


def _middle(noun: Callable[[], str]) -> list[str]:
    wordings = [f"middle {noun()}", f"{noun()} in middle", f"{noun()} in the middle", f"center {noun()}"]
    return [*wordings, f"{noun()} in center", "middle one", "middle"]


def _some(wordings: list[str], rng: np.random.Generator) -> list[str]:
    return [wordings[k] for k in rng.permutation(len(wordings))[:3]]


def _lay_out(
    cut_outs: Sequence[CutOut], background: Image.Image, rng: np.random.Generator
) -> tuple[Image.Image, list[np.ndarray]] | None:
    """An image of the objects and what is seen of each, (H, W) boolean; `None` where one is hidden or too small."""
    width, height = SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
    # blurred, so that nothing else in it can be meant
    canvas = ImageOps.fit(background, (width, height)).filter(ImageFilter.GaussianBlur(float(rng.uniform(6, 20))))
    stacked, scale = rng.random() < STACKED, rng.uniform(0.35, 0.8)
    slots = (rng.permutation(len(cut_outs)) + 0.5) / len(cut_outs)
    placed = []
    for cut_out, slot in zip(cut_outs, slots, strict=True):
        image, alpha = cut_out.image, cut_out.alpha
        if rng.random() < 0.5:  # the sentences kept say nothing of left and right
            image, alpha = ImageOps.mirror(image), ImageOps.mirror(alpha)
        tall = height * scale * rng.uniform(0.7, 1.3) / (1.6 if stacked else 1)
        tall = min(tall, (0.6 if stacked else 1.4 / len(cut_outs)) * width * image.height / image.width)
        size = (max(round(tall * image.width / image.height), 8), max(round(tall), 8))
        x = rng.uniform(0.3, 0.7) if stacked else slot + rng.uniform(-0.08, 0.08)
        y = slot if stacked else rng.uniform(0.45, 0.7)
        corner = (round(x * width - size[0] / 2), round(y * height - size[1] / 2))
        placed.append(
            (image.resize(size, Image.Resampling.BICUBIC), alpha.resize(size, Image.Resampling.BILINEAR), corner)
        )
    owner = np.full((height, width), -1)
    for k in sorted(
        range(len(placed)), key=lambda k: placed[k][1].width * placed[k][1].height
    ):  # the largest is in front
        image, alpha, corner = placed[k]
        canvas.paste(image, corner, alpha.filter(ImageFilter.GaussianBlur(0.7)))
        covered = Image.new("L", (width, height))
        covered.paste(alpha, corner)
        owner[np.asarray(covered) > 127] = k
    masks = [owner == k for k in range(len(placed))]
    whole = [int((np.asarray(alpha) > 127).sum()) for _, alpha, _ in placed]
    for mask, pixels in zip(masks, whole, strict=True):
        if mask.sum() < max(MIN_SHOWN * pixels, MIN_AREA * mask.size):
            return None
    return canvas, masks


__all__ = ["CopyPaste", "CutOut", "describe", "names_a_place", "nouns"]
