import time

import pytest
from absl.testing import flagsaver

from experiments import inference_time, paper_tables


def test_the_steps_take_turns(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    # The clock ticks once for each reading: every run takes one tick.
    assert inference_time.median_seconds(steps, repeats=2) == {"a": 1, "b": 1}
    assert order == ["a", "b"] * 3


def test_the_first_run_does_not_count_and_the_median_does(monkeypatch):
    # Runs of 100 (compiling), 2, 9 and 3: the median of the last three is 3.
    clock = iter([0, 100, 200, 202, 300, 309, 400, 403])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert inference_time.median_seconds({"a": lambda: None}, repeats=3) == {"a": 3}


def test_rows_and_text():
    seconds = {"baseline": 0.2, "kl_voting": 0.21, "kl_voting_soft_nms": 0.25}
    rows = inference_time.table_rows(seconds, batch_size=4)
    assert [row["ms"] for row in rows] == pytest.approx([50.0, 52.5, 62.5])
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.05, 1.25])
    text = inference_time.table_markdown(rows, meta={"batch": "4 images"})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["baseline", "smooth_l1", "hard", "none", "50.00", "1.000", "(99)?", "(1.00)?"] in lines
    assert ["kl_voting", "kl", "hard", "variance", "52.50", "1.050", "-", "-"] in lines
    full = ["kl_voting_soft_nms", "kl", "soft_gaussian", "variance", "62.50", "1.250", "(101)?", "(1.02)?"]
    assert full in lines
    assert "unverified" in text


@pytest.mark.parametrize("preset", inference_time.FAMILIES)
def test_a_dry_run_prints_two_commands(preset, capsys):
    with flagsaver.flagsaver(preset=preset, dry_run=True, table="4"):
        paper_tables.main(["paper_tables"])
    text = capsys.readouterr().out
    assert text.count("python -m klbox_jax.main") == 2
    assert "table4: trainings: 2," in text
