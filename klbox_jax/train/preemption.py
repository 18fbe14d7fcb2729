"""Stops a run on SIGTERM, which schedulers send, and on SIGINT (Ctrl-C), without loss.

The first signal is only recorded; the run asks for it at points where it can stop without loss. A second signal ends
the process at once.
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
    """Records stop signals inside its `with` block; in any thread but the main one it receives none."""

    def __init__(self):
        self._received = 0
        self._handlers_before: dict[int, object] = {}
        self._largest_received: jax.Array | None = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers_before.items():
            # None is a handler that was not set from Python and cannot be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def signal(self) -> int:
        """Returns the number of the signal that all processes stop for now, 0 if there is none.

        With several processes, all of them must call it equally often. Each call starts a reduction over the signals
        of all processes, queued on the devices after the running step, and returns the result of the reduction of the
        call before. So no process waits for it, and a signal to one process stops all of them after the same step.
        """
        if jax.process_count() == 1:
            return self._received
        result = 0 if self._largest_received is None else int(self._largest_received)
        self._largest_received = _largest(self._received)
        return result

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        # The next signal ends the process without Python, which a compiler can keep busy for minutes.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        # Without logging, which the signal may have interrupted inside a line.
        name = signal.Signals(number).name
        os.write(2, f"{name}: stopping as soon as nothing is lost; a second signal stops at once\n".encode())


def _largest(number: int) -> jax.Array:
    """Returns the maximum of a number over all processes."""
    mesh = make_mesh()
    return _maximum(mesh)(put_batch(np.full(len(mesh.local_devices), number, np.int32), mesh))


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=replicated(mesh))
