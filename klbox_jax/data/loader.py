"""Turns the plan of a run into its batches, on threads.

`grain` supplies random access (element k of the data set is the batch of a step) and the threads. A batch
depends on its step alone, so the number of threads, and the step a run resumes from, change nothing.
"""

from collections.abc import Callable

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8
from numpy import ndarray

from klbox_jax.data.plan import EvalPlan, StepPlan, TrainPlan, process_slice
from klbox_jax.data.source import MAX_WARNINGS, DataError, Source
from klbox_jax.data.transforms import (
    Preprocessing,
    check_max_gt,
    choose_canvas,
    make_blank_example,
    make_example,
    resized_size,
)
from klbox_jax.structures import Batch


def check_fits(source: Source, preprocessing: Preprocessing) -> Int[ndarray, " n"]:
    """Returns the canvas index of each image, after checking that every image and its objects fit.

    The array is what `TrainPlan` and `EvalPlan` are made from, so no plan exists for data that do not fit.

    Raises:
        DataError: an image fits no canvas, has more objects than slots, only some images have label noise, or
            masks are wanted and there are none.
    """
    if not source.records:
        raise DataError(f"{source.name} has no images.")
    for record in source.records:
        check_max_gt(record, preprocessing.max_gt)
        if (record.box_stds is None) != (source.records[0].box_stds is None):
            raise DataError(
                f"{source.name}: either all images have box_stds or none, but {record.file_name} and "
                f"{source.records[0].file_name} differ."
            )
        if preprocessing.mask_size and record.segmentations is None:
            raise DataError(
                f"{source.name} has no masks ({record.file_name}). Set config.data.mask_size to 0, or use a data "
                "set that has them."
            )
    return np.array([choose_canvas(record, preprocessing) for record in source.records], np.int32)


def train_batches(
    source: Source,
    plan: TrainPlan,
    preprocessing: Preprocessing,
    *,
    start_step: int,
    num_steps: int,
    num_threads: int,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Returns an iterator over this process' share of the batches of steps `start_step` and on.

    Close it (`contextlib.closing`) to stop its threads early.

    An image that cannot be decoded ends the training, or, under `preprocessing.on_bad_record = "skip"`, is warned
    of once and leaves its slot to an image that is not `valid` and has no objects, so that no loss looks at it. The
    plan, and with it every other slot, stays as it is.

    Args:
        source: the data set.
        plan: made from `check_fits(source, preprocessing)`.
        preprocessing: sizes and augmentation.
        start_step: number of the first step.
        num_steps: number of batches.
        num_threads: threads that make a batch each; 0 makes each batch when it is asked for.
        prefetch: batches held ready or in the making; no fewer than there are threads.
        process_index: number of this process.
        process_count: number of processes; divides the batch size.

    Raises:
        ValueError: the batch cannot be shared evenly by the processes.
        DataError: (from `next`) an image turned out to be unreadable, and `on_bad_record` is "stop".
    """
    slots = process_slice(plan.batch_size, process_index=process_index, process_count=process_count)
    unreadable: set[int] = set()
    return _iterate(
        lambda step: _make_batch(source, plan.step(step), preprocessing, slots, unreadable, augment=True),
        range(start_step, start_step + num_steps),
        num_threads=num_threads,
        prefetch=prefetch,
    )


def blank_batch(
    source: Source,
    step: StepPlan,
    preprocessing: Preprocessing,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Batch:
    """Returns what has the shapes of a process' share of a step's batch: black images, not `valid`; read-only.

    Arguments and errors as for `train_batches`; no image is read.
    """
    slots = process_slice(len(step.indices), process_index=process_index, process_count=process_count)
    canvas = preprocessing.canvases[step.canvas]
    example = make_blank_example(
        source.records[step.indices[0]],
        canvas=canvas,
        new_size=canvas,
        max_gt=preprocessing.max_gt,
        mask_size=preprocessing.mask_size,
    )
    return jax.tree.map(lambda x: np.broadcast_to(x, (slots.stop - slots.start, *x.shape)), example)


def eval_batches(
    source: Source,
    plan: EvalPlan,
    preprocessing: Preprocessing,
    *,
    num_threads: int,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Returns an iterator over this process' share of each batch of the evaluation, without augmentation.

    Arguments and errors as for `train_batches`. The objects of an image that was skipped stay in the source's ground
    truth, where nothing is found for them.
    """
    slots = process_slice(plan.batch_size, process_index=process_index, process_count=process_count)
    unreadable: set[int] = set()
    return _iterate(
        lambda step: _make_batch(source, plan.step(step), preprocessing, slots, unreadable, augment=False),
        range(plan.num_steps),
        num_threads=num_threads,
        prefetch=prefetch,
    )


def _iterate(
    make_batch: Callable[[int], Batch], steps: range, *, num_threads: int, prefetch: int
) -> grain.DatasetIterator[Batch]:
    # With fewer places than threads, threads would wait.
    places = max(prefetch, num_threads) if num_threads else 0
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=places)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make_batch)
    return iter(dataset.to_iter_dataset(options))


def _make_batch(
    source: Source,
    step: StepPlan,
    preprocessing: Preprocessing,
    slots: slice,
    unreadable: set[int],
    *,
    augment: bool,
) -> Batch:
    """Makes the given slots of a step's global batch; notes which images were skipped."""
    images = np.empty((slots.stop - slots.start, *preprocessing.canvases[step.canvas], 3), np.uint8)
    examples = [
        _make_slot(source, step, preprocessing, slot, unreadable, augment=augment, out=image)
        for slot, image in enumerate(images, start=slots.start)
    ]
    # The pixels are where they belong already.
    others = [example.replace(images=images[0, :0]) for example in examples]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *others)
    return batch.replace(images=images, valid=batch.valid & step.valid[slots])


def _make_slot(
    source: Source,
    step: StepPlan,
    preprocessing: Preprocessing,
    slot: int,
    unreadable: set[int],
    *,
    augment: bool,
    out: UInt8[ndarray, "H W 3"],
) -> Batch:
    index = int(step.indices[slot])
    record = source.records[index]
    canvas = preprocessing.canvases[step.canvas]
    flip, factor = False, 1.0
    if augment:
        # Both are drawn whatever the settings, so that switching one on leaves the other as it was.
        is_flipped, position = step.rng(slot).random(2)
        low, high = preprocessing.scale_jitter
        flip = preprocessing.flip and bool(is_flipped < 0.5)
        factor = float(low + (high - low) * position)
    new_size = resized_size(
        record.height,
        record.width,
        short_side=preprocessing.short_side,
        long_side=preprocessing.long_side,
        factor=factor,
        canvas=canvas,
    )
    slots = {"max_gt": preprocessing.max_gt, "mask_size": preprocessing.mask_size, "out": out}
    try:
        image = source.load_image(index)
    except DataError as error:
        if preprocessing.on_bad_record == "stop":
            raise
        _warn(error, index, unreadable)
        return make_blank_example(record, canvas=canvas, new_size=new_size, **slots)
    return make_example(image, record, canvas=canvas, new_size=new_size, flip=flip, **slots)


def _warn(error: DataError, index: int, unreadable: set[int]) -> None:
    if index in unreadable:
        return
    unreadable.add(index)
    if len(unreadable) <= MAX_WARNINGS:
        logging.warning("skipped: %s", error)
    elif len(unreadable) == MAX_WARNINGS + 1:
        logging.warning("more images cannot be read and are skipped; no further ones are listed")
