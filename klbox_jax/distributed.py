"""Start-up of several processes, the device mesh, and the placement of arrays on it.

The same program runs on one device and on many hosts. The mesh has the single axis `data`. Parameters are replicated
and batches are split along their first axis. So a compiled step sees global arrays, and the compiler inserts the
reductions.
"""

import os
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Variables in which launchers give the number of processes; jax.distributed reads the rest from the launcher.
_LAUNCHER_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

# A process without a heartbeat for this time counts as dead, and the others stop.
HEARTBEAT_TIMEOUT_SECONDS = 30


def initialize(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects the processes of a run if there are several; otherwise does nothing.

    Call it before anything touches a device. The number of processes comes from the arguments, from the variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, from Slurm or Open MPI, or from the list of
    workers of a TPU slice.

    Args:
        coordinator_address: `host:port` of process 0, the same in every process.
        num_processes: number of processes.
        process_id: rank of this process, from 0.

    Raises:
        ValueError: there are several processes, but their number, the rank of this one or the address of process 0
            is missing.
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
            f"the run has several processes, but {', '.join(missing)} is not given; set all of "
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
    """Returns the sharding of a batch: the first axis is split among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
        batch: pytree of NumPy arrays; their first axis is this process's share of the global batch.
        mesh: the mesh of `make_mesh`.

    Returns:
        The same pytree of global arrays; their first axis is the global batch in the order of the processes.

    Raises:
        ValueError: the rows cannot be split evenly among this process's devices.
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
    """Returns a pytree of whole NumPy arrays in every process; with several processes, all of them must call it.

    Args:
        tree: pytree of global arrays that are split along their first axis, or of NumPy arrays that are this process's
            share of such arrays.
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
    """Returns True in process 0, the only one of a run that writes files."""
    return jax.process_index() == 0
