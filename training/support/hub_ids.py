"""Options that take a folder or an id on the Hub (ours)."""

from os import PathLike
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def folder_or_id(source: str | PathLike[str], option: str | None = None) -> str:
    """Refuse a folder that is not there, before a library takes its path for an id and asks the Hub.

    A path is what is absolute, begins with "." or "~", has more than one slash, or lies in a folder that exists; also what cannot
    be an id on the Hub, "name" or "owner/name". Everything else may be an id.

    Args:
        source: What was given.
        option: The name of the option, for the message.

    Returns:
        The source, with "~" replaced by the home folder.

    Raises:
        FileNotFoundError: Where the source is a path, and there is no such folder.
        NotADirectoryError: Where the source is a file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    prefix = f"{option}: " if option else ""
    if path.exists():
        raise NotADirectoryError(f"{prefix}{source} is a file; give a folder or an id on the Hub.")
    if _is_path(str(source)):
        raise FileNotFoundError(f"{prefix}There is no folder {source}.")
    return str(source)


def _is_path(text: str) -> bool:
    path = Path(text)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        return True
    if "/" in text and path.parent.is_dir():
        return True
    try:
        validate_repo_id(text)
    except HFValidationError:
        return True
    return False


__all__ = ["folder_or_id"]
