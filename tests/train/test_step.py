import jax
import jax.numpy as jnp
import numpy as np

from klbox_jax.train.step import stop_frozen


def test_frozen_parameters_get_no_gradient():
    params = {"backbone": {"stem": jnp.ones(2), "stem2": jnp.ones(2)}, "head": jnp.ones(3)}

    def loss(params):
        return sum(
            jnp.square(leaf).sum() for leaf in jax.tree.leaves(stop_frozen(params, ("backbone/stem",)))
        )

    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["backbone"]["stem"], [0.0, 0.0])
    # A prefix ends at a whole name: stem2 is not stem.
    np.testing.assert_array_equal(grads["backbone"]["stem2"], [2.0, 2.0])
    np.testing.assert_array_equal(grads["head"], [2.0, 2.0, 2.0])
