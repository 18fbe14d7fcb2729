"""Faster R-CNN with ResNet-50-FPN: its training step and its inference, in the setting of the measures."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks.flops import layer_flops
from benchmarks.speed.measure import Sides, timed
from benchmarks.steps import Step, make_batch, make_step
from configs import faster_rcnn_resnet50_fpn
from klbox_jax.structures import Batch

CANVAS = (320, 320)
CLASSES = 80
TRAIN_IMAGES = 2
ROIS_PER_IMAGE = 128
PROPOSALS_BEFORE_NMS = 1000
TRAIN_PROPOSALS, TEST_PROPOSALS = 512, 1000
# Shares of the speed of a matrix product: the limit and the goal of a step.
MUST_SHARE, GOAL_SHARE = 0.65, 0.80
# Rows and columns of that product: 64 MiB a matrix.
PRODUCT_SIDE = 4096
# The layers right above those that `frozen` holds in this network.
LOWEST_TRAINED = ("backbone/res3_0/conv1", "backbone/res3_0/shortcut", "fpn/fpn_lateral2")


def make_config(loss: str) -> ml_collections.ConfigDict:
    """Returns the config of the full-scale detector with the proposals and RoIs of the measures."""
    config = faster_rcnn_resnet50_fpn.get_config(f"loss={loss},weights=torchvision")
    config.model.roi_heads.batch_size_per_image = ROIS_PER_IMAGE
    config.model.rpn.pre_nms_topk = (PROPOSALS_BEFORE_NMS, PROPOSALS_BEFORE_NMS)
    config.model.rpn.post_nms_topk = (TRAIN_PROPOSALS, TEST_PROPOSALS)
    return config


def images(count: int) -> Batch:
    """Returns a batch of the measures."""
    return make_batch(count, canvas=CANVAS, classes=CLASSES)


def train_step(loss: str) -> Step:
    """Returns the training step of a loss."""
    return make_step("train", make_config(loss), images(TRAIN_IMAGES), classes=CLASSES)


@functools.cache
def train_runner(loss: str) -> Callable[[], None]:
    """Returns the training step as a function, which several measures share: it compiles for half a minute."""
    return train_step(loss).runner()


def eval_runner(loss: str, *, suppression: str, voting: str) -> Callable[[], None]:
    """Returns the eval step on one image, from the batch to the detections, as a function."""
    config = make_config(loss)
    config.postprocess.update(suppression=suppression, voting=voting)
    return make_step("eval", config, images(1), classes=CLASSES).runner()


def train_step_flops(loss: str) -> int:
    """Returns the operations of the layers of the training step on its batch; see `layer_flops`."""
    step = train_step(loss)
    leaves, structure = jax.tree.flatten(step.batch)
    key = jax.random.key(0)

    def forward(params, leaves):
        batch = jax.tree.unflatten(structure, leaves)
        return step.model.apply({"params": params}, batch, key, method="train_forward").losses

    frozen = make_config(loss).optimizer.frozen
    return layer_flops(forward, step.first.params, leaves, frozen=frozen, lowest_trained=LOWEST_TRAINED)


def training() -> Sides:
    """Returns steps of SGD on the same two images: ours with KL Loss, torchvision's with smooth-L1."""
    from benchmarks import torchvision_peer as peer

    return Sides(ours=timed(train_runner("kl")), peer=timed(peer.make_train_step()))


def head_flops() -> Sides:
    """Returns the operations of the step with the log-variance branch, and without it."""
    flops = {loss: train_step_flops(loss) for loss in ("kl", "smooth_l1")}
    return Sides(ours=lambda: float(flops["kl"]), peer=lambda: float(flops["smooth_l1"]))


def head_time() -> Sides:
    """Returns the step with KL Loss and its branch, and with smooth-L1."""
    return Sides(ours=timed(train_runner("kl")), peer=timed(train_runner("smooth_l1")))


def product_share() -> Sides:
    """Returns our step, and the time it may take at `MUST_SHARE` of the speed that a large product has then."""
    flops = train_step_flops("kl")
    product = fastest_product()

    def allowed() -> float:
        per_second = 2 * PRODUCT_SIDE**3 / timed(product)()
        return flops / (MUST_SHARE * per_second)

    return Sides(ours=timed(train_runner("kl")), peer=allowed)


def fastest_product() -> Callable[[], object]:
    """Returns a product of two large float32 matrices by the fastest of the libraries that are installed."""
    matrix = np.random.default_rng(0).normal(size=(PRODUCT_SIDE, PRODUCT_SIDE)).astype(np.float32)
    on_device = jnp.asarray(matrix)
    products = {"NumPy": lambda: matrix @ matrix, "JAX": lambda: jax.block_until_ready(on_device @ on_device)}
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        tensor = torch.from_numpy(matrix)
        products["torch"] = lambda: tensor @ tensor
    for product in products.values():
        product()
    return min(products.values(), key=lambda product: timed(product)())


def inference() -> Sides:
    """Returns ours with KL Loss, variance voting and soft-NMS, and torchvision's with hard NMS."""
    from benchmarks import torchvision_peer as peer

    ours = eval_runner("kl", suppression="soft_gaussian", voting="variance")
    theirs = peer.make_inference()
    if not len(theirs()[0]["boxes"]):
        raise ValueError("torchvision's detector found nothing, so that its post-processing had no work")
    return Sides(ours=timed(ours), peer=timed(theirs))


def voting() -> Sides:
    """Returns the eval step with voting and soft-NMS, and with hard NMS alone, of one network."""
    return Sides(
        ours=timed(eval_runner("kl", suppression="soft_gaussian", voting="variance")),
        peer=timed(eval_runner("kl", suppression="hard", voting="none")),
    )
