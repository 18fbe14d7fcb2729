import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import __main__ as program
from benchmarks.accelerator import correctness, ours, processes, worker
from benchmarks.accelerator.correctness import BOUNDS, Outcome, box_distances, compare
from benchmarks.accelerator.detector import build_network
from benchmarks.accelerator.flops import flops_per_image
from benchmarks.accelerator.goals import check_goals
from benchmarks.accelerator.network import NETWORKS
from benchmarks.accelerator.outcomes import failure
from benchmarks.accelerator.page import page_markdown
from benchmarks.accelerator.plan import HARD, OURS, PEER, Cell, Phase, all_cells, make_phases
from benchmarks.accelerator.processes import Collected, Run, run_phase
from benchmarks.accelerator.program import Job
from benchmarks.accelerator.sizes import FULL, TINY
from benchmarks.accelerator.timing import median_seconds
from configs import faster_rcnn_resnet50_fpn, scenes
from klbox_jax.models.build import build_model
from klbox_jax.postprocess.settings import PostprocessSettings
from klbox_jax.structures import Detections

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {
    "resnet50_fpn": lambda: faster_rcnn_resnet50_fpn.get_config("loss=kl,weights=torchvision"),
    "small": lambda: scenes.get_config("loss=kl,size=tiny"),
}
ABSENT = ("grain", "tensorflow_datasets", "pycocotools", "ml_collections")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_are_those_of_the_config(name):
    network, config = NETWORKS[name], CONFIGS[name]()
    assert build_network(network, "float32") == build_model(config.model, num_classes=network.num_classes)
    assert dict(network.optimizer) == {key: config.optimizer[key] for key in network.optimizer}
    assert PostprocessSettings(**network.postprocess) == PostprocessSettings(**config.postprocess)


def test_the_image_of_a_gpu_needs_no_data_packages():
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing them fails
for name in ("__main__", "ours", "results", "processes", "worker"):
    importlib.import_module("benchmarks.accelerator." + name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_missing_packages_are_named_in_one_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("absl", "flax") else find(name)
    )
    assert program.main([]) == 1
    assert capsys.readouterr().err == (
        f"error: not installed: flax absl-py; run: {sys.executable} -m pip install flax absl-py\n"
    )


def test_the_tiny_run_measures_everything_and_its_network_is_correct(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    monkeypatch.setattr("benchmarks.accelerator.__main__.has_peer", lambda: False)
    assert program.main(["--tiny", "--minutes=30", f"--output={tmp_path}"]) == 0
    result = json.loads((tmp_path / "accelerator.json").read_text())

    cells = {cell["name"]: cell for cell in result["cells"]}
    assert {cell["status"] for cell in cells.values()} == {"measured"}, cells
    assert {cell["kind"] for cell in cells.values()} == set(ours.JOBS)
    for precision in ("float32", "bfloat16"):
        check = cells["correctness/ours/small"][precision]
        assert check["failures"] == []
        assert check["last_loss"] < 0.7 * check["first_loss"]
        assert check["boxes"] == 20
    # bfloat16 is not float32: the comparison sees a difference.
    assert max(cells["correctness/ours/small"]["bfloat16"]["loss_errors"].values()) > 1e-5

    for name in ("train/ours/bfloat16/2", "inference/ours/bfloat16/2"):
        cell = cells[name]
        assert cell["images_per_second"] == pytest.approx(2 / cell["seconds"])
        assert cell["fastest"] <= cell["seconds"] <= cell["slowest"]
        assert min(cell["compile_seconds"], cell["device_bytes"], cell["calls"]) > 0
        # XLA counts activations and pooling too, and pools on a CPU without products.
        assert 0.8 < cell["xla_flops"] / cell["flops"] < 1.5
    assert cells["postprocess/ours/bfloat16/2"]["soft-NMS and voting"]["detections_per_image"] == 20
    assert result["facts"]["device"]["platform"] == "cpu"
    assert set(result["facts"]["versions"]) >= {"jax", "jaxlib", "flax", "optax", "numpy"}
    assert [goal["met"] for goal in result["goals"]].count(None) == 1  # the one with torchvision

    page = (tmp_path / "accelerator.md").read_text()
    assert "torch and torchvision are not installed" in page
    assert "Nothing: every measurement of the plan was made." in page
    assert "not measured: training, bfloat16 at batch 2: at least 1.5 times" in capfd.readouterr().out


def make_outcome(*, shift=0.0, loss=2.0, losses=(4.0, 3.0, 2.0, 1.0), classes=(0, 0, 1, 1)):
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 60], [5, 5, 9, 9], [0, 0, 0, 0]], np.float32)
    boxes[1, 2] += shift
    detections = Detections(
        boxes=np.tile(boxes, (correctness.IMAGES, 1, 1)),
        scores=np.tile(np.float32([0.9, 0.8, 0.7, 0.0]), (correctness.IMAGES, 1)),
        classes=np.tile(np.int32(classes), (correctness.IMAGES, 1)),
        candidate_index=np.zeros((correctness.IMAGES, 4), np.int32),
        valid=np.tile([True, True, True, False], (correctness.IMAGES, 1)),
    )
    scalars = {"total_loss": 10.0, "loss_cls": loss, "loss_box_reg": 1e-4, "grad_norm": 5.0}
    return Outcome(scalars, losses, detections)


