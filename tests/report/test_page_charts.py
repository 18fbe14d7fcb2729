import numpy as np
import pytest

from klbox_jax.report.glossary import title_of
from klbox_jax.report.page_accuracy import IOU_THRESHOLDS, ClassAccuracy
from klbox_jax.report.page_charts import precision_recall_charts
from klbox_jax.report.page_data import read_run
from klbox_jax.report.page_errors import error_tables
from tests.report.page_runs import Page, write_run


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", tmp_path)
    return read_run(tmp_path / "run")


def accuracy(count, *, confusion=None, without_objects=()):
    names = [f"class {i}" for i in range(count)]
    curve = np.linspace(1, 0, 101)
    return ClassAccuracy(
        class_names=names,
        precision={
            threshold: {name: None if name in without_objects else curve * threshold for name in names}
            for threshold in IOU_THRESHOLDS
        },
        errors=None,
        confusion=np.zeros((count + 1, count + 1), int) if confusion is None else confusion,
    )


@pytest.mark.parametrize(("count", "folded"), [(2, False), (11, False), (12, True)])
def test_curves_of_many_classes_are_folded(run, count, folded):
    page = Page(precision_recall_charts([run], [accuracy(count)]))
    charts = [e for e in page.all("svg") if e.get("class") == "chart"]
    assert len(charts) == count + 1
    assert sum("details" in e["parents"] for e in charts) == (count if folded else 0)


def test_a_class_without_objects_has_no_curve(run):
    page = Page(precision_recall_charts([run], [accuracy(3, without_objects=("class 1",))]))
    charts = [e["aria-label"] for e in page.all("svg") if e.get("class") == "chart"]
    assert charts == ["All classes (mean)", "class 0", "class 2"]
    names = {e["text"] for e in page.all("li")}
    assert names == {"IoU 0.5: AP 25.0", "IoU 0.75: AP 37.5", "IoU 0.9: AP 45.0"}


def test_curves_of_two_runs_are_told_apart_by_colour_and_dash(run):
    page = Page(precision_recall_charts([run, run], [accuracy(1), accuracy(1)]))
    lines = [
        e["class"] for e in page.all("path") if e.get("class", "").startswith("line") and len(e["d"]) > 20
    ]
    assert lines == ["line s0 d0", "line s0 d2", "line s1 d0", "line s1 d2"] * 2


def test_a_curve_ends_at_precision_0(run):
    found = accuracy(1)
    for curves in found.precision.values():
        curves["class 0"] = np.append(np.ones(50), np.zeros(51))
    page = Page(precision_recall_charts([run], [found]))
    line = next(e["d"] for e in page.all("path") if e.get("class") == "line s0 d0" and len(e["d"]) > 20)
    assert line.count("L") == 50  # 50 levels of precision 1, and one of 0


def test_many_classes_have_a_list_of_confusions(run):
    counts = np.diag(np.full(23, 50))
    counts[3, 5], counts[7, 1], counts[22, 4], counts[2, 22] = 6, 9, 100, 100
    page = Page(error_tables([run], [accuracy(22, confusion=counts)]))
    assert page.rows("Confusions of run") == {
        "true class": ["detected as", "number"],
        "class 7": ["class 1", "9"],
        "class 3": ["class 5", "6"],
    }
    text = error_tables([run], [accuracy(22)])
    assert "No object was detected as another class" in text


def test_titles_of_metrics_are_words():
    assert title_of("train/loss_rpn_cls") == "RPN objectness loss"
    assert title_of("evaluation/AP80") == "AP80 (evaluation)"
    assert title_of("evaluation/coverage_1sigma") == "Share of labels within 1 sigma (evaluation)"
    assert title_of("train/my_new_loss") == "My new loss"
    assert title_of("train/aux/depth") == "Aux depth"
