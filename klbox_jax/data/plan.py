"""Which images each step reads, in which order: a pure function of the seed, the step and the canvases.

So the input pipeline has no state but the step number. Every process knows every batch, and takes its slice
of it; a run resumes at any step, on any number of processes, with the batches it would have had.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

# First words of the entropy of each kind of random number, so that no two share a stream.
_ORDER, _AUGMENTATION = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One global batch, over all processes.

    Attributes:
        step: number of the step, from 0.
        epoch: number of the epoch, from 0.
        canvas: index of the canvas of all its images.
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
        """Returns the generator of the augmentation of the image in `slot` of the global batch."""
        return np.random.default_rng((_AUGMENTATION, self.seed, self.step, slot))


class TrainPlan:
    """An endless shuffled order of batches.

    In each epoch every image comes at least once, batches hold images of one canvas, and batches of all
    canvases are shuffled together. The last batch of a canvas is filled with images of that canvas that the
    epoch has already used, each as rarely as possible. All epochs have the same number of steps.
    """

    def __init__(self, canvas_index: Sequence[int] | Int[ndarray, " n"], *, batch_size: int, seed: int):
        """Plans for the images whose canvases are `canvas_index`.

        Args:
            canvas_index: index of the canvas of each image.
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
        # Threads work on a few neighbouring steps, which lie in two epochs at most.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def step(self, step: int) -> StepPlan:
        """Returns the batch of any step, from 0."""
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
    """Every image once, in order, canvas after canvas; the last batch of a canvas is filled with repeats
    that are not valid.
    """

    def __init__(self, canvas_index: Sequence[int] | Int[ndarray, " n"], *, batch_size: int):
        """Plans for the images whose canvases are `canvas_index`; raises ValueError as `TrainPlan`."""
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
        """Returns the batch of a step, 0 to `num_steps - 1`."""
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


def process_slice(batch_size: int, *, process_index: int, process_count: int) -> slice:
    """Returns the slots of the global batch that a process reads.

    Raises:
        ValueError: the batch cannot be shared evenly, or there is no such process.
    """
    if batch_size % process_count:
        raise ValueError(
            f"A batch of {batch_size} images cannot be shared evenly by {process_count} processes. Make the "
            f"batch size a multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in 0 to {process_count - 1}, got {process_index}.")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _group(
    canvas_index: Sequence[int] | Int[ndarray, " n"], batch_size: int
) -> dict[int, Int[ndarray, " m"]]:
    """Returns the images of each canvas that has any, in order."""
    if batch_size < 1:
        raise ValueError(f"The batch size must be positive, got {batch_size}.")
    canvas_index = np.asarray(canvas_index)
    if canvas_index.size == 0:
        raise ValueError("There are no images to plan batches of.")
    return {int(canvas): np.flatnonzero(canvas_index == canvas) for canvas in np.unique(canvas_index)}


def _in_batches(
    members: dict[int, Int[ndarray, " m"]], batch_size: int
) -> tuple[Int[ndarray, " s"], Int[ndarray, "s b"]]:
    """Returns canvas and images of each batch. The last batch of a canvas wraps round to its first images,
    which are in another batch wherever the canvas has as many images as a batch.
    """
    canvases, indices = [], []
    for canvas, images in members.items():
        num_batches = -(-len(images) // batch_size)
        canvases += [canvas] * num_batches
        indices.append(np.resize(images, (num_batches, batch_size)))
    return np.array(canvases), np.concatenate(indices)