def test_equal_outcomes_pass():
    found = compare(make_outcome(), make_outcome(shift=0.009), BOUNDS["float32"])
    assert found["failures"] == []
    # Of three valid detections, the better two are compared.
    assert found["boxes"] == 2 * correctness.IMAGES
    assert found["box_error"] == pytest.approx(0.009, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shift": 0.02}, "100% of the boxes differ by up to 0.02 px; 0.01 is allowed"),
        ({"loss": 2.001}, "loss_cls differs by 5.0e-04 of itself; 1e-04 is allowed"),
        ({"losses": (1.0, 2.0)}, "2 steps raise the loss from 1 to 2"),
        ({"losses": (1.0, float("nan"))}, "a metric of the training steps is not finite"),
        ({"loss": float("nan")}, "loss_cls differs by nan"),
        ({"classes": (2, 2, 1, 1)}, "100% of the boxes differ by up to inf px"),
    ],
)
def test_differences_are_named(changes, sentence):
    found = compare(make_outcome(), make_outcome(**changes), BOUNDS["float32"])
    assert any(failed.startswith(sentence) for failed in found["failures"]), found["failures"]
    json.dumps(found, allow_nan=False)


def test_boxes_are_compared_with_the_closest_of_their_class():
    reference, found = (
        jax.tree.map(lambda x: x[0], outcome.detections)
        for outcome in (make_outcome(), make_outcome(shift=0.5))
    )
    np.testing.assert_allclose(box_distances(reference, found), [0.0, 0.5])
    # The slot that is not valid is no counterpart.
    none = found.replace(valid=np.zeros(4, bool))
    assert np.isinf(box_distances(reference, none)).all()


def test_the_full_plan_has_every_step_of_both_sides_once_and_the_goals_first():
    phases = make_phases(FULL, has_peer=True)
    cells = all_cells(phases)
    assert len({cell.name for cell in cells}) == len(cells)
    for side in (OURS, PEER):
        steps = {
            (cell.kind, cell.precision, cell.batch)
            for cell in cells
            if cell.side == side and cell.kind in ("train", "inference") and not cell.variant
        }
        precisions = ("float32", "tf32", "bfloat16")
        assert steps == {("train", p, b) for p in precisions for b in (2, 8, 16, 32)} | {
            ("inference", p, b) for p in precisions for b in (1, 8, 32)
        }
    first = {cell.name for cell in all_cells(phases[:2])}
    assert first >= {
        *("correctness/ours/small", "correctness/ours/resnet50_fpn", "product/ours/bfloat16"),
        *("train/ours/bfloat16/16", "train/torchvision/bfloat16/16", "inference/ours/bfloat16/32"),
        f"inference/ours/bfloat16/32/{HARD}",
    }
    assert [phase.until for phase in phases] == sorted(phase.until for phase in phases)
    assert {phase.side for phase in make_phases(FULL, has_peer=False)} == {OURS}


