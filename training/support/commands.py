"""How a command ends when its input is wrong: with one sentence, not with a traceback (ours)."""

import logging
import pickle
import sys
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError

# errors that bad input raises; the last one is of a model's configuration
INPUT_ERRORS = (ValueError, OSError, pickle.UnpicklingError, StrictDataclassError)


def describe_error(error: Exception) -> str | None:
    """One sentence about an error; `None` where the code is at fault, not the input.

    A check of a configuration and a process that prepares batches wrap errors. The sentence is then that of the wrapped error.
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
    """Run a command. An error about its input ends the process with "error: …" on stderr and exit code 1.

    The traceback of such an error is logged at the level DEBUG. All other errors keep their traceback.

    Args:
        main: The command.
        describe: Gives the sentence about an error, or `None` where the code is at fault.
        also: Further kinds of errors that may be about the input.
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
    """The text of an error in one line; the name of its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
