"""Runs the `main` of a program: logging, flags, and user errors as one line."""

import logging as python_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from klbox_jax.errors import CheckpointError, Preempted


def report_user_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Wraps a program's main so that it prints user errors as one line instead of a traceback.

    The exit status is 0 on success, 1 if config, data, weights or folder are wrong, 143 after SIGTERM and 130 after
    SIGINT.
    """

    def wrapped(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError("Too many command-line arguments.")
        try:
            main(argv)
        except Preempted as stop:
            logging.flush()
            print(f"stopped by {stop}", file=sys.stderr)
            sys.exit(stop.status)
        except (ValueError, CheckpointError, FloatingPointError) as error:
            if os.environ.get("KLBOX_TRACEBACK"):
                raise
            logging.flush()
            sys.exit(f"error: {error}\n(set KLBOX_TRACEBACK=1 to see where it was raised)")

    return wrapped


def set_up_logging() -> None:
    """Shows the messages of this package, and only errors of libraries that log much."""
    logging.set_verbosity(logging.INFO)
    libraries = ("orbax", "grain", "tensorflow_datasets", "etils", "/jax/_src/")

    def is_ours(record) -> bool:
        return record.levelno >= python_logging.ERROR or not any(
            name in record.pathname for name in libraries
        )

    logging.get_absl_handler().addFilter(is_ours)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; prints errors, such as an unknown config field, as one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")


def start(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as the program: sets up logging, parses the flags, reports user errors, and exits."""
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
