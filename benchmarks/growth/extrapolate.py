"""A training step on many accelerators, on paper: arithmetic, reduction of the gradients, input, learning rate.

Every number that is not computed is an argument; `CHIPS` and `ASSUMED` hold those of docs/scaling.md.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator and how it is wired, by its maker's figures.

    Attributes:
        name: with the number format of `peak_flops`.
        peak_flops: operations per second of dense products.
        near_bytes: bytes per second, in one direction, between the devices of one host.
        far_bytes: the same between hosts, for each device.
        devices_per_host: wired by the near links.
        most_devices: wired by the far links.
    """

    name: str
    peak_flops: float
    near_bytes: float
    far_bytes: float
    devices_per_host: int
    most_devices: int


CHIPS = (
    # NVIDIA's data sheet of the H100 SXM: 1,979 TFLOP/s in bfloat16 with sparsity, half of it without; NVLink 900 GB/s,
    # both directions together. Between hosts one InfiniBand port of 400 Gb/s for each device, as in a DGX H100.
    Chip("H100 SXM, bfloat16", 989e12, 450e9, 50e9, 8, 512),
    # Google's page of the TPU v5e: 197 TFLOP/s, interconnect 1,600 Gb/s of each chip (400 GB/s, both directions
    # together), hosts of 8 chips, a pod of 256 on one torus.
    Chip("TPU v5e, bfloat16", 197e12, 200e9, 200e9, 8, 256),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes and sends.

    Attributes:
        step_flops: of an image, forward and backward.
        forward_flops: of an image in evaluation.
        gradient_bytes: what is reduced once a step.
        gathered_bytes: what every device gets of each image of the others, beside the gradients.
    """

    step_flops: float
    forward_flops: float
    gradient_bytes: float
    gathered_bytes: float


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What nobody has measured here.

    Attributes:
        sustained_share: of the peak that a step reaches, memory-bound parts and idle units included.
        images_per_device: of a step.
        latency: seconds of one hop of the ring.
        overlap: share of the reduction that is hidden behind the backward pass.
        core_seconds: that one core takes to decode and resize an image.
        evaluation_images: of an evaluation.
    """

    sustained_share: float = 0.25
    images_per_device: int = 2
    latency: float = 5e-6
    overlap: float = 0.0
    core_seconds: float = 6e-3
    evaluation_images: int = 5000


ASSUMED = Assumed()
# detectron2's and Detectron's: 0.02 for 16 images, 90,000 steps.
REFERENCE_BATCH, REFERENCE_RATE, REFERENCE_STEPS = 16, 0.02, 90_000


@dataclasses.dataclass(frozen=True)
class Step:
    """A row of the table.

    Attributes:
        devices: that share the batch.
        batch: images of a step.
        compute: seconds of arithmetic.
        reduce: seconds of the gradients' ring, what `overlap` hides included.
        gather: seconds of the other ring.
        total: seconds of a step.
        efficiency: `compute` over `total`: 1 is linear scaling.
        images_per_second: of all devices.
        host_cores: cores that each host needs for its images.
        learning_rate: by the linear rule.
        steps: of the 1x schedule.
        training_hours: of these.
        evaluation_seconds: of the forward passes; gathering and matching, on one host, are not in it.
    """

    devices: int
    batch: int
    compute: float
    reduce: float
    gather: float
    total: float
    efficiency: float
    images_per_second: float
    host_cores: float
    learning_rate: float
    steps: int
    training_hours: float
    evaluation_seconds: float


def ring_all_reduce(num_bytes: float, devices: int, *, bandwidth: float, latency: float) -> float:
    """Returns the seconds of a ring all-reduce: `2 (n - 1)` hops of a share `1 / n` (Patarasuk and Yuan 2009)."""
    hops = 2 * (devices - 1)
    return hops * (num_bytes / devices / bandwidth + latency)


def ring_all_gather(num_bytes: float, devices: int, *, bandwidth: float, latency: float) -> float:
    """Returns the seconds in which each device gets the shares of all others; `num_bytes` is the whole."""
    hops = devices - 1
    return hops * (num_bytes / devices / bandwidth + latency)


def extrapolate(chip: Chip, work: Work, devices: int, *, assumed: Assumed = ASSUMED) -> Step:
    """Returns the step on so many devices, each with the same number of images.

    A ring is as fast as its slowest link: the far ones, as soon as there is more than one host.

    Raises:
        ValueError: more devices than the chip is wired for.
    """
    if not 1 <= devices <= chip.most_devices:
        raise ValueError(f"{chip.name} is wired for 1 to {chip.most_devices} devices, not {devices}")
    bandwidth = chip.near_bytes if devices <= chip.devices_per_host else chip.far_bytes
    batch = assumed.images_per_device * devices
    speed = chip.peak_flops * assumed.sustained_share
    compute = assumed.images_per_device * work.step_flops / speed
    reduce = ring_all_reduce(work.gradient_bytes, devices, bandwidth=bandwidth, latency=assumed.latency)
    gather = ring_all_gather(
        work.gathered_bytes * batch, devices, bandwidth=bandwidth, latency=assumed.latency
    )
    gather = gather if work.gathered_bytes else 0.0
    total = compute + (1 - assumed.overlap) * reduce + gather
    images_per_second = batch / total
    hosts = math.ceil(devices / chip.devices_per_host)
    steps = round(REFERENCE_STEPS * REFERENCE_BATCH / batch)
    return Step(
        devices=devices,
        batch=batch,
        compute=compute,
        reduce=reduce,
        gather=gather,
        total=total,
        efficiency=compute / total,
        images_per_second=images_per_second,
        host_cores=images_per_second / hosts * assumed.core_seconds,
        learning_rate=REFERENCE_RATE * batch / REFERENCE_BATCH,
        steps=steps,
        training_hours=steps * total / 3600,
        evaluation_seconds=math.ceil(assumed.evaluation_images / devices) * work.forward_flops / speed,
    )
