import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from klbox_jax import distributed
from tests.programs import LAUNCHER_VARIABLES, finish, free_address, start_python

pytestmark = pytest.mark.four_devices


@pytest.fixture
def calls(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **settings: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_NTASKS": "1"}, {"JAX_NUM_PROCESSES": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}],
)
def test_a_single_process_joins_nobody(calls, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert calls == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
            ("h:1", 4, 0),
        ),
        ({"SLURM_NTASKS": "2"}, (None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
    ],
)
def test_announced_processes_are_joined(calls, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert calls == [expected]


def test_arguments_go_before_variables(calls, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    distributed.initialize("h:2", 2, 1)
    assert calls == [("h:2", 2, 1)]


def test_what_is_missing_is_named(calls, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="but JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not given"):
        distributed.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number, not 'two'"):
        distributed.initialize()
    assert calls == []


def test_mesh_and_shardings():
    mesh = distributed.make_mesh()
    assert mesh.shape == {"data": 4}
    assert mesh.axis_types == (AxisType.Auto,)
    assert distributed.replicated(mesh).is_fully_replicated
    assert distributed.batch_sharding(mesh).spec == PartitionSpec("data")


def test_put_batch_splits_the_rows_among_the_devices():
    mesh = distributed.make_mesh()
    batch = {
        "images": np.arange(8 * 2 * 3, dtype=np.uint8).reshape(8, 2, 3),
        "ids": np.arange(8),
        "none": None,
    }
    put = distributed.put_batch(batch, mesh)
    assert put["none"] is None
    for name in ("images", "ids"):
        assert put[name].sharding == distributed.batch_sharding(mesh)
        np.testing.assert_array_equal(put[name], batch[name])
        shards = sorted(put[name].addressable_shards, key=lambda shard: shard.index[0].start)
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, batch[name][2 * i : 2 * i + 2])
        assert len({shard.device for shard in shards}) == 4


def test_put_batch_names_the_array_that_does_not_divide():
    with pytest.raises(ValueError, match=r"\['ids'\] has 6 rows, which 4 devices"):
        distributed.put_batch({"ids": np.arange(6)}, distributed.make_mesh())


TWO_PROCESSES = """
    import pathlib, sys
    import jax, jax.numpy as jnp, numpy as np
    from klbox_jax import distributed
    from klbox_jax.train.checkpoints import Checkpoints, find_fault, restore_params
    from klbox_jax.train.state import TrainState

    distributed.initialize()
    mesh, me, directory = distributed.make_mesh(), jax.process_index(), pathlib.Path(sys.argv[1])
    assert (jax.process_count(), mesh.shape["data"]) == (2, 4)
    batch = distributed.put_batch({"x": np.arange(4.0) + 4 * me}, mesh)
    assert batch["x"].shape == (8,)
    assert float(jax.jit(lambda x: (x * jnp.arange(8.0)).sum())(batch["x"])) == 140.0  # sum of i^2, i < 8

    def make(step):
        state = TrainState(np.int32(step), {"w": np.full(3, step, np.float32)}, {})
        return jax.device_put(state, distributed.replicated(mesh))

    with Checkpoints(directory, max_to_keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make(step))
        assert checkpoints.steps() == [2, 3]
    if me == 0:
        (directory / "3" / "digests.json").unlink()
    with Checkpoints(directory, max_to_keep=1) as checkpoints:
        state = checkpoints.restore(make(0))
        assert int(state.step) == 2 and np.all(np.asarray(state.params["w"]) == 2)
        checkpoints.save(make(3))
        assert checkpoints.steps() == [3]
    assert find_fault(directory / "3") is None
    assert restore_params(directory)[1]["w"].tolist() == [3, 3, 3]
    print("done", me)
"""


def test_two_processes_share_a_batch_and_its_checkpoints(tmp_path):
    variables = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    processes = [
        start_python("-c", TWO_PROCESSES, tmp_path, devices=2, **variables, JAX_PROCESS_ID=str(rank))
        for rank in range(2)
    ]
    for rank, (output, errors) in enumerate(finish(*processes, timeout=120)):
        assert f"done {rank}" in output, errors
