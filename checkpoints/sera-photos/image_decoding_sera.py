"""Whatever stands for an image, to an upright 8-bit RGB image.

A path, a URL, the bytes of a file and a row of `datasets` are opened as Pillow images first. So all of them go through one
decoder, and the same image gives the same pixels whichever way it comes in. Everything here is Pillow, numpy and torch.
"""

import base64
import http.client
import io
import os
import string
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

ImageLike = str | os.PathLike | bytes | BinaryIO | Mapping | Image.Image | np.ndarray | torch.Tensor

ORIENTATION_TAG = 0x0112
ROUNDING = 1e-3  # share of white that computed values may lie outside of the range
DEPTHS = (8, 10, 12, 14, 16)  # bits per value of the sensors whose images lie in 16-bit files
SECONDS_WITHOUT_ANSWER = 10.0  # a URL's server may stay silent for this long
DOWNLOAD_SECONDS = 120.0  # and take this long for the whole file
DOWNLOAD_BYTES = 50 * 10**6
CHUNK_BYTES = 2**16
SHOWN_CHARACTERS = 200  # of a path or URL in a message
FILE_KEYS = {"bytes", "path"}  # of an image in a row of `datasets` that was not decoded
ACCEPTED = (
    "a PIL image, a path or URL, the bytes of a file, a file opened for reading, a dictionary of 'bytes' and 'path', "
    "or an array or tensor of shape (H,W), (H,W,1|3|4) or (1|3|4,H,W)"
)


class _ImageError(ValueError):
    """A message that already names the image."""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a broken image into one ValueError that names the image."""
    try:
        yield
    except (_ImageError, MemoryError):
        raise
    except Exception as error:  # its decoders raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{name} is not a readable image: {error}") from error


def to_rgb_image(image: ImageLike, name: str = "image") -> Image.Image:
    """Bring whatever stands for an image to an upright 8-bit RGB image.

    EXIF rotation is applied. Transparency is composited on white, as viewers show it.

    Integers of more than 8 bits are scaled by their highest value: the smallest of 8, 10, 12, 14 and 16 bits that holds it is
    taken for the image's depth. So a 12-bit image in a 16-bit file has its full brightness, with a warning. The rule knows the
    type and the values alone: a file, an array and an opened image of the same content give the same. Integers of more than
    16 bits whose highest value is at most 255 are 8-bit values, without a warning. PIL's mode "F" is read as [0, 1] where no
    value exceeds 1, else as [0, 255]. Float arrays must be in [0, 1]. An array whose layout is ambiguous is read
    channels-last, a tensor channels-first. (Ours.)

    Args:
        image: PIL image of any mode; path or URL (http, https or `data:`) of a file; the file's bytes; a file opened for
            reading; {"bytes": …, "path": …} as `datasets` keeps what it has not decoded; array or tensor (H,W), (H,W,1|3|4)
            or (1|3|4,H,W).
        name: what error messages call it where it is not a file.

    Raises:
        FileNotFoundError: no file at the path.
        TypeError: not an image at all.
        ValueError: a corrupt file, an empty image, a wrong shape, NaN or values out of range; a URL that gives no answer
            within `SECONDS_WITHOUT_ANSWER` or more than `DOWNLOAD_BYTES`.
    """
    if isinstance(image, Mapping):
        image, name = _undecoded(image, name)
    if isinstance(image, str) and image[:5].lower() == "data:":
        name = "the data URL"
        with _naming(name):
            image = _data_url_content(image)
    elif isinstance(image, str) and image[:8].lower().startswith(("http://", "https://")):
        name = image[:SHOWN_CHARACTERS]
        image = _fetched(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = io.BytesIO(image)
    elif isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        if not os.path.isfile(image):
            raise FileNotFoundError(f"No image at {name[:SHOWN_CHARACTERS]!r}.")
    elif hasattr(image, "read") and isinstance(getattr(image, "name", None), str):
        name = image.name
    if isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
        with _naming(name), Image.open(image) as opened:
            return _pil_to_rgb(opened, name)
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or name
        with _naming(name):
            return _pil_to_rgb(image, name)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(to_numpy(image), channels_first=isinstance(image, torch.Tensor), name=name)
    raise TypeError(f"{name} must be {ACCEPTED}, got {type(image).__name__}.")


def as_list(value: Any) -> list[Any] | None:
    """The items of a list, tuple, array, `datasets` Column, pandas Series or the like; None where the value is one thing."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Set, torch.Tensor)):
        return None
    is_sized = hasattr(value, "__len__") and hasattr(value, "__iter__") and not hasattr(value, "read")
    is_row = getattr(value, "ndim", 1) == 1 or (isinstance(value, np.ndarray) and value.ndim > 1)
    return list(value) if is_sized and is_row else None


