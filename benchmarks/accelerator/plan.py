"""Measurements of a run, in the order in which they are made: what matters most comes first."""

import dataclasses
from collections.abc import Sequence

from benchmarks.accelerator.sizes import Sizes

OURS, PEER = "ours", "torchvision"
# Of the eval step: hard NMS and no voting, in place of soft-NMS and variance voting.
HARD = "hard NMS, no voting"
COMPILED = "torch.compile of the backbone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        kind: `correctness`, `product`, `train`, `inference`, `postprocess`, `nms` or `roi_align`.
        side: `OURS` or `PEER`.
        precision: key of `detector.PRECISIONS`; torchvision's bfloat16 is its autocast. Empty for a check.
        batch: images; 0 where there are none.
        variant: network of a correctness check, or the setting that differs.
    """

    kind: str
    side: str = OURS
    precision: str = ""
    batch: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """Unique in a run."""
        parts = (self.kind, self.side, self.precision, str(self.batch or ""), self.variant)
        return "/".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Measurements of one process, which has the device to itself.

    Attributes:
        side: `OURS` or `PEER`.
        cells: in order.
        until: share of the run's time at which it has to end.
    """

    side: str
    cells: tuple[Cell, ...]
    until: float


def make_phases(sizes: Sizes, *, has_peer: bool) -> tuple[Phase, ...]:
    """Returns the phases of a run: the goals of both sides first, then the rest of both."""
    phases = (
        Phase(OURS, _first_of_ours(sizes), 0.6),
        Phase(PEER, _first_of_peer(sizes), 0.72),
        Phase(OURS, _others(sizes, OURS), 0.92),
        Phase(PEER, (*_others(sizes, PEER), *_compiled(sizes)), 1.0),
    )
    return tuple(phase for phase in phases if phase.cells and (has_peer or phase.side == OURS))


def all_cells(phases: Sequence[Phase]) -> tuple[Cell, ...]:
    """Returns the cells of all phases."""
    return tuple(cell for phase in phases for cell in phase.cells)


def headline(sizes: Sizes, kind: str, side: str = OURS, variant: str = "") -> Cell:
    """Returns the cell of `train` or `inference` that the goals are about."""
    batch = (sizes.train_batches if kind == "train" else sizes.eval_batches)[0]
    return Cell(kind=kind, side=side, precision=sizes.precisions[0], batch=batch, variant=variant)


def _first_of_ours(sizes: Sizes) -> tuple[Cell, ...]:
    checks = tuple(Cell(kind="correctness", variant=name) for name in sizes.checked)
    products = tuple(Cell(kind="product", precision=precision) for precision in sizes.precisions)
    pooling = tuple(
        Cell(kind="roi_align", precision=precision, batch=sizes.pooled_images)
        for precision in sizes.precisions
    )
    inference = headline(sizes, "inference")
    return (
        *checks,
        *products,
        headline(sizes, "train"),
        inference,
        headline(sizes, "inference", variant=HARD),
        dataclasses.replace(inference, kind="postprocess"),
        dataclasses.replace(inference, kind="nms"),
        *pooling,
    )


def _first_of_peer(sizes: Sizes) -> tuple[Cell, ...]:
    return (
        headline(sizes, "train", PEER),
        headline(sizes, "inference", PEER),
        Cell(kind="roi_align", side=PEER, precision="float32", batch=sizes.pooled_images),
    )


def _others(sizes: Sizes, side: str) -> tuple[Cell, ...]:
    """The steps that are no headline: other batches first, then the first batch of other precisions, then the rest."""
    first, *other_precisions = sizes.precisions

    def steps(precision: str, *, position: slice) -> list[Cell]:
        batches = {"train": sizes.train_batches[position], "inference": sizes.eval_batches[position]}
        return [
            Cell(kind=kind, side=side, precision=precision, batch=batch)
            for kind, chosen in batches.items()
            for batch in chosen
        ]

    cells = steps(first, position=slice(1, None))
    for position in (slice(0, 1), slice(1, None)):
        for precision in other_precisions:
            cells += steps(precision, position=position)
    return tuple(cells)


def _compiled(sizes: Sizes) -> tuple[Cell, ...]:
    if not sizes.torch_compile:
        return ()
    return tuple(headline(sizes, kind, PEER, COMPILED) for kind in ("train", "inference"))
