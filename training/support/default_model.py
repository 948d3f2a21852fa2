"""The model that `sera-segment` uses where none is named: sera-photos, from the clone or from the user's cache (ours)."""

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path

from training.support.files import partial_folder, replace_folder, sha256_of, writing

NAME = "sera-photos"
CLONE = Path(__file__).resolve().parents[2]
CONFIG = "config.json"


def default_model() -> Path:
    """The folder of sera-photos.

    Raises:
        FileNotFoundError: It is neither in a clone of the repository nor in the cache.
    """
    places = [CLONE / "checkpoints" / NAME, _cached()]
    for place in places:
        if (place / CONFIG).is_file():
            return place
    raise FileNotFoundError(
        f"There is no {NAME} here. Name a model with --model, or download {NAME}.tar.gz from the project's releases and run "
        f"sera-segment --install {NAME}.tar.gz SHA256. (In a clone of the repository it is in checkpoints/{NAME}.)"
    )


def install(archive: Path, sha256: str) -> Path:
    """Put the archive of a release into the cache.

    Args:
        archive: A tar file that holds one folder, `sera-photos/`.
        sha256: The archive's checksum, 64 hexadecimal digits, as the release states it.

    Returns:
        The folder in the cache. It is there whole or not at all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has another checksum, or it is not such an archive.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"There is no file {archive}.")
    found = sha256_of(archive)
    if found != sha256.strip().lower():
        raise ValueError(f"{archive} has the SHA-256 {found}, not {sha256}; download it again.")
    folder = _cached()
    with writing(folder):
        partial = partial_folder(folder)
        inner, problem = partial / NAME, f"it has no {NAME}/{CONFIG}"
        try:
            with tarfile.open(archive) as files:
                files.extractall(
                    partial, filter="data"
                )  # nothing outside of the folder, no links out of it, no devices
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            problem = str(error)
        if not (inner / CONFIG).is_file():
            shutil.rmtree(partial)
            raise ValueError(f"{archive} is no archive of {NAME}: {problem}.")
        for file in inner.iterdir():
            file.rename(partial / file.name)
        inner.rmdir()
        replace_folder(folder)
    return folder


def _cached() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sera" / NAME


__all__ = ["default_model", "install"]
