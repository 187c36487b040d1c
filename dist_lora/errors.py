"""Errors by who can fix them; each kind has its exit code.

Every error also inherits from a standard class, so that callers who don't know this package can catch it. A message says
where (the setting, file or tensor by its full name), what was found, what was expected, and what to do.
"""

import errno

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_PLAN = 3
EXIT_DAMAGED = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may start the run again


class DistLoraError(Exception):
    """Any error that is shown to the user as one message, without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(DistLoraError, ValueError):
    """A config file, an override or an argument is wrong."""

    exit_code = EXIT_USER


class RunInUse(ConfigError):
    """Another process is writing the same run."""


class DataError(DistLoraError, ValueError):
    """The training or evaluation data is not what the config declares."""

    exit_code = EXIT_USER


class ReadError(DistLoraError, RuntimeError):
    """Data that are there couldn't be read, or changed meanwhile: the same command may succeed."""


class OwnCodeError(DistLoraError, RuntimeError):
    """A format, metric or callback of the user's own raised an error, or returned what it must not."""

    exit_code = EXIT_USER


class PlanError(DistLoraError, MemoryError):
    """The run doesn't fit the machines it is given."""

    exit_code = EXIT_PLAN


class WeightsError(DistLoraError, OSError):
    """A file of the base model is missing, damaged or belongs to another model."""

    exit_code = EXIT_DAMAGED


class AdapterError(DistLoraError, OSError):
    """An adapter folder is damaged or doesn't belong to this base."""

    exit_code = EXIT_DAMAGED


class CheckpointError(DistLoraError, OSError):
    """A checkpoint is damaged or incomplete."""

    exit_code = EXIT_DAMAGED


class SaveError(DistLoraError, OSError):
    """Something could not be written: disk full, no permission."""


class UnwritablePath(SaveError):
    """The place that a user has named can't be written at all: it doesn't exist, is no folder, or is another user's."""

    exit_code = EXIT_USER


_DENIED = frozenset((errno.EACCES, errno.EPERM))
_WRONG_PLACE = _DENIED | {
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EROFS,
}


def cannot_write(message: str, error: OSError) -> SaveError:
    """The error for a place that the system refuses to write, before anything is lost by it.

    ``UnwritablePath`` where the place is wrong, so that the same command would fail again; ``SaveError`` where the disk
    is full or faulty. What a run writes later is always a ``SaveError``: its place was writable when it began.
    """
    return (UnwritablePath if error.errno in _WRONG_PLACE else SaveError)(message)


def cannot_read(message: str, error: OSError) -> DataError | ReadError:
    """The error for data that the system doesn't read: the user's mistake where the place is wrong, else the disk's."""
    return (DataError if error.errno in _WRONG_PLACE else ReadError)(message)


class TrainingError(DistLoraError, ArithmeticError):
    """Training diverged or can't work: NaN, infinity, an adapter without a gradient."""


class HangError(DistLoraError, TimeoutError):
    """A rank made no progress for as long as the config allows."""


class OutOfMemory(DistLoraError, MemoryError):
    """A device or the host ran out of memory."""


class RankError(DistLoraError, RuntimeError):
    """Another process of the run failed; this one exits too, silently and with the same code."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class JoinError(DistLoraError, TimeoutError):
    """Not all processes of a run joined the rendezvous."""


class StoppedOnRequest(DistLoraError, InterruptedError):
    """A signal asked the run to stop; everything is saved and the same command resumes it."""

    exit_code = EXIT_STOPPED


class StoppedForGood(StoppedOnRequest):
    """The user stopped the run by hand: everything is saved, and no script may start it again."""


class StopNow(BaseException):
    """A signal asked this rank to stop before there was anything to save: the same command starts over.

    Not an ``Exception``: code that converts a stage's errors into one of ours must let it pass.
    """

    exit_code = EXIT_STOPPED


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``.

    A file that this user may not read isn't damaged: that is the user's mistake, whichever kind of error reports it.
    """
    code = error.exit_code if isinstance(error, DistLoraError | StopNow) else EXIT_FAILED
    cause: BaseException | None = error
    while code == EXIT_DAMAGED and cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DENIED:
            return EXIT_USER
        cause = cause.__cause__
    return code
