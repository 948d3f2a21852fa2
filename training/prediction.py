"""The command `sera-segment`: it writes the masks for phrases about one image to files. (Ours.)

`sera-segment photo.jpg "left zebra" "zebra drinking" --out DIR` writes one PNG mask per phrase, an overlay of all masks, and
`prediction.json` with scores and COCO run lengths. The model is sera-photos unless `--model` names another.

Torch and the libraries on top of it take seconds to import. The functions import them, so `--help` and wrong arguments are answered
at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from PIL import Image

from training.scoring.overlay import overlay
from training.support.commands import in_one_line
from training.support.default_model import default_model, install
from training.support.files import write_binary, write_text
from training.support.model_location import locate_model

if TYPE_CHECKING:
    from processing_sera import ReferringImageSegmentationPipeline

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in one file, or in several
MODEL_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
EXPERTS_FILE = "experts.png"
EXPRESSIONS_AT_ONCE = 32  # masks of this many are in memory together


class OneLineParser(argparse.ArgumentParser):
    """Reports wrong arguments in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Install(argparse.Action):
    """Installs the default model and exits, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            folder = install(Path(values[0]), values[1])
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: error: {in_one_line(error)}\n")
        print(folder)
        parser.exit(0)


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exit codes: 0 for success, 2 for input that cannot be used, 1 for any other failure."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("pycocotools") is None:
        parser.exit(
            1,
            f"{parser.prog}: error: pycocotools is not installed; install it with: pip install '.[demo]'\n",
        )
    output = Path(options.out)
    _refuse_to_overwrite(parser, options.photo, output)

    from processing_sera.image_processing_sera import to_rgb_image

    try:
        image = to_rgb_image(options.photo)
        model = str(default_model()) if options.model is None else options.model
        pipe = load_pipeline(model, device=options.device, dtype=options.dtype)
        if options.experts and not pipe.model.config.fusion_experts:
            raise ValueError(f"{model} has no fusion experts, which --experts would draw.")
        records = write_prediction(image, predict(pipe, image, options.expressions, options.threshold), output)
        if options.experts:
            write_experts(pipe, image, options.expressions, options.threshold, output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {in_one_line(error)}\n")
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of an expression
    for record in records:
        absence = f", no target {record['no_target']:.3f}" if "no_target" in record else ""
        nothing = "" if _area(record) else ", nothing there"
        print(f"{output / record['mask']}: score {record['score']:.3f}{absence}{nothing}, {record['expression']}")
    print(output / "overlay.png")
    if options.experts:
        print(output / EXPERTS_FILE)
    print(output / "prediction.json")


def load_pipeline(model: str, device: str | None = None, dtype: str = "auto") -> ReferringImageSegmentationPipeline:
    """The pipeline for a saved SERA. It uses the installed code and runs no code from the folder.

    Args:
        model: A run's folder, the model's own, or an id on the Hub.
        device: For example "cpu" or "cuda:1". `None`: the first accelerator, or else the CPU.
        dtype: Name of a floating-point type of torch. "auto": the type of the weights.

    Raises:
        ValueError: The device cannot be used, or the weights are damaged, incomplete or of another model.
        OSError: The model, or one of its files, was not found.
    """
    import torch

    from modeling_sera import SeraConfig, SeraForReferringSegmentation
    from processing_sera import ReferringImageSegmentationPipeline, SeraProcessor

    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {in_one_line(error)}") from error
    model = locate_model(model).source
    _check_files(model)
    try:
        kind = SeraConfig.get_config_dict(model)[0].get("model_type")
    except OSError as error:
        raise OSError(
            f"{model} is no folder here and could not be loaded from the Hub: {in_one_line(error)}"
        ) from error
    if kind != SeraConfig.model_type:
        raise ValueError(f"{model} holds a model of the type {kind!r}, not {SeraConfig.model_type!r}.")
    try:
        with _quiet_libraries():
            processor = SeraProcessor.from_pretrained(model)
            loaded, info = SeraForReferringSegmentation.from_pretrained(
                model, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # damaged files raise many kinds of errors in the libraries
        raise ValueError(f"{model} cannot be loaded: {in_one_line(error)}") from error
    size = loaded.config.text_config.vocab_size
    if len(processor.tokenizer) > size:
        raise ValueError(
            f"{model} cannot be loaded: its tokenizer.json holds {len(processor.tokenizer)} tokens, its text tower {size}."
        )
    unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        raise ValueError(
            f"The weights of {model} do not fit its config.json: {unfit[0]} is missing or of another size."
        )
    return ReferringImageSegmentationPipeline(model=loaded.eval(), processor=processor, device=device)


def predict(
    pipe: ReferringImageSegmentationPipeline, image: Image.Image, expressions: list[str], threshold: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the pipeline's results for the expressions, in their order."""
    groups = [expressions[i : i + EXPRESSIONS_AT_ONCE] for i in range(0, len(expressions), EXPRESSIONS_AT_ONCE)]
    for results in pipe(({"image": image, "text": group} for group in groups), threshold=threshold):
        yield from results


