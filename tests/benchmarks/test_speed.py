import json
import pathlib
import resource
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from benchmarks.speed import coco_evaluation, measure, pipeline, roi_align, suppression
from benchmarks.speed.__main__ import MEASURES
from benchmarks.speed.measure import Measure, Sides, choose, plan_text, run_in_turn, timed
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.table import quantity, record, records_table
from klbox_jax.data.coco import CocoSource
from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.models.convolution import Conv


def make_measure(name="step", against="a peer", **fields):
    return Measure(name, against, None, must=1.0, goal=0.8, **fields)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.001, "FAIL"), (1.0, "PASS"), (0.81, "PASS"), (0.8, "GOAL")]
)
def test_marks(ratio, expected):
    assert record(make_measure(), (ratio,), (1.0,))["mark"] == expected


def test_the_record_and_the_table():
    entry = record(make_measure(), (0.2, 0.1, 0.3), (0.4, 0.4, 0.4))
    low, high = entry.pop("interval")
    assert low == 0.25
    assert high == pytest.approx(0.75)
    assert entry == {
        **{
            "name": "step",
            "against": "a peer",
            "ours": 0.2,
            "peer": 0.4,
            "ratio": 0.5,
            "must": 1.0,
            "goal": 0.8,
        },
        **{"unit": "s", "pairs": 3, "mark": "GOAL"},
    }
    entry["interval"] = [low, high]
    assert json.loads(json.dumps(entry)) == entry
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in records_table([entry]).splitlines()
    ]
    assert ["step", "200 ms", "400 ms, a peer", "0.5", "0.25 to 0.75", "1", "0.8", "3", "GOAL"] in cells


@pytest.mark.parametrize("ours", [(0.0,), (float("nan"),)])
def test_a_ratio_is_never_missing(ours):
    with pytest.raises(ValueError, match=r"step has the ratio .*; it must be positive"):
        record(make_measure(), ours, (1.0,))


def test_quantities_are_shown_in_units_of_their_size():
    assert quantity(2.5, "s") == "2.5 s"
    assert quantity(0.0012, "s") == "1.2 ms"
    assert quantity(3 * 2**30, "bytes") == "3.00 GiB"
    assert quantity(2.5e9, "FLOP") == "2.50 GFLOP"


def test_the_sides_take_turns_and_change_places():
    order = []
    sides = Sides(ours=lambda: order.append("ours") or 1.0, peer=lambda: order.append("peer") or 2.0)
    values = run_in_turn(sides, pairs=3, seconds=60.0, warm_up=True)
    assert " ".join(order) == "ours peer ours peer peer ours ours peer"
    assert values == ([1.0] * 3, [2.0] * 3)


