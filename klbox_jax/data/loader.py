"""The batches of a plan, read and preprocessed on threads.

`grain` provides random access (element k of the data set is the batch of step k) and the threads. A batch depends on
its step only, so the number of threads, and the step from which a run resumes, change nothing.
"""

import dataclasses
from collections.abc import Callable

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8
from numpy import ndarray

from klbox_jax.data.plan import EvalPlan, Shard, StepPlan, TrainPlan
from klbox_jax.data.source import MAX_WARNINGS, DataError, Fault, Source, raise_fault
from klbox_jax.data.transforms import (
    Placement,
    Preprocessing,
    choose_canvas,
    make_blank_example,
    make_example,
    max_gt_fault,
    resized_size,
)
from klbox_jax.structures import Batch

# Batches that are ready or in progress; with more threads, one for each thread.
PREFETCH = 4


def check_fits(source: Source, preprocessing: Preprocessing) -> Int[ndarray, " n"]:
    """Checks that every image and its objects fit, and returns the canvas index of each image.

    `TrainPlan` and `EvalPlan` are made from the array, so there is no plan for data that do not fit.

    Raises:
        DataError: an image fits no canvas, has more objects than slots, only some images have label noise, or
            masks are required and there are none.
    """
    if not source.records:
        raise DataError(f"{source.name} has no images.")
    for record in source.records:
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
    raise_fault([fault for _, fault in find_misfits(source, preprocessing)])
    return np.array([choose_canvas(record, preprocessing) for record in source.records], np.int32)


def find_misfits(source: Source, preprocessing: Preprocessing) -> list[tuple[int, Fault]]:
    """Returns the row and the fault of each image that has more objects than slots, or fits no canvas."""
    misfits = []
    most = max((len(record.boxes) for record in source.records), default=0)
    for row, record in enumerate(source.records):
        if (fault := max_gt_fault(record, preprocessing.max_gt)) is not None:
            remedy = f"Raise config.data.max_gt to {most} or more."
            misfits.append((row, dataclasses.replace(fault, remedy=remedy)))
    for row, record in enumerate(source.records):
        try:
            choose_canvas(record, preprocessing)
        except DataError as error:
            misfits.append((row, error.fault))
    return misfits


def train_batches(
    source: Source,
    plan: TrainPlan,
    preprocessing: Preprocessing,
    *,
    steps: range,
    num_threads: int,
    shard: Shard = Shard(),  # noqa: B008
) -> grain.DatasetIterator[Batch]:
    """Returns an iterator over this process' part of the batches of some steps.

    Close it (`contextlib.closing`) to stop its threads early.

    An image that cannot be decoded ends the training. With `preprocessing.on_bad_record = "skip"` it is logged once,
    and its slot gets an image that is not `valid` and has no objects, which no loss uses. The plan, and so every
    other slot, stays the same.

    Args:
        source: the data set.
        plan: made from `check_fits(source, preprocessing)`.
        preprocessing: sizes and augmentation.
        steps: consecutive steps, from 0.
        num_threads: threads, each of which makes one batch; 0 makes each batch when it is requested.
        shard: the part of each batch that this process reads; by default the whole batch.

    Raises:
        ValueError: the batch cannot be shared evenly by the processes.
        DataError: (from `next`) an image cannot be read, and `on_bad_record` is "stop".
    """
    slots = shard.slots(plan.batch_size)
    maker = _make_batch_maker(source, preprocessing, slots, augment=True)
    return _iterate(lambda step: maker.make(plan.step(step)), steps, num_threads=num_threads)


def blank_batch(
    source: Source,
    step: StepPlan,
    preprocessing: Preprocessing,
    *,
    shard: Shard = Shard(),  # noqa: B008
) -> Batch:
    """Returns a batch of black images, not `valid`, in the shapes of this process' part of a step; read-only.

    The arguments and errors are those of `train_batches`; no image is read.
    """
    slots = shard.slots(len(step.indices))
    canvas = preprocessing.canvases[step.canvas]
    example = make_blank_example(
        dataclasses.replace(source.records[step.indices[0]], image_id=0),
        Placement(canvas=canvas, new_size=canvas),
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
    shard: Shard = Shard(),  # noqa: B008
) -> grain.DatasetIterator[Batch]:
    """Returns an iterator over this process' part of each batch of the evaluation, without augmentation.

    The arguments and errors are those of `train_batches`. The objects of a skipped image stay in the source's ground
    truth, without any detections.
    """
    slots = shard.slots(plan.batch_size)
    maker = _make_batch_maker(source, preprocessing, slots, augment=False)
    return _iterate(lambda step: maker.make(plan.step(step)), range(plan.num_steps), num_threads=num_threads)


