import json

import pytest
from PIL import Image

from experiments import stored_results
from klbox_jax.report.paper import PAPER_TABLE1, PAPER_TABLE3, PAPER_TABLE4, PAPER_TABLE5


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Two rows with two seeds, instead of docs/results."""
    rows = [
        {"name": name, "AP": ap, "AP50": 2 * ap, "std": {"AP": 0.25, "AP50": 0.5}, "mask_AP": None}
        for name, ap in (("baseline", 10.04), ("kl", 12.96))
    ]
    one = {"row": "kl", "base": "baseline", "metric": "AP", "mean": 2.92, "by_seed": [3.5, 2.34]}
    intervals = {"interval_seeds": [-4.449, 10.289], "interval_images": [1.0, 4.0]}
    result = {"rows": rows, "differences": [one | intervals]}
    (tmp_path / "seeds.json").write_text(stored_results.to_text(result))
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path)
    stored_results.read.cache_clear()
    yield tmp_path
    stored_results.read.cache_clear()


def test_cells_of_rows(numbers):
    assert stored_results.value("seeds", "AP")("kl") == "13.0"
    assert stored_results.value("seeds", "AP", ".2f")("kl") == "12.96"
    assert stored_results.value("seeds", "mask_AP")("kl") == "-"
    assert stored_results.value("seeds", "AP")("iou_net") == "-"
    assert stored_results.mean_and_std("seeds", "AP50")("baseline") == "20.1 ± 0.5"
    assert stored_results.gain("seeds", "AP")("kl") == "+2.9"
    assert stored_results.gain("seeds", "AP")("baseline") == ""


def test_cells_of_differences(numbers):
    pair = ("kl", "baseline")
    parts = ("mean", "by_seed", "seeds", "images")
    assert [stored_results.difference("seeds", "AP", part)(pair) for part in parts] == [
        "+2.92",
        "+3.50 +2.34",
        "-4.45 to +10.29",
        "+1.00 to +4.00",
    ]
    with pytest.raises(ValueError, match=r"seeds\.json has no difference of baseline and kl in AP"):
        stored_results.difference("seeds", "AP", "mean")(("baseline", "kl"))


def test_cells_of_the_paper():
    assert stored_results.paper_value(PAPER_TABLE1)("kl") == "26.4*"
    assert stored_results.paper_gain(PAPER_TABLE5)("kl_voting_soft_nms") == "+1.3*"
    assert stored_results.paper_gain(PAPER_TABLE5)("baseline") == ""
    assert stored_results.paper_gain(PAPER_TABLE3)("2mlp/kl") == "+0.6*"
    ratio = stored_results.paper_value(PAPER_TABLE4, ".2f", over="baseline")
    assert ratio("kl_voting_soft_nms") == "(1.02)?"
    assert ratio("kl_voting") == "-"


def test_a_table_has_a_line_for_each_key(numbers):
    cells = {"AP": stored_results.value("seeds", "AP")}
    table = stored_results.table_of("row", {"kl": "KL Loss"}, cells)
    assert table() == "| row     |   AP |\n| ------- | ---: |\n| KL Loss | 13.0 |"
    # Headings may repeat.
    twice = stored_results.table_of("row", {"kl": "KL Loss"}, [*cells.items(), *cells.items()])
    assert twice().splitlines()[-1] == "| KL Loss | 13.0 | 13.0 |"


def test_each_record_has_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path)
    stored_results.read.cache_clear()
    rows = [{"name": "a", "AP": 1.25}, {"name": "b", "AP": None, "extra": [1, 2]}]
    result = {"rows": rows, "preset": "mini", "empty": [], "numbers": [1, 2]}
    text = stored_results.to_text(result)
    (tmp_path / "one.json").write_text(text)
    assert stored_results.read("one") == result
    assert len([line for line in text.splitlines() if line.startswith("  {")]) == 2


def test_a_workdir_is_stored_with_the_rows_of_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    stored_results.read.cache_clear()
    scores = {"NLL": 2.5, "by_edge": {"x1": {"NLL": 2.0}}, "curve": [1.0]}
    for seed in range(2):
        row = {"name": "kl", "seed": seed, "AP": 40.0 + seed, "uncertainty": scores, "PDQ": None}
        (tmp_path / "run" / f"seed{seed}").mkdir(parents=True)
        (tmp_path / "run" / f"seed{seed}" / "table.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "run" / "table.json").write_text(json.dumps({"rows": [{"name": "kl", "AP": 40.5}]}))
    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "run" / "ap_over_iou.png")
    path = stored_results.store(tmp_path / "run", "run")
    assert path == tmp_path / "results" / "run.json"
    found = stored_results.read("run")
    assert found["rows"] == [{"name": "kl", "AP": 40.5}]
    assert [row["AP"] for row in found["by_seed"]] == [40.0, 41.0]
    with Image.open(tmp_path / "results" / "run.png") as image:
        assert (image.size, image.mode) == ((60, 40), "P")
    # The numbers stay, the tables by edge and level do not.
    assert all(row["uncertainty"] == {"NLL": 2.5} and row["PDQ"] is None for row in found["by_seed"])


def test_every_file_is_a_result():
    names = [path.stem for path in stored_results.RESULTS.glob("*.json")]
    assert len(names) > 10
    for name in names:
        assert isinstance(stored_results.read(name), dict)
