"""The order of images: the batch of each step as a pure function of the seed, the step and the canvases.

So the step number is the only state of the input pipeline. Every process knows every batch and takes its slice of it.
A run resumes at any step, on any number of processes, with the same batches as an uninterrupted run.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

# First word of the entropy of each kind of random number, so that no two kinds share a stream.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The plan of one global batch, over all processes.

    Attributes:
        step: number of the step, from 0.
        epoch: number of the epoch, from 0.
        canvas: index of the canvas that all images of the batch share.
        indices: index of each image in its source.
        valid: False for an image that only fills the batch.
        seed: seed of the plan.
    """

    step: int
    epoch: int
    canvas: int
    indices: Int[ndarray, " b"]
    valid: Bool[ndarray, " b"]
    seed: int

    def rng(self, slot: int) -> np.random.Generator:
        """Returns the random generator for the augmentation of the image in `slot` of the global batch."""
        return np.random.default_rng((_AUGMENTATION, self.seed, self.step, slot))


class TrainPlan:
    """An endless shuffled sequence of batches.

    Each epoch contains every image at least once. A batch holds images of one canvas, and the batches of all canvases
    are shuffled together. The last batch of a canvas is filled with images of that canvas that the epoch has already
    used, each as rarely as possible. All epochs have the same number of steps.
    """

    def __init__(self, canvas_index: Sequence[int] | Int[ndarray, " n"], *, batch_size: int, seed: int):
        """Plans the batches of a training set.

        Args:
            canvas_index: index of the canvas of each image, from `check_fits`.
            batch_size: images of a global batch.
            seed: not negative.

        Raises:
            ValueError: there are no images, or `batch_size` or `seed` is out of range.
        """
        if seed < 0:
            raise ValueError(f"The data seed must not be negative, got {seed}.")
        self.batch_size = batch_size
        self.seed = seed
        self._members = _group(canvas_index, batch_size)
        self.steps_per_epoch = sum(-(-len(images) // batch_size) for images in self._members.values())
        # Threads work on a few neighbouring steps, which belong to two epochs at most.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> StepPlan:
        """Returns the plan of a step, from 0."""
        if step < 0:
            raise ValueError(f"Steps count from 0, got {step}.")
        epoch, position = divmod(step, self.steps_per_epoch)
        canvases, indices = self._epoch(epoch)
        return StepPlan(
            step=step,
            epoch=epoch,
            canvas=int(canvases[position]),
            indices=indices[position],
            valid=np.ones(self.batch_size, bool),
            seed=self.seed,
        )

    def _plan_epoch(self, epoch: int) -> tuple[Int[ndarray, " s"], Int[ndarray, "s b"]]:
        rng = np.random.default_rng((_ORDER, self.seed, epoch))
        shuffled = {canvas: rng.permutation(images) for canvas, images in self._members.items()}
        canvases, indices = _in_batches(shuffled, self.batch_size)
        order = rng.permutation(len(canvases))
        return canvases[order], indices[order]


class EvalPlan:
    """The batches of an evaluation: every image once, in order, one canvas after the other.

    The last batch of a canvas is filled with repeated images that are not valid.
    """

    def __init__(self, canvas_index: Sequence[int] | Int[ndarray, " n"], *, batch_size: int):
        """Plans the batches of a set; `canvas_index` and errors are those of `TrainPlan`."""
        self.batch_size = batch_size
        members = _group(canvas_index, batch_size)
        self._canvases, self._indices = _in_batches(members, batch_size)
        self._valid = np.concatenate(
            [
                (np.arange(-(-len(images) // batch_size) * batch_size) < len(images)).reshape(-1, batch_size)
                for images in members.values()
            ]
        )
        self.num_steps = len(self._canvases)

    def step(self, step: int) -> StepPlan:
        """Returns the plan of a step, 0 to `num_steps - 1`."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"The evaluation has the steps 0 to {self.num_steps - 1}, got {step}.")
        return StepPlan(
            step=step,
            epoch=0,
            canvas=int(self._canvases[step]),
            indices=self._indices[step],
            valid=self._valid[step],
            seed=0,
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of each global batch that one process reads.

    Attributes:
        process_index: number of the process, from 0.
        process_count: number of processes.
    """

    process_index: int = 0
    process_count: int = 1

    def slots(self, batch_size: int) -> slice:
        """Returns the slots of a global batch that the process reads.

        Raises:
            ValueError: the batch cannot be shared evenly, or there is no such process.
        """
        index, count = self.process_index, self.process_count
        if batch_size % count:
            raise ValueError(
                f"A batch of {batch_size} images cannot be shared evenly by {count} processes. Make the "
                f"batch size a multiple of {count}."
            )
        if not 0 <= index < count:
            raise ValueError(f"process_index must be in 0 to {count - 1}, got {index}.")
        share = batch_size // count
        return slice(index * share, (index + 1) * share)


def _group(
    canvas_index: Sequence[int] | Int[ndarray, " n"], batch_size: int
) -> dict[int, Int[ndarray, " m"]]:
    """Returns the indices of the images of each canvas that has any, in order."""
    if batch_size < 1:
        raise ValueError(f"The batch size must be positive, got {batch_size}.")
    canvas_index = np.asarray(canvas_index)
    if canvas_index.size == 0:
        raise ValueError("There are no images to plan batches of.")
    return {int(canvas): np.flatnonzero(canvas_index == canvas) for canvas in np.unique(canvas_index)}


def _in_batches(
    members: dict[int, Int[ndarray, " m"]], batch_size: int
) -> tuple[Int[ndarray, " s"], Int[ndarray, "s b"]]:
    """Returns the canvas and the images of each batch.

    The last batch of a canvas is filled with the canvas' first images. These are in another batch unless the canvas
    has fewer images than a batch.
    """
    canvases, indices = [], []
    for canvas, images in members.items():
        num_batches = -(-len(images) // batch_size)
        canvases += [canvas] * num_batches
        indices.append(np.resize(images, (num_batches, batch_size)))
    return np.array(canvases), np.concatenate(indices)
