"""What an inference endpoint runs: images and expressions in a request, masks in the answer.

This file lies beside the weights. The inference toolkit imports it as a module of its own. It calls `EndpointHandler(folder)`
once, and then the handler with each request. The text of an exception becomes the answer `{"error": message}` with status 400.
So every refusal here is a `ValueError` of one sentence that says what to send instead. No other message leaves the machine. (Ours.)
"""

import base64
import hashlib
import io
import logging
import math
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 20 * 2**20  # of the file, after base64
MAX_PIXELS = 25_000_000  # of the image; a mask and its probabilities are as large
MAX_EXPRESSIONS = 100  # more take longer than a connection stays open
MAX_CHARACTERS = 1000  # of one expression; the model reads at most 77 tokens of them
EXPRESSIONS_AT_ONCE = 16  # memory grows with them
MAX_KEPT_BYTES = 256 * 2**20  # of the last images' features, on the model's device
NUM_BYTES = 256  # a CLIP tokenizer's vocabulary holds all of them
# Pillow has more; some of them start other programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

FORM = '{"inputs": {"image": "<base64>", "text": ["left zebra"]}, "parameters": {"threshold": 0.5}}'
TEXT_NAMES = ("text", "expressions")


class EndpointHandler:
    """Answers requests about one image each. A further request about one of the last images computes only the expressions."""

    def __init__(self, path: str = ""):
        """
        Args:
            path: Folder of the model, which holds its code where the installed transformers does not.

        Raises:
            OSError, ValueError: Where the folder does not hold a whole model.
        """
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        # Where a file is missing, transformers creates an empty or another tokenizer, or returns the tokenizer as the processor.
        tokenizer = getattr(self.processor, "tokenizer", ())
        if len(tokenizer) < NUM_BYTES or tokenizer.pad_token_id is None:
            raise ValueError(
                "The model's processor is incomplete; is its code, its tokenizer.json or its tokenizer_config.json missing?"
            )
        model = AutoModel.from_pretrained(path, trust_remote_code=True)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        code = sys.modules[type(model).__module__]  # it lies beside the weights
        self.kept = code.SeraFeatureCache(MAX_KEPT_BYTES)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer one request.

        Args:
            data: `{"inputs": …, "parameters": …}`. `inputs` is `{"image": image, "text": expressions}` or the image alone,
                with `"text"` among the parameters. An image is the base64 of a file (`data:` URLs too), the file's bytes or a
                PIL image; expressions are a string or a list of strings, also under the name `"expressions"`. The other
                parameter is `"threshold"`, the probability within (0, 1) at the mask's edge; by default masks are selected as the
                processor says.

        Returns:
            Per expression, in order, `{"label": str, "score": float, "mask": str}`: the expression as given, a number in [0, 1],
            and the base64 of a PNG of the upright image's size, 255 on the object and 0 elsewhere. From a model that predicts
            presence also `"no_target"`, the probability that nothing in the image is meant. Where it is likely, the mask is empty.

        Raises:
            ValueError: Where the request cannot be answered, with what to change.
            RuntimeError: Where the model failed; the reason is in the log alone.
        """
        image, expressions, threshold = read_request(data)
        content = read_content(image)
        key = content_key(content) if isinstance(content, (bytes, bytearray)) else None
        encoded = None if key is None else self.kept.get(key)
        image_inputs = self._prepare(content) if encoded is None else None
        self._check_expressions(expressions)
        try:
            with torch.inference_mode():
                encoded = encoded or self._encode(image_inputs, key)
                return self._segment(*encoded, expressions, threshold)
        except Exception:
            logger.exception("a request failed")
            # The toolkit answers with the text of any exception. This one's text could name files of the machine.
            raise RuntimeError("The model could not answer this request; the endpoint's log says why.") from None

    def _prepare(self, content: Any) -> dict[str, torch.Tensor]:
        """The processor's outputs for an image as [`open_image`] takes it."""
        image = open_image(content)
        try:
            return self.processor(images=[image], return_tensors="pt")
        except ValueError:
            raise ValueError("The image's values are not colours; send an image of 8 bits per channel.") from None

    def _encode(self, image_inputs: dict[str, torch.Tensor], key: tuple | None) -> tuple[Any, torch.Tensor]:
        """The model's features of an image and its (1, 2) size, which are kept from now on.

        Args:
            image_inputs: Of [`_prepare`].
            key: Of the file; `None` where there is none. Images without a file are told apart by what the model gets of them.
        """
        pixel_values, size = image_inputs["pixel_values"], image_inputs["original_sizes"]
        if key is None:
            key = content_key(pixel_values.numpy().tobytes(), *size[0].tolist())
            if (encoded := self.kept.get(key)) is not None:
                return encoded
        features = self.model.get_image_features(pixel_values.to(self.model.device, self.model.dtype))
        self.kept.put(key, (features, size), features.nbytes)
        return features, size

    def _check_expressions(self, expressions: list[str]) -> None:
        """Raise `ValueError` where an expression is empty after cleaning, or has more tokens than the model reads."""
        for i, expression in enumerate(expressions):
            try:
                count = self.processor.count_tokens(expression)
            except ValueError:
                raise ValueError(f"text[{i}] is empty: it holds only spaces and invisible characters.") from None
            if count > self.processor.max_tokens:
                raise ValueError(f"text[{i}] has more tokens than the model reads; shorten it.")

    def _segment(
        self, features: Any, size: torch.Tensor, expressions: list[str], threshold: float | None
    ) -> list[dict[str, Any]]:
        text = self.processor(text=[expressions], return_tensors="pt").to(self.model.device)
        outputs = self.model(image_features=features, **text, max_expressions=EXPRESSIONS_AT_ONCE)
        about_it = {"original_sizes": size}
        answers = []
        for n, label in enumerate(expressions):  # masks have the image's own size and are large: one at a time
            alone = {name: outputs[name][n : n + 1] for name in ("logits", "presence_logits") if name in outputs}
            (result,) = self.processor.post_process_referring_segmentation(alone, about_it, threshold=threshold)
            answers.append({"label": label, **result, "mask": encode_mask(result["mask"])})
        return answers


