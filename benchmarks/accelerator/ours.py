"""Measurements of our side: their programs are compiled together, then they run one after the other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jaxlib

from benchmarks.accelerator.correctness import make_correctness_job
from benchmarks.accelerator.operations import (
    make_nms_job,
    make_pooling_job,
    make_postprocess_job,
    make_product_job,
)
from benchmarks.accelerator.outcomes import failure, measured
from benchmarks.accelerator.plan import Cell
from benchmarks.accelerator.program import Job, Program, compile_program
from benchmarks.accelerator.sizes import Sizes
from benchmarks.accelerator.steps import make_inference_job, make_train_job

JOBS: dict[str, Callable[[Cell, Sizes, jax.Device], Job]] = {
    "correctness": make_correctness_job,
    "product": make_product_job,
    "train": make_train_job,
    "inference": make_inference_job,
    "postprocess": make_postprocess_job,
    "nms": make_nms_job,
    "roi_align": make_pooling_job,
}


def environment() -> dict[str, Any]:
    """Returns the device and the versions of JAX's side."""
    import flax
    import numpy
    import optax

    device = jax.devices()[0]
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "runtime": device.client.platform_version,
        },
        "versions": {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax, numpy)},
    }


def group_cells(cells: Sequence[Cell], sizes: Sizes) -> list[tuple[Cell, ...]]:
    """Returns the cells in groups whose programs are compiled together."""
    count = sizes.compile_together
    return [tuple(cells[start : start + count]) for start in range(0, len(cells), count)]


def measure_group(cells: Sequence[Cell], sizes: Sizes) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yields each cell with its outcome; an error of one cell leaves the others."""
    device = jax.devices()[0]
    jobs: dict[Cell, tuple[Job, dict[str, Future[Program]]]] = {}
    # Tracing needs the interpreter, compilers do not: one program is traced while others are compiled.
    with ThreadPoolExecutor(sizes.compile_together) as compilers:
        for cell in cells:
            try:
                job = JOBS[cell.kind](cell, sizes, device)
                jobs[cell] = (
                    job,
                    {
                        name: compilers.submit(compile_program, lower())
                        for name, lower in job.programs.items()
                    },
                )
            except Exception as error:
                yield cell, failure(error)
    for cell, (job, compiling) in jobs.items():
        try:
            yield cell, measured(job.run({name: future.result() for name, future in compiling.items()}))
        except Exception as error:
            yield cell, failure(error)
