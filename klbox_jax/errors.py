"""Exceptions with a message for the user: one sentence with the file or field, the reason and the remedy."""

import signal


def one_line(error: BaseException) -> str:
    """Returns the message of an error as one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class WorkdirError(ValueError):
    """A folder or file cannot be used for this run; the message names it and the remedy."""


class CheckpointError(RuntimeError):
    """Checkpoints cannot be used; the message names the folder and the remedy."""


class Preempted(Exception):  # noqa: N818 (it is no error)
    """A signal stopped the run; the message says at which point.

    Attributes:
        status: exit status for the process: 128 plus the number of the signal, the convention of shells.
    """

    def __init__(self, signal_number: int, where: str):
        super().__init__(f"{signal.Signals(signal_number).name}: {where}")
        self.status = 128 + int(signal_number)
