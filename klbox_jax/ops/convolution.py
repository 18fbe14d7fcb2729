"""Convolutions with 1x1, 3x3 and depthwise 3x3 kernels, in forms that are fast on CPUs.

XLA's CPU backend runs a 1x1 convolution at half the speed of the same product written as a dot, the kernel gradient
of a 3x3 convolution over a large map at half the speed of nine products, and a depthwise convolution 10 to 50
times slower than nine shifted multiply-adds. The lowering chooses the form by platform, so accelerators still get
convolutions. Parameters and results are the same on all platforms.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# On a CPU, the kernel gradient of a 3x3 convolution is a sum of nine products if the batch has at least this many
# output cells. With 256 channels, two images of 80 x 80 cells then take half the time of the convolution, one image of
# 200 x 336 cells a sixth; smaller maps gain nothing.
MANY_CELLS = 10_000
# Dimension numbers of `dot_general`: contracts batch, rows and columns of both operands.
_OVER_CELLS = (((0, 1, 2), (0, 1, 2)), ((), ()))


def conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k c F"], strides: int, groups: int = 1
) -> Float[Array, "B h w F"]:
    """Returns XLA's convolution, padded by `k // 2` on every side."""
    padding = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# The functions below define their gradients explicitly, so that only (x, kernel) is kept for the backward pass.
# Otherwise JAX would keep the residuals of every platform's branch.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pointwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "1 1 C F"], strides: int
) -> Float[Array, "B h w F"]:
    """Returns the 1x1 convolution, computed as a dot on CPUs."""
    convolved = functools.partial(conv, strides=strides)
    return lax.platform_dependent(x, kernel, cpu=functools.partial(_dot, strides=strides), default=convolved)


def _dot(x, kernel, *, strides):
    return x[:, ::strides, ::strides] @ kernel[0, 0]


def _pointwise_forward(x, kernel, strides):
    return pointwise_conv(x, kernel, strides), (x, kernel)


def _pointwise_backward(strides, residuals, cotangent):
    # The transpose rule of the product would transpose the cotangent, the large operand, and compute it twice.
    def dotted(x, kernel, cotangent):
        kernel_gradient = _product_over_cells(x[:, ::strides, ::strides], cotangent)
        x_gradient = cotangent @ kernel[0, 0].T
        if strides > 1:
            sides = zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
            spread = [(0, side - strides * (count - 1) - 1, strides - 1) for side, count in sides]
            x_gradient = lax.pad(x_gradient, jnp.zeros((), x.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
        return x_gradient, kernel_gradient[None, None]

    convolved = _gradients_of(functools.partial(conv, strides=strides))
    return lax.platform_dependent(*residuals, cotangent, cpu=dotted, default=convolved)


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


def _product_over_cells(x, cotangent):
    """Returns the sum over batch and cells of `x[c] * cotangent[f]`, [C, F]."""
    # The backend transposes the left operand of this product: use the one with fewer channels.
    if x.shape[-1] < cotangent.shape[-1]:
        return lax.dot_general(x, cotangent, _OVER_CELLS)
    # Without the barrier, the compiler rewrites this product to the one above.
    return lax.optimization_barrier(lax.dot_general(cotangent, x, _OVER_CELLS)).T


def _gradients_of(function):
    """Returns the gradients of a function that is linear in each argument, from its transposes."""

    def gradients(x, kernel, cotangent):
        (x_gradient,) = jax.linear_transpose(lambda x: function(x, kernel), x)(cotangent)
        (kernel_gradient,) = jax.linear_transpose(lambda kernel: function(x, kernel), kernel)(cotangent)
        return x_gradient, kernel_gradient

    return gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def full_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"], strides: int
) -> Float[Array, "B h w F"]:
    """Returns the 3x3 convolution; on CPUs its kernel gradient over a large map is computed as nine products."""
    return conv(x, kernel, strides)


def _full_forward(x, kernel, strides):
    return full_conv(x, kernel, strides), (x, kernel)


def _full_backward(strides, residuals, cotangent):
    convolved = _gradients_of(functools.partial(conv, strides=strides))

    def multiplied(x, kernel, cotangent):
        x_gradient, _ = convolved(x, kernel, cotangent)
        return x_gradient, _full_kernel_gradient(x, cotangent, strides)

    if math.prod(cotangent.shape[:3]) < MANY_CELLS:
        return convolved(*residuals, cotangent)
    return lax.platform_dependent(*residuals, cotangent, cpu=multiplied, default=convolved)


full_conv.defvjp(_full_forward, _full_backward)


def _full_kernel_gradient(x, cotangent, strides):
    """Returns the kernel gradient as one product for each tap and image.

    The taps run one after the other, so that memory holds one shifted map and not nine. The batch is summed once
    at the end; `_depthwise_kernel_gradient` says why.
    """
    batch, height, width, features = cotangent.shape
    channels = x.shape[-1]
    padded = _pad_one(x)
    # Transposed once here; otherwise the backend transposes the left operand in each product.
    left = lax.optimization_barrier(cotangent.reshape(batch, height * width, features).swapaxes(1, 2))

    def product(tap):
        sizes = (batch, strides * (height - 1) + 1, strides * (width - 1) + 1, channels)
        shifted = lax.dynamic_slice(padded, (0, tap // 3, tap % 3, 0), sizes)[:, ::strides, ::strides]
        return left @ shifted.reshape(batch, height * width, channels)

    products = lax.map(product, jnp.arange(9))
    return products.sum(axis=1).reshape(3, 3, features, channels).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 1 C"], strides: int
) -> Float[Array, "B h w C"]:
    """Returns the depthwise 3x3 convolution, computed as nine shifted multiply-adds on CPUs."""
    convolved = functools.partial(conv, strides=strides, groups=x.shape[-1])
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_shifted, strides=strides), default=convolved
    )


