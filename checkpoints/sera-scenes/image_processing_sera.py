"""Images to letterboxed, normalised pixel values, and masks into the same frame.

Everything here is Pillow, numpy and torch: torchvision is not needed. One function, `letterbox_box`, says where an image
lies in its frame; the forward direction, the training labels and the post-processing all ask it.
"""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs

ImageLike = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORIENTATION_TAG = 0x0112
ROUNDING = 1e-3  # share of white that computed values may lie outside of the range
TORCH_FILTERS = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}
ACCEPTED = "a PIL image, a path or URL, or an array or tensor of shape (H,W), (H,W,1|3|4) or (1|3|4,H,W)"


class LetterboxBox(NamedTuple):
    """Where an image lies inside its letterboxed frame, in whole pixels of the frame."""

    top: int
    left: int
    height: int
    width: int


def letterbox_box(original_size: tuple[int, int], size: tuple[int, int]) -> LetterboxBox:
    """Place an image in a frame: scaled until it just fits, its aspect kept, and centred.

    Centred, so that mirroring the image mirrors the frame (up to one pixel where the padding is odd).
    Rounding to whole pixels may scale the axes by slightly different factors: the box counts, for images
    and masks alike.

    Args:
        original_size: (height, width) of the image, pixels.
        size: (height, width) of the frame, pixels.

    Returns:
        The box; each side at least 1 pixel and within the frame.
    """
    (height, width), (frame_height, frame_width) = original_size, size
    scale = min(frame_height / height, frame_width / width)
    box_height = min(max(round(height * scale), 1), frame_height)
    box_width = min(max(round(width * scale), 1), frame_width)
    top, left = (frame_height - box_height) // 2, (frame_width - box_width) // 2
    return LetterboxBox(top, left, box_height, box_width)


