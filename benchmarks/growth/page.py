"""docs/scaling.md: the tables of a run with what they mean."""

from collections.abc import Mapping

from benchmarks.growth.collectives import IMAGES_A_DEVICE
from benchmarks.growth.extrapolate import CHIPS, Assumed, Step, Work
from benchmarks.growth.fit import LEAST_SHARE, MOST_LINEAR
from benchmarks.growth.tables import devices_table, extrapolation_table, growth_table, scatter, verdict

NOT_RUN = "Not run."

TEXT = """# How cost grows

Written by `python -m benchmarks.growth`. {meta}

## With the size of the work

The detector is that of `configs/scenes.py` with a box for each class, and random parameters. By default it has 4
images of 256 x 256 pixels, 64 RoIs, 8 ground-truth slots, 80 classes, 50 detections and 400 candidates of an image,
and 200 proposals of a level before NMS. One of these grows at a time, by a factor of 2 from size to size.

{verdict}

### Training step

{train}

### Eval step

{eval}

![Each cost over each size, in units of the smallest](scaling.png)

* **step**: {clock} of one step, the median of several runs.
* **compile**: tracing, lowering and compiling it, every time from empty caches.
* **memory**: arguments, results and temporary arrays by the compiler's plan (`compiled.memory_analysis()`). What
  takes the place of an argument counts once. No run is needed. On CPUs it leaves out what XLA's library of products
  (YNN) allocates inside its fusions.
* **all, last, beyond**: three exponents, 1 being linear. *All* is the least-squares slope through the logarithms of
  all points. *Last* is the slope of the last doubling, bold above {most_linear}; it gives the verdict. *Beyond* is
  the `p` of the best `c + a size^p`, so what is left without the constant part; `-` where that part is below
  {least_share:.0%} of the last cost.
* **the same**: the smallest and the largest size lower to the same program, to the byte.

Where squares could hide, by the code:

* **Proposals of a level before NMS** are the one square: `suppress_sorted` computes the IoU of every two proposals of
  a level, and keeps one bit for each pair. A level with fewer anchors enters whole, so coarse levels stop growing.
* All other pairs are of two different things, each linear in either: anchors and ground-truth slots in the matcher,
  detections and candidates in suppression and voting. The best of every class is picked at once, each against all
  candidates, until there are enough detections.
* **A jump of the time that is no growth**: glibc gives arrays above 32 MiB back to the system after use, and clearing
  them anew at every step can take longer than the arithmetic. RoIAlign by products, as accelerators do it, of 300
  RoIs took 7 ms on one core for 2 images and 42 ms for 4; under the `MALLOC_` variables of the Makefile 14 ms for 4,
  but 88 ms for 8, as glibc's arenas of other threads end at 64 MiB; with `MALLOC_ARENA_MAX=1` besides, 29 ms for 8.
  Set them before you time.

## With the number of devices

`XLA_FLAGS=--xla_force_host_platform_device_count=N` simulates them, each with {images} images. Read off the compiled
programs, in which every operation takes the branch of accelerators:

{devices}

* **The floor is one reduction of the gradients.** The step reduces them all at once, in a single instruction. The
  column *over the gradients'* has its bytes over those of the trained parameters. What is above 1 are the gradients
  of the RPN's head, which are reduced for each level and then added, and the counts and sums of the losses.
* **all-gathers**: all of them rank scores, in a `top_k` of the RPN, of the samplers or of the candidates. On CPUs XLA
  does not split a `top_k` along the batch: every device gets the scores of all images, and ranks them all. Their
  bytes grow with the global batch. For TPUs it does split: a `top_k` alone, compiled ahead of time for a slice of
  eight v5e, gathers nothing. For GPUs it was not tried.
* **in loops**: NMS goes on until no image of the batch changes. In every round of each level the devices tell each
  other one bit, and the slowest image of the global batch sets the number of rounds for all. XLA does the same to
  such a loop for TPUs.
* **memory of a device**: all parameters and the optimizer's state, and its own images.

## On many accelerators, on paper

R50-FPN on a canvas of 800 x 1344 pixels: {step_flops:,.0f} GFLOP an image forward and backward, {forward_flops:,.0f}
GFLOP forward (counted by `benchmarks/flops.py`, as in [models.md](models.md)), {gradient_bytes:.0f} MB of float32
gradients. Nothing in this table was run.

{extrapolation}

Assumed, each an argument of `benchmarks/growth/extrapolate.py`:

* **chips**: {chips}. By NVIDIA's data sheet of the H100 (1,979 TFLOP/s with sparsity, half of it without; NVLink 900
  GB/s, both directions together), a 400 Gb/s InfiniBand port for each GPU as in its DGX H100, and Google's page of
  the TPU v5e (197 TFLOP/s, 400 GB/s of each chip, both directions together, pods of 256).
* **a sustained {share:.0%} of the peak**: a guess; nobody has measured ours.
* **{per_device} images on a device**, as in Detectron's 8 x 2, with activations in bfloat16.
* **reduce**: a ring (Patarasuk and Yuan 2009): `2 (n - 1) / n` of the bytes over the slowest link, and {latency:.0f}
  microseconds for each of its `2 (n - 1)` hops. {overlap:.0%} of it is hidden behind the backward pass. Libraries use
  trees and several rings across hosts, so for 512 devices this is much.
* **gather**: in the rows *gathering*, what the all-gathers above would cost with as many bytes for each anchor,
  {gathered:.1f} MB an image. That every device then ranks all images is not in it.
* **cores a host**: images a second of a host, at {core_ms:.0f} ms of one core for each. Measure yours with `python -m
  benchmarks.speed --only=input_pipeline_800`.
* **evaluation**: the forward passes of 5,000 images. Matching them with the annotations is the work of one process,
  however many there are.

Where it stops:

* **At the learning rate, first.** The linear rule asks for 8 times the reference rate at 64 devices, and for 64 times
  at 512. Goyal et al. (2017) tried the rule for Mask R-CNN on 1 to 8 GPUs; MegDet (Peng et al. 2018) trained a
  detector with batches of 256, under a longer warm-up and batch norm across devices. For batches of 1,024 we have no
  evidence, and the config's warm-up of 500 steps would be a third of the schedule.
* **At the reduction, second**, where links between hosts are slow beside the arithmetic: the column *efficiency*. Its
  bytes do not grow with the devices, its hops do. More images on a device pay for it once for more arithmetic, and
  make the batch larger still. `config.train.accumulate_steps` does not: every one of its batches is reduced.
* **At the input**, on hosts with fewer free cores than the column *cores a host* says.
* **At the shared score lists**, on a platform that gathers them: they grow with the devices, and nothing else does.
"""


