"""Time from the command to the first finished step of the small config, without and with a cache of programs."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.speed.measure import Sides
from configs import scenes
from klbox_jax.data.build import build_source
from klbox_jax.train.workdir import Workdir

COLD_SECONDS, WARM_SECONDS = 20.0, 6.0
# After this time something hangs.
TIMEOUT = 300.0


def seconds_to_first_step(cache: pathlib.Path) -> float:
    """Returns the seconds until the record of the first step of a new process is on disk; ends the process then.

    `cache` is the folder of the compiled programs. Raises RuntimeError if there is no record after `TIMEOUT`, or the
    training ends without one.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "klbox_jax.main", f"--config={scenes.__file__}:loss=kl"),
            *(f"--workdir={folder}/run", "--mode=train", "--config.train.log_every=1"),
        ]
        metrics, log = Workdir(f"{folder}/run").metrics, pathlib.Path(folder) / "log.txt"
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        started = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None or time.perf_counter() - started > TIMEOUT:
                        lines = log.read_text(errors="replace").splitlines()
                        raise RuntimeError(
                            f"no first step: {lines[-1] if lines else 'the training said nothing'}"
                        )
                    time.sleep(0.01)
                return time.perf_counter() - started
            finally:
                process.kill()
                process.wait()


def prepare_scenes() -> None:
    """Paints the scenes if they are missing: that happens once on a machine and is not part of a start."""
    data = scenes.get_config().data
    build_source(data, data.train_split)


def cold() -> Sides:
    """Returns starts that have an empty folder for compiled programs each."""
    prepare_scenes()

    def start() -> float:
        with tempfile.TemporaryDirectory() as cache:
            return seconds_to_first_step(pathlib.Path(cache))

    return Sides(ours=start, peer=lambda: COLD_SECONDS)


def warm() -> Sides:
    """Returns starts that all find the programs that the first one compiled."""
    prepare_scenes()
    cache = tempfile.TemporaryDirectory()
    return Sides(ours=lambda: seconds_to_first_step(pathlib.Path(cache.name)), peer=lambda: WARM_SECONDS)
