import json

import numpy as np
import pytest

from klbox_jax.report.__main__ import write_report
from klbox_jax.report.page_data import curves, flat, read_run, with_distinct_labels
from klbox_jax.report.page_examples import relative_sigma
from tests.report.page_runs import write_json, write_run


def broken_run(folder, tmp_path, what):
    workdir = tmp_path / "run"
    write_run(workdir, folder / "sea", settings=("one", "two") if what == "settings" else ("",))
    for name, path in {
        "config": workdir / "config.json",
        "records": workdir / "metrics.jsonl",
        "metrics": workdir / "eval" / "5" / "metrics.json",
        "detections": workdir / "eval" / "5" / "detections.json",
    }.items():
        if what == name:
            path.unlink()
    if what == "json":
        (workdir / "config.json").write_text("{")
    return workdir


@pytest.mark.parametrize(
    ("what", "choice", "message"),
    [
        ("config", {}, "is not a run, because it has no config.json; name the folder of a run"),
        ("records", {}, "no metrics.jsonl"),
        ("metrics", {}, "no finished evaluation; make one with .*--mode=eval"),
        ("detections", {}, "no detections.json; evaluate again"),
        ("json", {}, "config.json is not readable as JSON"),
        ("settings", {}, "several settings at step 5; choose --setting from one, two"),
        ("settings", {"settings": ["three"]}, "no setting 'three' at step 5; choose --setting from one, two"),
        ("", {"steps": [4]}, "no evaluation of step 4; choose --step from 5"),
        ("", {"steps": [5, 5]}, "--step is given 2 times for 1 runs"),
    ],
)
def test_what_is_missing_is_said_in_one_line(folder, tmp_path, what, choice, message):
    workdir = broken_run(folder, tmp_path, what)
    with pytest.raises(ValueError, match=message) as error:
        write_report([str(workdir)], tmp_path / "page.html", **choice)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_wrong_folders_are_said_in_one_line(folder, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_report([str(tmp_path / "nowhere")], page)
    with pytest.raises(ValueError, match="name one of the runs in it: a&b, plain"):
        write_report([str(folder)], page)
    with pytest.raises(ValueError, match="0 are given"):
        write_report([], page)
    with pytest.raises(ValueError, match="given twice"):
        write_report([str(folder / "plain")] * 2, page)
    with pytest.raises(ValueError, match="choose another --output"):
        write_report([str(folder / "plain")], tmp_path / "nowhere" / "page.html")
    write_run(tmp_path / "lake", folder / "sea", data="lake/valid")
    with pytest.raises(ValueError, match=r"evaluated on sea/valid and .*lake/valid"):
        write_report([str(folder / "plain"), str(tmp_path / "lake")], page)


def test_setting_of_the_config_is_the_default(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea", settings=("one", "two"))
    path = tmp_path / "run" / "eval" / "5" / "two" / "metrics.json"
    write_json(path, json.loads(path.read_text()) | {"postprocess": {"voting": "variance"}})
    assert read_run(tmp_path / "run").setting == "two"
    assert read_run(tmp_path / "run", setting="one").setting == "one"
    one, two = (read_run(tmp_path / "run", setting=setting) for setting in ("one", "two"))
    assert len({run.label for run in with_distinct_labels([one, two])}) == 2
    write_run(tmp_path / "run", folder / "sea", settings=("",))
    assert read_run(tmp_path / "run").setting == ""


def test_curves_take_the_last_record_of_a_step_and_leave_holes_out(tmp_path):
    write_run(tmp_path / "run", tmp_path, settings=("one", "two"))
    lines = [
        {"step": 1, "train/loss": 1.0, "val/one/AP": 10.0, "val/two/AP": 20.0, "other": 1.0},
        {"step": 3, "train/loss": 5.0},
        {"step": 2, "train/loss": None, "nonfinite": {"train/loss": "nan"}},
        {"step": 3, "train/loss": 3.0, "val/one/AP": 11.0, "val/two/AP": 21.0, "train/once": 1.0},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves(read_run(tmp_path / "run", setting="two"))
    assert found == {"train/loss": ([1, 3], [1.0, 3.0]), "evaluation/AP": ([1, 3], [20.0, 21.0])}


def test_long_curves_are_thinned_to_means(tmp_path):
    write_run(tmp_path / "run", tmp_path)
    lines = [{"step": step, "train/loss": float(step % 2)} for step in range(600)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, values = curves(read_run(tmp_path / "run"))["train/loss"]
    assert values == [0.5] * 300
    assert steps == [2 * i + 0.5 for i in range(300)]


def test_flat_names_every_leaf():
    assert flat({"a": {"b": [1, 2], "c": {}}, "d": "é"}) == {"a.b": "[1, 2]", "a.c": "{}", "d": '"é"'}


def test_relative_sigma_is_the_mean_share_of_the_sides():
    boxes = np.array([[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 5.0, 9.0]])
    stds = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 0.5, 1.0]])
    # (1/10 + 2/20 + 3/10 + 4/20) / 4; a side of nothing counts as 1 px: (0.5/1 + 1/4 + 0.5/1 + 1/4) / 4.
    np.testing.assert_allclose(relative_sigma(boxes, stds), [0.175, 0.375])
