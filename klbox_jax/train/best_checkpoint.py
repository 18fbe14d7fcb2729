"""Finds the best checkpoint of a run from the evaluations in `metrics.jsonl`, which survive an interruption."""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import multihost_utils

from klbox_jax.distributed import is_writer
from klbox_jax.errors import CheckpointError
from klbox_jax.train.checkpoints import find_steps
from klbox_jax.train.workdir import Workdir
from klbox_jax.train.writer import read_metrics

# Metrics for which higher is better.
HEADLINES = ("AP", "AP50", "AP75", "AP80", "AP90")
FURTHER_HEADLINES = ("mask_AP", "AP_voc")
UNCERTAINTY_HEADLINES = ("NLL", "coverage_1sigma", "spearman_sigma_error")
# The first part of a tag of an evaluation without a name, after `val/`; the first part of others is their name.
OWN_TAGS = (*HEADLINES, *FURTHER_HEADLINES, *UNCERTAINTY_HEADLINES, "AP_class", "AP_iou")


@dataclasses.dataclass(frozen=True)
class EvaluationHistory:
    """The best evaluations of a run so far.

    Attributes:
        best_steps: steps of the best evaluations that still have a checkpoint, best first; ties go to the earlier
            step.
        since_best: number of periodic evaluations after the best of them.
    """

    best_steps: tuple[int, ...]
    since_best: int


def scores(workdir: Workdir, metric: str) -> dict[int, float]:
    """Returns the value of a metric, such as `AP`, at each evaluated step, in ascending order of the steps.

    If a step was evaluated several times, possibly under other settings, the first result counts.
    """
    found: dict[int, float] = {}
    if workdir.metrics.exists():
        for record in read_metrics(workdir.metrics):
            value = record.get(f"val/{metric}")
            if value is not None:
                found.setdefault(record["step"], float(value))
    return dict(sorted(found.items()))


def evaluation_history(
    workdir: Workdir, metric: str, *, eval_every: int, count: int = 1
) -> EvaluationHistory:
    """Returns the best `count` steps and the number of evaluations since the best.

    Process 0 reads the files; all processes return the same.
    """
    best, since = [], 0
    if is_writer():
        found = scores(workdir, metric)
        periodic = [value for step, value in found.items() if step % eval_every == 0]
        since = len(periodic) - 1 - periodic.index(max(periodic)) if periodic else 0
        best = _best_first({step: found[step] for step in find_steps(workdir.checkpoints) if step in found})
    # Padded with -1, because every process must send the same number of values.
    since, *best = _broadcast(since, *best[:count], *(-1,) * (count - len(best)))
    return EvaluationHistory(best_steps=tuple(step for step in best if step >= 0), since_best=since)


def best_checkpoint(workdir: Workdir, metric: str) -> int:
    """Returns the step of the best checkpoint.

    Raises:
        CheckpointError: no step has both an evaluation and a checkpoint.
    """
    found = scores(workdir, metric)
    best = _best_first({step: found[step] for step in find_steps(workdir.checkpoints) if step in found})
    if not best:
        raise CheckpointError(
            f"{workdir.checkpoints} has no checkpoint with val/{metric} in {workdir.metrics}; train with "
            "config.train.keep_best and config.train.eval_every, or set config.evaluation.checkpoint = 'last'"
        )
    return best[0]


def is_evaluated(workdir: Workdir, step: int, names: Iterable[str] = ("",)) -> bool:
    """Returns True if metrics.jsonl has an evaluation of the step; process 0 reads, all return the same.

    Args:
        workdir: the folder of the run.
        step: the step.
        names: names of the post-processings of the run. An evaluation under a name of the user's does not count.
    """
    found = False
    if is_writer() and workdir.metrics.exists():
        prefixes = tuple(f"val/{name}/" for name in names if name)
        prefixes += tuple(f"val/{tag}" for tag in OWN_TAGS if "" in names)
        records = [record for record in read_metrics(workdir.metrics) if record["step"] == step]
        found = any(tag.startswith(prefixes) for record in records for tag in record)
    return bool(_broadcast(int(found))[0])


def _best_first(found: dict[int, float]) -> list[int]:
    """Sorts steps by descending value; ties go to the earlier step."""
    return sorted(found, key=lambda step: (-found[step], step))


def _broadcast(*values: int) -> tuple[int, ...]:
    """Returns the values of process 0."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist())
