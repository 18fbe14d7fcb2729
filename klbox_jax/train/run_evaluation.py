"""Evaluates a run's parameters under one or several post-processings, and writes what came out."""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from klbox_jax.data.loader import eval_batches, restore_image_ids
from klbox_jax.data.plan import EvalPlan, Shard
from klbox_jax.data.source import Source
from klbox_jax.distributed import is_writer
from klbox_jax.errors import Preempted
from klbox_jax.evaluation.coco import IOU_THRESHOLDS, check_backend, evaluate_detections
from klbox_jax.evaluation.eval_step import Evaluator, compile_eval_step
from klbox_jax.evaluation.lrp import evaluate_lrp
from klbox_jax.evaluation.pdq import evaluate_pdq
from klbox_jax.evaluation.temperature import scale_stds
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.evaluation.voc import evaluate_voc
from klbox_jax.files import read_json, write_json
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.train.best_checkpoint import FURTHER_HEADLINES, HEADLINES
from klbox_jax.train.calibration_file import load_temperature
from klbox_jax.train.job import Job
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.sample_pictures import draw_samples
from klbox_jax.train.workdir import current_versions
from klbox_jax.train.writer import MetricWriter, Progress

UNCERTAINTY_HEADLINES = ("NLL", "coverage_1sigma", "spearman_sigma_error")
# PDQ counts every detection that finds nothing as one fault, whatever its score: those below are for AP alone.
PDQ_MIN_SCORE = 0.5


