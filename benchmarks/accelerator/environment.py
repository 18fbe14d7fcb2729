"""Facts that make a run repeatable: commit, driver, interpreter and environment variables."""

import os
import pathlib
import platform
import subprocess
from typing import Any

VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_PLATFORMS",
)


def describe_host(root: pathlib.Path) -> dict[str, Any]:
    """Returns the facts that need neither JAX nor torch; `root` is the repository."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    changed = _output_of(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {
        "commit": _output_of(["git", "-C", str(root), "rev-parse", "HEAD"]),
        "uncommitted changes": None if changed is None else bool(changed),
        "driver": _output_of(query),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _output_of(command: list[str]) -> str | None:
    """Returns the output of a command, or None if it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
