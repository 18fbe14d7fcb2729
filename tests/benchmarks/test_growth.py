import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from benchmarks.growth import collectives, extrapolate, fit, plot, settings, tables
from benchmarks.growth.__main__ import choose, extrapolation, first_result
from benchmarks.steps import make_batch
from klbox_jax.distributed import make_mesh, put_batch, replicated
from klbox_jax.files import write_json
from klbox_jax.train.init_or_restore import dummy_batch
from klbox_jax.train.optimizer import make_optimizer
from klbox_jax.train.step import compile_train_step, create_state
from tests.thin import random_batch, thin_model

pytestmark = pytest.mark.four_devices

SIZES = (4, 8, 16, 32, 64)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_a_power_has_its_exponent_everywhere(p):
    growth = fit.fit_growth(SIZES, [3.0 * size**p for size in SIZES])
    assert growth["exponent"] == pytest.approx(p)
    assert growth["last_doubling"] == pytest.approx(p)
    assert growth["beyond_constant"] == pytest.approx(p, abs=0.011)


def test_a_constant_hides_an_exponent_until_it_is_taken_away():
    growth = fit.fit_growth(SIZES, [1000.0 + size**2 for size in SIZES])
    # 1016, ..., 2024, 5096: log2(5096 / 2024) = 1.332.
    assert growth["last_doubling"] == pytest.approx(1.3322, abs=1e-4)
    assert growth["exponent"] < 0.6
    assert growth["beyond_constant"] == pytest.approx(2.0, abs=0.011)


@pytest.mark.parametrize(
    "costs", [(7.0,) * 5, (5.0, 4.0, 4.0, 3.0, 3.0), (100.0, 101.0, 100.0, 102.0, 103.0)]
)
def test_what_does_not_grow_has_no_exponent_beyond_its_constant(costs):
    growth = fit.fit_growth(SIZES, costs)
    assert growth["beyond_constant"] is None


@pytest.mark.parametrize(
    ("sizes", "costs"), [((1, 2), (1.0, 2.0)), ((1, 2, 2), (1.0, 2.0, 3.0)), ((1, 2, 4), (1.0, 0.0, 2.0))]
)
def test_too_few_points_and_points_without_a_logarithm_are_refused(sizes, costs):
    with pytest.raises(ValueError, match="a growth needs three ascending sizes and positive costs"):
        fit.fit_growth(sizes, costs)


def test_sizes_double_and_pass_through_the_default():
    for axis in settings.AXES:
        sizes = np.array(axis.sizes)
        np.testing.assert_array_equal(sizes[1:], 2 * sizes[:-1])
        assert settings.Setting() in axis.settings()
        assert all(side % 32 == 0 for one in axis.settings() for side in one.canvas)


def test_a_config_has_the_sizes_of_its_setting():
    fields = {"batch": 2, "canvas": (64, 96), "rois": 3, "gt_slots": 11, "classes": 5}
    setting = settings.Setting(**fields, detections=6, candidates=7, proposals=8)
    config = settings.make_config(setting)
    assert config.train.batch_size == 2
    assert config.model.roi_heads.batch_size_per_image == 3
    assert (config.postprocess.detections_per_image, config.postprocess.pre_nms_topk) == (6, 7)
    assert config.model.rpn.pre_nms_topk == (8, 8)
    batch = make_batch(2, canvas=setting.canvas, classes=setting.classes, slots=setting.gt_slots)
    assert batch.images.shape == (2, 64, 96, 3)
    assert batch.gt.boxes.shape == (2, 11, 4)
    np.testing.assert_array_equal(batch.gt.valid.sum(axis=1), 8)
    assert (batch.gt.boxes <= np.array([96, 64, 96, 64])[None, None, :] + 1e-3).all()
    assert batch.gt.classes.max() < 5


HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition (state: (pred[4], s32[])) -> pred[] {
  ROOT %all-reduce.7 = pred[] all-reduce(%any), channel_id=1, to_apply=%or, metadata={op_name="jit(step)/while"}
}

