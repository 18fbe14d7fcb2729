"""Runs the `main` of a program with absl flags: logging, flags, and user errors as one line."""

import logging as python_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from klbox_jax.errors import CheckpointError, Preempted, one_line

# Packages whose flags a program's `--help` shows; flags of libraries are behind `--helpfull`.
_OWN_PACKAGES = ("experiments", "benchmarks", "checks", "klbox_jax")


def report_user_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Wraps a program's main so that it prints user errors as one line instead of a traceback.

    The exit status is 0 on success, 1 if config, data, weights or folder are wrong, 143 after SIGTERM and 130 after
    SIGINT. `KLBOX_TRACEBACK=1` in the environment shows where an error was raised.
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
        except (ValueError, CheckpointError, FloatingPointError, OSError) as error:
            if os.environ.get("KLBOX_TRACEBACK"):
                raise
            logging.flush()
            sys.exit(f"error: {one_line(error)}")

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
    """Parses the command line; prints errors, such as an unknown config field, as one line.

    `--help` prints the flags of this package's programs and exits with 0.
    """
    if any(argument in ("-h", "--help", "-help", "--helpshort") for argument in argv[1:]):
        print(own_help(argv[0]))
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


def own_help(program: str) -> str:
    """Returns the docstring of the program and its flags, those of this package's modules that it imports too."""
    modules = [
        name
        for name in flags.FLAGS.flags_by_module_dict()
        if name == program or name.partition(".")[0] in (*_OWN_PACKAGES, "__main__")
    ]
    parts = [(sys.modules["__main__"].__doc__ or "").strip()]
    parts += [flags.FLAGS.module_help(name) for name in modules if flags.FLAGS.flags_by_module_dict()[name]]
    return "\n\n".join(parts)


def start(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as the program: sets up logging, parses the flags, reports user errors, and exits."""
    set_up_logging()
    app.run(report_user_errors(main), flags_parser=parse_flags)
