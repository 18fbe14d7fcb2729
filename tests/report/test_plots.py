import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from klbox_jax.report.plots import (
    Scatter,
    plot_ap_over_iou,
    plot_ap_over_sigma_t,
    plot_reliability,
    plot_scatters,
)

CURVE = [45, 43, 41, 38, 34, 29, 23, 15, 7, 1]


def size_of(path):
    with Image.open(path) as file:
        file.load()
        return file.size


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


def test_reliability(tmp_path):
    levels = [0.25, 0.5, 0.75]
    curves = {"x1": [0.2, 0.5, 0.8], "y1": levels}
    backwards = dict(reversed(curves.items()))
    plot_reliability({"raw": curves, "calibrated": curves}, tmp_path / "one.png", levels=levels, title="t")
    plot_reliability({"raw": curves, "calibrated": backwards}, tmp_path / "two.png", levels=levels, title="t")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    width, height = size_of(tmp_path / "one.png")
    assert width > 1.5 * height > 600
    with pytest.raises(ValueError, match="raw, x1: 2 shares for 3 levels"):
        plot_reliability({"raw": {"x1": [0.1, 0.2]}}, tmp_path / "x.png", levels=levels, title="")
    with pytest.raises(ValueError, match="no panels"):
        plot_reliability({}, tmp_path / "x.png", levels=levels, title="")


def test_scatters(tmp_path):
    def panel(xs, ys, **options):
        xs, ys = np.array(xs, float), np.array(ys, float)
        return Scatter(xs=xs, ys=ys, x_label="score", y_label="IoU", title="kl", **options)

    plot_scatters([panel([0.1, 0.9], [0.5, 0.8])] * 2, tmp_path / "two.png", title="t")
    width, height = size_of(tmp_path / "two.png")
    assert width > 1.5 * height > 500
    # Points that are not positive are left out of a logarithmic axis.
    plot_scatters([panel([1, 8], [2, 3], is_ratio=True)], tmp_path / "a.png", title="t")
    plot_scatters([panel([1, 0, 8, 2], [2, 1, 3, -1], is_ratio=True)], tmp_path / "b.png", title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_scatters([panel([], [], is_ratio=True), panel([], [])], tmp_path / "empty.png", title="t")
    with pytest.raises(ValueError, match="no panels"):
        plot_scatters([], tmp_path / "x.png", title="t")


def test_reports_need_no_jax():
    code = (
        "import sys, klbox_jax.report.pictures, klbox_jax.report.plots, klbox_jax.report.tables;"
        "sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