ENTRY %main (p: f32[3,4]) -> f32[3,4] {
  %all-reduce.1 = (f32[3,4]{1,0}, bf16[5]{0}, /*index=2*/f32[]) all-reduce(%a, %b, %c), channel_id=2, to_apply=%add
  %all-gather.2 = s8[2,6]{1,0} all-gather(%d), channel_id=3, dimensions={0}, metadata={op_name="jit(step)/top_k"}
  %all-gather-start.3 = (f32[2]{0}, f32[4]{0}) all-gather-start(%e), channel_id=4, dimensions={0}
  %all-gather-done.3 = f32[4]{0} all-gather-done(%all-gather-start.3)
  ROOT %copy = f32[3,4]{1,0} fusion(%all-reduce.1), kind=kLoop, calls=%add
}
"""


def test_collectives_of_a_program():
    assert collectives.find_collectives(HLO) == [
        collectives.Collective("all-reduce", 1, 1, True, "jit(step)/while"),
        # 12 and 1 numbers of 4 bytes, 5 of 2.
        collectives.Collective("all-reduce", 3, 62, False, ""),
        collectives.Collective("all-gather", 1, 12, False, "jit(step)/top_k"),
        collectives.Collective("all-gather", 1, 16, False, ""),
    ]


def test_the_training_step_reduces_its_gradients_and_nothing_else_of_size():
    model = thin_model("loss=kl")
    schedule = optax.constant_schedule(0.1)
    optimizer = make_optimizer(
        name="sgd", schedule=schedule, weight_decay=0.01, momentum=0.9, clip_norm=10.0, frozen=()
    )
    mesh = make_mesh()
    state = create_state(model, optimizer, batch=dummy_batch((64, 96)), seed=0)
    step = compile_train_step(mesh, model=model, optimizer=optimizer, schedule=schedule, seed=0)
    batch = put_batch(random_batch(size=4), mesh)
    compiled = step.lower(jax.device_put(state, replicated(mesh)), batch).compile()
    found = collectives.find_collectives(compiled.as_text())
    reduced = [one for one in found if one.kind == "all-reduce" and not one.is_repeated]
    gradients, head = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.params["rpn"]["head"])
    )
    levels = len(model.rpn.levels)
    # XLA may add the gradients of the RPN's head, which all levels share, before or after it reduces them. The rest
    # are counts and sums of losses.
    num_bytes = sum(one.bytes for one in reduced)
    assert gradients <= num_bytes <= gradients + (levels - 1) * head + 256
    # A bit for each level, in every round of NMS.
    assert [one for one in found if one.is_repeated and one.bytes > 4] == []
    others = [one for one in found if one.kind != "all-reduce"]
    # On a CPU XLA gathers the scores that it ranks, and under jax 0.12 the labels of the anchors, never features or
    # images: no array is larger than one number for each anchor.
    number_each = 4 * 4 * 6 * (8 * 12 + 4 * 6 + 2 * 3)
    assert [one for one in others if one.kind != "all-gather" or one.bytes > one.arrays * number_each] == []
    # Of 6 anchors a cell, each ranked a few times.
    scores_of_an_image = sum(one.bytes for one in others) / 4
    assert scores_of_an_image < 8 * 4 * 6 * (8 * 12 + 4 * 6 + 2 * 3)


def test_rings_by_hand():
    # 6 hops of a quarter of 8 bytes at 2 bytes a second, and 6 times half a second.
    assert extrapolate.ring(8.0, 4, rounds=2, bandwidth=2.0, latency=0.5) == 6 * 1.0 + 3.0
    assert extrapolate.ring(8.0, 4, rounds=1, bandwidth=2.0, latency=0.5) == 3 * 1.0 + 1.5
    assert extrapolate.ring(8.0, 1, rounds=2, bandwidth=2.0, latency=0.5) == 0.0


CHIP = extrapolate.Chip("chip", 100.0, 10.0, 1.0, devices_per_host=2, most_devices=4)
WORK = extrapolate.Work(step_flops=40.0, forward_flops=10.0, gradient_bytes=20.0, gathered_bytes=0.0)
ASSUMED = extrapolate.Assumed(
    sustained_share=0.5,
    images_per_device=4,
    latency=0.25,
    overlap=0.5,
    core_seconds=0.5,
    evaluation_images=7,
)


def test_a_step_by_hand():
    step = extrapolate.extrapolate(CHIP, WORK, 4, assumed=ASSUMED)
    # 4 images of 40 at 50 a second; 6 hops of 5 bytes at the far link's 1, with their latency, half of it hidden.
    assert (step["batch"], step["compute"], step["reduce"], step["gather"]) == (16, 3.2, 31.5, 0.0)
    assert step["total"] == pytest.approx(3.2 + 15.75)
    assert step["efficiency"] == pytest.approx(3.2 / 18.95)
    assert step["images_per_second"] == pytest.approx(16 / 18.95)
    assert step["host_cores"] == pytest.approx(16 / 18.95 / 2 * 0.5)
    assert (step["learning_rate"], step["steps"]) == (0.02, 90_000)
    assert step["training_hours"] == pytest.approx(25 * 18.95)
    # 7 images on 4 devices are 2 rounds of 10 at 50 a second.
    assert step["evaluation_seconds"] == pytest.approx(0.4)
    # Within a host the links are ten times as fast: 2 hops of 10 bytes.
    assert extrapolate.extrapolate(CHIP, WORK, 2, assumed=ASSUMED)["reduce"] == 2 * (1.0 + 0.25)
    gathering = dataclasses.replace(WORK, gathered_bytes=3.0)
    # 3 hops of a quarter of 48 bytes.
    assert extrapolate.extrapolate(CHIP, gathering, 4, assumed=ASSUMED)["gather"] == 3 * (12.0 + 0.25)
    with pytest.raises(ValueError, match="chip is wired for 1 to 4 devices, not 5"):
        extrapolate.extrapolate(CHIP, WORK, 5)


def axis_record(field="batch", step="train", p=1.0):
    growth = fit.fit_growth((1, 2, 4), (1.0, 2.0**p, 4.0**p))
    costs = [1e-3, 2e-3, 4e-3]
    return {
        **{"field": field, "label": field, "step": step, "sizes": [1, 2, 4], "enters": True},
        "costs": {"seconds": costs, "compile_seconds": costs, "bytes": [2**20, 2**21, 2**22]},
        "growth": dict.fromkeys(tables.QUANTITIES, growth),
    }


def test_less_work_in_more_time_is_noise():
    calm, restless, same = axis_record(), axis_record("rois"), axis_record("slots") | {"enters": False}
    assert "scatter" not in tables.verdict([calm, same])
    assert "scatter" not in tables.verdict([])
    restless["costs"]["seconds"] = [1.0, 3.0, 2.0, 4.0, 3.0]
    assert "up to 1.5 times as long as its double (rois, train step)" in tables.verdict([calm, restless])


def test_the_verdict_names_what_grows_faster_than_linearly():
    assert "above 1.15: none." in tables.verdict([axis_record()])
    text = tables.verdict([axis_record(), axis_record("rois", p=1.5), axis_record("proposals", p=2.0)])
    assert "rois, train step, step 1.50; rois, train step, compile 1.50" in text
    assert "proposals, train step, memory 2.00" in text
    assert "batch" not in text


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_tables(tmp_path):
    found = [
        collectives.Collective("all-reduce", 3, 1010, False, ""),
        collectives.Collective("all-gather", 1, 64, False, "top_k"),
        collectives.Collective("all-reduce", 1, 1, True, "while"),
    ]
    devices = {
        **{"step": "train", "devices": 2, "images": 4, "gradient_bytes": 1000},
        **{"held_bytes": 2**20, "collectives": [dataclasses.asdict(one) for one in found]},
    }
    unchanged = {"field": "rois", "label": "RoIs", "step": "eval", "sizes": [1, 2, 4], "enters": False}
    axes = json.loads(json.dumps([axis_record(), unchanged]))
    (row,) = [row for row in cells_of(tables.growth_table(axes, "train")) if row[0] == "batch"]
    assert row[:4] == ["batch", "1 to 4", "1 ms to 4 ms", "1.00, 1.00, 1.00"]
    (row,) = [row for row in cells_of(tables.growth_table(axes, "eval")) if row[0] == "RoIs"]
    assert row[:4] == ["RoIs", "1 to 4", "the same", "-"]
    reduced = ["train", "2", "4", "1", "3", "1,010", "1.010000", "1", "16", "0", "1", "1.0 MiB"]
    assert reduced in cells_of(tables.devices_table([devices]))
    assert cells_of(tables.devices_table([devices | {"step": "eval"}]))[-1][6] == "-"
    rows = extrapolation(WORK, gathered=5.0)
    assert [row["devices"] for row in rows] == [8, 64, 512, 8, 64, 256, 8, 64, 512]
    assert "H100 SXM, bfloat16, gathering" in tables.extrapolation_table(rows)
    assert "gathering" not in tables.extrapolation_table(extrapolation(WORK, gathered=0.0))
    plot.plot_growth(axes, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.width > 500
    with pytest.raises(ValueError, match="nothing to plot: no axis was measured"):
        plot.plot_growth([], tmp_path / "none.png")


def test_parts_that_are_not_chosen_stay(tmp_path):
    file = tmp_path / "growth.json"
    new = first_result(file, {"batch"}, quick=False)
    assert new["axes"] == new["devices"] == []
    measured = {"axes": [{"field": "batch"}, {"field": "classes"}], "devices": [{"devices": 1}]}
    write_json(file, new | measured)
    kept = first_result(file, {"batch"}, quick=False)
    assert kept == new | {"axes": [{"field": "classes"}], "devices": [{"devices": 1}]}
    assert first_result(file, {"devices"}, quick=False) == new | {"axes": measured["axes"], "devices": []}
    # A quick trial must neither stand beside results nor take their place.
    with pytest.raises(ValueError, match=r"growth\.json holds parts of another quick: .*another --output"):
        first_result(file, {"batch"}, quick=True)
    everything = {"batch", "classes", "devices"}
    assert first_result(file, everything, quick=True)["axes"] == []


def test_other_variables_of_the_allocator_are_another_setting(tmp_path, monkeypatch):
    file = tmp_path / "growth.json"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    new = first_result(file, {"batch"}, quick=False)
    assert new["malloc"]["MALLOC_ARENA_MAX"] == "1"
    write_json(file, new | {"axes": [{"field": "classes"}]})
    assert first_result(file, {"batch"}, quick=False)["axes"] == [{"field": "classes"}]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with pytest.raises(ValueError, match=r"growth\.json holds parts of another malloc"):
        first_result(file, {"batch"}, quick=False)


def test_parts_are_chosen_by_name():
    assert {"batch", "proposals", "devices", "extrapolation"} <= choose([])
    assert choose(["batch"]) == {"batch"}
    with pytest.raises(ValueError, match=r"--only=btach is unknown; choose from batch, canvas, rois"):
        choose(["btach"])
