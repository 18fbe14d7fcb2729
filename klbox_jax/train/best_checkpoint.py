"""Which evaluation of a run was its best, read from `metrics.jsonl`, so that an interrupted run knows it again."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils

from klbox_jax.distributed import is_writer
from klbox_jax.errors import CheckpointError
from klbox_jax.train.checkpoints import find_steps
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics

# Of each of them, more is better.
HEADLINES = ("AP", "AP50", "AP75", "AP80", "AP90")
FURTHER_HEADLINES = ("mask_AP", "AP_voc")


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a run stands among its own evaluations.

    Attributes:
        best_steps: the steps of the best evaluations whose checkpoints are there, best first, of equals the first.
        since_best: how many periodic evaluations there were since the best of them.
    """

    best_steps: tuple[int, ...]
    since_best: int


def scores(workdir: Workdir, metric: str) -> dict[int, float]:
    """Returns the value of a metric, such as `AP`, at each step that was evaluated, in ascending order.

    Of a step that was evaluated again, under settings that may be others, the first result counts.
    """
    found: dict[int, float] = {}
    if workdir.metrics.exists():
        for record in read_metrics(workdir.metrics):
            value = record.get(f"val/{metric}")
            if value is not None:
                found.setdefault(record["step"], float(value))
    return dict(sorted(found.items()))


def standing(workdir: Workdir, metric: str, *, eval_every: int, count: int = 1) -> Standing:
    """Returns where the run stands, with `count` best steps at most; process 0 reads, all return the same."""
    best, since = [], 0
    if is_writer():
        found = scores(workdir, metric)
        periodic = [value for step, value in found.items() if step % eval_every == 0]
        since = len(periodic) - 1 - periodic.index(max(periodic)) if periodic else 0
        best = _best_first({step: found[step] for step in find_steps(workdir.checkpoints) if step in found})
    # Every process sends as many numbers.
    since, *best = _as_process_0(since, *best[:count], *(-1,) * (count - len(best)))
    return Standing(best_steps=tuple(step for step in best if step >= 0), since_best=since)


def best_checkpoint(workdir: Workdir, metric: str) -> int:
    """Returns the step of the best checkpoint that was kept.

    Raises:
        CheckpointError: no step has both an evaluation and a checkpoint.
    """
    found = scores(workdir, metric)
    best = _best_first({step: found[step] for step in find_steps(workdir.checkpoints) if step in found})
    if not best:
        raise CheckpointError(
            f"{workdir.checkpoints} has no checkpoint of which {workdir.metrics} tells val/{metric}; train with "
            "config.train.keep_best and config.train.eval_every, or set config.evaluation.checkpoint = 'last'"
        )
    return best[0]


def is_evaluated(workdir: Workdir, step: int) -> bool:
    """Returns whether metrics.jsonl has an evaluation of the step; process 0 looks."""
    found = False
    if is_writer() and workdir.metrics.exists():
        records = [record for record in read_metrics(workdir.metrics) if record["step"] == step]
        found = any(name.startswith("val/") for record in records for name in record)
    return bool(_as_process_0(int(found))[0])


def _best_first(found: dict[int, float]) -> list[int]:
    """Steps by falling value, of equals the first one first."""
    return sorted(found, key=lambda step: (-found[step], step))


def _as_process_0(*values: int) -> tuple[int, ...]:
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist())
