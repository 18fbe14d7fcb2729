"""One program from one device to many hosts: start-up, the mesh, and where arrays lie on it.

The mesh has the single axis `data`. Parameters are replicated and batches are cut along their first axis, so
that a compiled step sees global arrays and the compiler inserts the reductions.
"""

import os
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Where launchers say how many processes they started; jax.distributed reads the rest from them.
_LAUNCHER_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

# A process that was not heard of for so long is taken for dead, and the others stop.
HEARTBEAT_TIMEOUT_SECONDS = 30


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of this run, if several were announced; otherwise does nothing.

    Call it before anything touches a device. Processes are announced by the arguments, by the variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, by Slurm or Open MPI, or by the list
    of workers of a TPU slice.

    Args:
        coordinator_address: `host:port` of process 0, the same in every process.
        num_processes: how many processes take part.
        process_id: rank of this process, from 0.

    Raises:
        ValueError: several processes are announced, but their number, this one's rank or the address of the
            first is missing.
    """
    num_processes = _integer("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _integer("JAX_PROCESS_ID") if process_id is None else process_id
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    by_launcher = any((_integer(name) or 1) > 1 for name in _LAUNCHER_COUNTS) or _tpu_workers() > 1
    several = num_processes > 1 if num_processes is not None else address is not None or by_launcher
    if not several or jax.distributed.is_initialized():
        return
    named = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": num_processes,
        "JAX_PROCESS_ID": process_id,
    }
    missing = [name for name, value in named.items() if value is None]
    if missing and not by_launcher:
        raise ValueError(
            f"several processes are announced, but {', '.join(missing)} is not given; set all of "
            f"{', '.join(named)}, or none of them to run a single process"
        )
    jax.distributed.initialize(
        address, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS
    )


def make_mesh() -> Mesh:
    """Returns the mesh of all devices of all processes, with the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of parameters: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first axis is dealt to the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
        batch: pytree of NumPy arrays, each with this process's share of the global batch as its first axis.
        mesh: the mesh of `make_mesh`.

    Returns:
        The same pytree of global arrays, whose first axis is the global batch in the order of the processes.

    Raises:
        ValueError: the rows cannot be dealt evenly to this process's devices.
    """
    sharding = batch_sharding(mesh)
    num_devices = len(mesh.local_devices)

    def put(path, rows):
        if rows.shape[0] % num_devices:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has {rows.shape[0]} rows, which {num_devices} devices cannot "
                "share evenly; choose a batch size that is a multiple of the number of devices"
            )
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree_util.tree_map_with_path(put, batch)


def gather(tree: Any) -> Any:
    """Returns the pytree of NumPy arrays in every process, each whole along its first axis.

    Args:
        tree: pytree of global arrays that are cut along their first axis, or of NumPy arrays which are this
            process's share of such ones. With several processes, all of them call it.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name} must be a whole number, not {text!r}") from None


def _tpu_workers() -> int:
    return len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))


def is_writer() -> bool:
    """True in the one process of a run that writes files."""
    return jax.process_index() == 0
