"""Masks for the expressions about one photograph, as files.

`python training/prediction.py MODEL photo.jpg "left zebra" "zebra drinking" --output DIR` writes one PNG mask per expression,
an overlay of all of them, and `prediction.json` with scores and COCO run lengths.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from processing_sera.image_processing_sera import to_rgb_image
from training.data import encode_mask, open_image
from training.figures import overlay
from training.files import write_binary, write_text

logger = logging.getLogger(__name__)


def predict(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    image: Image.Image,
    expressions: list[str],
    threshold: float | None = None,
) -> list[dict]:
    """All expressions about one picture in one forward pass.

    Returns:
        Per expression `{"mask": bool (H, W) array, "score": float in [0, 1]}`.
    """
    inputs = processor(images=[image], text=[expressions], return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    results = processor.post_process_referring_segmentation(outputs, inputs, threshold=threshold)
    return [{"mask": result["mask"].cpu().numpy(), "score": result["score"]} for result in results]


def write_prediction(image: Image.Image, expressions: list[str], results: list[dict], output: Path) -> None:
    """Write `mask-1.png` … (0 and 255), `overlay.png` and `prediction.json` into a folder."""
    for i, result in enumerate(results, start=1):
        mask = Image.fromarray(result["mask"].astype(np.uint8) * 255)
        write_binary(output / f"mask-{i}.png", lambda partial, mask=mask: mask.save(partial, format="png"))
    combined = overlay(image, [result["mask"] for result in results])
    write_binary(output / "overlay.png", lambda partial: combined.save(partial, format="png"))
    records = [
        {"expression": text, "score": result["score"], "mask": f"mask-{i}.png", "rle": encode_mask(result["mask"])}
        for i, (text, result) in enumerate(zip(expressions, results, strict=True), start=1)
    ]
    write_text(output / "prediction.json", json.dumps(records, indent=1))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Segment what expressions mean in one photograph.")
    parser.add_argument("model", type=str, help="folder or Hub id of a SERA")
    parser.add_argument("image", type=str, help="photograph")
    parser.add_argument("expressions", type=str, nargs="+", help="one or more expressions")
    parser.add_argument("--output", type=str, default="prediction", help="folder for the files")
    parser.add_argument(
        "--threshold", type=float | None, default=None, help="probability at the mask's edge; default: processor's"
    )
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = Path(options.output)
    try:
        image = to_rgb_image(open_image({"path": options.image, "bytes": None}))
        model = SeraForReferringSegmentation.from_pretrained(options.model).eval()
        processor = SeraProcessor.from_pretrained(options.model)
        results = predict(model, processor, image, options.expressions, options.threshold)
        write_prediction(image, options.expressions, results, output)
    except (ValueError, OSError) as error:
        parser.error(str(error))  # what was wrong with the input, without a traceback; exit code 2
    for i, (text, result) in enumerate(zip(options.expressions, results, strict=True), start=1):
        logger.info(
            f"{output / f'mask-{i}.png'}: {text!r}, score {result['score']:.3f}, {int(result['mask'].sum())} pixels"
        )
    logger.info(f"{output / 'overlay.png'}")


if __name__ == "__main__":
    main()
