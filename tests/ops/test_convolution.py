import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from klbox_jax.models.convolution import Conv
from klbox_jax.models.normalization import FrozenBatchNorm
from klbox_jax.ops import convolution
from klbox_jax.ops.convolution import depthwise_conv, full_conv, pointwise_conv

SIZES = [(8, 7), (7, 10), (1, 2)]
KEY = jax.random.key(0)


def _inputs(function, hw, kernel_shape, channels, strides):
    x = jax.random.normal(KEY, (2, *hw, channels))
    kernel = jax.random.normal(jax.random.fold_in(KEY, 1), kernel_shape)
    out = jax.eval_shape(lambda x, kernel: function(x, kernel, strides), x, kernel)
    return x, kernel, jax.random.normal(jax.random.fold_in(KEY, 2), out.shape)


def _value_and_gradients(function):
    def run(x, kernel, cotangent):
        y, vjp = jax.vjp(function, x, kernel)
        return y, *vjp(cotangent)

    return run


def _assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(e).max()))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("hw", SIZES)
def test_depthwise_equals_xla_with_gradients(hw, strides):
    args = _inputs(depthwise_conv, hw, (3, 3, 1, 5), 5, strides)
    fast = jax.jit(_value_and_gradients(lambda x, kernel: depthwise_conv(x, kernel, strides)))
    slow = _value_and_gradients(lambda x, kernel: convolution.conv(x, kernel, strides, groups=5))
    _assert_same(fast(*args), slow(*args))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("hw", SIZES)
@pytest.mark.parametrize("features", [3, 7])
def test_pointwise_equals_xla_with_gradients(hw, strides, features):
    args = _inputs(pointwise_conv, hw, (1, 1, 5, features), 5, strides)
    fast = jax.jit(_value_and_gradients(lambda x, kernel: pointwise_conv(x, kernel, strides)))
    slow = _value_and_gradients(lambda x, kernel: convolution.conv(x, kernel, strides))
    _assert_same(fast(*args), slow(*args))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("hw", SIZES)
def test_full_equals_xla_with_gradients(hw, strides, monkeypatch):
    monkeypatch.setattr(convolution, "MANY_CELLS", 0)
    args = _inputs(full_conv, hw, (3, 3, 5, 7), 5, strides)
    fast = _value_and_gradients(lambda x, kernel: full_conv(x, kernel, strides))
    slow = _value_and_gradients(lambda x, kernel: convolution.conv(x, kernel, strides))
    _assert_same(jax.jit(fast)(*args), slow(*args))
    # Two convolutions on a CPU, forward and the input's gradient; three elsewhere.
    for platform, count in (("cpu", 2), ("cuda", 3)):
        text = export.export(jax.jit(fast), platforms=[platform])(*args).mlir_module()
        assert text.count("stablehlo.convolution") == count


def test_depthwise_by_hand():
    # A lone 1 at (row 1, column 2) of a 3x4 map paints the flipped kernel around it.
    x = jnp.zeros((1, 3, 4, 1)).at[0, 1, 2, 0].set(1.0)
    kernel = jnp.arange(1.0, 10.0).reshape(3, 3, 1, 1)
    expected = [[0, 9, 8, 7], [0, 6, 5, 4], [0, 3, 2, 1]]
    np.testing.assert_array_equal(depthwise_conv(x, kernel, 1)[0, :, :, 0], expected)
    # Stride 2 keeps rows 0 and 2, columns 0 and 2.
    np.testing.assert_array_equal(depthwise_conv(x, kernel, 2)[0, :, :, 0], [[0, 8], [0, 2]])


