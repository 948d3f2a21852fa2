"""Image files and bytes: decoded, turned as their annotations mean them, told apart by their content (ours)."""

import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from PIL.ExifTags import Base

from training.support.files import sha256_of

# COCO's file names, of 2014 and of 2017, hold the image's id; copies of 2014's append to it.
_COCO_FILES = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})|^(\d{12})\.\w+$")

# The turn that a tag asks for, and the turns that undo it where that is another one.
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    7: PIL.Image.Transpose.TRANSVERSE,
    6: PIL.Image.Transpose.ROTATE_270,
    8: PIL.Image.Transpose.ROTATE_90,
}
_UNDONE = {6: PIL.Image.Transpose.ROTATE_90, 8: PIL.Image.Transpose.ROTATE_270}


def coco_id(path: str | os.PathLike[str] | None) -> int | None:
    """The image id in one of COCO's file names; None for any other name."""
    found = _COCO_FILES.search(os.path.basename(path or ""))
    return int(found[1] or found[2]) if found else None


def content_hash(image: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the file of a row's `image`; a file on the disk is read once."""
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).hexdigest()
    state = os.stat(image["path"])
    return _file_hash(image["path"], state.st_size, state.st_mtime_ns)


def is_same_image(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the `image` of two rows is the same file, by its content."""
    if one["bytes"] is not None and other["bytes"] is not None:
        return one["bytes"] == other["bytes"]
    is_one_file = one["bytes"] is None and other["bytes"] is None and one["path"] == other["path"]
    return is_one_file or content_hash(one) == content_hash(other)


@cache
def _file_hash(path: str, size: int, modified: int) -> str:
    return sha256_of(Path(path))


def find_image(name: str, folders: Sequence[Path], what: str = "image") -> Path:
    """An image in one of the folders, by its whole path there or by as much of the end as it takes; "\\" separates as "/" does.

    Raises:
        ValueError: Where there is none; messages call it `what`.
    """
    if not name:
        raise ValueError(f"it names no {what}")
    parts = name.replace("\\", "/").split("/")
    tails = ["/".join(parts[i:]) for i in range(len(parts))]
    for tail in tails:
        for folder in folders:
            if tail and (candidate := folder / tail).is_file():
                return candidate
    raise ValueError(f"the {what} {folders[0] / name} does not exist")


def is_upright(path: str | None, upright: bool | None) -> bool:
    """Whether a mask is drawn on its image as viewers show it, whatever the orientation tag says.

    Args:
        path: Of the image. COCO's images, known by their file names, are annotated as they are stored; all others as annotation
            programs show them, upright.
        upright: What was chosen; None: as the path says.
    """
    return coco_id(path) is None if upright is None else upright


def upright_for(orientation: str) -> bool | None:
    """What `data.orientation` chooses for every image, as [`is_upright`] takes it: None for "by_source"."""
    return None if orientation == "by_source" else orientation == "upright"


def check_size(
    name: str, image: tuple[int, int], mask: tuple[int, int], tag: int, upright: bool, what: str = "mask"
) -> None:
    """`ValueError` where an image is of another size than what was drawn on it, with the mistake that it looks like.

    Args:
        name: Of the image.
        image: Its height and width in pixels, as `open_upright` gave it.
        mask: Height and width of its mask.
        tag: Orientation tag of its file.
        upright: Whether it was turned as the tag says.
        what: What messages call the mask.
    """
    if image == mask:
        return
    (height, width), hint = mask, ""
    if image == mask[::-1]:
        hint = f" Height and width look swapped: the {what} may be transposed."
        if tag >= 5:
            hint = f" Its orientation tag is {tag}: data.orientation {'stored' if upright else 'upright'} would make them fit."
    elif abs(image[0] * width - image[1] * height) <= max(*image, *mask):
        hint = f" The image looks resized: the {what} is {width / image[1]:.3g} times as large."
    raise ValueError(f"the image {name} is {image[1]}×{image[0]}, its {what} {width}×{height} pixels.{hint}")


def open_upright(value: Mapping[str, Any], upright: bool) -> tuple[PIL.Image.Image, int]:
    """Decodes the `image` of a row and turns it, by one rule for all formats.

    Args:
        value: {"path": str or None, "bytes": bytes or None}.
        upright: Whether the image is wanted as viewers show it. Otherwise its pixels are as the file holds them.

    Returns:
        The image without an orientation tag, and the tag that it had, 1 to 8; 1 is upright.

    Raises:
        ValueError: as `open_image`.
    """
    image, tag = _open(value, decode=True)
    if tag not in _TURNS:
        return image, 1
    if upright:
        image = PIL.ImageOps.exif_transpose(image)
    elif image.format == "TIFF":  # Pillow has turned it while decoding
        image = image.transpose(_UNDONE.get(tag, _TURNS[tag]))
    image.getexif().pop(Base.Orientation, None)
    return image, tag


def open_image(value: Mapping[str, Any] | PIL.Image.Image, decode: bool = True) -> PIL.Image.Image:
    """Decodes the `image` of a row, {"path": str or None, "bytes": bytes or None}, or a PIL image, in full.

    Without `decode` only the head is read, which is enough for the size. The image keeps its mode and its EXIF
    orientation, see `open_upright`. Raises ValueError naming the file when it is missing, empty, truncated (as
    far as it is read), no image, or above Pillow's limit.
    """
    return _open(value, decode)[0]


def _open(value: Mapping[str, Any] | PIL.Image.Image, decode: bool) -> tuple[PIL.Image.Image, int]:
    """An image and its orientation tag; 1 where it is not decoded."""
    if isinstance(value, PIL.Image.Image):
        path, data = getattr(value, "filename", None), None
    else:
        path, data = value.get("path"), value.get("bytes")
        if data is None and not path:
            raise ValueError("an image needs a path or bytes, got neither")
    name = path or "(given without a path)"
    try:
        # From memory, so that no file stays open however late a decoder reads its metadata.
        if not isinstance(value, PIL.Image.Image):
            value = PIL.Image.open(io.BytesIO(Path(path).read_bytes() if data is None else data))
        if not decode:
            return value, 1
        tag = value.getexif().get(Base.Orientation, 1) if value.format == "TIFF" else None  # decoding drops it
        value.load()
        return value, value.getexif().get(Base.Orientation, 1) if tag is None else tag
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"the image {name} is damaged, or not an image") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise ValueError(f"the image {name} cannot be read: {error}") from error
