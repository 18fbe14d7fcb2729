"""The training step: against torchvision's, against itself without variances, and against the machine's limit."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flops import layer_flops
from benchmarks.speed import detector
from benchmarks.speed.measure import Measure, Sides, timed

# Shares of the speed of a matrix product: the limit and the goal of a step.
MUST_SHARE, GOAL_SHARE = 0.65, 0.80
# Rows and columns of that product: 64 MiB a matrix.
PRODUCT_SIDE = 4096
# The layers right above those that `frozen` holds in this detector.
LOWEST_TRAINED = ("backbone/res3_0/conv1", "backbone/res3_0/shortcut", "fpn/fpn_lateral2")


def train_step_flops(loss: str) -> int:
    """Returns the operations of the layers of the training step on its batch; see `layer_flops`."""
    step = detector.training(loss)
    leaves, structure = jax.tree.flatten(step.batch)
    key = jax.random.key(0)

    def forward(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        return step.model.apply({"params": params}, batch, key, method="train_forward").losses

    frozen = detector.make_config(loss).optimizer.frozen
    return layer_flops(forward, step.first.params, leaves, frozen=frozen, lowest_trained=LOWEST_TRAINED)


def against_torchvision() -> Sides:
    """Returns steps of SGD on the same two images: ours with KL Loss, torchvision's with smooth-L1."""
    from benchmarks import torchvision_peer as peer

    return Sides(ours=timed(detector.train_runner("kl")), peer=timed(peer.make_train_step()))


def head_flops() -> Sides:
    """Returns the operations of the step with the log-variance branch, and without it."""
    flops = {loss: train_step_flops(loss) for loss in ("kl", "smooth_l1")}
    return Sides(ours=lambda: float(flops["kl"]), peer=lambda: float(flops["smooth_l1"]))


def head_time() -> Sides:
    """Returns the step with KL Loss and its branch, and with smooth-L1."""
    return Sides(ours=timed(detector.train_runner("kl")), peer=timed(detector.train_runner("smooth_l1")))


def against_machine() -> Sides:
    """Returns our step, and the time it may take at `MUST_SHARE` of the speed that a large product has then."""
    flops = train_step_flops("kl")
    product = fastest_product()

    def allowed() -> float:
        per_second = 2 * PRODUCT_SIDE**3 / timed(product)()
        return flops / (MUST_SHARE * per_second)

    return Sides(ours=timed(detector.train_runner("kl")), peer=allowed)


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
        "training_step",
        "torchvision's with smooth-L1",
        against_torchvision,
        must=1.0,
        goal=0.85,
        seconds=125.0,
        needs_torch=True,
    ),
    Measure(
        "training_step_share_of_machine",
        f"{MUST_SHARE:.0%} of a large product's speed",
        against_machine,
        must=1.0,
        goal=MUST_SHARE / GOAL_SHARE,
        seconds=100.0,
    ),
    Measure(
        "kl_head_operations",
        "the step without it",
        head_flops,
        must=1.005,
        goal=1.005,
        unit="FLOP",
        pairs=1,
        warm_up=False,
    ),
    Measure("kl_head_time", "the step without it", head_time, must=1.03, goal=1.03, seconds=125.0),
)
