"""Image files and bytes to decoded images (ours)."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image


def open_image(value: Mapping[str, Any] | PIL.Image.Image, decode: bool = True) -> PIL.Image.Image:
    """Decodes the `image` of a row, {"path": str or None, "bytes": bytes or None}, or a PIL image, in full.

    Without `decode` only the head is read, which is enough for the size. The image keeps its mode and its EXIF
    orientation: the image processor takes care of both. Raises ValueError naming the file when it is missing,
    empty, truncated (as far as it is read), no image, or above Pillow's limit.
    """
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
        if decode:
            value.load()
        return value
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"the image {name} is damaged, or not an image") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise ValueError(f"the image {name} cannot be read: {error}") from error
