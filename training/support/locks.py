"""One process at a time in a folder (ours)."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = ".lock"
PAUSE = 0.1  # seconds between two tries
# what some network file systems answer, which know no locks
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_held: set[int] = set()  # descriptors of the locks of this process


class FolderInUseError(OSError):
    """Another process holds the lock of a folder."""


@contextmanager
def locked_folder(folder: Path, advice: str, wait_s: float = 5.0) -> Iterator[int]:
    """Hold the lock of a folder. The folder is made where it is absent, and removed again where it is still empty at the end.

    The lock ends with the process, even with a killed one. Forked processes do not hold it. A process that is to hold it too is
    started with the descriptor among its `pass_fds`; the lock is then free once all of these processes have ended.

    Args:
        folder: The folder. The lock is its file `.lock`, which is removed at the end.
        advice: What to do where the folder is in use; the last words of the message.
        wait_s: Seconds to wait for the lock: the processes of a killed command need a moment to end.

    Yields:
        The descriptor of the lock.

    Raises:
        FolderInUseError: Where another process holds the lock for longer than that.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    descriptor = _acquire(folder, advice, wait_s)
    _held.add(descriptor)
    try:
        yield descriptor
    finally:
        (folder / NAME).unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
        with suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(folder: Path, advice: str, wait_s: float) -> int:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):
            if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
                raise  # a file is in the way
            continue  # the process before has just removed the empty folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(descriptor, folder / NAME):
                return descriptor
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise FolderInUseError(f"{folder}: another command is at work there; {advice}.") from error
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second command there.")
            return descriptor
        os.close(descriptor)


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file still stands at a path: the process before removes its lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """Close the locks in a forked process: one that outlives a killed command would hold them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


__all__ = ["FolderInUseError", "locked_folder"]
