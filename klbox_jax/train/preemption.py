"""How a run ends when it is told to: SIGTERM, as schedulers send it, and SIGINT, which is Ctrl-C.

The first signal is only noted, and the run asks for it where it can stop without loss. A second one ends the
process at once.
"""

import functools
import os
import signal
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from klbox_jax.distributed import make_mesh, put_batch, replicated

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Listens for the signals inside its `with` block; outside of the main thread it hears none."""

    def __init__(self):
        self._heard = 0
        self._before: dict[int, object] = {}
        self._asked: jax.Array | None = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def signal(self) -> int:
        """Returns the number of the signal that all processes stop for now; 0 to go on.

        With several processes, all of them call it equally often. A call then returns the answer to the
        question of the call before, which was put to the devices behind the step that ran then: no one waits
        for it, and a signal to any process stops all of them after the same step.
        """
        if jax.process_count() == 1:
            return self._heard
        answer = 0 if self._asked is None else int(self._asked)
        self._asked = _largest(self._heard)
        return answer

    def _hear(self, number: int, frame: object) -> None:
        self._heard = number
        # The next signal need not wait for Python, which a compiler can keep busy for minutes.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Not by logging, which may be in the middle of a line.
        name = signal.Signals(number).name
        os.write(2, f"{name}: stopping as soon as nothing is lost; a second signal stops at once\n".encode())


def _largest(number: int) -> jax.Array:
    mesh = make_mesh()
    return _maximum(mesh)(put_batch(np.full(len(mesh.local_devices), number, np.int32), mesh))


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=replicated(mesh))
