"""A sheet to look at before a long run: images with the masks of their expressions (ours)."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from training.scoring.figures import DPI, new_figure
from training.scoring.overlay import COLORS, fit_lines
from training.scoring.predictions import Prediction
from training.support.files import write_binary

COLUMNS, LINES, LETTERS = 4, 6, 44  # images beside each other; expressions below each, of so many letters


def draw_predictions(examples: Sequence[tuple[Image.Image | None, Sequence[Prediction]]], path: Path) -> None:
    """One PNG of images and, below each, its expressions in the colours of their masks, with score or error.

    Args:
        examples: Images with the masks laid over them by `overlay`, `None` for one that could not be read; and the predictions
            about each, in the order of the masks. Six of each are written, the others counted.
        path: Of the PNG file.
    """
    lines = -(-len(examples) // COLUMNS)
    figure = new_figure(4 * COLUMNS, 5.2 * lines)
    grid = figure.add_gridspec(lines, COLUMNS, left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    for i, (image, predictions) in enumerate(examples):
        upper, lower = grid[i // COLUMNS, i % COLUMNS].subgridspec(2, 1, height_ratios=[3, 2], hspace=0.02)
        axis, text = figure.add_subplot(upper), figure.add_subplot(lower)
        for part in (axis, text):
            part.set_axis_off()
        if image is not None:
            axis.imshow(image)
        axis.set_anchor("S")
        written = [(_label(predictions[0].image), "black")]
        masks = 0
        for prediction in predictions[:LINES]:
            said = prediction.error or (f"{prediction.score:.2f}" if prediction.area else "nothing there")
            color = COLORS[masks % len(COLORS)] if prediction.error is None else "black"
            masks += prediction.error is None
            written.append((f"{_label(prediction.expression or '')}  {_label(said)}", color))
        if len(predictions) > LINES:
            written.append((f"and {len(predictions) - LINES} more", "black"))
        for line, (label, color) in enumerate(written):
            text.text(0, 1 - line / (LINES + 2), label, color=color, va="top", fontsize=9, parse_math=False)
    write_binary(path, lambda partial: figure.savefig(partial, format="png", dpi=DPI))


def _label(text: str) -> str:
    return fit_lines(text, LETTERS, len, max_lines=1)


__all__ = ["draw_predictions"]
