import base64
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from klbox_jax.evaluation.coco import evaluate_detections
from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.report.__main__ import write_report
from klbox_jax.report.glossary import GLOSSARY
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
        assert len(controls) > 8
        labels = {e["for"]: e for e in page.all("label")}
        assert {e["id"] for e in controls} == set(labels)
        assert all(e["text"].strip() for e in labels.values())
        # A label around an output would name the output, not the slider.
        assert not [e for e in page.elements if e["tag"] != "label" and "label" in e["parents"]]
        places = [e["role"] for e in page.elements if "data-count" in e]
        assert places == ["status"] * len(page.block("data")["runs"])


def test_every_measure_leads_to_its_definition(one, two):
    for page in (one, two):
        for table in ("Accuracy", "Uncertainty", "Errors and boxes"):
            names = [e for e in page.all("th") if table in e["regions"] and e.get("scope") == "row"]
            links = [e for e in page.all("a") if table in e["regions"]]
            assert [e["text"] for e in links] == [e["text"] for e in names]
            assert len(names) > 6
        terms, meanings = ([e for e in page.all(tag) if "section" in e["parents"]] for tag in ("dt", "dd"))
        defined = {e["text"] for e in terms}
        for measure in (
            "ECE",
            "ENCE",
            "AUSE",
            "NLL",
            "Optimal LRP",
            "PDQ",
            "Energy score",
            "Coverage",
            "Sigma",
        ):
            assert measure in defined
        assert any("AP80" in name for name in defined)
        assert len(terms) == len(meanings) == len(GLOSSARY)
        assert min(len(e["text"]) for e in meanings) > 20
    used = {e["href"].removeprefix("#about-") for e in two.all("a") if e["href"].startswith("#about-")}
    assert {"ap-iou", "ence", "lrp", "tide-loc", "confusion"} <= used


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
    rows = one.rows("Config")
    assert rows["model.init_weights"] == [json.dumps("<img src=x onerror=alert(1)>" + HOSTILE)]


def test_rows_have_the_kind_of_each_detection(one):
    data = one.block("data")
    # 3 of 4, evenly spaced, and the one that only a gallery shows.
    assert [(image["id"], image["extra"]) for image in data["images"]] == [
        (10, False),
        (11, True),
        (12, False),
        (13, False),
    ]
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


def test_galleries_are_in_order_and_every_picture_leads_to_its_image(one):
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
    assert {(item["id"], item["image"]) for item in items} == {(10, 0), (11, 1), (12, 2), (13, 3)}
    for item in items:
        x, y, width, height = item["window"]
        assert 0 <= x < x + width <= SIZE[0]
        assert 0 <= y < y + height <= SIZE[1]


def test_pictures_are_small_jpegs_and_crops_show_their_window(one):
    pictures, data = one.block("pictures"), one.block("data")
    assert len(pictures["images"]) == 4

    def decoded(uri):
        head, text = uri.split(",")
        assert head == "data:image/jpeg;base64"
        return Image.open(io.BytesIO(base64.b64decode(text)))

    assert {decoded(uri).size for uri in pictures["images"]} == {(640, 400)}
    for gallery in data["galleries"]:
        for item in gallery["items"]:
            width, height = decoded(pictures["crops"][item["crop"]]).size
            assert width / height == pytest.approx(item["window"][2] / item["window"][3], rel=0.02)


def test_numbers_of_two_runs_have_their_difference(one, two):
    assert one.rows("Accuracy")["AP"] == ["40.0"]
    accuracy, uncertainty = two.rows("Accuracy"), two.rows("Uncertainty")
    assert accuracy["AP"] == ["40.0", "42.5", "+2.5"]
    assert accuracy["AP90"] == ["-", "-", "-"]
    assert two.rows("AP by class")[HOSTILE] == ["40.0", "42.5", "+2.5"]
    assert two.rows("Errors and boxes")["optimal LRP"] == ["61.5", "61.5", "+0.0"]
    truth = evaluate_uncertainty(annotations(), detections())
    rows = one.rows("Uncertainty")
    assert rows["NLL of an edge"] == [f"{truth['NLL']:.3f}"]
    assert rows["coverage at 1 sigma (68.3)"] == [f"{100 * truth['coverage_1sigma']:.1f}"]
    assert uncertainty["NLL of an edge"][1:] == ["-", "-"]
    assert uncertainty["objects found"] == [str(truth["num_matched"])] * 2 + ["+0"]
    assert not two.rows("Uncertainty after calibration")
    data = two.block("data")
    assert data["runs"] == [{"label": "a&b", "stds": True}, {"label": "plain", "stds": False}]
    assert {len(row) for image in data["images"] for row in image["found"][1]} == {8}
    charts = [e["aria-label"] for e in two.all("svg") if e.get("class") == "chart"]
    assert charts == [
        "Total loss",
        "Rate",
        "AP over the IoU threshold",
        "Reliability diagram, a&b",
        "Error over sigma, a&b",
        "All classes (mean)",
        *CLASSES,
    ]