def test_goals_are_computed_from_the_cells():
    measured = {"status": "measured"}
    outcomes = {
        "train/ours/bfloat16/16": measured | {"images_per_second": 120.0, "seconds": 0.1, "flops": 6e12},
        "train/torchvision/bfloat16/16": measured | {"images_per_second": 100.0, "seconds": 0.16},
        "inference/ours/bfloat16/32": measured | {"images_per_second": 240.0, "seconds": 0.100},
        f"inference/ours/bfloat16/32/{HARD}": measured | {"images_per_second": 242.0, "seconds": 0.099},
        "product/ours/bfloat16": measured | {"flops_per_second": 100e12},
    }
    goals = check_goals(outcomes, FULL)
    assert [goal.value for goal in goals] == pytest.approx([120.0, 1.2, 240.0, 0.01, 0.6])
    assert [goal.met for goal in goals] == [True, False, False, True, True]
    outcomes["train/torchvision/bfloat16/16"] = {"status": "out of memory", "reason": "none left"}
    assert check_goals(outcomes, FULL)[1].met is None


def test_the_page_has_what_was_measured_and_why_the_rest_was_not():
    phases = make_phases(TINY, has_peer=True)
    cells = all_cells(phases)
    outcomes = {cell.name: {"status": "out of memory", "reason": "RESOURCE_EXHAUSTED"} for cell in cells}
    outcomes["train/torchvision/bfloat16/2"] = {
        "status": "measured",
        **{"images_per_second": 8.0, "seconds": 0.25, "device_bytes": 3 * 2**30},
    }
    page = page_markdown(
        cells=cells, outcomes=outcomes, goals=check_goals(outcomes, TINY), facts={"driver": None}, notes=[]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    assert ["torchvision", "autocast bfloat16", "2", "8", "250", "3.00", "-", "-", "-", "-"] in rows
    assert "- driver: unknown" in page
    assert f"- inference/ours/bfloat16/2/{HARD}: out of memory: RESOURCE_EXHAUSTED" in page


def test_the_useful_work_of_resnet50_fpn():
    training, inference = (
        flops_per_image("resnet50_fpn", FULL.canvas, train=train) for train in (True, False)
    )
    # Multiply-adds: torchvision's count of the backbone at 224 x 224, then layer by layer for cells and RoIs.
    backbone = 4.087e9 * (800 * 1344) / 224**2
    cells = {256: 200 * 336, 512: 100 * 168, 1024: 50 * 84, 2048: 25 * 42}
    pyramid = sum(count * (channels + 9 * 256) * 256 for channels, count in cells.items())
    rpn = (sum(cells.values()) + 13 * 21) * (9 * 256 + 15) * 256
    heads = 1000 * (7 * 7 * 256 + 1024 + 81 + 2 * 4 * 80) * 1024
    assert inference == pytest.approx(2 * (backbone + pyramid + rpn + heads), rel=0.01)
    # The stem and the first stage have no backward pass, and half as many RoIs are trained on.
    assert 2.2 < training / inference < 3


def test_one_cell_that_fails_leaves_the_others(monkeypatch):
    def make_job(cell, sizes, device):
        if cell.variant == "traced":
            raise ValueError("no such setting")

        def run(programs):
            if cell.variant == "run":
                raise MemoryError("RESOURCE_EXHAUSTED: Out of memory")
            return {"seconds": float(programs["double"].compiled(jnp.ones(2)).sum()), "batch": cell.batch}

        return Job({"double": lambda: jax.jit(lambda x: 2 * x).lower(jnp.ones(2))}, run)

    monkeypatch.setitem(ours.JOBS, "train", make_job)
    cells = [Cell(kind="train", variant=variant) for variant in ("traced", "run", "")]
    found = {cell.variant: outcome for cell, outcome in ours.measure_group(cells, TINY)}
    assert found["traced"] == {"status": "failed", "reason": "ValueError: no such setting"}
    assert found["run"]["status"] == "out of memory"
    assert found[""] == {"status": "measured", "seconds": 4.0, "batch": 0}


def test_a_worker_without_time_says_so_for_every_cell(tmp_path):
    names = ["product/ours/bfloat16", "train/ours/bfloat16/2", "nms/ours/bfloat16/2"]
    events = tmp_path / "events.jsonl"
    worker.main(
        ["--tiny", "--side=ours", f"--cells={json.dumps(names)}", f"--events={events}", "--deadline=0"]
    )
    first, *rest = map(json.loads, events.read_text().splitlines())
    assert first["environment"]["device"]["platform"] == "cpu"
    assert [event["cell"] for event in rest] == names
    assert {event["outcome"]["reason"] for event in rest} == {"no time was left"}


class TestPhases:
    """A phase whose process dies, hangs or never starts; the process is a stand-in."""

    cells = tuple(Cell(kind="train", batch=batch) for batch in (1, 2, 3))

    def collect(self, tmp_path, monkeypatch, code, *, seconds=600.0):
        """Runs the phase with a worker that runs `code`, which has the names of the cells and writes events."""
        script = tmp_path / "worker.py"
        script.write_text(
            "import json, os, sys, time\n"
            "value = lambda name: next(x.split('=', 1)[1] for x in sys.argv if x.startswith(name))\n"
            "names, events = json.loads(value('--cells')), open(value('--events'), 'a')\n"
            "def write(**event): print(json.dumps(event), file=events, flush=True)\n"
            f"{code}\n"
        )
        popen = subprocess.Popen
        monkeypatch.setattr(
            processes.subprocess,
            "Popen",
            lambda command, **rest: popen([sys.executable, script, *command], **rest),
        )
        collected = Collected()
        run = Run(folder=tmp_path, tiny=True, started=time.time(), seconds=seconds)
        run_phase(Phase(OURS, self.cells, 1.0), run, collected)
        return [collected.outcomes[cell.name] for cell in self.cells]

    def test_after_a_crash_the_rest_is_measured(self, tmp_path, monkeypatch):
        code = """
for name in names:
    write(started=[name])
    if name == "train/ours/2":
        os._exit(7)
    write(cell=name, outcome={"status": "measured"})
"""
        first, second, third = self.collect(tmp_path, monkeypatch, code)
        assert first == third == {"status": "measured"}
        assert second["status"] == "failed"
        assert "ended with status 7" in second["reason"]

    def test_a_process_that_never_starts_is_not_tried_again(self, tmp_path, monkeypatch):
        outcomes = self.collect(tmp_path, monkeypatch, "sys.exit(3)")
        assert {outcome["status"] for outcome in outcomes} == {"failed"}
        assert len(list(tmp_path.glob("log_*.txt"))) == 1

    def test_a_process_that_hangs_is_stopped(self, tmp_path, monkeypatch):
        monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)
        code = """
write(started=names[:2])
write(cell=names[0], outcome={"status": "measured"})
time.sleep(600)
"""
        started = time.time()
        seconds = processes.RESERVED_SECONDS + 4.0
        first, second, third = self.collect(tmp_path, monkeypatch, code, seconds=seconds)
        assert time.time() - started < 60
        assert first == {"status": "measured"}
        assert second == {"status": "not measured", "reason": "stopped at the end of the time"}
        assert third == {"status": "not measured", "reason": "no time was left"}


def test_the_outcome_of_an_error():
    class OutOfMemoryError(RuntimeError):
        pass

    assert failure(OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert failure(ValueError("first line\nsecond"))["reason"] == "ValueError: first line"


def test_times_are_medians_of_whole_calls():
    made, waited = [], []

    def call():
        made.append(len(made))
        time.sleep(0.012)
        return made[-1]

    found = median_seconds(call, waited.append, seconds=0.05)
    assert 0.012 <= found["fastest"] <= found["seconds"] <= found["slowest"]
    # At most nine calls in each sample, which ends with a wait for its last one.
    assert found["calls"] <= 9 * 3
    assert waited[-1] == made[-1]
    assert len(made) == found["calls"] + 3
    assert dataclasses.asdict(FULL)["seconds"] > 1
