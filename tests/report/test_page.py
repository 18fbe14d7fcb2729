import base64
import hashlib
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.report.__main__ import write_report
from tests.report.page_runs import (
    CLASSES,
    FILE_NAME,
    HOSTILE,
    NUM_IMAGES,
    SIZE,
    Page,
    annotations,
    detections,
    write_json,
    write_run,
)


def test_page_is_well_formed_and_its_links_lead_somewhere(one, two):
    for page in (one, two):
        ids = [element["id"] for element in page.elements if "id" in element]
        assert len(ids) == len(set(ids))
        assert {e["href"][1:] for e in page.all("a")} <= set(ids)
        assert all(e["href"].startswith("#") for e in page.all("a"))
        assert page.all("a")[0]["href"] == "#main"
        assert (
            len(page.all("h1"))
            == len(page.all("title")) - sum("svg" in e["parents"] for e in page.all("title"))
            == 1
        )
        controls = [e for tag in ("input", "select") for e in page.all(tag)]
        assert len(controls) > 5
        assert all("label" in e["parents"] for e in controls)
        assert [e["aria-live"] for e in page.elements if "data-count" in e] == ["polite"] * len(
            page.block("data")["runs"]
        )


def test_page_loads_nothing_and_runs_only_its_own_script(one):
    assert not {e["tag"] for e in one.elements} & {"link", "img", "iframe", "object", "embed"}
    assert not [
        e for e in one.elements if "src" in e or "style" in e or any(key.startswith("on") for key in e)
    ]
    (script,) = [e["text"] for e in one.all("script") if "type" not in e]
    (style,) = [e["text"] for e in one.all("style")]
    for text in (script, style):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    (policy,) = [e["content"] for e in one.all("meta") if "http-equiv" in e]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    assert parts["img-src"] == "data:"
    for name, text in (("script-src", script), ("style-src", style)):
        assert parts[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_hostile_text_stays_text(folder, one):
    text = (folder / "one.html").read_text()
    assert HOSTILE not in text
    assert "<img" not in text
    assert FILE_NAME not in text
    assert len(one.all("script")) == 3
    data = one.block("data")
    assert tuple(data["classes"]) == CLASSES
    assert data["images"][0]["name"] == FILE_NAME
    assert [e["text"] for e in one.all("option") if e["value"] in ("0", "1")] == list(CLASSES)
    assert one.all("h1")[0]["text"] == one.all("title")[0]["text"] == "a&b"
    assert one.rows()["model.init_weights"] == [json.dumps("<img src=x onerror=alert(1)>" + HOSTILE)]


def test_rows_have_the_kind_of_each_detection(one):
    data = one.block("data")
    assert [image["id"] for image in data["images"]] == [10, 12, 13]  # 3 of 4, evenly spread
    assert data["images"][0]["objects"] == [[10, 10, 50, 70, 0, 0]]
    found = data["images"][0]["found"][0]
    kinds = [(data["kinds"][row[6]], row[7]) for row in found]
    assert kinds == [
        ("true positive", 1.0),
        ("duplicate", 0.83),
        ("localization error", 0.33),
        ("false positive", 0.0),
    ]
    assert found[0] == [10, 10, 50, 70, 0.9, 0, 0, 1.0, 1, 2, 3, 4]
    assert [row[5] for row in found] == [0, 0, 0, 1]


def test_galleries_are_in_order_and_reach_beyond_the_browser(one):
    data = one.block("data")
    galleries = {gallery["key"]: gallery["items"] for gallery in data["galleries"]}
    best = [item["row"][7] for item in galleries["best"]]
    assert best == sorted(best, reverse=True)
    assert {item["row"][6] for item in galleries["best"]} == {0}
    worst = [item["row"][4] for item in galleries["worst"]]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) == 12
    assert {item["row"][6] for item in galleries["worst"]} <= {2, 3}
    assert min(item["row"][4] for item in galleries["uncertain"]) >= 0.5
    items = [item for items in galleries.values() for item in items]
    assert {(item["id"], item["image"]) for item in items} == {(10, 0), (11, None), (12, 1), (13, 2)}
    for item in items:
        x, y, width, height = item["window"]
        assert 0 <= x < x + width <= SIZE[0]
        assert 0 <= y < y + height <= SIZE[1]