def write_prediction(image: Image.Image, results: Iterable[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Write `mask-1.png` … (0 and 255), `overlay.png` and, last, `prediction.json` into a folder.

    Args:
        image: The image.
        results: The pipeline's results for its expressions. Only one of them is held in memory.
        output: The folder. It is made if it is absent.

    Returns:
        The content of `prediction.json`, per expression: "expression", "score" in [0, 1], "no_target" in [0, 1] if the model
        predicts it, "mask" (the file's name) and "rle", COCO's compressed run lengths {"size": [height, width], "counts"}.
    """
    from pycocotools import mask as coco_mask

    records: list[dict[str, Any]] = []

    def masks() -> Iterator[np.ndarray]:
        for i, result in enumerate(results, start=1):
            name = f"mask-{i}.png"
            write_binary(output / name, lambda partial, image=result["mask"]: image.save(partial, format="png"))
            mask = np.asarray(result["mask"]) > 0
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            numbers = {key: result[key] for key in ("score", "no_target") if key in result}
            written = {"mask": name, "rle": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}}
            records.append({"expression": result["label"]} | numbers | written)
            yield mask

    combined = overlay(image, masks())
    write_binary(output / "overlay.png", lambda partial: combined.save(partial, format="png"))
    write_text(output / "prediction.json", json.dumps(records, indent=1, ensure_ascii=False))
    return records


def _area(record: dict[str, Any]) -> int:
    """Pixels in the mask of a record."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area({**record["rle"], "counts": record["rle"]["counts"].encode("ascii")}))


def write_experts(
    pipe: ReferringImageSegmentationPipeline,
    image: Image.Image,
    expressions: list[str],
    threshold: float | None,
    output: Path,
) -> None:
    """Write `experts.png` into a folder. It shows how each fusion expert changes the answer for each expression."""
    from training.scoring.expert_maps import draw_expert_maps, expert_maps

    sheet = draw_expert_maps(image, list(expert_maps(pipe.model, pipe.processor, image, expressions, threshold)))
    write_binary(output / EXPERTS_FILE, lambda partial: sheet.save(partial, format="png"))


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="sera-segment",
        description="Find what phrases describe in one image. Writes a mask per phrase (PNG), an overlay of all masks (PNG), and "
        "scores with COCO run lengths (JSON).",
        epilog='example: sera-segment photo.jpg "left zebra" "zebra drinking" --out prediction',
    )
    parser.add_argument("photo", help="file or URL of the image")
    parser.add_argument(
        "expressions",
        nargs="+",
        type=expression_argument,
        metavar="expression",
        help="a phrase that describes what to segment",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a run's folder, the model's own, or an id on the Hub (default: sera-photos, from the clone or as installed)",
    )
    parser.add_argument(
        "--install",
        nargs=2,
        action=_Install,
        metavar=("ARCHIVE", "SHA256"),
        help="put the archive of sera-photos from a release into the cache, and exit",
    )
    parser.add_argument(
        "--out", default="prediction", metavar="DIR", help="folder for the files (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=probability_argument,
        metavar="P",
        help="probability, between 0 and 1, above which a pixel is in the mask (default: the model's own mask selection)",
    )
    parser.add_argument(
        "--experts",
        action="store_true",
        help="also draw how the probabilities change without each fusion expert (five more passes per phrase)",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="for example cpu, cuda or cuda:1 (default: an accelerator if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the computation (default: %(default)s, the precision of the weights)",
    )
    return parser


def expression_argument(text: str) -> str:
    """An expression of a command line; `ArgumentTypeError` where it says nothing."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates
        raise argparse.ArgumentTypeError(f"{text!a} is not valid UTF-8") from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is an empty expression")
    return text


def count_argument(text: str) -> int:
    """A whole number of a command line, from 1 on; `ArgumentTypeError` for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def probability_argument(text: str) -> float:
    """A probability of a command line, between 0 and 1; `ArgumentTypeError` for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the libraries' progress bars and reports on weights. The command reports faults itself, in one sentence."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_to_overwrite(parser: OneLineParser, photo: str, output: Path) -> None:
    if output.exists() and not output.is_dir():
        parser.error(f"--out {output} is a file; name a folder")
    path = Path(photo)
    if path.parent.resolve() == output.resolve() and (
        path.name in ("overlay.png", EXPERTS_FILE) or path.match("mask-*.png")
    ):
        parser.error(f"{photo} would be overwritten; name another folder with --out")


def _check_files(model: str) -> None:
    """Check that a model's folder holds every file that is needed. transformers does not name all of those that are missing."""
    folder = Path(model)
    if not folder.is_dir():  # a model on the Hub
        return
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    if missing:
        raise FileNotFoundError(
            f"The folder {model} has no {missing[0]}; name a folder with a saved model and its processor."
        )
    for name in MODEL_FILES:
        try:
            whole = isinstance(json.loads((folder / name).read_bytes()), dict)
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"{folder / name} is damaged: it does not hold a JSON object.")