def test_no_pair_begins_after_the_time_is_up_but_for_the_fewest(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    sides = Sides(ours=lambda: 1.0, peer=lambda: 2.0)
    # The clock is read before the first pair, and before every one behind the fewest: 10, 20, 30, ...
    assert len(run_in_turn(sides, pairs=50, seconds=25.0, warm_up=False)[0]) == measure.FEWEST_PAIRS + 2
    assert len(run_in_turn(sides, pairs=50, seconds=5.0, warm_up=False)[0]) == measure.FEWEST_PAIRS
    assert len(run_in_turn(sides, pairs=1, seconds=5.0, warm_up=False)[0]) == 1


def test_a_share_of_the_time(monkeypatch):
    clock = iter([3.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert timed(lambda: None, share=1 / 4)() == 2.0


def test_the_mean_of_calls_in_a_row(monkeypatch):
    clock, made = iter([3.0, 11.0]), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert timed(lambda: made.append(1), calls=4, share=1 / 2)() == 1.0
    assert len(made) == 4


def test_measures_are_chosen_by_the_beginnings_of_their_names():
    measures = [
        make_measure("step", "torchvision's with smooth-L1"),
        make_measure("head_time"),
        make_measure("head_work"),
    ]
    assert choose(measures, [], has_torch=True) == tuple(measures)
    assert choose(measures, ["head"], has_torch=False) == tuple(measures[1:])
    with pytest.raises(ValueError, match=r"--only=haed is unknown; choose from step, head_time, head_work"):
        choose(measures, ["haed"], has_torch=True)
    with pytest.raises(
        ValueError, match=r"step cannot run without torch and torchvision: `make speed` installs"
    ):
        choose(measures, [], has_torch=False)
    text = plan_text([make_measure(pairs=30, seconds=45.0), make_measure("other", seconds=75.0)])
    assert text.splitlines()[0] == "step: up to 30 pairs in 45 s, against a peer"
    assert text.splitlines()[-1] == "2 measures, at most 2 minutes and their preparations"


class TinyNet(nn.Module):
    """A frozen convolution, one right above it, one that is called twice, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = Conv(4, kernel_size=3, name="stem")(x)
        x = nn.relu(Conv(6, kernel_size=1, strides=2, use_bias=False, name="lowest")(x))
        shared = Conv(6, kernel_size=3, name="shared")
        x = shared(shared(x))
        return nn.Dense(5, name="dense")(x.mean(axis=(1, 2)))


def test_work_by_hand():
    net, x = TinyNet(), jnp.zeros((2, 8, 10, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x)

    def work_of(frozen):
        return flops.layer_flops(net.apply, params, x, frozen=frozen, lowest_trained=("lowest",))

    # Multiply-adds of 2 images: 80 cells of 4 channels from 27 numbers; 20 cells of 6 from 4; 20 of 6 from 54, twice;
    # 5 outputs from 6 numbers.
    stem, lowest, shared, dense = 2 * 80 * 4 * 27, 2 * 20 * 6 * 4, 2 * 2 * 20 * 6 * 54, 2 * 5 * 6
    assert work_of(frozen=()) == 2 * (3 * (stem + shared + dense) + 2 * lowest)
    found = work_of(frozen=("stem",))
    assert found == 2 * (stem + 2 * lowest + 3 * (shared + dense))


def test_a_prefix_of_a_name_freezes_nothing():
    trained = {"frozen": ("backbone/res2_0",), "lowest_trained": ()}
    assert flops.passes("backbone/res2_0/conv1", **trained) == 1
    assert flops.passes("backbone/res2_01/conv1", **trained) == 3


def test_the_measures_have_names_and_limits_of_their_own():
    assert len({one.name for one in MEASURES}) == len(MEASURES) == 16
    assert all(0 < one.goal <= one.must for one in MEASURES)
    torch = [one.name for one in MEASURES if one.needs_torch]
    assert "training_step" in torch
    assert "start_cold" not in torch


def test_ours_equals_algorithm_1_on_the_candidates_that_are_timed():
    suppression.sides(1)  # raises where they differ


def test_inputs_lie_where_they_should():
    _, boxes, cotangent = roi_align.make_inputs()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= 80).all()
    assert cotangent.shape == (512, 7, 7, 256)
    truth, results = coco_evaluation.make_results(6)
    assert len(results) == 600
    metrics = evaluate_detections(truth, results)
    assert 1 < metrics["AP"] < 60


def test_the_photographs_are_a_sound_coco_folder(tmp_path):
    pipeline.write_photographs(tmp_path, count=4)
    source = CocoSource(tmp_path, pipeline.SPLIT)
    assert sorted((record.height, record.width) for record in source.records) == [(480, 640)] * 3 + [
        (640, 480)
    ]
    # Neither flat nor pure noise: a photograph of this size has some 50 to 200 kB.
    sizes = [path.stat().st_size for path in (tmp_path / pipeline.SPLIT).iterdir()]
    assert all(30_000 < size < 300_000 for size in sizes)


def test_the_peak_is_that_of_this_process():
    held_now = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = peak_bytes()
    # The other count starts from the peak of whoever started the process.
    assert 0.9 * held_now <= peak <= 1.1 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
