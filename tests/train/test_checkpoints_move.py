"""A checkpoint of eight devices goes on on one and on four; `test_safetensors_file.py` has the exported weights."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from klbox_jax.distributed import batch_sharding, replicated
from klbox_jax.train.checkpoints import Checkpoints, find_fault, restore_params
from klbox_jax.train.state import TrainState

ROOT = pathlib.Path(__file__).parents[2]
# The momentum is dealt to the devices, as no state of ours is: arrays that are cut move too.
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


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), devices=jax.devices()[:count], axis_types=(AxisType.Auto,))


def bits(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(p): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for p, x in leaves}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint that a process with eight devices has written."""
    folder = tmp_path_factory.mktemp("eight")
    variables = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SAVE, str(folder)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert find_fault(folder / "7") is None
    return folder


@pytest.mark.parametrize("count", [1, 4])
def test_from_eight_devices_to_fewer_bit_for_bit(saved, count):
    mesh = mesh_of(count)
    target = on_mesh(jax.tree.map(np.zeros_like, numbers()), mesh)
    with Checkpoints(saved, max_to_keep=1) as checkpoints:
        state = checkpoints.restore(target)
    assert bits(state) == bits(numbers())
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
    assert bits(state) == bits(numbers())


def test_the_parameters_alone_need_no_devices(saved):
    step, params = restore_params(saved)
    assert step == 7
    assert bits(params) == bits(numbers().params)