def batch_ids_of(source: Source) -> Int[ndarray, " n"]:
    """Returns the number of each image in its batch, which is int32 on the device.

    This is its id, or, if an id of the set needs more than 32 bits, its row in `source.records`;
    `restore_image_ids` inverts that.
    """
    ids = [record.image_id for record in source.records]
    if ids and not -(2**31) <= min(ids) <= max(ids) < 2**31:
        ids = range(len(ids))
    return np.array(ids, np.int32)


def restore_image_ids(results: list[dict], source: Source) -> list[dict]:
    """Returns COCO results whose `image_id` is that of the batches with the original ids of the data set."""
    numbers = batch_ids_of(source).tolist()
    original = {number: record.image_id for number, record in zip(numbers, source.records, strict=True)}
    if all(number == image_id for number, image_id in original.items()):
        return results
    return [entry | {"image_id": original[entry["image_id"]]} for entry in results]


def _iterate(
    make_batch: Callable[[int], Batch], steps: range, *, num_threads: int
) -> grain.DatasetIterator[Batch]:
    # With a smaller buffer than threads, threads would wait.
    buffer_size = max(PREFETCH, num_threads) if num_threads else 0
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make_batch)
    return iter(dataset.to_iter_dataset(options))


def _make_batch_maker(
    source: Source, preprocessing: Preprocessing, slots: slice, *, augment: bool
) -> "_BatchMaker":
    return _BatchMaker(
        source=source,
        preprocessing=preprocessing,
        slots=slots,
        augment=augment,
        batch_ids=batch_ids_of(source),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BatchMaker:
    """Makes the slots of one process in any step's global batch; may be called from several threads.

    Attributes:
        source: the data set.
        preprocessing: sizes and augmentation.
        slots: the slots of the global batch that are made.
        augment: flip and rescale the images at random.
        batch_ids: number of each image in its batch, see `batch_ids_of`.
        unreadable: indices of the images that were skipped so far.
    """

    source: Source
    preprocessing: Preprocessing
    slots: slice
    augment: bool
    batch_ids: Int[ndarray, " n"]
    unreadable: set[int] = dataclasses.field(default_factory=set)

    def make(self, step: StepPlan) -> Batch:
        """Returns the slots of a step's batch."""
        count = self.slots.stop - self.slots.start
        images = np.empty((count, *self.preprocessing.canvases[step.canvas], 3), np.uint8)
        examples = [
            self._example(step, slot, out=image) for slot, image in enumerate(images, start=self.slots.start)
        ]
        # The pixels are already in `images`.
        others = [example.replace(images=images[0, :0]) for example in examples]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *others)
        return batch.replace(images=images, valid=batch.valid & step.valid[self.slots])

    def _example(self, step: StepPlan, slot: int, *, out: UInt8[ndarray, "H W 3"]) -> Batch:
        index, preprocessing = int(step.indices[slot]), self.preprocessing
        record = dataclasses.replace(self.source.records[index], image_id=int(self.batch_ids[index]))
        placement = self._place(step, slot)
        sizes = {"max_gt": preprocessing.max_gt, "mask_size": preprocessing.mask_size}
        try:
            image = self.source.load_image(index)
        except DataError as error:
            if preprocessing.on_bad_record == "stop":
                raise
            self._warn(error, index)
            return make_blank_example(record, placement, **sizes, out=out)
        return make_example(image, record, placement, **sizes, out=out)

    def _place(self, step: StepPlan, slot: int) -> Placement:
        record, preprocessing = self.source.records[int(step.indices[slot])], self.preprocessing
        canvas = preprocessing.canvases[step.canvas]
        flip, factor = False, 1.0
        if self.augment:
            # Both are always drawn, so that one setting does not change the random numbers of the other.
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
        return Placement(canvas=canvas, new_size=new_size, flip=flip)

    def _warn(self, error: DataError, index: int) -> None:
        if index in self.unreadable:
            return
        self.unreadable.add(index)
        if len(self.unreadable) <= MAX_WARNINGS:
            logging.warning("skipped: %s", error)
        elif len(self.unreadable) == MAX_WARNINGS + 1:
            logging.warning("more images cannot be read and are skipped; no further ones are listed")
