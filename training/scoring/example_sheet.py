"""A sheet of prepared rows, to check by eye that images, masks and sentences belong together (ours)."""

from collections.abc import Mapping
from pathlib import Path

import datasets
from PIL import Image

from training.examples.batches import group_by_image, image_as_annotated
from training.scoring.captioned_sheet import LINES, Line, draw_captioned
from training.scoring.overlay import overlay
from training.sources.masks import decode_mask

EXAMPLES = 12  # images on the sheet
SIDE = 480  # pixels of an image on the sheet at most


def draw_rows(splits: Mapping[str, datasets.Dataset], upright: bool | None, path: Path) -> None:
    """Draw images with the masks and the sentences of their rows. They are at even distances in the data; none is chosen by hand.

    Args:
        splits: Rows of REFER_FEATURES.
        upright: Which pixels masks are drawn on, see `is_upright`.
        path: Of the PNG file.
    """
    images = [(split, group) for split, rows in splits.items() for group in group_by_image(rows, None)]
    number = min(EXAMPLES, len(images))
    chosen = [images[(2 * i + 1) * len(images) // (2 * number)] for i in range(number)]
    examples = []
    for split, group in chosen:
        rows = [splits[split][row] for row in group[: LINES + 1]]
        image = image_as_annotated(rows[0] | {"upright": upright})
        drawn = overlay(image, [decode_mask(row["mask"]) for row in rows[:LINES]])
        drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        lines = [Line(["; ".join(row["sentences"]), "(nothing)" if row["no_target"] else ""]) for row in rows]
        lines += [Line([""])] * (len(group) - len(rows))
        name = Path(rows[0]["image"]["path"]).name
        examples.append((drawn, f"{name} ({split})", lines))
    draw_captioned(examples, path)


__all__ = ["draw_rows"]
