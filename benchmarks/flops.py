"""Operations and bytes of a program, from its shapes: exact, and nothing is run."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def count_flops(jaxpr: Jaxpr) -> int:
    """Returns the floating-point operations of all products and convolutions, two for each multiply-add.

    Everything else (activations, norms, pooling, NMS) is left out, as is usual. A convolution's window counts
    whole where it covers padding, and without the zeros that the gradient of a strided one inserts. Of the branches
    of a condition the most expensive counts, and of the forms of a layer for several platforms that of accelerators.

    Raises ValueError if a loop whose length is unknown holds a product.
    """
    return sum(_flops_of(equation) for equation in jaxpr.eqns)


def _flops_of(equation) -> int:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            window = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            inserted = math.prod(params["lhs_dilation"])
            return 2 * math.prod(equation.outvars[0].aval.shape) * window // inserted
        case "scan":
            return params["length"] * count_flops(params["jaxpr"].jaxpr)
        case "cond" if params.get("branches_platforms"):
            return count_flops(params["branches"][-1].jaxpr)
        case "cond":
            return max(count_flops(branch.jaxpr) for branch in params["branches"])
        case "while":
            if any(map(count_flops, _inner(params))):
                raise ValueError("a while loop holds a product, and the number of its rounds is unknown")
            return 0
        case _:
            return sum(map(count_flops, _inner(params)))


def largest_product_bytes(jaxpr: Jaxpr) -> int:
    """Returns the bytes of the largest result of a product or convolution; the compiler keeps such a result whole."""
    largest = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            result = equation.outvars[0].aval
            largest = max(largest, result.size * result.dtype.itemsize)
        branches = [branch.jaxpr for branch in equation.params.get("branches", ())]
        for inner in _inner(equation.params) + branches:
            largest = max(largest, largest_product_bytes(inner))
    return largest


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs inside an equation."""
    values = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in params.values()]
    return [value for value in values if isinstance(value, Jaxpr)]


def saved_bytes(function: Callable, *arguments) -> int:
    """Returns the bytes of the arrays that reverse-mode differentiation keeps from forward to backward pass.

    Arguments are not counted. The compiler may compute some of the arrays again instead of keeping them, and needs
    further memory while it works. The function returns a scalar and is differentiated in its first argument; arguments
    are arrays or `jax.ShapeDtypeStruct`, in any pytrees.
    """

    def saved(first, *rest):
        _, backward = jax.vjp(lambda first: function(first, *rest), first)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(saved)(*arguments).jaxpr
    kept = {id(variable): variable.aval for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        kept.pop(id(variable), None)
    return sum(aval.size * aval.dtype.itemsize for aval in kept.values())


def layer_flops(
    forward: Callable[..., Any], *arguments: Any, frozen: tuple[str, ...], lowest_trained: tuple[str, ...]
) -> int:
    """Returns the operations of the convolutions and dense layers of a training step, from their shapes.

    A layer does two operations for each multiply-add, once on the way forward. On the way back it does as many again
    for the gradient of its kernel unless it is frozen, and as many for that of its input unless all below is frozen.
    Nothing else counts; pooling and repeated computation do not.

    Args:
        forward: calls the layers; is only traced.
        *arguments: of `forward`.
        frozen: prefixes of the paths of frozen layers.
        lowest_trained: paths of the layers right above the frozen ones, whose inputs need no gradient.
    """
    total = 0

    def count(call, args, kwargs, context):
        nonlocal total
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and "kernel" in context.module.variables.get("params", {}):
            kernel = context.module.variables["params"]["kernel"]
            once = 2 * output.size * kernel.size // kernel.shape[-1]
            path = "/".join(context.module.path)
            total += once * passes(path, frozen=frozen, lowest_trained=lowest_trained)
        return output

    with nn.intercept_methods(count):
        jax.eval_shape(forward, *arguments)
    return total


def passes(path: str, *, frozen: tuple[str, ...], lowest_trained: tuple[str, ...]) -> int:
    """Returns how often the layer of a path does its work in a step: forward, for the kernel, for the input."""
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in frozen):
        return 1
    return 2 if path in lowest_trained else 3