def as_image_list(images: Any) -> list[Any]:
    """One image, several in whatever holds them, or a batched array, as a list.

    Raises:
        ValueError: where there is none.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)):
        holds_several = images.ndim == 4 or (isinstance(images, np.ndarray) and images.dtype.kind in "OU")
        found = list(images) if holds_several and images.ndim else [images]
    else:
        found = as_list(images)
        found = [images] if found is None else found
    if not found:
        raise ValueError("images is empty: give at least one image.")
    return found


def is_undecoded(value: Any) -> bool:
    """Whether a value is an image as `datasets` keeps it before decoding, {"bytes": …, "path": …}."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= FILE_KEYS


def to_numpy(value: Any) -> np.ndarray:
    """An array of whatever holds numbers, tensors of any device and type too."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return np.asarray(value)


def _undecoded(image: Mapping, name: str) -> tuple[Any, str]:
    """Bytes or, where there are none, the path; and what to call the image."""
    if not is_undecoded(image) or (image.get("bytes") is None and image.get("path") is None):
        keys = [key for key in image if image[key] is not None]
        raise TypeError(f"{name} must be {ACCEPTED}, got a dictionary of {keys}.")
    content, path = image.get("bytes"), image.get("path")
    return (path, name) if content is None else (content, path or name)


def _data_url_content(url: str) -> bytes:
    head, _, content = url.partition(",")
    content = urllib.parse.unquote_to_bytes(content)
    return base64.b64decode(content) if head.lower().endswith(";base64") else content


def _fetched(url: str) -> bytes:
    """What lies at a URL, within the limits of time and size above.

    Raises:
        ValueError: no answer in time, too large a file, or any other failure; it names the URL.
    """
    name = url[:SHOWN_CHARACTERS]
    quoted = urllib.parse.quote(url, safe=string.punctuation)  # spaces and letters beyond ASCII
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    try:
        request = urllib.request.Request(quoted, headers={"User-Agent": "sera-segmentation (Python urllib)"})
        with urllib.request.urlopen(request, timeout=SECONDS_WITHOUT_ANSWER) as response:
            while chunk := response.read1(CHUNK_BYTES):
                content += chunk
                if len(content) > DOWNLOAD_BYTES:
                    raise _ImageError(
                        f"{name} holds more than {DOWNLOAD_BYTES / 10**6:g} MB, the most that is fetched."
                    )
                if time.monotonic() > deadline:
                    raise _ImageError(f"{name} was not fetched within {DOWNLOAD_SECONDS:g} s.")
    except _ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL, though it begins as one
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            raise _ImageError(f"{name} gave no answer within {SECONDS_WITHOUT_ANSWER:g} s.") from error
        raise _ImageError(f"{name} cannot be fetched: {error}.") from error
    return bytes(content)


def _pil_to_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise _ImageError(f"{name} is empty: its size is {image.size}.")
    if image.getexif().get(ORIENTATION_TAG, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        white = 255 if image.mode == "F" and values.max() > 1 + ROUNDING else None
        return Image.fromarray(_to_8_bit(values, name, white)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _array_to_rgb(array: np.ndarray, channels_first: bool, name: str) -> Image.Image:
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}.")
    if array.ndim == 3:
        axes = (0, 2) if channels_first else (2, 0)
        candidates = [axis for axis in axes if array.shape[axis] in (1, 3, 4)]
        if not candidates:
            raise ValueError(f"{name} must have 1, 3 or 4 channels, its shape is {array.shape}.")
        array = np.moveaxis(array, candidates[0], -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    elif array.ndim != 2:
        raise ValueError(f"{name} must be {ACCEPTED}, its shape is {array.shape}.")
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(_to_8_bit(array, name))), name)


def _to_8_bit(values: np.ndarray, name: str, white: int | None = None) -> np.ndarray:
    """Scale pixel values of any type to uint8; `white` is the highest where neither type nor values say."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind not in "buif":
        raise ValueError(f"{name} must hold numbers, its type is {values.dtype}.")
    lowest, highest = values.min(), values.max()
    if white is None:
        is_16_bit = (kind, values.dtype.itemsize) == ("u", 2)  # of either byte order
        white = 1 if kind in "bf" else _white_of_integers(int(highest), is_16_bit)
    slack = ROUNDING * white if kind == "f" else 0
    if not (lowest >= -slack and highest <= white + slack):  # NaN fails too
        wanted = f"[0, {white}]" + (" (or be uint8)" if kind == "f" else "")
        found = f"from {lowest} to {highest}"
        raise _ImageError(f"{name} has {values.dtype} values {found}; they must lie in {wanted}.")
    return np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)


def _white_of_integers(highest: int, is_16_bit: bool) -> int:
    """The value that stands for white: the highest of the smallest depth that holds the image's highest value."""
    depth = next((bits for bits in DEPTHS if highest < 2**bits), DEPTHS[-1])
    white = 2**depth - 1
    if depth < 16 and highest > (0 if is_16_bit else 255):
        warnings.warn(  # the same words for every image of a depth, so that a data set of them says it once
            f"An image of 16-bit values has none above {white}. It is taken for an image of {depth} bits: {white} is white. "
            "To choose another scale, give the image in 8 bits.",
            stacklevel=2,
        )
    return white


__all__ = ["ImageLike", "as_image_list", "as_list", "is_undecoded", "to_numpy", "to_rgb_image"]