def test_a_rounded_difference_has_no_negative_zero(folder, tmp_path):
    for name, ap in (("first", 42.51), ("second", 42.5)):
        write_run(tmp_path / name, folder / "sea", ap=ap)
    write_report([str(tmp_path / "first"), str(tmp_path / "second")], tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text()).rows("Accuracy")["AP"] == ["42.5", "42.5", "+0.0"]


def test_scores_after_calibration_and_other_evaluations_have_tables(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea", settings=("soft", "hard"))
    path = tmp_path / "run" / "eval" / "5" / "soft" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["uncertainty_calibrated"] = metrics["uncertainty"] | {"NLL": 1.25}
    write_json(path, metrics | {"AP": 12.0})
    write_report([str(tmp_path / "run")], tmp_path / "page.html", settings=["soft"])
    page = Page((tmp_path / "page.html").read_text())
    assert page.rows("Uncertainty after calibration")["NLL of an edge"] == ["1.250"]
    rows = page.rows("All evaluations")
    assert rows["run, step 5, soft"][:2] == ["sea/valid", "12.0"]
    assert rows["run, step 5, hard"][:2] == ["sea/valid", "40.0"]


def test_precision_and_errors_by_class(one):
    # The first class has one object, which its best detection finds exactly; the other class has three.
    curves = {e["aria-label"] for e in one.all("svg") if e.get("class") == "chart"}
    assert {"All classes (mean)", *CLASSES} <= curves
    entries = [e["text"] for e in one.all("li")]
    assert {"IoU 0.5: AP 100.0", "IoU 0.75: AP 100.0", "IoU 0.9: AP 100.0"} <= set(entries)
    errors = one.rows("Error types of a&b")
    assert errors[CLASSES[0]][0] == "100.0"
    assert errors[CLASSES[0]][1:] == ["-", "0.0", "-", "0.0", "0.0", "0.0", "0.0", "0.0"]
    mean = evaluate_detections(annotations(), detections())["AP50"]
    assert errors["all classes"][0] == f"{mean:.1f}"
    assert float(errors["all classes"][7]) == pytest.approx(100 - mean, abs=0.06)  # FP: nothing is missed
    confusions = one.rows("Confusions of a&b")
    # At least 0.5: the object, its duplicate and the localization error of it; of the other class one more is wrong.
    assert confusions[CLASSES[0]] == ["1", "0", "0"]
    assert confusions["background"][0] == "2"


def test_without_hotcoco_the_report_says_how_to_get_error_types(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_report([str(folder / "plain")], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert not page.rows("Error types of plain")
    assert any("need hotcoco: pip install 'klbox-jax[fast]'" in e["text"] for e in page.all("p"))
    assert page.rows("Confusions of plain")


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
    assert page.rows("Accuracy")["AP"] == ["40.0"]
    assert {e["href"][1:] for e in page.all("a")} <= {e["id"] for e in page.elements if "id" in e}
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
    images = Page((tmp_path / "page.html").read_text()).block("data")["images"]
    assert len([image for image in images if not image["extra"]]) == 2
    done = subprocess.run([*command, "--setting=soft"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*no setting 'soft' at step 5; choose --setting from \"\"\n", done.stderr)


def test_a_run_that_found_nothing_has_a_report(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea")
    write_json(tmp_path / "run" / "eval" / "5" / "detections.json", [])
    write_report([str(tmp_path / "run")], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.block("data")["images"][0]["found"] == [[]]
    assert page.rows("Confusions of run")[CLASSES[1]] == ["0", "0", "3"]
    assert page.rows("Error types of run")["all classes"][0] == "0.0"
    assert "IoU 0.5: AP 0.0" in [e["text"] for e in page.all("li")]
