"""Writes a run's detector as a small folder that can be shipped: its weights in float16, and their provenance.

    python -m experiments.small_checkpoint --workdir=runs/table1_mini/kl --output=checkpoints/scenes_kl

writes `config.json`, `classes.json`, `model.safetensors` and `provenance.json`, which has the AP on the evaluation
split before and after the rounding. `klbox_jax.serving.predictor.load` reads the folder, `--config.model.init_weights`
the weights.
"""

import functools
import hashlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

from experiments.runs import WORKDIR
from klbox_jax import cli, distributed
from klbox_jax.data.loader import eval_batches
from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.eval_step import Evaluator, compile_eval_step
from klbox_jax.files import read_json, write_json
from klbox_jax.serving.model_folder import WEIGHTS_FILE, read_config
from klbox_jax.serving.predictor import load
from klbox_jax.train.best_checkpoint import HEADLINES
from klbox_jax.train.job import Job
from klbox_jax.train.loop import training_seconds
from klbox_jax.train.workdir import Workdir, current_versions
from klbox_jax.weights.safetensors_file import load_params, model_metadata, save_params

# Bytes of the largest folder that counts as small.
MAX_SIZE = 3_000_000


def write_small_checkpoint(workdir: Workdir, output: pathlib.Path) -> dict[str, Any]:
    """Writes the newest sound checkpoint of a run as a small folder; returns the content of provenance.json.

    Raises:
        ValueError: the folder would be larger than `MAX_SIZE`, and nothing is written; or see `load`.
        CheckpointError: the run has no sound checkpoint.
    """
    predictor, config = load(workdir.path), read_config(workdir)
    job = Job(config=config, workdir=workdir)
    metadata = model_metadata(predictor.model) | {"step": str(predictor.step)}
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / WEIGHTS_FILE
        save_params(weights, predictor.params, metadata=metadata, dtype="float16")
        content = weights.read_bytes()
        if len(content) > MAX_SIZE:
            raise ValueError(
                f"the weights of {workdir.path} take {len(content):,} bytes in float16, above {MAX_SIZE:,}"
            )
        rounded, _ = load_params(weights)
    step = compile_eval_step(job.mesh, model=job.model, settings={"": predictor.settings})
    score = functools.partial(_score, job, step)
    source = job.eval_source
    provenance = {
        "step": predictor.step,
        "seed": config.seed,
        "training_seconds": round(training_seconds(job), 1),
        "trained_with": read_json(workdir.versions) if workdir.versions.exists() else None,
        "evaluated_with": current_versions(),
        "data": {"name": source.name, "images": len(source.records), "fingerprint": source.fingerprint},
        "postprocess": predictor.settings.to_dict(),
        "metrics": {"float32": score(predictor.params), "float16": score(rounded)},
        "weights": {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(rounded)),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / WEIGHTS_FILE).write_bytes(content)
    classes = {"names": predictor.class_names, "category_ids": predictor.category_ids}
    for name, value in (("config", config.to_dict()), ("classes", classes), ("provenance", provenance)):
        write_json(output / f"{name}.json", value)
    return provenance


def _score(job: Job, step: Callable, params: Any) -> dict[str, float | None]:
    """Headline APs of parameters on the evaluation split, under the post-processing of the config."""
    evaluator = Evaluator(step=step, mesh=job.mesh, category_ids=job.eval_source.category_ids)
    threads = job.config.data.num_threads
    batches = eval_batches(job.eval_source, job.eval_plan, job.preprocessing, num_threads=threads)
    results = evaluator(jax.device_put(params, distributed.replicated(job.mesh)), batches)[""]
    metrics = evaluate_detections(job.eval_source.coco_ground_truth(), results)
    return {name: metrics[name] for name in HEADLINES}


def main(_: list[str]) -> None:
    """Writes the folder, and logs the AP before and after the rounding."""
    if not WORKDIR.value:
        raise ValueError("name the run's folder: --workdir=runs/table1_mini/kl")
    provenance = write_small_checkpoint(Workdir(WORKDIR.value), pathlib.Path(_OUTPUT.value))
    for dtype, metrics in provenance["metrics"].items():
        logging.info("%s: %s", dtype, "  ".join(f"{name} {ap:.2f}" for name, ap in metrics.items()))
    logging.info("%s: %d bytes of weights", _OUTPUT.value, provenance["weights"]["bytes"])


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "checkpoints/scenes_kl", "Folder to write.")
    cli.start(main)