def _shifted(x, kernel, *, strides):
    height, width = (-(-side // strides) for side in x.shape[1:3])
    return _sum_of_taps(_pad_one(x), kernel, strides, height, width)


def _depthwise_forward(x, kernel, strides):
    return depthwise_conv(x, kernel, strides), (x, kernel)


def _depthwise_backward(strides, residuals, cotangent):
    # The transpose of `_shifted` would reduce nine products over B, H and W. XLA's CPU backend is ten times slower at
    # that than at the loop over rows.
    def shifted(x, kernel, cotangent):
        return (
            _depthwise_input_gradient(cotangent, kernel, strides, x.shape[1], x.shape[2]),
            _depthwise_kernel_gradient(x, cotangent, strides).astype(kernel.dtype),
        )

    channels = cotangent.shape[-1]
    convolved = _gradients_of(functools.partial(conv, strides=strides, groups=channels))
    return lax.platform_dependent(*residuals, cotangent, cpu=shifted, default=convolved)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def _pad_one(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _sum_of_taps(padded, kernel, strides, height, width):
    """Returns the sum over i, j of `padded[:, i + s*y, j + s*x] * kernel[i, j]` for y < height, x < width."""
    batch, _, _, channels = padded.shape
    total = jnp.zeros((batch, height, width, channels), jnp.promote_types(padded.dtype, jnp.float32))
    for i in range(3):
        for j in range(3):
            end = (batch, i + strides * (height - 1) + 1, j + strides * (width - 1) + 1, channels)
            tap = lax.slice(padded, (0, i, j, 0), end, (1, strides, strides, 1))
            total += tap.astype(total.dtype) * kernel[i, j].astype(total.dtype)[None, None]
    return total.astype(padded.dtype)


def _depthwise_input_gradient(cotangent, kernel, strides, height, width):
    """Returns the input gradient: correlates the cotangent, dilated by the stride, with the flipped kernel."""

    def spread(side, count):
        return 1, side - strides * (count - 1), strides - 1

    rows, columns = spread(height, cotangent.shape[1]), spread(width, cotangent.shape[2])
    padded = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))
    return _sum_of_taps(padded, kernel[::-1, ::-1], 1, height, width)


def _depthwise_kernel_gradient(x, cotangent, strides):
    """Returns the kernel gradient: sums the rows of each tap's product in a loop, then batch and columns once.

    The running sums keep the batch axis, so that a batch that is split over devices is summed across them once and
    not in every iteration of the loop.
    """
    batch, height, width, channels = cotangent.shape
    padded = _pad_one(x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add_row(sums, y):
        rows = lax.dynamic_slice_in_dim(padded, y * strides, 3, axis=1).astype(dtype)
        row = lax.dynamic_index_in_dim(cotangent, y, axis=1, keepdims=False).astype(dtype)
        last = strides * (width - 1) + 1
        taps = (rows[:, i, j : j + last : strides] for i in range(3) for j in range(3))
        return tuple(total + tap * row for total, tap in zip(sums, taps, strict=True)), None

    zeros = jnp.zeros((batch, width, channels), dtype)
    sums, _ = lax.scan(add_row, (zeros,) * 9, jnp.arange(height))
    return jnp.stack([total.sum((0, 1)) for total in sums]).reshape(3, 3, 1, channels)
