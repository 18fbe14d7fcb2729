"""Evaluates during a training, keeps the best checkpoints, and stops early."""

from collections.abc import Callable
from typing import Any

from absl import logging

from klbox_jax.distributed import is_writer
from klbox_jax.train import best_checkpoint
from klbox_jax.train.checkpoints import Checkpoints
from klbox_jax.train.job import Job
from klbox_jax.train.step_logger import Clock


class PeriodicEvaluation:
    """Evaluates every `config.train.eval_every` steps, except at step 0 and at the last step."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        *,
        evaluate: Callable[[Any, int], Any] | None,
        clock: Clock,
    ):
        """Protects the best checkpoints so far.

        Args:
            job: the run.
            checkpoints: of the run; the best are protected from deletion.
            evaluate: called with parameters and step; records its metrics in metrics.jsonl. None never evaluates.
            clock: paused during an evaluation.
        """
        self._job = job
        self._checkpoints = checkpoints
        self._evaluate = evaluate
        self._clock = clock
        if evaluate and job.config.train.keep_best:
            checkpoints.protect(*self._history().best_steps)

    def is_due(self, step: int) -> bool:
        """Returns True if the training evaluates after this step."""
        every = self._job.config.train.eval_every
        return bool(self._evaluate and every) and 0 < step < self._job.total_steps and step % every == 0

    def __call__(self, params: Any, step: int) -> bool:
        """Evaluates, unless metrics.jsonl has the evaluation of this step; returns True if the training ends early.

        Raises:
            ValueError: the evaluation does not have the metric `config.train.keep_best`.
        """
        names = getattr(self._evaluate, "names", ("",))
        if not best_checkpoint.is_evaluated(self._job.workdir, step, names):
            with self._clock.paused():
                self._evaluate(params, step)
        return bool(self._job.config.train.keep_best) and self._keep_best(step)

    def _keep_best(self, step: int) -> bool:
        """Protects the best checkpoints so far; returns True if the patience of early stopping is used up."""
        job, config = self._job, self._job.config.train
        if is_writer() and step not in best_checkpoint.scores(job.workdir, config.keep_best):
            raise ValueError(
                f"config.train.keep_best = {config.keep_best!r} is not among the metrics of the evaluation of step "
                f"{step}: {job.workdir.metrics} has no val/{config.keep_best}"
            )
        history = self._history()
        self._checkpoints.protect(*history.best_steps)
        if not config.early_stopping_patience or history.since_best < config.early_stopping_patience:
            return False
        logging.info(
            "%s is trained: it ends early at step %d of %d, after %d evaluations without a better %s; the best "
            "checkpoint is that of step %s",
            job.workdir.path,
            step,
            job.total_steps,
            history.since_best,
            config.keep_best,
            history.best_steps[0],
        )
        return True

    def _history(self) -> best_checkpoint.EvaluationHistory:
        config = self._job.config.train
        return best_checkpoint.evaluation_history(
            self._job.workdir,
            config.keep_best,
            eval_every=config.eval_every,
            count=config.keep_best_checkpoints,
        )
