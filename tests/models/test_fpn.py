import jax
import jax.numpy as jnp
import numpy as np

from klbox_jax.models.fpn import FPN, upsample_to
from tests.thin import num_params


def stages_of(*sizes, channels):
    rng = np.random.default_rng(0)
    return {
        f"res{level}": jnp.asarray(rng.normal(size=(2, *size, depth)), jnp.float32)
        for level, (size, depth) in enumerate(zip(sizes, channels, strict=True), start=3)
    }


def test_shapes_and_parameters_of_the_shipped_pyramid():
    fpn = FPN(features=64, levels=(3, 4, 5), extra_levels=1)
    stages = {
        "res2": jnp.zeros((1, 48, 48, 32)),  # not in the pyramid
        "res3": jnp.zeros((1, 24, 24, 64)),
        "res4": jnp.zeros((1, 12, 12, 128)),
        "res5": jnp.zeros((1, 6, 6, 192)),
    }
    outputs, variables = jax.eval_shape(lambda: fpn.init_with_output(jax.random.key(0), stages))
    assert {name: level.shape for name, level in outputs.items()} == {
        "p3": (1, 24, 24, 64),
        "p4": (1, 12, 12, 64),
        "p5": (1, 6, 6, 64),
        "p6": (1, 3, 3, 64),
    }
    # Lateral 1x1: (64 + 128 + 192) * 64 + 3 * 64; output 3x3: 3 * (9 * 64 * 64 + 64).
    assert num_params(variables) == 384 * 64 + 3 * 64 + 3 * (9 * 64 * 64 + 64)


def test_sums_by_hand_under_identity_kernels():
    fpn = FPN(features=3, levels=(3, 4, 5), extra_levels=2)
    # Odd sides: 13 x 11 halves to 7 x 6 and to 4 x 3.
    stages = stages_of((13, 11), (7, 6), (4, 3), channels=(3, 3, 3))
    params = {}
    for level in (3, 4, 5):
        params[f"fpn_lateral{level}"] = {"kernel": jnp.eye(3)[None, None], "bias": jnp.zeros(3)}
        centre = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
        params[f"fpn_output{level}"] = {"kernel": centre, "bias": jnp.zeros(3)}
    outputs = fpn.apply({"params": params}, stages)

    def twice(x, height, width):
        return np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]

    p5 = np.asarray(stages["res5"])
    p4 = np.asarray(stages["res4"]) + twice(p5, 7, 6)
    p3 = np.asarray(stages["res3"]) + twice(p4, 13, 11)
    for name, expected in {
        "p3": p3,
        "p4": p4,
        "p5": p5,
        "p6": p5[:, ::2, ::2],
        "p7": p5[:, ::4, ::4],
    }.items():
        np.testing.assert_allclose(outputs[name], expected, atol=1e-5, err_msg=name)


def test_upsampling_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    assert upsample_to(x, 3, 4)[0, :, :, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]