def page(
    result: Mapping, *, work: Work, assumed: Assumed, rows: list[tuple[str, Step]], gathered: float
) -> str:
    """Returns the page.

    Args:
        result: growth.json.
        work, assumed, rows: of the extrapolation.
        gathered: bytes of an image in the rows that gather.
    """
    axes, devices = result["axes"], result["devices"]
    tables = {
        step: growth_table(axes, step) if any(one["step"] == step for one in axes) else NOT_RUN
        for step in ("train", "eval")
    }
    chips = "; ".join(
        f"{chip.name} {chip.peak_flops / 1e12:.0f} TFLOP/s, {chip.near_bytes / 1e9:.0f} GB/s in one direction within a "
        f"host of {chip.devices_per_host} and {chip.far_bytes / 1e9:.0f} GB/s a device between hosts"
        for chip in CHIPS
    )
    return TEXT.format(
        meta=result["meta"],
        verdict=f"{verdict(axes)}\n{scatter(axes)}".rstrip() if axes else NOT_RUN,
        **tables,
        clock="processor time, of all cores," if result["quick"] else "seconds",
        most_linear=MOST_LINEAR,
        least_share=LEAST_SHARE,
        images=IMAGES_A_DEVICE,
        devices=devices_table(devices) if devices else NOT_RUN,
        step_flops=work.step_flops / 1e9,
        forward_flops=work.forward_flops / 1e9,
        gradient_bytes=work.gradient_bytes / 1e6,
        extrapolation=extrapolation_table(rows),
        chips=chips,
        share=assumed.sustained_share,
        per_device=assumed.images_per_device,
        latency=1e6 * assumed.latency,
        overlap=assumed.overlap,
        gathered=gathered / 1e6,
        core_ms=1e3 * assumed.core_seconds,
    )