def read_request(data: Any) -> tuple[Any, list[str], float | None]:
    """The parts of a request: the image as sent, the checked expressions, the checked threshold (`None` where not given).

    Raises:
        ValueError: See [`EndpointHandler.__call__`].
    """
    if not isinstance(data, dict) or data.get("inputs") is None:
        raise ValueError(f"The request has no inputs; send {FORM}.")
    inputs, parameters = data["inputs"], data.get("parameters")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters must be an object, got {_type_name(parameters)}; send {FORM}.")
    if not isinstance(inputs, dict):
        inputs = {"image": inputs}
    _check_names("inputs", inputs, ("image", *TEXT_NAMES))
    _check_names("parameters", parameters, ("threshold", *TEXT_NAMES))
    if inputs.get("image") is None:
        raise ValueError(f"inputs has no image; send {FORM}.")
    texts = [part[name] for part in (inputs, parameters) for name in TEXT_NAMES if part.get(name) is not None]
    if not texts:
        raise ValueError(f"The request has no text: say what to segment; send {FORM}.")
    if len(texts) > 1:
        raise ValueError("The request has text in several places; send it once.")
    return inputs["image"], _read_expressions(texts[0]), _read_threshold(parameters.get("threshold"))


def read_content(image: Any) -> Any:
    """The bytes of an image's file where it was sent as base64; anything else as it is."""
    return _decode_base64(image) if isinstance(image, str) else image


def content_key(content: bytes | bytearray, *size: int) -> tuple:
    """What tells images apart: a checksum of their content and sizes, by default the number of bytes."""
    return hashlib.sha256(content).hexdigest(), *(size or (len(content),))


def open_image(image: Any) -> Image.Image:
    """Decode an image, a file's bytes or an opened one, after a check of its size in its header.

    Raises:
        ValueError: Where it is not an image, too large, cut off, or of a format that is not accepted.
    """
    if isinstance(image, (bytes, bytearray)):
        if len(image) > MAX_IMAGE_BYTES:
            raise ValueError(f"The image has {len(image)} bytes; send at most {MAX_IMAGE_BYTES}.")
        try:
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(f"The image has too many pixels; send at most {MAX_PIXELS}.") from None
        except Exception:  # Pillow raises errors of many kinds on a broken header
            raise ValueError(f"image is not an image; send one of these formats: {', '.join(FORMATS)}.") from None
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be the base64 of a file, got {_type_name(image)}; send {FORM}.")
    if image.format not in (
        *FORMATS,
        "MPO",
        None,
    ):  # MPO: JPEG files of phones with several images; None: made in memory
        raise ValueError(f"A {image.format} image is not accepted; send one of {', '.join(FORMATS)}.")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"The image has {width} x {height} pixels; send at most {MAX_PIXELS} in all.")
    try:
        image.load()
    except Exception:
        raise ValueError("The image cannot be decoded to its end; was it cut off or damaged on the way?") from None
    return image


def encode_mask(mask: torch.Tensor) -> str:
    """The base64 of a PNG of a bool (H, W) mask: mode "L", 255 where it is true."""
    buffer = io.BytesIO()
    Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decode_base64(text: str) -> bytes:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("image is a data URL without base64; send data:image/png;base64, and the base64 after it.")
    elif "://" in text[:16]:
        raise ValueError("image is a URL, and the endpoint fetches none; send the image itself as base64.")
    if len(text) > MAX_IMAGE_BYTES * 3 // 2:  # 4 characters stand for 3 bytes, and line breaks come on top
        raise ValueError(f"image has {len(text)} characters of base64; send at most {MAX_IMAGE_BYTES} bytes of image.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise ValueError("image is not valid base64; was it cut off, or is it not encoded?") from None


def _read_expressions(text: Any) -> list[str]:
    expressions = [text] if isinstance(text, str) else text
    if not isinstance(expressions, (list, tuple)):
        raise ValueError(f"text must be a string or a list of strings, got {_type_name(text)}.")
    if not expressions:
        raise ValueError("text is an empty list; send at least one expression.")
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(f"text has {len(expressions)} expressions; send at most {MAX_EXPRESSIONS} in one request.")
    for i, expression in enumerate(expressions):
        name = "text" if isinstance(text, str) else f"text[{i}]"
        if not isinstance(expression, str):
            raise ValueError(f"{name} must be a string, got {_type_name(expression)}.")
        if not expression.strip():
            raise ValueError(f"{name} is empty; say what to segment.")
        if len(expression) > MAX_CHARACTERS:
            raise ValueError(f"{name} has {len(expression)} characters; send at most {MAX_CHARACTERS}.")
        try:
            expression.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair: JSON can hold it, the answer cannot
            raise ValueError(f"{name} is not valid UTF-8 text; encode it again.") from None
    return list(expressions)


def _read_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    try:
        number = math.nan if isinstance(threshold, bool) else float(threshold)  # a query string brings text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < 1:
        raise ValueError("threshold must be a number between 0 and 1, both excluded.")
    return number


def _check_names(place: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(str(name) for name in set(given) - set(known))
    if unknown:
        raise ValueError(f"{place} has an unknown name {unknown[0][:40]!r}; it takes {', '.join(known)}.")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
