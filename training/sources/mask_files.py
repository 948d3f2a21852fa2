"""Masks in image files: one object in a file, or a number or a colour for each object (ours)."""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image

from training.sources.annotations import Rle
from training.sources.images import open_upright
from training.sources.masks import encode_mask
from training.sources.refer_records import shown

SHOWN_VALUES = 8  # of a mask that a message names
WHITE = (1, 255, 65535)  # a mask of nothing else is all object


class MaskFile:
    """`Annotation.draw` of an object in a mask's file. The mask has the file's size, whatever the image's is."""

    def __init__(self, image: Mapping[str, Any], thing: str | None = None, cut_grey: bool = False):
        """
        Args:
            image: {"path": str or None, "bytes": bytes or None} of the file.
            thing: The object in it: a number, or a colour such as "#ff8800" or "255, 136, 0". None: all that is not black.
            cut_grey: Cut grey values at half, instead of refusing them.

        Raises:
            ValueError: Where the object is neither a number nor a colour.
        """
        self.image, self.cut_grey = image, cut_grey
        self.thing = None if thing is None else _parse_object(thing)

    def __call__(self, height: int, width: int) -> tuple[Rle, bool]:
        """The mask's code; `ValueError` where the file cannot be read, or does not tell the object from the rest."""
        try:
            return encode_mask(self.read()), False
        except ValueError as error:
            raise ValueError(f"has no mask: {error}") from error

    def read(self) -> np.ndarray:
        """The mask, (H, W) bool."""
        pixels, palette = _pixels(self.image)
        if isinstance(self.thing, tuple):
            colours = _coloured(pixels, palette)
            mask = (colours == np.array(self.thing)).all(axis=-1)
            if not mask.any():
                raise ValueError(f"no pixel has the colour {_hex(self.thing)}; there are {_colours_in(colours)}")
            return mask
        if pixels.ndim == 3:
            if self.thing is not None:
                raise ValueError(f"it has colours, {_colours_in(pixels)}: name the object by its colour")
            return _one_colour(pixels)
        if self.thing is not None:
            mask = pixels == self.thing
            if not mask.any():
                raise ValueError(f"no pixel has the value {self.thing}; there are {_values_in(pixels)}")
            return mask
        values = np.unique(pixels)
        is_pair = len(values) <= 2 and values[0] == 0
        if is_pair or (len(values) == 1 and values[0] in WHITE):
            return pixels != 0
        if self.cut_grey:
            return pixels > (127 if values[-1] <= 255 else 32767)
        raise ValueError(
            f"it holds the values {_values_in(pixels)}. Where each is an object, name its number in the column object; where they "
            "are the grey edge of one object, give --cut_grey"
        )


def _parse_object(text: str) -> int | tuple[int, ...]:
    if re.fullmatch(r"\d{1,9}", text := text.strip()):
        return int(text)
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return tuple(bytes.fromhex(text[1:]))
    parts = re.fullmatch(r"[(\[]?\s*(\d{1,3})[,;\s]+(\d{1,3})[,;\s]+(\d{1,3})\s*[)\]]?", text)
    if parts and all(int(part) <= 255 for part in parts.groups()):
        return tuple(map(int, parts.groups()))
    raise ValueError(f"an object in a mask is a number or a colour such as #ff8800, got {shown(text)}")


def _pixels(image: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Whole numbers (H, W), with the colours (N, 3) that they stand for where there is a palette; or colours (H, W, 3)."""
    if image["bytes"] is None and image["path"] and os.path.isfile(image["path"]):
        state = os.stat(image["path"])
        return _file_pixels(image["path"], state.st_size, state.st_mtime_ns)
    return _decoded(open_upright(image, upright=True)[0])


@lru_cache(maxsize=8)
def _file_pixels(path: str, size: int, modified: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A file with several objects is decoded once."""
    return _decoded(open_upright({"path": path, "bytes": None}, upright=True)[0])


def _decoded(image: PIL.Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64), None
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        return np.asarray(image).astype(np.int64), palette
    if image.mode not in ("LA", "RGB", "RGBA"):
        raise ValueError(f"it has Pillow's mode {image.mode}; 1, L, LA, P, I, RGB and RGBA are accepted")
    if image.mode != "RGB":
        alpha = np.asarray(image.getchannel("A")).astype(np.int64)
        colours = np.asarray(image.convert("RGBA"))[..., :3]
        if alpha.min() < 255:  # the object is what is not transparent
            seen = colours[alpha > 0]
            if not len(seen) or (seen == seen[0]).all():
                return alpha, None
            return np.where(alpha[..., None] > 0, colours, 0), None
        image = image.convert("RGB")
    colours = np.asarray(image)
    if (colours == colours[..., :1]).all():
        return colours[..., 0].astype(np.int64), None
    return colours, None


def _coloured(pixels: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    if pixels.ndim == 3:
        return pixels
    if palette is None:
        return np.repeat(pixels[..., None], 3, axis=-1)
    padded = np.zeros((max(len(palette), int(pixels.max()) + 1), 3), dtype=np.uint8)
    padded[: len(palette)] = palette
    return padded[pixels]


def _one_colour(pixels: np.ndarray) -> np.ndarray:
    """What is not black, where all of it has one colour."""
    mask = pixels.any(axis=-1)
    if not (pixels[mask] == pixels[mask][0]).all():
        raise ValueError(f"it has the colours {_colours_in(pixels)}: name the object's in the column object")
    return mask


def _values_in(pixels: np.ndarray) -> str:
    return _listed([str(value) for value in np.unique(pixels)[: SHOWN_VALUES + 1]])


def _colours_in(colours: np.ndarray) -> str:
    return _listed([_hex(colour) for colour in np.unique(colours.reshape(-1, 3), axis=0)[: SHOWN_VALUES + 1]])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_VALUES]) + ("…" if len(names) > SHOWN_VALUES else "")


def _hex(colour: Any) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)


__all__ = ["MaskFile"]
