import json
import subprocess
import sys

import pytest
from PIL import Image

from klbox_jax.report.plots import plot_ap_over_iou, plot_ap_over_sigma_t, plot_loss_curves

CURVE = [45, 43, 41, 38, 34, 29, 23, 15, 7, 1]


def size_of(path):
    with Image.open(path) as file:
        file.load()
        return file.size


def write_lines(path, lines, *, tail=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_ap_over_iou(tmp_path):
    rows = [{"name": f"row_{i}", "AP_by_iou": [ap + i for ap in CURVE]} for i in range(8)]
    rows[2]["AP_by_iou"] = [None] * 10
    plot_ap_over_iou(rows, tmp_path / "ap.png", title="Scenes")
    width, height = size_of(tmp_path / "ap.png")
    assert width > 1.5 * height > 600
    assert (tmp_path / "ap.png").stat().st_size <= 200_000
    plot_ap_over_iou(rows, tmp_path / "again.png", title="Scenes")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "ap.png").read_bytes()
    plot_ap_over_iou(rows[:1], tmp_path / "other.png", title="Scenes")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "ap.png").read_bytes()


def test_ap_over_iou_needs_ten_numbers(tmp_path):
    with pytest.raises(ValueError, match="row kl: AP_by_iou needs 10 numbers, not 9"):
        plot_ap_over_iou([{"name": "kl", "AP_by_iou": CURVE[:9]}], tmp_path / "ap.png", title="")
    with pytest.raises(ValueError, match="no rows"):
        plot_ap_over_iou([], tmp_path / "ap.png", title="")


def test_ap_over_sigma_t(tmp_path):
    points = [{"sigma_t": s, "AP50": 60.0, "AP90": 10 + s} for s in (0.005, 0.02, 0.1)]
    without = {"sigma_t": None, "AP50": None, "AP90": 9.0}
    options = {"metrics": ("AP50", "AP90"), "title": "Scenes", "paper": 0.02}
    plot_ap_over_sigma_t([without, *points], tmp_path / "one.png", **options)
    width, height = size_of(tmp_path / "one.png")
    assert width > 1.5 * height > 600
    points[1]["AP90"] = None
    plot_ap_over_sigma_t([without, *points], tmp_path / "two.png", **options)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    for rows in (points, [without], [without, without, *points]):
        with pytest.raises(ValueError, match="rows with a sigma_t and one without"):
            plot_ap_over_sigma_t(rows, tmp_path / "three.png", **options)


def test_loss_curves(tmp_path):
    kl = write_lines(
        tmp_path / "kl.jsonl",
        [{"step": 10, "loss": 3.0, "box": 1}, {"step": 20, "AP": 5.0}, {"step": 20, "loss": 2.0, "box": 2}],
        tail='{"step": 30, "lo',
    )
    plot_loss_curves({"kl": kl}, tmp_path / "one.png", keys=("loss", "box"), title="Losses")
    one, two = size_of(tmp_path / "one.png"), tmp_path / "two.png"
    plot_loss_curves({"kl": kl, "again": kl}, two)
    assert one[0] == 2 * size_of(two)[0]


def test_the_last_line_of_a_step_counts(tmp_path):
    whole = write_lines(tmp_path / "a.jsonl", [{"step": i, "loss": 9 - i} for i in (1, 2, 3)])
    resumed = write_lines(
        tmp_path / "b.jsonl", [{"step": s, "loss": v} for s, v in ((1, 8), (2, 99), (2, 7), (3, 6))]
    )
    plot_loss_curves({"run": whole}, tmp_path / "a.png")
    plot_loss_curves({"run": resumed}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_loss_curves_name_what_is_missing(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no line has 'box'; there are loss"):
        plot_loss_curves({"run": path}, tmp_path / "x.png", keys=("box",))
    with pytest.raises(ValueError, match="no runs"):
        plot_loss_curves({}, tmp_path / "x.png")


def test_reports_need_no_jax():
    code = (
        "import sys, klbox_jax.report.pictures, klbox_jax.report.plots, klbox_jax.report.tables;"
        "sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
