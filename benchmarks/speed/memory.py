"""Peak memory of a process that trains: ours, compiling included, and torchvision's.

    python -m benchmarks.speed.memory ours

Each process takes a few steps and prints the largest number of bytes that it held (`VmHWM` of /proc/self/status;
`ru_maxrss` would begin with the peak of the process that started it).
"""

import functools
import pathlib
import re
import subprocess
import sys

from benchmarks.speed.measure import Sides

STEPS = 3
SIDES = ("ours", "peer")


def peak_bytes() -> int:
    """Returns the most memory that this process has held so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE).group(1))


def train_and_print(side: str) -> None:
    """Takes the steps of one side in this process, and prints its peak."""
    if side == "ours":
        from benchmarks.speed import detector
        from klbox_jax.compilation import give_back_freed_memory

        step = detector.train_runner("kl")
        # A training too returns the memory that it used to make its parameters.
        give_back_freed_memory()
    else:
        from benchmarks import torchvision_peer as peer

        step = peer.make_train_step()
    for _ in range(STEPS):
        step()
    print(peak_bytes())


def peaks() -> Sides:
    """Returns the peaks of a new process of each side."""
    return Sides(*(functools.partial(_peak_of, side) for side in SIDES))


def _peak_of(side: str) -> float:
    command = [sys.executable, "-m", "benchmarks.speed.memory", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    train_and_print(sys.argv[1])
