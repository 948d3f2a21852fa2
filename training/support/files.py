"""Writing files so that a reader finds the whole of them or nothing (ours)."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:  # they take seconds to import, and torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name in its folder (made where absent), then rename it."""
    write_binary(path, lambda partial: partial.write_text(text, encoding="utf-8"))


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
    """SHA-256 of a file in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def partial_path(path: Path) -> Path:
    """The temporary name beside `path` under which it is written."""
    return path.with_name(f".{path.name}.partial")


def partial_folder(path: Path) -> Path:
    """An empty folder beside `path` to write into before [`replace_folder`] puts it in its place."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(path: Path) -> None:
    """Put the folder written under [`partial_folder`]'s name in the place of what stands at `path`."""
    partial, previous = partial_path(path), path.with_name(f".{path.name}.previous")
    for file in partial.rglob("*"):
        _sync(file)  # a renamed folder must not outlive, on the disk, what it holds
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.rename(path, previous)
    os.rename(partial, path)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> bool:
    """Whether a whole folder stands at `path`, after undoing a replacement that was interrupted half-way."""
    previous = path.with_name(f".{path.name}.previous")
    if not path.exists() and previous.exists():
        os.rename(previous, path)
    return path.is_dir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the libraries raise when a folder cannot be written (a full disk, say) to one `OSError`, and makes room again.

    Torch and safetensors have errors of their own for a failed write. What stands at `path` is left alone.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, OSError) and "inline_container" not in str(error):
            raise  # torch's file writer names its source so; others are no matter of writing
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        shutil.rmtree(partial_path(path), ignore_errors=True)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}; {free / 2**20:.0f} MiB are free there). What stood there before is whole: "
            "once there is room, the same command goes on."
        ) from error


def save_model(model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights and processor as one folder that `from_pretrained` loads; whole or, if interrupted, as it was before."""
    with writing(folder):
        partial = partial_folder(folder)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        replace_folder(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