def test_pictures_are_small_jpegs_and_crops_show_their_window(one):
    pictures, data = one.block("pictures"), one.block("data")
    assert len(pictures["images"]) == 3

    def decoded(uri):
        head, text = uri.split(",")
        assert head == "data:image/jpeg;base64"
        return Image.open(io.BytesIO(base64.b64decode(text)))

    assert {decoded(uri).size for uri in pictures["images"]} == {(400, 250)}
    for gallery in data["galleries"]:
        for item in gallery["items"]:
            width, height = decoded(pictures["crops"][item["crop"]]).size
            assert width / height == pytest.approx(item["window"][2] / item["window"][3], rel=0.02)


def test_numbers_of_two_runs_have_their_difference(one, two):
    assert one.rows()["AP"] == ["40.0"]
    assert two.rows()["AP"] == ["40.0", "42.5", "+2.5"]
    assert two.rows()["AP90"] == ["-", "-", "-"]
    assert two.rows()[HOSTILE] == ["40.0", "42.5", "+2.5"]
    truth = evaluate_uncertainty(annotations(), detections())
    assert one.rows()["NLL of an edge"] == [f"{truth['NLL']:.3f}"]
    assert one.rows()["coverage at 1 sigma (68.3)"] == [f"{100 * truth['coverage_1sigma']:.1f}"]
    assert two.rows()["NLL of an edge"][1:] == ["-", "-"]
    assert two.rows()["objects found"] == [str(truth["num_matched"])] * 2 + ["+0"]
    data = two.block("data")
    assert data["runs"] == [{"label": "a&b", "stds": True}, {"label": "plain", "stds": False}]
    assert {len(row) for image in data["images"] for row in image["found"][1]} == {8}
    charts = [e["aria-label"] for e in two.all("svg") if e.get("class") == "chart"]
    assert charts == [
        "train/total_loss",
        "train/rate",
        "AP over IoU",
        "Reliability of a&b",
        "Error over sigma, a&b",
    ]


def test_config_marks_what_differs(folder, tmp_path):
    config = json.loads((folder / "plain" / "config.json").read_text())
    write_run(tmp_path / "other", folder / "sea")
    write_json(tmp_path / "other" / "config.json", config | {"seed": 8, "extra": {}})
    write_report([str(folder / "plain"), str(tmp_path / "other")], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    differing = [e["text"] for e in page.all("tr") if e.get("class") == "differs"]
    assert differing == ["extra differs-{}", "seed differs78"]


def test_without_the_data_set_the_report_says_so(folder, tmp_path, capsys):
    write_run(tmp_path / "run", tmp_path / "<nowhere>")
    write_report([str(tmp_path / "run")], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    (note,) = [e["text"] for e in page.elements if e.get("id") == "no-pictures"]
    assert str(tmp_path / "<nowhere>") in note
    assert "--data_root" in note
    assert "no pictures" in capsys.readouterr().err
    assert len(page.all("script")) == 1
    assert page.rows()["AP"] == ["40.0"]
    write_report([str(tmp_path / "run")], tmp_path / "page.html", data_root=str(folder / "sea"))
    assert len(Page((tmp_path / "page.html").read_text()).block("data")["images"]) == NUM_IMAGES


def test_a_data_set_that_has_changed_is_not_shown(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea")
    path = tmp_path / "run" / "eval" / "5" / "metrics.json"
    write_json(path, json.loads(path.read_text()) | {"data_fingerprint": "a" * 64})
    write_report([str(tmp_path / "run")], tmp_path / "page.html")
    assert "fingerprint differs" in (tmp_path / "page.html").read_text()


def test_page_needs_neither_jax_nor_a_model():
    code = "import sys, klbox_jax.report.page; print(*(name for name in sys.modules if name.split('.')[0] == 'jax' "
    code += "or name.startswith(('klbox_jax.models', 'klbox_jax.train'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_command_writes_the_page_or_says_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "klbox_jax.report", f"--workdir={folder / 'a&b'}", "--images=2"]
    command += [f"--output={tmp_path / 'page.html'}", "--step=5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r".*page\.html: \d+\.\d MB\n", done.stdout)
    assert done.stderr == ""
    assert len(Page((tmp_path / "page.html").read_text()).block("data")["images"]) == 2
    done = subprocess.run([*command, "--setting=soft"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*no setting 'soft' at step 5; choose --setting from \"\"\n", done.stderr)
