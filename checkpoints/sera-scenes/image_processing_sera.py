"""Images to normalised pixel values, with or without padding, and masks into the same frame.

One method, `SeraImageProcessor.box`, says where an image lies in its frame. Images, training labels and post-processing all use it.
Everything here is Pillow, numpy and torch: torchvision is not needed.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from .image_decoding_sera import ImageLike, as_image_list, to_numpy, to_rgb_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TORCH_FILTERS = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


class LetterboxBox(NamedTuple):
    """Where an image lies inside its frame, in whole pixels of the frame."""

    top: int
    left: int
    height: int
    width: int


def letterbox_box(original_size: tuple[int, int], size: tuple[int, int]) -> LetterboxBox:
    """Place an image in a frame: scaled until it just fits, its aspect kept, and centred.

    It is centred, so a horizontal flip of the image is a horizontal flip of the frame (up to one pixel where the padding is
    odd). Rounding to whole pixels may scale the axes by slightly different factors. Images and masks both use the box, so they
    stay aligned.

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


def centred_on_patches(length: int, whole: int, patch_size: int) -> int:
    """Where an image without padding begins on an axis of a larger frame: centred, on the grid of patches.

    So the same pixels share a patch in every frame.

    Args:
        length: Of the image, pixels.
        whole: Of the frame, pixels.
        patch_size: Side of a patch, pixels.
    """
    return (whole - length) // 2 // patch_size * patch_size


