import json

import pytest

from experiments import cells
from klbox_jax.report.paper import PAPER_TABLE1, PAPER_TABLE3, PAPER_TABLE5


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Two rows with two seeds, in the place of docs/results."""
    rows = [
        {"name": name, "AP": ap, "AP50": 2 * ap, "std": {"AP": 0.25, "AP50": 0.5}, "mask_AP": None}
        for name, ap in (("baseline", 10.04), ("kl", 12.96))
    ]
    one = {"row": "kl", "base": "baseline", "metric": "AP", "mean": 2.92, "by_seed": [3.5, 2.34]}
    intervals = {"interval_seeds": [-4.449, 10.289], "interval_images": [1.0, 4.0]}
    (tmp_path / "seeds.json").write_text(json.dumps({"rows": rows, "differences": [one | intervals]}))
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    cells.read.cache_clear()
    yield tmp_path
    cells.read.cache_clear()


def test_cells_of_rows(numbers):
    assert cells.value("seeds.json", "AP")("kl") == "13.0"
    assert cells.value("seeds.json", "AP", ".2f")("kl") == "12.96"
    assert cells.value("seeds.json", "mask_AP")("kl") == "-"
    assert cells.value("seeds.json", "AP")("iou_net") == "-"
    assert cells.mean_and_std("seeds.json", "AP50")("baseline") == "20.1 ± 0.5"
    assert cells.gain("seeds.json", "AP")("kl") == "+2.9"
    assert cells.gain("seeds.json", "AP")("baseline") == ""
    assert cells.across("AP", "kl")("seeds.json") == "13.0"


def test_cells_of_differences(numbers):
    pair = ("kl", "baseline")
    parts = ("mean", "by_seed", "seeds", "images")
    assert [cells.difference("seeds.json", "AP", part)(pair) for part in parts] == [
        "+2.92",
        "+3.50 +2.34",
        "-4.45 to +10.29",
        "+1.00 to +4.00",
    ]
    with pytest.raises(ValueError, match=r"seeds\.json has no difference of baseline and kl in AP"):
        cells.difference("seeds.json", "AP", "mean")(("baseline", "kl"))


def test_cells_of_the_paper():
    assert cells.paper_value(PAPER_TABLE1)("kl") == "26.4*"
    assert cells.paper_gain(PAPER_TABLE5)("kl_voting_soft_nms") == "+1.3*"
    assert cells.paper_gain(PAPER_TABLE5)("baseline") == ""
    assert cells.paper_gain(PAPER_TABLE3)("2mlp/kl") == "+0.6*"
    assert cells.paper_ratio("kl_voting_soft_nms") == "(1.02)?"
    assert cells.paper_ratio("kl_voting") == "-"


def test_a_table_has_a_line_for_each_key(numbers):
    table = cells.Table("row", {"kl": "KL Loss"}, [("AP", cells.value("seeds.json", "AP"))])
    assert table() == "| row     |   AP |\n| ------- | ---: |\n| KL Loss | 13.0 |"


def test_a_copied_file_has_no_line_ends_around_it(numbers):
    (numbers / "table.md").write_text("| a |\n| - |\n")
    assert cells.copied("table.md")() == "| a |\n| - |"
