"""Several processes of one command that act as one (ours)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from training.support.commands import INPUT_ERRORS, describe_error

if TYPE_CHECKING:  # importing it takes seconds
    from accelerate import Accelerator

T = TypeVar("T")


def agree(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decides, in every process.

    Args:
        accelerator: The processes.
        decide: Runs in the main process alone. Its result must be picklable.

    Raises:
        ValueError, OSError, pickle.UnpicklingError: What `decide` raises about the input, in the main process. The other processes
            end without a word, so that the message comes once.
    """
    from accelerate.utils import broadcast_object_list

    said: list[Any] = [None, None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            said[0] = decide()
        except INPUT_ERRORS as raised:
            error, said[1] = raised, describe_error(raised) or str(raised)
    broadcast_object_list(said)
    if error is not None:
        raise error
    if said[1] is not None:
        sys.exit(1)
    return said[0]


__all__ = ["agree"]
