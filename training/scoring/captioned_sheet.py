"""A sheet of images, each with lines of text below it (ours)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.scoring.figures import DPI, new_figure
from training.scoring.overlay import COLORS, fit_lines
from training.support.files import write_binary

LINES = 6  # below each image
WIDTH = 16.0  # inches of the sheet
LETTERS = 192  # of all parts of a line that stand beside each other


@dataclass(frozen=True)
class Line:
    """A line below an image.

    Attributes:
        parts: Texts, each cut where it is long.
        has_mask: Whether it is about a mask over the image; the lines that are have the masks' colours, in their order.
    """

    parts: Sequence[str]
    has_mask: bool = True


def draw_captioned(examples: Sequence[tuple[Image.Image | None, str, Sequence[Line]]], path: Path) -> None:
    """One PNG of images with a title and lines below each.

    Args:
        examples: Images with the masks laid over them by `overlay`, `None` for one that could not be read; the title; the lines.
            Six of each are written, the others counted.
        path: Of the PNG file.
    """
    columns = 4 if len(examples) <= 12 else 6
    rows, letters = -(-len(examples) // columns), LETTERS // columns
    slots = 1 + max((min(len(lines), LINES + 1) for _, _, lines in examples), default=0)  # with the title
    image_height, text_height = 0.75 * WIDTH / columns, 0.25 * slots  # inches
    figure = new_figure(WIDTH, (image_height + text_height + 0.2) * rows)
    grid = figure.add_gridspec(rows, columns, left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    for i, (image, title, lines) in enumerate(examples):
        upper, lower = grid[i // columns, i % columns].subgridspec(
            2, 1, height_ratios=[image_height, text_height], hspace=0.02
        )
        axis, text = figure.add_subplot(upper), figure.add_subplot(lower)
        for part in (axis, text):
            part.set_axis_off()
        if image is not None:
            axis.imshow(image)
        axis.set_anchor("S")
        written = [(fit_lines(title, letters, len, max_lines=1), "black")]
        masks = 0
        for line in lines[:LINES]:
            parts = [fit_lines(part, letters, len, max_lines=1) for part in line.parts]
            written.append(("  ".join(parts), COLORS[masks % len(COLORS)] if line.has_mask else "black"))
            masks += line.has_mask
        if len(lines) > LINES:
            written.append((f"and {len(lines) - LINES} more", "black"))
        for place, (label, color) in enumerate(written):
            text.text(0, 1 - place / slots, label, color=color, va="top", fontsize=9, parse_math=False)
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI))


__all__ = ["LINES", "Line", "draw_captioned"]
