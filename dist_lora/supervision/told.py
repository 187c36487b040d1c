"""Errors as they are told to the user, by a command or by a rank on behalf of all. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback

from dist_lora.errors import DistLoraError, StopNow, StoppedOnRequest
from dist_lora.text import without_cpp_stack

_GONE = (errno.EIO, errno.EPIPE, errno.EBADF)


def report_error(error: BaseException, who: str = "") -> None:
    """Print an error; see ``error_text``. Under torchrun also leave it the text, which it shows last."""
    text = error_text(error, who)
    tell(text)
    from dist_lora.world.launcher import note_for_torchrun

    note_for_torchrun(os.environ, text)


def tell(text: str) -> None:
    """Print a line to the user; to a terminal that is gone, nothing: a run goes on, or saves and stops, without it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            return
        with contextlib.suppress(
            OSError, ValueError
        ):  # what it couldn't write would be written again at the process's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def error_text(error: BaseException, who: str = "") -> str:
    """An error as it is shown: a user's error as one message, an internal error with its stack.

    ``who`` is the rank that failed, where that is of use.
    """
    if isinstance(error, StoppedOnRequest | StopNow | KeyboardInterrupt):
        return str(error) or "interrupted"
    message, stack = without_cpp_stack(str(error)), ""
    if not isinstance(error, DistLoraError):
        formatted = traceback.TracebackException.from_exception(error)
        last = list(formatted.format_exception_only())
        message = without_cpp_stack("".join(last).strip())
        stack = "\n" + "".join(list(formatted.format())[: -len(last)]).rstrip()
    return f"error: {who + ': ' if who else ''}{message}{stack}"
