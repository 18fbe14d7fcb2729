"""Evaluates a run's parameters under one or several post-processings, and writes the results."""

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
from klbox_jax.train.best_checkpoint import FURTHER_HEADLINES, HEADLINES, UNCERTAINTY_HEADLINES
from klbox_jax.train.calibration_file import load_temperature
from klbox_jax.train.evaluation_record import check_same_evaluation
from klbox_jax.train.job import Job
from klbox_jax.train.preemption import Preemption
from klbox_jax.train.sample_pictures import draw_samples
from klbox_jax.train.workdir import current_versions
from klbox_jax.train.writer import MetricWriter, Progress

# PDQ counts every unmatched detection as a false positive, whatever its score. Detections below this score, which
# only AP needs, are left out.
PDQ_MIN_SCORE = 0.5


class Evaluation:
    """Evaluates parameters on a run's evaluation set; compiled once for all calls."""

    def __init__(
        self, job: Job, settings: Mapping[str, PostprocessSettings], *, preemption: Preemption | None = None
    ):
        """Takes the settings by name; results of the name "" are written directly to the folder of the step.

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

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(self._settings)

    def check_replaces_nothing(self, step: int) -> None:
        """Raises ValueError if a folder of the step holds the evaluation of other data or other settings."""
        source = self._job.eval_source
        for name, chosen in self._settings.items():
            check_same_evaluation(
                self._job.workdir.eval_dir(step) / name / "metrics.json",
                name,
                data={
                    "data": source.name,
                    "data_fingerprint": source.fingerprint,
                    "data_root": str(self._job.config.data.root),
                },
                postprocess=chosen.to_dict(),
            )

    def __call__(self, params: Any, step: int) -> dict[str, dict[str, Any]]:
        """Returns the metrics of each setting. Results are cached: a second call for the same step returns them.

        Writes `eval/<step>/<name>/detections.json` and `metrics.json`, headline metrics to metrics.jsonl and
        TensorBoard, a few pictures to TensorBoard, and the AP of each class to the log. Headlines are called `val/...`,
        or `<split>/...` for another split than the run's own.

        If a calibration fitted a temperature to this step and setting, `uncertainty_calibrated` scores the scaled
        stds. `detections.json` always has the stds of the network.

        Raises:
            Preempted: a signal stopped it before all detections were scored; nothing is written.
            ValueError: a folder that it would write holds another evaluation.
        """
        if self._latest[0] == step:  # a training that ends early has evaluated its last step already
            return self._latest[1]
        job = self._job
        self.check_replaces_nothing(step)
        started = time.perf_counter()
        results = self.detections(params, job.eval_source, job.eval_plan, step=step)
        seconds = time.perf_counter() - started
        metrics = self._score_all(results, step)
        for name, numbers in metrics.items():
            self._write_files(name, results[name], numbers, step, seconds=seconds)
            _log(name, numbers, step)
        self._write_metrics(metrics, results, step)
        logging.info("%d traces of the eval step", self._step.num_traces)
        self._latest = step, metrics
        return metrics

    def detections(self, params: Any, source: Source, plan: EvalPlan, *, step: int) -> dict[str, list[dict]]:
        """Returns the detections in a source's images for each setting, as entries of a COCO results file.

        Raises:
            Preempted: a signal stopped it; the message names `step`.
        """
        job = self._job
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

            def timed_step(params: Any, batch: Any) -> Any:
                started, traces = time.monotonic(), self._step.num_traces
                found = self._step(params, batch)
                if self._step.num_traces > traces:
                    progress.leave_out(time.monotonic() - started)
                return found

            evaluator = Evaluator(step=timed_step, mesh=job.mesh, category_ids=source.category_ids)

            def on_batch(finished: int) -> None:
                progress.update(finished)
                self._check_preemption(step)

            found = evaluator(params, batches, on_batch=on_batch)
            return {name: restore_image_ids(rows, source) for name, rows in found.items()}

    def _check_preemption(self, step: int) -> None:
        if stopped_by := self._preemption.signal():
            raise Preempted(
                stopped_by,
                f"{self._job.workdir.path} was in the evaluation of step {step}, whose checkpoint is saved; the "
                "same command begins that evaluation again",
            )

    def _score_all(self, results: Mapping[str, list[dict]], step: int) -> dict[str, dict[str, Any]]:
        truth = self._job.eval_source.coco_ground_truth()
        metrics = {}
        for name, rows in results.items():
            metrics[name] = self._score(truth, rows)
            temperature = load_temperature(
                self._job.workdir, step, self._settings[name], data=self._job.eval_source.name
            )
            if temperature is not None:
                scaled = scale_stds(rows, temperature)
                metrics[name]["uncertainty_calibrated"] = evaluate_uncertainty(truth, scaled)
            self._check_preemption(step)
        return metrics

    def _score(self, ground_truth: dict, results: list[dict]) -> dict[str, Any]:
        """Returns COCO AP, LRP, PDQ and uncertainty metrics of the boxes, AP of the masks, and the AP of VOC 2007."""
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

    def _write_files(
        self, name: str, results: list[dict], numbers: dict[str, Any], step: int, *, seconds: float
    ) -> None:
        """Writes the detections and the metrics of a setting; `seconds` is the time of the detection."""
        job = self._job
        folder = job.workdir.eval_dir(step) / name
        provenance = {
            "step": step,
            "seed": job.config.seed,
            "data": job.eval_source.name,
            "data_fingerprint": job.eval_source.fingerprint,
            "data_root": str(job.config.data.root),
            "postprocess": self._settings[name].to_dict(),
            "eval_seconds": seconds,
            "versions": current_versions(),
        }
        if is_writer():
            write_json(folder / "detections.json", results)
            # The metrics come last: if they exist, the evaluation is complete.
            write_json(folder / "metrics.json", {**numbers, **provenance})

    def _write_metrics(
        self, metrics: Mapping[str, dict[str, Any]], results: Mapping[str, list[dict]], step: int
    ) -> None:
        """Writes the headlines of each setting, and pictures of the first one, to metrics.jsonl and TensorBoard."""
        job, group = self._job, self._group()
        with MetricWriter(job.workdir) as writer:
            for name, numbers in metrics.items():
                prefix = f"{group}/{name}/" if name else f"{group}/"
                writer.write(step, {prefix + key: value for key, value in _headlines(numbers).items()})
            if is_writer():
                first, rows = next(iter(results.items()))
                pictures = draw_samples(job.eval_source, rows, count=job.config.evaluation.num_pictures)
                prefix = f"{group}_pictures/{first}/" if first else f"{group}_pictures/"
                writer.write_images(step, {prefix + name: picture for name, picture in pictures.items()})

    def _group(self) -> str:
        """Returns `val` for the run's own evaluation split, which chooses its best step, else the split's name."""
        split, file = self._job.config.data.eval_split, self._job.workdir.config
        own = read_json(file)["data"].get("eval_split", split) if file.exists() else split
        return "val" if split == own else split


def _headlines(numbers: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics that go to metrics.jsonl, by name, without those that are None."""
    found = {key: numbers[key] for key in (*HEADLINES, *FURTHER_HEADLINES) if key in numbers}
    found |= {f"AP_class/{key}": ap for key, ap in numbers["AP_by_class"].items()}
    by_iou = zip(IOU_THRESHOLDS, numbers["AP_by_iou"], strict=True)
    found |= {f"AP_iou/{iou:.2f}": ap for iou, ap in by_iou}
    found |= {key: numbers["uncertainty"][key] for key in UNCERTAINTY_HEADLINES}
    return {key: value for key, value in found.items() if value is not None}


def _log(name: str, numbers: dict[str, Any], step: int) -> None:
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
