"""A training step on many accelerators, by calculation: arithmetic, reduction of the gradients, input, learning rate.

Every number that is not computed is an argument; `CHIPS` and `ASSUMED` have the numbers of docs/scaling.md.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator and its links, by its maker's figures."""

    name: str  # with the number format of `peak_flops`
    peak_flops: float  # operations per second of dense products
    near_bytes: float  # bytes per second, in one direction, between the devices of one host
    far_bytes: float  # the same between hosts, for each device
    devices_per_host: int  # connected by the near links
    most_devices: int  # connected by the far links


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
    """Operations and bytes of a step."""

    step_flops: float  # of an image, forward and backward
    forward_flops: float  # of an image in evaluation
    gradient_bytes: float  # reduced once a step
    gathered_bytes: (
        float  # of each image of the others, received by every device in addition to the gradients
    )


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Numbers that were not measured here."""

    sustained_share: float = 0.25  # of the peak, memory-bound parts and idle units included
    images_per_device: int = 2  # of a step
    latency: float = 5e-6  # seconds of one hop of the ring
    overlap: float = 0.0  # share of the reduction that is hidden behind the backward pass
    core_seconds: float = 6e-3  # of one core, to decode and resize an image
    evaluation_images: int = 5000  # of an evaluation


ASSUMED = Assumed()
# detectron2's and Detectron's: 0.02 for 16 images, 90,000 steps.
REFERENCE_BATCH, REFERENCE_RATE, REFERENCE_STEPS = 16, 0.02, 90_000


def ring(num_bytes: float, devices: int, *, rounds: int, bandwidth: float, latency: float) -> float:
    """Returns the seconds of a ring of devices (Patarasuk and Yuan 2009): `n - 1` hops of a share `1 / n` a round.

    An all-reduce has 2 rounds, an all-gather 1. Bandwidth is in bytes a second of a link, latency in seconds of a hop.
    """
    return rounds * (devices - 1) * (num_bytes / devices / bandwidth + latency)


def extrapolate(chip: Chip, work: Work, devices: int, *, assumed: Assumed = ASSUMED) -> dict[str, float]:
    """Returns the step on a number of devices, each with the same number of images: a row of the table.

    A ring is as fast as its slowest link: a far one, if there is more than one host. Raises ValueError if there are
    more devices than the chip can be connected to.
    """
    if not 1 <= devices <= chip.most_devices:
        raise ValueError(f"{chip.name} is wired for 1 to {chip.most_devices} devices, not {devices}")
    links = {
        "bandwidth": chip.near_bytes if devices <= chip.devices_per_host else chip.far_bytes,
        "latency": assumed.latency,
    }
    batch = assumed.images_per_device * devices
    speed = chip.peak_flops * assumed.sustained_share
    compute = assumed.images_per_device * work.step_flops / speed
    reduce = ring(work.gradient_bytes, devices, rounds=2, **links)
    gather = ring(work.gathered_bytes * batch, devices, rounds=1, **links) if work.gathered_bytes else 0.0
    total = compute + (1 - assumed.overlap) * reduce + gather
    images_per_second = batch / total
    steps = round(REFERENCE_STEPS * REFERENCE_BATCH / batch)
    rounds = math.ceil(assumed.evaluation_images / devices)
    return {
        "devices": devices,  # that share the batch
        "batch": batch,  # images of a step
        "compute": compute,  # seconds of arithmetic
        "reduce": reduce,  # seconds of the gradients' ring, including the hidden share
        "gather": gather,  # seconds of the other ring
        "total": total,  # seconds of a step
        "efficiency": compute / total,  # 1 is linear scaling
        "images_per_second": images_per_second,  # of all devices
        "host_cores": images_per_second / math.ceil(devices / chip.devices_per_host) * assumed.core_seconds,
        "learning_rate": REFERENCE_RATE * batch / REFERENCE_BATCH,  # by the linear rule
        "steps": steps,  # of the 1x schedule
        "training_hours": steps * total / 3600,
        "evaluation_seconds": rounds
        * work.forward_flops
        / speed,  # without gathering and matching on one host
    }
