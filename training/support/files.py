"""Files that are written whole: a reader finds all of a file or nothing (ours)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:  # importing them takes seconds, and they import torch
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name in its folder (made where absent), then rename it."""
    write_binary(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as [`write_text`] does.

    Raises:
        ValueError: Where a number is not finite: JSON has no word for it, and other programs refuse what Python writes.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: a number in it is not finite.") from error
    write_text(path, text)


def write_binary(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under a temporary name in its folder (made where absent), then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    write(partial)
    _sync(partial)
    os.replace(partial, path)


def write_once(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_binary`, but under a temporary name of its own: several processes may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path).with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal. The file is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def partial_path(path: Path) -> Path:
    """The temporary name beside `path` under which it is written."""
    return path.with_name(f".{path.name}.partial")


def previous_path(path: Path) -> Path:
    """The temporary name beside `path` of what stood there before, while it is replaced."""
    return path.with_name(f".{path.name}.previous")


def partial_folder(path: Path) -> Path:
    """An empty folder beside `path` to write into before [`replace_folder`] puts it in its place."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(path: Path) -> None:
    """Put the folder that [`partial_folder`] made at `path`, in place of what is there."""
    partial, previous = partial_path(path), previous_path(path)
    for file in partial.rglob("*"):
        _sync(file)  # the files must be on the disk before the folder has its name
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.rename(path, previous)
    os.rename(partial, path)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> bool:
    """Undo a replacement of the folder at `path` that was interrupted. Returns whether there is a whole folder now."""
    previous = previous_path(path)
    if not path.exists() and previous.exists():
        os.rename(previous, path)
    return path.is_dir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of the libraries about a folder that cannot be written, as on a full disk, into one `OSError`.

    Torch and safetensors have their own errors for a failed write. The part that was written is removed, which makes room. What was
    at `path` before stays.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, OSError) and "inline_container" not in str(error):
            raise  # only errors of torch's file writer have this word in them
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        shutil.rmtree(partial_path(path), ignore_errors=True)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}; {free / 2**20:.0f} MiB are free there). What was there before is whole. When "
            "there is room, the same command goes on."
        ) from error


def save_model(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and processor to one folder that `from_pretrained` loads. If this is interrupted, the folder is as before.

    Args:
        model: The model.
        processor: Its processor or tokenizer.
        folder: Folder to make or to replace.
        dtype: Type of the weights in the file. None: the model's own. `config.json` names the model's own type in any case.
    """
    stored = None
    if dtype is not None:
        weights = model.state_dict().items()
        stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights}
    with writing(folder):
        partial = partial_folder(folder)
        model.save_pretrained(partial, state_dict=stored)
        processor.save_pretrained(partial)
        replace_folder(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
