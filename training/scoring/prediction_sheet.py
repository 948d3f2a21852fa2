"""A sheet to look at before a long run: images with the masks of their expressions (ours)."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from training.scoring.captioned_sheet import Line, draw_captioned
from training.scoring.predictions import Prediction


def draw_predictions(examples: Sequence[tuple[Image.Image | None, Sequence[Prediction]]], path: Path) -> None:
    """One PNG of images and, below each, its expressions in the colours of their masks, with score or error.

    Args:
        examples: Images with the masks laid over them by `overlay`, `None` for one that could not be read; and the predictions
            about each, in the order of the masks. Six of each are written, the others counted.
        path: Of the PNG file.
    """
    draw_captioned(
        [(image, predictions[0].image, list(map(_line, predictions))) for image, predictions in examples], path
    )


def _line(prediction: Prediction) -> Line:
    said = prediction.error or (f"{prediction.score:.2f}" if prediction.area else "nothing there")
    return Line((prediction.expression or "", said), prediction.error is None)


__all__ = ["draw_predictions"]
