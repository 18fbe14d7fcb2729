import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import model_report
from benchmarks.flops import count_flops, largest_product_bytes, saved_bytes
from klbox_jax.models.build import build_model
from klbox_jax.models.convolution import Conv
from klbox_jax.train.init_or_restore import dummy_batch
from tests.thin import num_params, scenes_config

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/models.md"


def flops(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def conv(x, kernel, strides=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_products_and_convolutions_by_hand():
    # 3 x 5 results of 4 multiply-adds each.
    assert flops(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 5 * 4
    # Twice that for two of them; a batch axis multiplies.
    assert flops(lambda a, b: (a @ b) + (a @ b), (7, 3, 4), (7, 4, 5)) == 2 * 7 * 2 * 3 * 5 * 4
    # 6 x 8 cells of 10 channels, each from a window of 3 x 3 x 2.
    assert flops(conv, (1, 6, 8, 2), (3, 3, 2, 10)) == 2 * 6 * 8 * 10 * 18
    assert flops(lambda x, k: conv(x, k, 2), (1, 6, 8, 2), (3, 3, 2, 10)) == 2 * 3 * 4 * 10 * 18
    assert flops(lambda x: jnp.exp(x).sum(), (1000,)) == 0


@pytest.mark.parametrize("strides", [1, 2])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(strides):
    shapes = (2, 8, 8, 2), (3, 3, 2, 10)
    once = flops(lambda x, k: conv(x, k, strides), *shapes)
    both = flops(jax.grad(lambda x, k: conv(x, k, strides).sum(), argnums=(0, 1)), *shapes)
    # The forward pass is not needed for the gradients of a linear function, but is traced.
    assert both == 3 * once


def test_programs_inside_a_program():
    product = 2 * 3 * 3 * 3
    x = (3, 3)
    assert flops(jax.jit(lambda x: x @ x), x) == product
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0], x) == 5 * product
    two = lambda x: x @ x @ x  # noqa: E731
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, two, lambda x: x @ x, x), x) == 2 * product
    assert flops(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, jnp.cos, x), x) == 0
    with pytest.raises(ValueError, match="a while loop holds a product"):
        flops(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x), x)
    # A 1x1 convolution has a form for the CPU and one for the rest: it counts once, and not twice.
    layer = Conv(5, kernel_size=1, use_bias=False)
    assert flops(lambda x, k: layer.apply({"params": {"kernel": k}}, x), (1, 4, 6, 2), (1, 1, 2, 5)) == 480


def test_saved_bytes_by_hand():
    x, first, second = jnp.zeros((16, 4)), jnp.zeros((4, 8)), jnp.zeros((8, 2))
    hidden_bytes = 16 * 8 * 4
    # The second layer's gradient needs its input, and nothing of the first.
    assert saved_bytes(lambda second: (jnp.sin(x @ first) @ second).sum(), second) == hidden_bytes
    # The first layer's needs the cosine, and its own input, which is an argument.
    found = saved_bytes(lambda first, x, second: (jnp.sin(x @ first) @ second).sum(), first, x, second)
    assert found == hidden_bytes
    # A product alone needs its arguments.
    assert saved_bytes(lambda first, x: (x @ first).sum(), first, x) == 0


def test_the_largest_product():
    def program(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T @ x, lambda x: x, x)

    # 50 x 50 float32 inside the branch; the arrays of 1000 are no products.
    jaxpr = jax.make_jaxpr(lambda x: program(x).sum() + jnp.ones((50, 1000)).sum())(jnp.zeros((50, 4)))
    assert largest_product_bytes(jaxpr.jaxpr) == 50 * 50 * 4


def test_a_detector_is_measured():
    config = scenes_config("loss=kl")
    numbers = model_report.measure(config, num_classes=3)
    model = build_model(config.model, num_classes=3)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: model.init(key, dummy_batch((192, 192)), key, method="train_forward"))
    assert numbers["parameters"] == num_params(params)
    assert numbers["parameter_bytes"] == 4 * num_params(params)
    # The sampled RoIs of training are fewer than the proposals of an evaluation, the layers are the same.
    assert numbers["forward_flops"] < numbers["step_flops"] < 4 * numbers["forward_flops"]
    # The finest maps have 48 x 48 cells of 8 channels.
    assert numbers["saved_bytes"] > numbers["product_bytes"]
    assert numbers["product_bytes"] >= 4 * 48 * 48 * 8


def test_the_batch_that_fits():
    # 90 percent of 16 GB, less 3 x 0.4 GB: 13.2 GB.
    assert model_report.largest_batch(16, parameter_bytes=400_000_000, image_bytes=1_000_000_000) == 13
    assert model_report.largest_batch(16, parameter_bytes=400_000_000, image_bytes=20_000_000_000) == 0
    assert model_report.largest_batch(16, parameter_bytes=10**10, image_bytes=1) == 0


def test_the_document_has_a_row_for_every_full_config():
    rows = [
        line.split("|")
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| faster_") or line.startswith("| mask_")
    ]
    assert len(rows) == len(model_report.MODELS)
    for row, (name, arg, _) in zip(rows, model_report.MODELS, strict=True):
        assert row[1].strip() == name + (f":{arg}" if arg else "")
        height, width = (int(side) for side in row[2].split("x"))
        batch = model_report.example_batch(model_report.get_config(name, arg).data)
        assert batch.images.shape == (1, height, width, 3)
