"""Evaluates a run's parameters under one or several post-processings, and writes what came out."""

import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from klbox_jax.data.loader import eval_batches
from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.evaluate import Evaluator, compile_eval_step
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.evaluation.voc import evaluate_voc
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.job import Job
from klbox_jax.train.workdir import current_versions, write_json
from klbox_jax.train.writer import MetricWriter, Progress

HEADLINES = ("AP", "AP50", "AP75", "AP80", "AP90")
FURTHER_HEADLINES = ("mask_AP", "AP_voc")
UNCERTAINTY_HEADLINES = ("NLL", "coverage_1sigma", "spearman_sigma_error")


class Evaluation:
    """Evaluates parameters on a run's evaluation set; compiled once for all calls."""

    def __init__(self, job: Job, settings: Mapping[str, PostprocessSettings]):
        """Takes the settings by name; results of the name "" lie directly in the step's folder."""
        self._job = job
        self._settings = dict(settings)
        self._step = compile_eval_step(job.mesh, model=job.model, settings=self._settings)

    def __call__(self, params: Any, step: int) -> dict[str, dict[str, Any]]:
        """Returns the metrics of each setting.

        Writes `eval/<step>/<name>/detections.json` and `metrics.json`, the headline numbers to metrics.jsonl
        and TensorBoard, and the AP of each class to the log.
        """
        job = self._job
        started = time.perf_counter()
        evaluator = Evaluator(step=self._step, mesh=job.mesh, category_ids=job.eval_source.category_ids)
        batches = eval_batches(
            job.eval_source, job.eval_plan, job.preprocessing, num_threads=job.config.data.num_threads
        )
        with Progress(job.eval_plan.num_steps, description=f"eval {job.workdir.path.name}") as progress:
            results = evaluator(params, batches, on_batch=progress.update)
        seconds = time.perf_counter() - started
        truth = job.eval_source.coco_ground_truth()
        metrics = {name: self._score(truth, rows) for name, rows in results.items()}
        for name, numbers in metrics.items():
            folder = job.workdir.eval_dir(step) / name
            write_json(folder / "detections.json", results[name])
            provenance = {
                "step": step,
                "seed": job.config.seed,
                "data": job.eval_source.name,
                "data_fingerprint": getattr(job.eval_source, "fingerprint", None),
                "postprocess": vars(self._settings[name]),
                "eval_seconds": seconds,
                "versions": current_versions(),
            }
            # The metrics come last: where they stand, the evaluation is whole.
            write_json(folder / "metrics.json", {**numbers, **provenance})
            self._log(name, numbers, step)
        with MetricWriter(job.workdir) as writer:
            for name, numbers in metrics.items():
                prefix = f"val/{name}/" if name else "val/"
                headlines = (*HEADLINES, *FURTHER_HEADLINES)
                scalars = {prefix + key: numbers[key] for key in headlines if key in numbers}
                scalars |= {f"{prefix}AP_class/{key}": ap for key, ap in numbers["AP_by_class"].items()}
                scalars |= {prefix + key: numbers["uncertainty"][key] for key in UNCERTAINTY_HEADLINES}
                writer.write(step, {k: v for k, v in scalars.items() if v is not None})
        logging.info("%d traces of the eval step", self._step._cache_size())
        return metrics

    def _score(self, ground_truth: dict, results: list[dict]) -> dict[str, Any]:
        """COCO AP of the boxes and their uncertainty; of the masks, and VOC 2007's AP, where they belong."""
        numbers = evaluate_detections(ground_truth, results)
        numbers["uncertainty"] = evaluate_uncertainty(ground_truth, results)
        if self._job.config.model.mask_head.enabled:
            masks = evaluate_detections(ground_truth, results, iou_type="segm")
            numbers |= {f"mask_{key}": masks[key] for key in HEADLINES}
        if self._job.config.data.name == "voc":
            numbers["AP_voc"] = evaluate_voc(ground_truth, results)["AP_11_points"]
        return numbers

    def _log(self, name: str, numbers: dict[str, Any], step: int) -> None:
        def show(ap):
            return "-" if ap is None else f"{ap:.1f}"

        headline = "  ".join(f"{key} {show(numbers[key])}" for key in HEADLINES)
        headline += "".join(f"  {key} {show(numbers[key])}" for key in FURTHER_HEADLINES if key in numbers)
        uncertainty = numbers["uncertainty"]
        if uncertainty["NLL"] is not None:
            headline += "".join(f"  {key} {uncertainty[key]:.3f}" for key in ("NLL", "coverage_1sigma"))
        classes = "  ".join(f"{key} {show(ap)}" for key, ap in numbers["AP_by_class"].items())
        logging.info("step %d %s: %s", step, name or "evaluation", headline)
        logging.info("step %d %s AP by class: %s", step, name or "evaluation", classes)