class Evaluation:
    """Evaluates parameters on a run's evaluation set; compiled once for all calls."""

    def __init__(
        self, job: Job, settings: Mapping[str, PostprocessSettings], *, preemption: Preemption | None = None
    ):
        """Takes the settings by name; results of the name "" lie directly in the step's folder.

        Raises:
            ValueError: `config.evaluation.coco_backend` is unknown or not installed.
        """
        self._job = job
        self._backend = job.config.evaluation.coco_backend
        check_backend(self._backend)
        self._preemption = preemption or Preemption()
        self._settings = dict(settings)
        self._step = compile_eval_step(job.mesh, model=job.model, settings=self._settings)
        self._latest: tuple[int | None, dict[str, dict[str, Any]]] = None, {}

    def __call__(self, params: Any, step: int) -> dict[str, dict[str, Any]]:
        """Returns the metrics of each setting; asked for the same step again, those that it found.

        Writes `eval/<step>/<name>/detections.json` and `metrics.json`, the headline numbers to metrics.jsonl and
        TensorBoard (as `val/...`, those of another split than the run's own under its name), pictures of a few images
        to TensorBoard, and the AP of each class to the log. Where `--mode=calibrate` fitted a temperature to this
        step and setting, `uncertainty_calibrated` is that of the scaled stds; `detections.json` has them as they came
        from the network.

        Raises:
            Preempted: it was told to stop before all detections were scored; nothing of them is written.
        """
        if self._latest[0] == step:  # as where a training ends early, with an evaluation
            return self._latest[1]
        job = self._job
        started = time.perf_counter()
        results = self.detections(params, job.eval_source, job.eval_plan, step=step)
        seconds = time.perf_counter() - started
        truth = job.eval_source.coco_ground_truth()
        metrics = {}
        for name, rows in results.items():
            metrics[name] = self._score(truth, rows)
            temperature = load_temperature(job.workdir, step, self._settings[name])
            if temperature is not None:
                scaled = scale_stds(rows, temperature)
                metrics[name]["uncertainty_calibrated"] = evaluate_uncertainty(truth, scaled)
            self._stop_if_told(step)
        for name, numbers in metrics.items():
            folder = job.workdir.eval_dir(step) / name
            provenance = {
                "step": step,
                "seed": job.config.seed,
                "data": job.eval_source.name,
                "data_fingerprint": getattr(job.eval_source, "fingerprint", None),
                "postprocess": vars(self._settings[name]),
                "eval_seconds": seconds,
                "versions": current_versions(),
            }
            if is_writer():
                write_json(folder / "detections.json", results[name])
                # The metrics come last: where they stand, the evaluation is whole.
                write_json(folder / "metrics.json", {**numbers, **provenance})
            self._log(name, numbers, step)
        group = self._group()
        with MetricWriter(job.workdir) as writer:
            for name, numbers in metrics.items():
                prefix = f"{group}/{name}/" if name else f"{group}/"
                headlines = (*HEADLINES, *FURTHER_HEADLINES)
                scalars = {prefix + key: numbers[key] for key in headlines if key in numbers}
                scalars |= {f"{prefix}AP_class/{key}": ap for key, ap in numbers["AP_by_class"].items()}
                by_iou = zip(IOU_THRESHOLDS, numbers["AP_by_iou"], strict=True)
                scalars |= {f"{prefix}AP_iou/{iou:.2f}": ap for iou, ap in by_iou}
                scalars |= {prefix + key: numbers["uncertainty"][key] for key in UNCERTAINTY_HEADLINES}
                writer.write(step, {k: v for k, v in scalars.items() if v is not None})
            if is_writer():
                first, rows = next(iter(results.items()))
                pictures = draw_samples(job.eval_source, rows, count=job.config.evaluation.num_pictures)
                prefix = f"{group}_pictures/{first}/" if first else f"{group}_pictures/"
                writer.write_images(step, {prefix + name: picture for name, picture in pictures.items()})
        logging.info("%d traces of the eval step", self._step._cache_size())
        self._latest = step, metrics
        return metrics

    def detections(self, params: Any, source: Source, plan: EvalPlan, *, step: int) -> dict[str, list[dict]]:
        """Returns the detections of a source's images for each setting, as entries of a COCO results file.

        Raises:
            Preempted: it was told to stop; `step` is what the message calls the parameters.
        """
        job = self._job
        evaluator = Evaluator(step=self._step, mesh=job.mesh, category_ids=source.category_ids)
        batches = eval_batches(
            source,
            plan,
            job.preprocessing,
            num_threads=job.config.data.num_threads,
            shard=Shard(jax.process_index(), jax.process_count()),
        )
        with (
            contextlib.closing(batches),
            Progress(plan.num_steps, description=f"eval {job.workdir.path.name}") as progress,
        ):

            def on_batch(finished: int) -> None:
                progress.update(finished)
                self._stop_if_told(step)

            found = evaluator(params, batches, on_batch=on_batch)
            return {name: restore_image_ids(rows, source) for name, rows in found.items()}

    def _group(self) -> str:
        """`val` for the run's own evaluation split, on which its best step is chosen, else the split's name."""
        split, file = self._job.config.data.eval_split, self._job.workdir.config
        own = read_json(file)["data"].get("eval_split", split) if file.exists() else split
        return "val" if split == own else split

    def _stop_if_told(self, step: int) -> None:
        if stopped_by := self._preemption.signal():
            raise Preempted(
                stopped_by,
                f"{self._job.workdir.path} was in the evaluation of step {step}, whose checkpoint is saved; the "
                "same command begins that evaluation again",
            )

    def _score(self, ground_truth: dict, results: list[dict]) -> dict[str, Any]:
        """COCO AP, LRP, PDQ and uncertainty of the boxes; AP of the masks, and VOC 2007's AP, where they belong."""
        numbers = evaluate_detections(ground_truth, results, backend=self._backend)
        numbers["uncertainty"] = evaluate_uncertainty(ground_truth, results)
        numbers["LRP"] = evaluate_lrp(ground_truth, results)
        numbers["PDQ"] = evaluate_pdq(ground_truth, results, min_score=PDQ_MIN_SCORE) | {
            "min_score": PDQ_MIN_SCORE
        }
        if self._job.config.model.mask_head.enabled:
            masks = evaluate_detections(ground_truth, results, iou_type="segm", backend=self._backend)
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
