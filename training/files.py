"""Writing files so that a reader finds the whole of them or nothing (ours)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name in its folder (made where absent), then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def partial_folder(path: Path) -> Path:
    """An empty folder beside `path` to write into before [`replace_folder`] puts it in its place."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace_folder(path: Path) -> None:
    """Put the folder written under [`partial_folder`]'s name in the place of what stands at `path`."""
    previous = path.with_name(f".{path.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.rename(path, previous)
    os.rename(path.with_name(f".{path.name}.partial"), path)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> bool:
    """Whether a whole folder stands at `path`, after undoing a replacement that was interrupted half-way."""
    previous = path.with_name(f".{path.name}.previous")
    if not path.exists() and previous.exists():
        os.rename(previous, path)
    return path.is_dir()


def write_binary(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under a temporary name in its folder (made where absent), then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
