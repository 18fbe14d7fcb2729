"""A checkpoint of eight devices is restored on one and on four; `test_safetensors_file.py` has exported weights."""

import jax
import numpy as np
import pytest

from klbox_jax.distributed import batch_sharding, replicated
from klbox_jax.train.checkpoints import Checkpoints, find_fault, restore_params
from klbox_jax.train.state import TrainState
from tests.bits import assert_same_bits
from tests.meshes import mesh_of
from tests.programs import run_python

# The momentum is split among the devices, unlike any state of the package: split arrays move too.
SAVE = """
import sys
import jax
from klbox_jax.distributed import make_mesh
from klbox_jax.train.checkpoints import Checkpoints
from tests.train.test_checkpoints_move import numbers, on_mesh

mesh = make_mesh()
assert mesh.size == 8
with Checkpoints(sys.argv[1], max_to_keep=1) as checkpoints:
    state = on_mesh(numbers(), mesh)
    assert len(state.opt_state["momentum"].addressable_shards) == 8
    assert state.opt_state["momentum"].addressable_shards[0].data.shape == (2, 3)
    checkpoints.save(state)
"""


def numbers():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 3)).astype(np.float32)
    kernel[0] = np.nan, -0.0, 1e-42
    half = jax.numpy.bfloat16
    return TrainState(
        step=np.int32(7),
        params={"kernel": kernel, "scale": rng.normal(size=(5, 7)).astype(half)},
        opt_state={"momentum": rng.normal(size=(16, 3)).astype(np.float32), "count": np.int32(6)},
    )


def on_mesh(state, mesh):
    """The momentum in as many parts as there are devices, everything else whole on each of them."""
    whole = jax.device_put(state, replicated(mesh))
    parts = jax.device_put(state.opt_state["momentum"], batch_sharding(mesh))
    return whole.replace(opt_state={**whole.opt_state, "momentum": parts})


@pytest.fixture(scope="module")
def saved(module_path):
    """The folder of a checkpoint that a process with eight devices has written."""
    run_python("-c", SAVE, module_path, devices=8)
    assert find_fault(module_path / "7") is None
    return module_path


@pytest.mark.parametrize("count", [1, 4])
def test_from_eight_devices_to_fewer_bit_for_bit(saved, count):
    mesh = mesh_of(count)
    target = on_mesh(jax.tree.map(np.zeros_like, numbers()), mesh)
    with Checkpoints(saved, max_to_keep=1) as checkpoints:
        state = checkpoints.restore(target)
    assert_same_bits(state, numbers())
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
        assert leaf.devices() == set(jax.devices()[:count])
    assert state.opt_state["momentum"].addressable_shards[0].data.shape == (16 // count, 3)


def test_and_from_four_to_one(saved, tmp_path):
    with Checkpoints(saved, max_to_keep=1) as checkpoints:
        state = checkpoints.restore(on_mesh(numbers(), mesh_of(4)))
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        state = checkpoints.restore(on_mesh(numbers(), mesh_of(1)))
    assert_same_bits(state, numbers())


def test_the_parameters_alone_need_no_devices(saved):
    step, params = restore_params(saved)
    assert step == 7
    assert_same_bits(params, numbers().params)
