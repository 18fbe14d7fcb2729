import pytest

from klbox_jax.report.charts import Axes, Series, chart
from tests.report.page_runs import Page


def test_chart_places_points_and_leaves_gaps():
    line = Series(name="<a>", xs=[0.0, 1.0, 2.0, 3.0, 4.0], ys=[0.0, 1.0, None, 1.0, 0.5], style=0)
    text = chart([line], title="<t>", axes=Axes(x_range=(0.0, 4.0), y_range=(0.0, 1.0)))
    # The drawing spans x from 54 to 410 and y from 230 up to 28.
    assert 'd="M54.0 230.0L143.0 28.0M321.0 28.0L410.0 129.0"' in text
    assert "<a>" not in text
    assert "&lt;a&gt;" in text
    assert Page(text).all("svg")[0]["aria-label"] == "<t>"
    with pytest.raises(ValueError, match="chart 't' has no points"):
        chart([Series(name="", xs=[1.0], ys=[None], style=0)], title="t")


def test_logarithmic_chart_leaves_out_points_that_are_not_positive():
    dots = Series(name="", xs=[1.0, 10.0, 100.0, -1.0], ys=[1.0, 10.0, 0.0, 1.0], style=1, form="dots")
    axes = Axes(log=True, x_range=(1.0, 100.0), y_range=(1.0, 100.0), diagonal=True)
    text = chart([dots], title="t", axes=axes)
    assert 'd="M54.0 230.0h0M232.0 129.0h0"' in text
    assert 'class="diagonal" d="M54.0 230.0L410.0 28.0"' in text