def test_cpu_executable_has_no_convolution_and_no_branch():
    x, kernel, cotangent = _inputs(depthwise_conv, (8, 8), (3, 3, 1, 4), 4, 2)
    run = jax.jit(_value_and_gradients(lambda x, kernel: depthwise_conv(x, kernel, 2)))
    text = run.lower(x, kernel, cotangent).compile().as_text()
    assert "convolution(" not in text
    assert "conditional(" not in text


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 6)])
def test_accelerators_see_convolutions(kernel_size, groups):
    module = Conv(6, kernel_size, strides=2, groups=groups)
    x = jnp.ones((1, 8, 8, 6))
    params = module.init(KEY, x)

    def gradients(params, x):
        return jax.grad(lambda params, x: (module.apply(params, x) ** 2).sum(), argnums=(0, 1))(params, x)

    # Forward, and the transposes for the input and the kernel.
    for platform in ("cuda", "tpu"):
        text = export.export(jax.jit(gradients), platforms=[platform])(params, x).mlir_module()
        assert text.count("stablehlo.convolution") == 3
    assert (
        "stablehlo.convolution"
        not in export.export(jax.jit(gradients), platforms=["cpu"])(params, x).mlir_module()
    )
    export.export(jax.jit(gradients), platforms=["cpu", "cuda", "tpu"])(params, x)


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 6)])
def test_vmap_equals_batch(kernel_size, groups):
    module = Conv(6, kernel_size, strides=2, groups=groups)
    x = jax.random.normal(KEY, (3, 7, 8, 6))
    params = module.init(KEY, x)

    def loss(params, x):
        return jnp.sin(module.apply(params, x)).sum()

    batched = jax.grad(loss)(params, x)
    single = jax.vmap(lambda image: jax.grad(loss)(params, image[None]))(x)
    jax.tree.map(lambda b, s: np.testing.assert_allclose(b, s.sum(0), rtol=1e-4, atol=1e-4), batched, single)


@pytest.mark.parametrize("groups", [1, 5])
def test_split_batch_is_summed_across_devices_outside_the_loop(groups, monkeypatch):
    monkeypatch.setattr(convolution, "MANY_CELLS", 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.random.normal(KEY, (4, 6, 8, 5))
    kernel = jax.random.normal(KEY, (3, 3, 5 // groups, 5))
    function = full_conv if groups == 1 else depthwise_conv

    def gradient(x, kernel):
        return jax.grad(lambda kernel: (function(x, kernel, 1) ** 2).sum())(kernel)

    split = jax.jit(gradient, in_shardings=(sharding, None))
    np.testing.assert_allclose(split(x, kernel), gradient(x, kernel), rtol=1e-4)
    computations = split.lower(x, kernel).compile().as_text().split("\n\n")
    summing = [text for text in computations if " all-reduce(" in text]
    assert summing
    assert all(text.startswith("ENTRY") for text in summing)


@pytest.mark.parametrize(
    ("features", "kernel_size", "strides", "groups"),
    [
        (6, 1, 1, 1),
        (6, 1, 2, 1),
        (6, 1, 1, 2),
        (6, 3, 2, 6),
        (12, 3, 1, 6),
        (4, 3, 2, 2),
        (4, 7, 2, 1),
        (6, 5, 1, 6),
    ],
)
def test_module_equals_flax(features, kernel_size, strides, groups):
    x = jax.random.normal(KEY, (2, 9, 12, 6))
    module = Conv(features, kernel_size, strides, groups, bias_init=nn.initializers.normal())
    padding = ((kernel_size // 2,) * 2,) * 2
    flax_module = nn.Conv(features, (kernel_size,) * 2, strides, padding, feature_group_count=groups)
    params = module.init(KEY, x)
    expected = flax_module.apply(params, x)
    np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape[1:3] == (-(-9 // strides), -(-12 // strides))


def test_bfloat16_arithmetic_keeps_float32_params():
    module = Conv(6, 3, groups=6, dtype=jnp.bfloat16)
    x = jax.random.normal(KEY, (1, 8, 8, 6))
    params = module.init(KEY, x)
    y = module.apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), Conv(6, 3, groups=6).apply(params, x), rtol=0.05, atol=0.05
    )
    gradient = jax.grad(lambda params: module.apply(params, x).astype(jnp.float32).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}


def test_bad_shapes_are_refused():
    x = jnp.ones((1, 4, 4, 6))
    with pytest.raises(ValueError, match="must be odd"):
        Conv(6, 2).init(KEY, x)
    with pytest.raises(ValueError, match="must divide"):
        Conv(6, 3, groups=4).init(KEY, x)


def test_frozen_batch_norm_by_hand():
    params = {"scale": [2.0, 1.0], "bias": [1.0, 0.0], "mean": [3.0, -1.0], "var": [4.0, 0.25]}
    params = {name: jnp.asarray(value) for name, value in params.items()}
    x = jnp.asarray([[[5.0, 0.0]]])
    # (5 - 3) / 2 * 2 + 1 = 3; (0 + 1) / 0.5 = 2
    y = FrozenBatchNorm().apply({"params": params}, x)
    np.testing.assert_allclose(y, [[[3.0, 2.0]]], rtol=3e-5)
    gradient = jax.grad(lambda params: FrozenBatchNorm().apply({"params": params}, x).sum())(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))
    assert FrozenBatchNorm().apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
