"""The training step: against torchvision's, against itself without variances, and against the machine's limit."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import detector, work
from benchmarks.speed.measure import Measure, Sides, timed

# The share of the speed of a matrix product that a step must reach, and the share that is wanted.
MUST_SHARE, GOAL_SHARE = 0.65, 0.80
# Rows and columns of that product: 64 MiB a matrix.
PRODUCT_SIDE = 4096


def against_torchvision() -> Sides:
    """Both take a step of SGD on the same two images; ours with KL Loss, torchvision's with smooth-L1."""
    from benchmarks.speed import peer

    return Sides(ours=timed(detector.make_train_step("kl")), peer=timed(peer.make_train_step()))


def head_flops() -> Sides:
    """The operations of the step with the log-variance branch, and without it."""
    flops = {loss: work.train_step_flops(detector.make_detector(loss)) for loss in ("kl", "smooth_l1")}
    return Sides(ours=lambda: float(flops["kl"]), peer=lambda: float(flops["smooth_l1"]))


def head_time() -> Sides:
    """The step with KL Loss and its branch, and with smooth-L1."""
    return Sides(
        ours=timed(detector.make_train_step("kl")), peer=timed(detector.make_train_step("smooth_l1"))
    )


def against_machine() -> Sides:
    """Our step, and the time it may take at `MUST_SHARE` of the speed that a large product has in between."""
    flops = work.train_step_flops(detector.make_detector("kl"))
    product = fastest_product()

    def allowed() -> float:
        per_second = 2 * PRODUCT_SIDE**3 / timed(product)()
        return flops / (MUST_SHARE * per_second)

    return Sides(ours=timed(detector.make_train_step("kl")), peer=allowed)


def fastest_product() -> Callable[[], object]:
    """Returns a product of two large float32 matrices by the fastest of the libraries that are installed."""
    matrix = np.random.default_rng(0).normal(size=(PRODUCT_SIDE, PRODUCT_SIDE)).astype(np.float32)
    on_device = jnp.asarray(matrix)
    products = {
        "NumPy": lambda: matrix @ matrix,
        "JAX": lambda: jax.block_until_ready(on_device @ on_device),
    }
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        tensor = torch.from_numpy(matrix)
        products["torch"] = lambda: tensor @ tensor
    seconds = {}
    for name, product in products.items():
        product()
        started = time.perf_counter()
        product()
        seconds[name] = time.perf_counter() - started
    return products[min(seconds, key=seconds.get)]


MEASURES = (
    Measure(
        name="training_step",
        against="torchvision's with smooth-L1",
        unit="s",
        must=1.0,
        goal=0.85,
        prepare=against_torchvision,
        seconds=125.0,
        needs_torch=True,
    ),
    Measure(
        name="training_step_share_of_machine",
        against=f"{MUST_SHARE:.0%} of a large product's speed",
        unit="s",
        must=1.0,
        goal=MUST_SHARE / GOAL_SHARE,
        prepare=against_machine,
        seconds=100.0,
    ),
    Measure(
        name="kl_head_operations",
        against="the step without it",
        unit="FLOP",
        must=1.005,
        goal=1.005,
        prepare=head_flops,
        pairs=1,
        warm_up=False,
    ),
    Measure(
        name="kl_head_time",
        against="the step without it",
        unit="s",
        must=1.03,
        goal=1.03,
        prepare=head_time,
        seconds=125.0,
    ),
)
