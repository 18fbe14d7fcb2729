"""Compiles functions: counts their traces, keeps compiled programs on disk, and returns memory that compilers freed."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import jax

from klbox_jax.files import cache_folder


class CountedJit:
    """`jax.jit` of a function of positional arguments, with the number of its traces."""

    def __init__(self, function: Callable, **options: Any):
        """Takes the function and the options of `jax.jit`."""
        # A list of its own: a closure over `self` would make a cycle, which keeps the compiled programs alive.
        traces: list[None] = []
        self._traces = traces

        @functools.wraps(function)
        def traced(*arguments):
            # Runs only while JAX traces.
            traces.append(None)
            return function(*arguments)

        self._jitted = jax.jit(traced, **options)

    @property
    def num_traces(self) -> int:
        """The number of traces so far, one for each combination of argument shapes and types."""
        return len(self._traces)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function; traces and compiles it first if the shapes are new."""
        return self._jitted(*arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Traces and lowers the function for arguments, which may be `jax.ShapeDtypeStruct`."""
        return self._jitted.lower(*arguments)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is already given another one."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def give_back_freed_memory() -> None:
    """Returns freed memory to the operating system if the C library is glibc; does nothing with another one.

    Compiling a large training step frees hundreds of megabytes in small pieces. glibc keeps them, so that the arrays
    of the step would need as much memory again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
