import jax
import numpy as np
import optax

from klbox_jax.distributed import make_mesh, put_batch, replicated
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import make_optimizer
from klbox_jax.train.step import compile_train_step, create_state
from tests.meshes import mesh_of
from tests.thin import random_batch, thin_model


def test_four_devices_are_one():
    # Unequal images: of 1, 2, no and 4 objects, the first of which only fills the batch. So a mean that was
    # taken on each device by itself would show.
    batch = random_batch(size=4)
    valid, image_valid = np.array(batch.gt.valid), np.ones(4, bool)
    valid[2], image_valid[0] = False, False
    batch = batch.replace(gt=batch.gt.replace(valid=valid), valid=image_valid)
    model = thin_model("loss=kl")
    # Plain SGD: the step is the gradient. Adam's first one is its sign, whatever its size.
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer(
        name="sgd", schedule=schedule, weight_decay=0.01, momentum=0.9, clip_norm=10.0, frozen=()
    )
    start = jax.device_get(create_state(model, optimizer, batch=dummy_batch((64, 96)), seed=0))

    def after_two_steps(mesh):
        step = compile_train_step(mesh, model=model, optimizer=optimizer, schedule=schedule, seed=0)
        state, scalars = jax.device_put(start, replicated(mesh)), []
        for _ in range(2):
            state, numbers = step(state, put_batch(batch, mesh))
            scalars.append(jax.device_get(numbers))
        return jax.device_get(state), scalars

    four = make_mesh()
    assert four.size == 4
    expected_state, expected_scalars = after_two_steps(mesh_of(1))
    state, scalars = after_two_steps(four)
    for found, expected in zip(scalars, expected_scalars, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True)]
    assert max(moved) > 1e-3
