"""Measures speed and memory against torchvision, a plain loop, a limit or another setting of ours, in one run.

    make speed
    python -m benchmarks.speed --preset=cpu --only=training_step,inference

The two sides of a measure run in turn, with the same number of threads. Medians, their ratio and its interval are
printed, and written to speed.json, from which `python -m benchmarks.pages` makes the table of docs/speed.md. All of it
takes at most 25 minutes on two quiet cores. Close other programs: on a busy machine the intervals are wide.
"""

import functools
import gc
import importlib.util
import os
import pathlib
import platform
import time

import jax
from absl import flags, logging

from benchmarks.speed import detector, pipeline, roi_align, start, suppression
from benchmarks.speed.coco_evaluation import evaluations
from benchmarks.speed.measure import Measure, choose, plan_text, run_in_turn
from benchmarks.speed.memory import peaks
from benchmarks.speed.table import NOTES, record, records_table
from klbox_jax import cli
from klbox_jax.files import write_json
from klbox_jax.train.workdir import current_versions

TORCHVISION, LOOP = "torchvision's", "Algorithm 1 in NumPy"
WITHOUT_IT, HARD_NMS = "the step without it", "the eval step with hard NMS"
PRODUCT = f"{detector.MUST_SHARE:.0%} of a large product's speed"
PRODUCT_GOAL = detector.MUST_SHARE / detector.GOAL_SHARE
forward, both = (functools.partial(roi_align.sides, with_gradient=gradient) for gradient in (False, True))
pipelines = {side: functools.partial(pipeline.sides, side) for side in pipeline.SIZES}
one_image, batch = (functools.partial(suppression.sides, images) for images in (1, 8))
# In the order of the table: name, the other side, both sides, the largest ratio allowed, the ratio wanted.
MEASURES = (
    Measure("training_step", f"{TORCHVISION} with smooth-L1", detector.training, 1.0, 0.85, seconds=125.0),
    Measure(
        "training_step_share_of_machine", PRODUCT, detector.product_share, 1.0, PRODUCT_GOAL, seconds=100.0
    ),
    Measure("kl_head_operations", WITHOUT_IT, detector.head_flops, 1.005, 1.005, unit="FLOP", pairs=1),
    Measure("kl_head_time", WITHOUT_IT, detector.head_time, 1.03, 1.03, seconds=125.0),
    Measure("inference", f"{TORCHVISION} with hard NMS", detector.inference, 1.0, 0.8, seconds=50.0),
    Measure("voting_and_soft_nms", HARD_NMS, detector.voting, 1.03, 1.0, pairs=60, seconds=70.0),
    Measure("roi_align_forward", TORCHVISION, forward, 1.0, 0.8, pairs=60, seconds=20.0),
    Measure("roi_align_forward_backward", TORCHVISION, both, 0.4, 0.3, seconds=40.0),
    Measure("suppression_one_image", LOOP, one_image, 1 / 40, 1 / 60, pairs=100, seconds=20.0),
    Measure("suppression_batch_of_8", LOOP, batch, 1 / 60, 1 / 100, pairs=100, seconds=20.0),
    Measure("input_pipeline_320", TORCHVISION, pipelines[320], 0.67, 0.5, seconds=30.0),
    Measure("input_pipeline_800", TORCHVISION, pipelines[800], 0.67, 0.5, seconds=60.0),
    Measure("coco_evaluation", "pycocotools", evaluations, 0.33, 0.2, pairs=3, seconds=150.0, warm_up=False),
    Measure("start_cold", "the limit", start.cold, 1.0, 0.7, pairs=3, seconds=75.0, warm_up=False),
    Measure("start_warm", "the limit", start.warm, 1.0, 0.7, pairs=5, seconds=45.0),
    Measure("peak_memory", TORCHVISION, peaks, 1.0, 0.8, unit="bytes", pairs=2, seconds=120.0, warm_up=False),
)
# Number of pairs of a quick trial.
QUICK_PAIRS = 3


def main(_: list[str]) -> None:
    """Runs the measures that the flags choose; writes the table after each of them."""
    logging.set_verbosity(logging.WARNING)
    # Every measure waits for its result, as torch and NumPy do on the thread that calls them. JAX would use another
    # thread, so that Python can continue, which makes 0.5 ms of a call of 0.4 ms.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    has_torch = importlib.util.find_spec("torch") is not None
    measures = choose(MEASURES, _ONLY.value, has_torch=has_torch)
    print(plan_text(measures), flush=True)
    versions, threads = current_versions(), len(os.sched_getaffinity(0))
    if has_torch:
        from benchmarks import torchvision_peer as peer

        peer.use_threads(threads)
        versions |= peer.versions()
    machine = {
        "processor": processor(),
        "cores": threads,
        "threads of each side": threads,
        # Of other programs, when it began.
        "load average": os.getloadavg()[0],
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", "not set"),
    }
    output = pathlib.Path(_OUTPUT.value)
    started, records = time.perf_counter(), []
    for measure in measures:
        pairs = min(QUICK_PAIRS, measure.pairs) if _QUICK.value else measure.pairs
        values = run_in_turn(measure.prepare(), pairs=pairs, seconds=measure.seconds, warm_up=measure.warm_up)
        entry = record(measure, *values)
        records.append(entry)
        seconds = time.perf_counter() - started
        print(f"{seconds:5.0f} s  {measure.name}: {entry['ratio']:.4g}, {entry['mark']}", flush=True)
        conditions = {"versions": versions, "machine": machine, "quick": _QUICK.value}
        write_json(output / "speed.json", {"measures": records, **conditions})
        gc.collect()
    failed = [entry["name"] for entry in records if entry["mark"] == "FAIL"]
    print(f"\n{records_table(records)}\n\n{NOTES}\n")
    print(
        f"{len(failed)} of {len(records)} measures fail: {', '.join(failed) or 'none'}. {output / 'speed.json'}"
    )


def processor() -> str:
    """Returns the processor's name, or its kind if the system does not give the name."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    flags.DEFINE_enum("preset", "cpu", ["cpu"], "The sizes and limits; these are for two processor cores.")
    _ONLY = flags.DEFINE_list("only", [], "Names of measures, or what they begin with; all by default.")
    _OUTPUT = flags.DEFINE_string("output", "runs/speed", "Folder of speed.json.")
    _QUICK = flags.DEFINE_bool("quick", False, "Few pairs of each: a trial, not a result.")
    cli.start(main)
