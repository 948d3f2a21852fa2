"""How the commands of this room end when something given to them is wrong: with a sentence, not a traceback (ours)."""

import logging
import pickle
import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError

# what bad input raises, the last of them in a configuration
INPUT_ERRORS = (ValueError, OSError, pickle.UnpicklingError, StrictDataclassError)


def describe_error(error: Exception) -> str | None:
    """What went wrong, in a sentence; `None` where it is a fault of ours, not of the input.

    What a check of the configuration or a process that prepares batches passes on is told in its own words.
    """
    if isinstance(error, StrictDataclassError):
        error = error.__cause__ or error
    text = str(error)
    if text.startswith("DataLoader worker"):
        return f"a process was lost that prepares batches ({text})."
    if text.startswith("Caught "):  # the last line of its traceback
        return text.strip().splitlines()[-1].partition(": ")[2]
    return None if isinstance(error, RuntimeError) else text


def run_command(
    main: Callable[[], None],
    describe: Callable[[Exception], str | None] = describe_error,
    also: tuple[type[Exception], ...] = (),
) -> None:
    """Run a command; an error about its input ends the process with "error: …" on stderr and exit code 1.

    The traceback is logged at the level DEBUG. Any other error is a fault of ours and keeps its traceback.

    Args:
        main: The command.
        describe: The error in a sentence; `None` for one that is a fault of ours after all.
        also: Further kinds of error that may be about the input.
    """
    try:
        main()
    except (*INPUT_ERRORS, *also) as error:
        said = describe(error)
        if said is None:
            raise
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        sys.exit(f"error: {said}")


def in_one_line(error: object) -> str:
    """An error's text, without its line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
