"""Sentences about things that are not in an image, where every object of an image is annotated (ours).

The sentences are other images' own, about objects of categories that the image has none of. So their words are as frequent as those
of true sentences.
"""

import logging
import os
from collections import defaultdict

import datasets
import numpy as np
from accelerate import PartialState

from training.configuration import DataSettings, MixedSet
from training.sources.masks import encode_mask
from training.sources.refer import REFER_FEATURES, refer_categories

logger = logging.getLogger(__name__)

SEED = 31_200  # the sentences are the same in every run


def check_absent(data: DataSettings | MixedSet) -> None:
    """`ValueError` where sentences about absent things are asked of data that do not tell what else is in an image."""
    if data.absent and data.source != "refer":
        raise ValueError(
            f"data.absent needs a source refer, whose annotations tell what is in an image; the source is {data.source!r}."
        )


def with_absent(rows: datasets.Dataset, number: int, root: str, dataset: str, split_by: str) -> datasets.Dataset:
    """The rows of a split, and after them one more for each image, without a target.

    Args:
        rows: A split of the REFER set that the other arguments name.
        number: Sentences of each new row; 0: the rows as they are.
        root, dataset, split_by: The set. The categories of an image are those of all of its annotations.

    Returns:
        The rows. An image that has objects of all categories gets none.
    """
    if not number:
        return rows
    present = refer_categories(root, dataset, split_by)
    by_category: dict[str, list[str]] = defaultdict(list)
    first: dict[int, int] = {}
    for place, (image_id, category, sentences) in enumerate(
        zip(rows["image_id"], rows["category"], rows["sentences"], strict=True)
    ):
        first.setdefault(image_id, place)
        by_category[category] += sentences
    added = []
    for image_id, place in first.items():
        # a sentence that another category has as well may be true here
        true = {text for category in present[image_id] for text in by_category.get(category, [])}
        pool = [
            text
            for category, texts in by_category.items()
            if category not in present[image_id]
            for text in texts
            if text not in true
        ]
        if not pool:
            continue
        rng = np.random.default_rng((SEED, image_id))
        row = rows[place]
        added.append(
            row
            | {
                "ref_id": -1 - image_id,
                "ann_ids": [],
                "no_target": True,
                "category": "",
                "sentences": [pool[k] for k in rng.integers(len(pool), size=number)],
                "sentence_ids": list(range(number)),
                "sentence_kinds": ["absent"] * number,
                "mask": encode_mask(np.zeros(row["mask"]["size"], bool)),
                "boxes": [],
            }
        )
    if PartialState().is_main_process:
        logger.info(
            f"{os.path.join(root, dataset)}: {number} sentences about absent things for each of {len(added)} images"
        )
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_list(added, features=REFER_FEATURES)])


__all__ = ["check_absent", "with_absent"]