def letterbox_masks(masks: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Put masks into the letterboxed frame as area averages: the share of each pixel that the object covers.

    The averages are exact, also at pixels that a cell covers in part, so the covered area is kept and nothing shifts. (Pillow's
    box filter takes whole source pixels only.) (Ours: the loss is defined on area-averaged targets.)

    Args:
        masks: N masks (H0, W0), each of its own image's size, see `read_masks`.
        size: (height, width) of the frame, pixels.

    Returns:
        float32 (N, height, width) in [0, 1], -1 where more than half of a pixel is to be left out; the padding is 0.

    Raises:
        ValueError: what `read_masks` raises.
    """
    arrays = read_masks(masks)
    return _labels(arrays, [letterbox_box(array.shape, size) for array in arrays], size)


def _labels(arrays: Sequence[np.ndarray], boxes: Sequence[LetterboxBox], size: tuple[int, int]) -> np.ndarray:
    """The labels of `letterbox_masks`, of masks that were read and of their places in the frame."""
    labels = np.zeros((len(arrays), *size), np.float32)
    for i, (array, (top, left, height, width)) in enumerate(zip(arrays, boxes, strict=True)):
        label = _shares(array > 0, height, width)
        if (left_out := array < 0).any():
            label[_shares(left_out, height, width) > 0.5] = -1
        labels[i, top : top + height, left : left + width] = label
    return labels


def read_masks(masks: Sequence[Any]) -> list[np.ndarray]:
    """Masks of every accepted type as boolean arrays, or as int8 arrays where they leave pixels out.

    In a mask of numbers 0 is the background, 1 or 255 the object, and negative pixels are those that the loss leaves out.
    Other whole numbers come from JPEG files or resized masks: they are cut at half of white, which is 255 (65535 where values are
    above 255), with one warning. A mask with one positive value has nothing to cut: that value is the object. Several positive
    values that all lie below half of white are numbers of several objects, and are refused. (Ours.)

    Args:
        masks: N boolean arrays or arrays of whole numbers, also as floats, (H0, W0), (H0, W0, 1) or (1, H0, W0).

    Returns:
        N arrays (H0, W0): bool, or int8 of -1, 0 and 1.

    Raises:
        ValueError: a mask that is empty, of another shape or type, with fractions, or with the numbers of several objects.
    """
    read, grey = [], {}
    for i, mask in enumerate(masks):
        array = to_numpy(mask)
        if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
            array = array[..., 0] if array.shape[-1] == 1 else array[0]
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "buif":
            raise ValueError(
                f"masks[{i}] must be a boolean or integer array of shape (height, width), "
                f"got {array.dtype} of shape {array.shape}."
            )
        cut, is_grey = _cut_of(array, f"masks[{i}]")
        if is_grey:
            grey[i] = cut
        above = array > cut if array.dtype != bool else array
        read.append(above if array.dtype.kind in "bu" or array.min() >= 0 else above.astype(np.int8) - (array < 0))
    if grey:
        first, cut = next(iter(grey.items()))
        others = f" (and {len(grey) - 1} more masks)" if len(grey) > 1 else ""
        message = (
            f"masks[{first}]{others} has other values than 0 and 1 or 0 and 255: pixels above {cut:g} are the object."
        )
        warnings.warn(message, stacklevel=3)
    return read


def _cut_of(array: np.ndarray, name: str) -> tuple[float, bool]:
    """The value above which a pixel is the object, and whether the values are others than 0 and 1, or 0 and 255."""
    if array.dtype == bool:
        return 0, False
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} must be a boolean or integer array; it has NaN or infinite values.")
    if array.dtype.kind == "f" and (fractions := array != np.rint(array)).any():
        found = array[fractions][0]
        raise ValueError(
            f"{name} must be a boolean or integer array, or floats of 0 and 1; it has the value {found:g}."
        )
    highest = int(array.max())
    if highest <= 1 or (highest == 255 and not ((array > 0) & (array < 255)).any()):
        return 0, False
    positive = np.unique(array[array > 0])
    if len(positive) == 1:
        return highest / 2, True
    white = 255 if highest <= 255 else 65535
    if not white / 2 < highest <= white:
        raise ValueError(
            f"{name} has {len(positive)} values above 0, up to {highest}: these are no grey values of one mask. "
            "Give one mask for each object, with 0 and 1."
        )
    return white / 2, True


def _shares(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each of `height` x `width` equal cells the boolean (H0, W0) pixels cover, float32 in [0, 1]."""
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


class SeraImageProcessor(BaseImageProcessor):
    """Scale images to fit one size and normalise them with the vision tower's mean and deviation.

    With `do_pad` an image keeps its aspect: it is scaled until it fits and centred (`letterbox_box`). The padding is the mean
    colour, so it is 0 after normalisation. Without `do_pad` a single image has no padding: it is scaled until it fits, and
    each side is rounded to the nearest multiple of the patch. Images of different shapes in one batch share a frame as large as
    the largest of them; the others are centred in it, on the grid of patches, and padded. Downscaling is anti-aliased.

    Args:
        size: {"height", "width"} of the frame in pixels, or one integer for a square. Positive; the model checks that they
            are multiples of its patch. Without `do_pad` it is the largest size of an image, and a multiple of the patch.
        resample: Pillow's resampling filter for images.
        image_mean, image_std: per channel, of values in [0, 1]; ImageNet's, which DINOv2 was trained with.
        do_pad: whether every frame has the full `size`.
        patch_size: side in pixels of the vision tower's patches.

    Raises:
        ValueError: an impossible size, mean, deviation, filter or patch.
        TypeError: an option of other image processors that this one does not have.
    """

    model_input_names = ["pixel_values", "original_sizes"]

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_pad: bool = True,
        patch_size: int = 14,
        **kwargs: Any,
    ):
        unknown = sorted(set(kwargs) & set(ImagesKwargs.__annotations__))
        if unknown:
            options = "size, resample, image_mean, image_std, do_pad and patch_size"
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
        self.do_pad, self.patch_size = bool(do_pad), patch_size
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size must be a positive integer, got {patch_size!r}.")
        if not self.do_pad and any(side % patch_size for side in self.frame_size):
            raise ValueError(
                f"size is {self.size}; without padding both sides must be multiples of the patch, {patch_size}."
            )

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of the largest frame, pixels; with `do_pad` of every frame."""
        return self.size["height"], self.size["width"]

    def frame_of(self, original_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) in pixels of the frame that images share in one batch.

        Args:
            original_sizes: (height, width) of each image, pixels.
        """
        if self.do_pad:
            return self.frame_size
        heights, widths = zip(*map(self._unpadded_size, original_sizes), strict=True)
        return max(heights), max(widths)

    def box(self, original_size: tuple[int, int], frame: tuple[int, int]) -> LetterboxBox:
        """Where an image lies in its frame.

        Args:
            original_size: (height, width) of the image, pixels.
            frame: (height, width) of the frame, pixels; see `frame_of`.
        """
        if self.do_pad:
            return letterbox_box(original_size, frame)
        height, width = self._unpadded_size(original_size)
        if height > frame[0] or width > frame[1]:
            raise ValueError(f"an image of {height}×{width} pixels does not fit into a frame of {frame[0]}×{frame[1]}.")
        top, left = (
            centred_on_patches(own, whole, self.patch_size) for own, whole in zip((height, width), frame, strict=True)
        )
        return LetterboxBox(top, left, height, width)

    def _unpadded_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in multiples of the patch, of an image that is scaled until it fits (ours)."""
        scale = min(limit / side for limit, side in zip(self.frame_size, original_size, strict=True))
        sides = (max(round(side * scale / self.patch_size), 1) * self.patch_size for side in original_size)
        height, width = (min(side, limit) for side, limit in zip(sides, self.frame_size, strict=True))
        return height, width

    def preprocess(self, images: ImageLike | Sequence[ImageLike], return_tensors: str | None = None) -> BatchFeature:
        """Scale and normalise images.

        Args:
            images: one image or B of them in a list, Column or Series (see `to_rgb_image`); a 4-dimensional array or
                tensor holds B images.
            return_tensors: "pt" for tensors, otherwise numpy arrays.

        Returns:
            `pixel_values` float32 (B, 3, H, W), normalised, of the frame that the images share (see `frame_of`), and
            `original_sizes` int64 (B, 2): height and width of each image in its own pixels, after EXIF rotation.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `to_rgb_image`; ValueError for an empty list.
        """
        images = as_image_list(images)
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        scale, offset = 1 / (255 * std), -mean / std
        sizes, contents = [], []  # the frame is known after the last image; one image at a time is held at full size
        for i, image in enumerate(images):
            rgb = to_rgb_image(image, name="image" if len(images) == 1 else f"images[{i}]")
            sizes.append((rgb.height, rgb.width))
            box = self.box(sizes[-1], self.frame_of(sizes[-1:]))
            contents.append(_resized(rgb, box.height, box.width, self.resample))
        frame = self.frame_of(sizes)
        pixel_values = np.zeros((len(images), 3, *frame), np.float32)
        for values, planes, size in zip(pixel_values, contents, sizes, strict=True):
            top, left, height, width = self.box(size, frame)
            for channel, plane in enumerate(planes):
                content = values[channel, top : top + height, left : left + width]
                np.multiply(plane, scale[channel], out=content)
                content += offset[channel]
        data = {"pixel_values": pixel_values, "original_sizes": np.array(sizes, np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def preprocess_masks(
        self,
        masks: Sequence[Any],
        original_sizes: Sequence[Any] | None = None,
        frame: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Training labels, aligned with the images of `preprocess`: see `letterbox_masks`.

        Args:
            masks: N masks (H0, W0), see `read_masks`.
            original_sizes: the (height, width) that each must have, pixels.
            frame: (height, width) of the images' frame, pixels. None: that of images of the masks' sizes.

        Returns:
            float32 (N, H, W) in [0, 1], and -1 where pixels are to be left out.

        Raises:
            ValueError: a mask that is not of its image's size, and what `read_masks` raises.
        """
        masks = read_masks(masks)
        for i, size in enumerate(() if original_sizes is None else original_sizes):
            if masks[i].shape != tuple(size):
                expected = f"{tuple(size)} (height, width, upright)"
                raise ValueError(f"masks[{i}] has shape {masks[i].shape}, its image is {expected}.")
        sizes = [mask.shape for mask in masks]
        frame = self.frame_of(sizes) if frame is None else frame
        return _labels(masks, [self.box(size, frame) for size in sizes], frame)


def _resized(image: Image.Image, height: int, width: int, resample: int) -> np.ndarray:
    """An RGB image at another size: uint8 (3, height, width). Downscaling is anti-aliased.

    torch has Pillow's bilinear and bicubic filters in code that is four times as fast. A few values differ by one level from
    rounding, in enlarged images by two at most. Pillow does the other filters. It also does reductions to a sixth or less,
    because it may average blocks first there (a gap of 3): that halves the time, and the difference cannot be seen.
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


def _checked_size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) and len(size) == 2 else []
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f'size must be {{"height": h, "width": w}} with positive integers, got {size!r}.')
    return {"height": sides[0], "width": sides[1]}


__all__ = ["LetterboxBox", "SeraImageProcessor", "letterbox_box", "letterbox_masks", "read_masks", "to_rgb_image"]
