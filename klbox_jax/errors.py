"""Exceptions whose message is one sentence for the user: the file or field, the reason, the remedy."""

import signal


class WorkdirError(ValueError):
    """The folder cannot be used for this run; the message names the folder and the remedy."""


class CheckpointError(RuntimeError):
    """Checkpoints cannot be used; the message names the folder and the remedy."""


class Preempted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was told to stop, and has; the message says where it stands.

    Attributes:
        status: what the process should exit with, 128 and the number of the signal, as shells have it.
    """

    def __init__(self, signal_number: int, where: str):
        super().__init__(f"{signal.Signals(signal_number).name}: {where}")
        self.status = 128 + int(signal_number)
