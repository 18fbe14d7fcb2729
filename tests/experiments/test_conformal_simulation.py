import json

import numpy as np
import pytest

from experiments import conformal_simulation
from experiments.conformal_simulation import SETTINGS, Setting, draw_boxes, measure, simulate, write_results


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_level_keeps_its_promise(setting):
    for num in (20, 100):
        row = measure(setting, num, 80)
        assert row["keeps_promise"] is (None if setting.promise == "none" else True), row
        assert row["standard_error"] < 0.01
    if setting.promise in ("exact", "risk"):
        assert row["coverage"] < 0.96


def test_a_broken_promise_is_seen(monkeypatch):
    fit = conformal_simulation.fit_intervals
    for coverage in (0.85, 0.95):
        monkeypatch.setattr(
            conformal_simulation,
            "fit_intervals",
            lambda *arrays, wrong=coverage, **choices: fit(*arrays, **choices | {"coverage": wrong}),
        )
        assert measure(SETTINGS[0], 100, 80)["keeps_promise"] is False


def test_boxes_come_in_images_of_unequal_difficulty():
    boxes = draw_boxes(np.random.default_rng(0), 2000, whole_images=True)
    counts = np.bincount(boxes.image_ids)
    assert counts.min() == 1
    assert counts.max() == conformal_simulation.MAX_BOXES
    ratios = boxes.errors / boxes.sigmas
    assert np.corrcoef(ratios[:, 0], ratios[:, 2])[0, 1] > 0.3
    sizes = np.log(np.abs(ratios)).mean(axis=1)
    means = (np.bincount(boxes.image_ids, sizes) / counts)[counts > 2]
    alone = draw_boxes(np.random.default_rng(1), 2000, whole_images=False)
    assert np.bincount(alone.image_ids).max() == 1
    spread = np.log(np.abs(alone.errors / alone.sigmas)).mean(axis=1).std()
    # Means of 3 to 7 independent boxes would have a spread of 1 / sqrt(3) at most, and .47 on average.
    assert means.std() > spread / np.sqrt(3)


def test_a_class_without_a_quantile_of_its_own_is_left_out():
    few = [simulate(Setting("class", level="class"), 12, (0, seed)) for seed in range(40)]
    kept = [draw for draw in few if draw is not None]
    assert 0 < len(kept) < 40
    assert min(draw.num_units for draw in kept) >= 9
    assert measure(Setting("class", level="class"), 3, 2)["num_draws"] == 0


def test_tables_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(conformal_simulation, "SETTINGS", SETTINGS[:1] + SETTINGS[-1:])
    rows = write_results(tmp_path, [9, 30], 5)
    assert len(rows) == 4
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["rows"] == rows
    text = (tmp_path / "table.md").read_text()
    assert "| box, max " in text
    assert "n = 30" in text
    assert "box, whole images" in text.split("\n\n")[-1]
    broken = [row | {"keeps_promise": False} for row in rows]
    assert conformal_simulation.table(broken).count("(!)") == 4