def letterbox_masks(masks: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Put masks into the letterboxed frame as area averages: the share of each pixel that the object covers.

    The averages are exact, fractional edges included, so the covered area is kept and nothing shifts;
    Pillow's box filter takes whole source pixels only. (Ours: the loss is defined on area-averaged targets.)

    Args:
        masks: N boolean or integer arrays (H0, W0), each of its own image's size; positive is the object, negative are
            pixels that the loss is to leave out.
        size: (height, width) of the frame, pixels.

    Returns:
        float32 (N, height, width) in [0, 1], -1 where more than half of a pixel is to be left out; the padding is 0.

    Raises:
        ValueError: a mask that is empty, not two-dimensional, or not boolean or integer.
    """
    labels = np.zeros((len(masks), *size), np.float32)
    for i, mask in enumerate(masks):
        array = to_numpy(mask)
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "bui":
            raise ValueError(
                f"masks[{i}] must be a boolean or integer array of shape (height, width), "
                f"got {array.dtype} of shape {array.shape}."
            )
        top, left, height, width = letterbox_box(array.shape, size)
        label = _shares(array > 0, height, width)
        if (left_out := array < 0).any():
            label[_shares(left_out, height, width) > 0.5] = -1
        labels[i, top : top + height, left : left + width] = label
    return labels


def _shares(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share of each of `height` x `width` equal cells that the boolean (H0, W0) pixels cover, float32 in [0, 1]."""
    rows = _area_average(pixels.astype(np.float32), height)
    return _area_average(np.ascontiguousarray(rows.T), width).T.clip(0, 1)  # rounding errors


def _area_average(values: np.ndarray, length: int) -> np.ndarray:
    """Average (n, m) values over `length` equal stretches of the first axis: (length, m) float32."""
    n = values.shape[0]
    edges = np.linspace(0, n, length + 1)
    start, stop = edges[:-1], edges[1:]
    averages = np.zeros((length, values.shape[1]), np.float32)
    for offset in range(-(-n // length) + 1):  # the rows that a stretch can touch
        row = np.floor(start) + offset
        share = (np.minimum(stop, row + 1) - np.maximum(start, row)).clip(0) * (length / n)
        averages += share.astype(np.float32)[:, None] * values[np.minimum(row, n - 1).astype(np.int64)]
    return averages


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

    EXIF rotation is applied. Transparency is composited on white, as viewers show it (a URL's is dropped by
    transformers' `load_image`). 16-bit values are scaled to 8 bits. 32-bit integers are read as 8-bit where
    none exceeds 255, else as 16-bit; PIL's "F" as [0, 1] where none exceeds 1, else as [0, 255]. Float arrays
    must be in [0, 1]. An array whose layout is ambiguous is read channels-last, a tensor channels-first.

    Args:
        image: PIL image of any mode, path or URL (`data:` too) of one, array or tensor (H,W), (H,W,1|3|4) or (1|3|4,H,W).
        name: what error messages call it where it is not a file.

    Raises:
        FileNotFoundError: no file at the path.
        TypeError: not an image at all.
        ValueError: a corrupt file, an empty image, a wrong shape, NaN or values out of range.
    """
    if isinstance(image, str) and image.startswith("data:"):
        name = "the data URL"
        with _naming(name), Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) as opened:
            return _pil_to_rgb(opened, name)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with _naming(image):
            image = load_image(image)
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"No image at {os.fspath(image)[:1000]!r}.")
        with _naming(os.fspath(image)), Image.open(image) as opened:
            return _pil_to_rgb(opened, os.fspath(image))
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or name
        with _naming(name):
            return _pil_to_rgb(image, name)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(to_numpy(image), channels_first=isinstance(image, torch.Tensor), name=name)
    raise TypeError(f"{name} must be {ACCEPTED}, got {type(image).__name__}.")


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
    """Scale pixel values of any type to uint8; `white` is the highest where the type does not say."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind not in "buif":
        raise ValueError(f"{name} must hold numbers, its type is {values.dtype}.")
    lowest, highest = values.min(), values.max()
    if white is None:
        is_16_bit = (kind, values.dtype.itemsize) == ("u", 2) or highest > 255  # of either byte order
        white = 1 if kind in "bf" else 65535 if is_16_bit else 255
    slack = ROUNDING * white if kind == "f" else 0
    if not (lowest >= -slack and highest <= white + slack):  # NaN fails too
        wanted = f"[0, {white}]" + (" (or be uint8)" if kind == "f" else "")
        found = f"from {lowest} to {highest}"
        raise _ImageError(f"{name} has {values.dtype} values {found}; they must lie in {wanted}.")
    return np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)


def to_numpy(value: Any) -> np.ndarray:
    """An array of whatever holds numbers, tensors of any device and type too."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return np.asarray(value)


class SeraImageProcessor(BaseImageProcessor):
    """Letterbox images to one size and normalise them with the vision tower's mean and deviation.

    An image keeps its aspect: it is scaled until it fits and centred (`letterbox_box`). The padding is the mean
    colour, so it is 0 after normalisation. Downscaling is anti-aliased.

    Args:
        size: {"height", "width"} of the frame in pixels, or one integer for a square. Positive; that they are
            multiples of the patch is the model's concern.
        resample: Pillow's resampling filter for images.
        image_mean, image_std: per channel, of values in [0, 1]; ImageNet's, which DINOv2 was trained with.

    Raises:
        ValueError: a size, mean, deviation or filter that cannot be meant.
        TypeError: an option of other image processors that this one does not have.
    """

    model_input_names = ["pixel_values", "original_sizes"]

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ):
        unknown = sorted(set(kwargs) & set(ImagesKwargs.__annotations__))
        if unknown:
            options = "size, resample, image_mean and image_std"
            raise TypeError(f"SeraImageProcessor has no option {unknown[0]!r}; it has {options}.")
        super().__init__(**kwargs)
        self.size = _checked_size({"height": 448, "width": 448} if size is None else size)
        self.resample = int(Image.Resampling(resample))
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                "image_mean and image_std must hold 3 numbers each, the deviations positive; "
                f"got {self.image_mean} and {self.image_std}."
            )

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of the letterboxed frame, pixels."""
        return self.size["height"], self.size["width"]

    def preprocess(self, images: ImageLike | Sequence[ImageLike], return_tensors: str | None = None) -> BatchFeature:
        """Letterbox and normalise images.

        Args:
            images: one image or a list of B (see `to_rgb_image`); a 4-dimensional array or tensor is a
                list.
            return_tensors: "pt" for tensors, otherwise numpy arrays.

        Returns:
            `pixel_values` float32 (B, 3, H, W), normalised, and `original_sizes` int64 (B, 2): height and
            width of each image in its own pixels, after EXIF rotation.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `to_rgb_image`; ValueError for an empty list.
        """
        images = as_image_list(images)
        pixel_values = np.zeros((len(images), 3, *self.frame_size), np.float32)
        original_sizes = np.zeros((len(images), 2), np.int64)
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        scale, offset = 1 / (255 * std), -mean / std
        for i, image in enumerate(images):
            rgb = to_rgb_image(image, name="image" if len(images) == 1 else f"images[{i}]")
            original_sizes[i] = rgb.height, rgb.width
            top, left, height, width = letterbox_box((rgb.height, rgb.width), self.frame_size)
            for channel, plane in enumerate(_resized(rgb, height, width, self.resample)):
                content = pixel_values[i, channel, top : top + height, left : left + width]
                np.multiply(plane, scale[channel], out=content)
                content += offset[channel]
        data = {"pixel_values": pixel_values, "original_sizes": original_sizes}
        return BatchFeature(data, tensor_type=return_tensors)

    def preprocess_masks(self, masks: Sequence[Any], original_sizes: Sequence[Any] | None = None) -> np.ndarray:
        """Training labels, aligned with `preprocess`'s images: see `letterbox_masks`.

        Args:
            masks: N boolean or integer arrays (H0, W0); negative pixels are those that the loss is to leave out.
            original_sizes: the (height, width) that each must have, pixels.

        Returns:
            float32 (N, H, W) in [0, 1], and -1 where pixels are to be left out.

        Raises:
            ValueError: a mask that is not of its image's size, and what `letterbox_masks` raises.
        """
        masks = [to_numpy(mask) for mask in masks]
        for i, size in enumerate(() if original_sizes is None else original_sizes):
            if masks[i].shape != tuple(size):
                expected = f"{tuple(size)} (height, width, upright)"
                raise ValueError(f"masks[{i}] has shape {masks[i].shape}, its image is {expected}.")
        return letterbox_masks(masks, self.frame_size)


def _resized(image: Image.Image, height: int, width: int, resample: int) -> np.ndarray:
    """An RGB image at another size: uint8 (3, height, width). Downscaling is anti-aliased.

    torch has Pillow's bilinear and bicubic filters in code that is four times as fast. From rounding, few values
    differ by a level, in enlarged images by two at most. Pillow does the other filters, and reductions to a
    sixth or less, where it may average blocks first (a gap of 3): that halves their time, and the result cannot
    be told from the full one.
    """
    mode = TORCH_FILTERS.get(resample)
    if image.size == (width, height):
        planes = np.asarray(image)
    elif mode is None or max(image.width / width, image.height / height) >= 6:
        planes = np.asarray(image.resize((width, height), resample, reducing_gap=3.0))
    else:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return interpolate(pixels, size=(height, width), mode=mode, antialias=True)[0].numpy()
    return planes.transpose(2, 0, 1)


def as_image_list(images: Any) -> list[Any]:
    """One image, a list of them, or a batched array, as a list; ValueError where there is none."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    images = list(images) if is_batch or isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("images is empty: give at least one image.")
    return images


def _checked_size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) and len(size) == 2 else []
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f'size must be {{"height": h, "width": w}} with positive integers, got {size!r}.')
    return {"height": sides[0], "width": sides[1]}


__all__ = ["LetterboxBox", "SeraImageProcessor", "letterbox_box", "letterbox_masks", "to_rgb_image"]
