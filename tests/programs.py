"""Programs that tests run: in this process, with their exit code, or in processes of their own."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from klbox_jax.cli import report_user_errors
from klbox_jax.main import run

ROOT = pathlib.Path(__file__).parents[1]
# Variables that announce several processes; a process started here sees only those that it is given.
LAUNCHER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
)


def exit_code_of(config, workdir, mode, **arguments):
    """Returns what a program that runs this mode exits with: a status, or the text of a user error."""
    program = report_user_errors(lambda argv: run(config, str(workdir), mode, **arguments))
    with pytest.raises(SystemExit) as caught:
        program(["program"])
    return caught.value.code


def start_python(*arguments, devices=1, cwd=ROOT, **variables):
    """Starts Python on simulated CPU devices, with pipes for its output; code after "-c" may be indented."""
    arguments = [
        textwrap.dedent(argument) if before == "-c" else str(argument)
        for before, argument in zip(("", *arguments), arguments, strict=False)
    ]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, timeout=300):
    """Waits for processes and returns the (output, errors) of each; none of them survives this call."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_python(*arguments, status=0, **options):
    """Runs Python to its end and returns (output, errors); fails if its status is another one."""
    process = start_python(*arguments, **options)
    ((output, errors),) = finish(process)
    assert process.returncode == status, errors
    return output, errors


def free_address():
    """Returns the address of a free port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"
