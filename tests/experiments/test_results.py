import json

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import results


def test_the_documents_say_what_the_numbers_say():
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_every_table_stands_in_a_document():
    text = "".join(document.read_text(encoding="utf-8") for document in results.DOCUMENTS)
    assert {found["name"] for found in results._MARKED.finditer(text)} == set(results.TABLES)


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
    methods = [
        {"name": name, "loss": name.split("-")[0], "seed": seed, "AP": ap, "AP90": ap90}
        for name, seed, ap, ap90 in (
            ("kl-hard", 0, 30.0, 9.0),
            ("kl-soft", 0, 31.0, 8.0),
            ("kl-hard", 1, 33.0, 9.5),
            ("kl-soft", 1, 32.0, 9.0),
            ("l1-hard", 0, 20.0, 1.0),
            ("l1-hard", 1, 20.0, 2.0),
            ("l1-hard", 2, 20.0, 3.0),
        )
    ]
    (tmp_path / "methods_mini").mkdir()
    (tmp_path / "methods_mini" / "table.json").write_text(json.dumps({"rows": methods}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.read.cache_clear()
    yield tmp_path
    results.read.cache_clear()


def test_cells_of_rows(numbers):
    assert results.value("seeds.json", "AP")("kl") == "13.0"
    assert results.value("seeds.json", "AP", ".2f")("kl") == "12.96"
    assert results.value("seeds.json", "mask_AP")("kl") == "-"
    assert results.value("seeds.json", "AP")("iou_net") == "-"
    assert results.mean_and_std("seeds.json", "AP50")("baseline") == "20.1 ± 0.5"
    assert results.gain("seeds.json", "AP")("kl") == "+2.9"
    assert results.gain("seeds.json", "AP")("baseline") == ""
    assert results.across("AP", "kl")("seeds.json") == "13.0"


def test_cells_of_differences(numbers):
    pair = ("kl", "baseline")
    parts = ("mean", "by_seed", "seeds", "images")
    assert [results.difference("seeds.json", "AP", part)(pair) for part in parts] == [
        "+2.92",
        "+3.50 +2.34",
        "-4.45 to +10.29",
        "+1.00 to +4.00",
    ]
    with pytest.raises(ValueError, match=r"seeds\.json has no difference of baseline and kl in AP"):
        results.difference("seeds.json", "AP", "mean")(("baseline", "kl"))


def test_methods_are_compared_by_their_best_rows_or_by_name(numbers):
    # By AP the soft row is KL Loss' best with seed 0, the hard one with seed 1; seed 2 has no network of KL Loss.
    assert results.method_difference("by_seed")(("kl", "l1")) == "+7.00 +7.50"
    assert results.method_difference("mean")(("kl", "l1")) == "+7.25"
    assert results.method_difference("by_seed")(("kl-hard", "l1-hard")) == "+8.00 +7.50"
    # Student's quantile with one degree of freedom is 12.706.
    half = 12.706 * np.std([7.0, 7.5], ddof=1) / np.sqrt(2)
    assert results.method_difference("seeds")(("kl", "l1")) == f"{7.25 - half:+.2f} to {7.25 + half:+.2f}"


def test_cells_of_the_paper():
    assert results.paper_value(results.PAPER_TABLE1)("kl") == "26.4*"
    assert results.paper_gain(results.PAPER_TABLE5)("kl_voting_soft_nms") == "+1.3*"
    assert results.paper_gain(results.PAPER_TABLE5)("baseline") == ""
    assert results.paper_gain(results.PAPER_TABLE3)("2mlp/kl") == "+0.6*"
    assert results.paper_ratio("kl_voting_soft_nms") == "(1.02)?"
    assert results.paper_ratio("kl_voting") == "-"


def test_a_document_is_filled_and_checked(numbers, monkeypatch):
    table = results.Table("row", {"kl": "KL Loss"}, [("AP", results.value("seeds.json", "AP"))])
    monkeypatch.setattr(results, "TABLES", {"one": table})
    document = numbers / "page.md"
    text = "Before.\n\n<!-- table: one -->\nold\n<!-- /table -->\n\nAfter.\n"
    document.write_text(text)
    monkeypatch.setattr(results, "DOCUMENTS", (document,))
    with (
        flagsaver.flagsaver(check=True),
        pytest.raises(ValueError, match=r"page\.md is not what docs/results says; run python -m experiments"),
    ):
        results.main(["results"])
    assert document.read_text() == text
    results.main(["results"])
    filled = "| row     |   AP |\n| ------- | ---: |\n| KL Loss | 13.0 |"
    assert document.read_text() == text.replace("old", filled)
    with flagsaver.flagsaver(check=True):
        results.main(["results"])


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no table is named 'Table 9'; there are .*'Table 2'"):
        results.fill("<!-- table: Table 9 -->\n<!-- /table -->\n")
