import base64
import hashlib
import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from klbox_jax.evaluation.uncertainty import evaluate_uncertainty
from klbox_jax.report.__main__ import write_report
from klbox_jax.report.charts import Series, chart
from klbox_jax.report.page_data import as_compared, curves, flat, read_run
from klbox_jax.report.page_examples import relative_sigma

HOSTILE = "</script><script>alert(1)</script>"
CLASSES = (HOSTILE, 'ray & "eel"')
FILE_NAME = "<b>&'\".png"
SIZE = (480, 300)  # wider than what a report embeds
NUM_IMAGES = 4


def annotations():
    images = [
        {"id": 10 + i, "file_name": FILE_NAME if i == 0 else f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
        for i in range(NUM_IMAGES)
    ]
    objects = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [10, 10, 40, 60]},
        *(
            {"id": 2 + i, "image_id": 11 + i, "category_id": 5, "bbox": [100 + 20 * i, 50, 80, 40]}
            for i in range(3)
        ),
    ]
    categories = [{"id": 3, "name": CLASSES[0]}, {"id": 5, "name": CLASSES[1]}]
    return {"images": images, "annotations": objects, "categories": categories}


def detections(with_stds=True):
    """In the first image one of each kind, in the others ten at random."""

    def entry(image_id, category_id, bbox, score, stds):
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score} | (
            {"bbox_std": stds} if with_stds else {}
        )

    rows = [
        entry(10, 3, [10, 10, 40, 60], 0.9, [1.0, 2.0, 3.0, 4.0]),  # finds its object exactly
        entry(10, 3, [10, 10, 40, 50], 0.8, [1.0, 1.0, 1.0, 1.0]),  # too late: a duplicate, IoU 50/60
        entry(10, 3, [10, 40, 40, 60], 0.7, [5.0, 5.0, 5.0, 5.0]),  # IoU 30/90: a localization error
        entry(10, 5, [200, 10, 40, 60], 0.6, [9.0, 9.0, 9.0, 9.0]),  # nothing is there
    ]
    rng = np.random.default_rng(0)
    for image_id in (11, 12, 13):
        for _ in range(10):
            x, y = rng.integers(60, 160), rng.integers(30, 70)
            score, stds = round(float(rng.uniform(0.1, 1)), 3), (rng.integers(1, 30, 4) / 4).tolist()
            rows.append(entry(image_id, 5, [float(x), float(y), 80.0, 40.0], score, stds))
    return rows


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_data(root):
    content = annotations()
    write_json(root / "annotations" / "instances_valid.json", content)
    (root / "valid").mkdir()
    rng = np.random.default_rng(0)
    for image in content["images"]:
        pixels = rng.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
        Image.fromarray(pixels).save(root / "valid" / image["file_name"])


def write_run(workdir, root, *, ap=40.0, settings=("",), data="sea/valid", with_stds=True):
    config = {
        "seed": 7,
        "model": {"box_loss": "kl", "init_weights": "<img src=x onerror=alert(1)>" + HOSTILE},
        "data": {"name": "coco", "root": str(root), "eval_split": "train"},
        "postprocess": {"voting": "variance"},
    }
    write_json(workdir / "config.json", config)
    lines = [{"step": step, "train/total_loss": 10.0 - step, "train/rate": 0.1} for step in range(1, 6)]
    lines[2]["train/total_loss"] = None
    (workdir / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "tra'
    )
    results = detections(with_stds)
    for setting in settings:
        metrics = {
            "AP": ap,
            "AP90": None,
            "AP_by_iou": [ap - i for i in range(10)],
            "AP_by_class": {CLASSES[0]: ap, CLASSES[1]: None},
            "uncertainty": evaluate_uncertainty(annotations(), results),
            "data": data,
            "seed": 7,
            "versions": {"jax": "0.0.1", "devices": {"cpu: <x>": 1}},
            "postprocess": {"voting": "none"},
        }
        write_json(workdir / "eval" / "5" / setting / "metrics.json", metrics)
        write_json(workdir / "eval" / "5" / setting / "detections.json", results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_data(root / "sea")
    write_run(root / "a&b", root / "sea")
    write_run(root / "plain", root / "sea", ap=42.5, with_stds=False)
    write_report([str(root / "a&b")], root / "one.html", num_images=3)
    write_report([str(root / "a&b"), str(root / "plain")], root / "two.html")
    return root


VOID = {"meta", "input", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes and own text; complains about tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        element = {"tag": tag, "parents": [e["tag"] for e in self.open], "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_endtag(self, tag):
        if not self.get_starttag_text().endswith("/>") or self.open[-1]["tag"] == tag:
            assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def block(self, name):
        (found,) = [e for e in self.all("script") if e.get("id") == name]
        assert found["type"] == "application/json"
        return json.loads(found["text"])

    def rows(self):
        """First cell of each table row -> the others."""
        lines, found = {}, None
        for element in self.elements:
            if element["tag"] == "tr":
                found = []
            elif element["tag"] in ("th", "td"):
                found.append(element["text"])
                lines[found[0]] = found[1:]
        return lines


@pytest.fixture(scope="module")
def one(folder):
    return Page((folder / "one.html").read_text())


@pytest.fixture(scope="module")
def two(folder):
    return Page((folder / "two.html").read_text())


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


def test_rows_tell_what_became_of_each_detection(one):
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


def test_numbers_of_two_runs_stand_beside_their_difference(one, two):
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


def test_another_world_of_the_data_set_is_not_shown(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea")
    path = tmp_path / "run" / "eval" / "5" / "metrics.json"
    write_json(path, json.loads(path.read_text()) | {"data_fingerprint": "a" * 64})
    write_report([str(tmp_path / "run")], tmp_path / "page.html")
    assert "fingerprint differs" in (tmp_path / "page.html").read_text()


def broken_run(folder, tmp_path, what):
    workdir = tmp_path / "run"
    write_run(workdir, folder / "sea", settings=("one", "two") if what == "settings" else ("",))
    for name, path in {
        "config": workdir / "config.json",
        "records": workdir / "metrics.jsonl",
        "metrics": workdir / "eval" / "5" / "metrics.json",
        "detections": workdir / "eval" / "5" / "detections.json",
    }.items():
        if what == name:
            path.unlink()
    if what == "json":
        (workdir / "config.json").write_text("{")
    return workdir


@pytest.mark.parametrize(
    ("what", "choice", "message"),
    [
        ("config", {}, "no config.json .* name the folder of a run"),
        ("records", {}, "no metrics.jsonl"),
        ("metrics", {}, "no finished evaluation; make one with .*--mode=eval"),
        ("detections", {}, "no detections.json; evaluate again"),
        ("json", {}, "config.json is not readable as JSON"),
        ("settings", {}, "several settings at step 5; choose --setting from one, two"),
        ("settings", {"settings": ["three"]}, "no setting 'three' at step 5; choose --setting from one, two"),
        ("", {"steps": [4]}, "no evaluation of step 4; choose --step from 5"),
        ("", {"steps": [5, 5]}, "--step is given 2 times for 1 runs"),
    ],
)
def test_what_is_missing_is_said_in_one_line(folder, tmp_path, what, choice, message):
    workdir = broken_run(folder, tmp_path, what)
    with pytest.raises(ValueError, match=message) as error:
        write_report([str(workdir)], tmp_path / "page.html", **choice)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_wrong_folders_are_said_in_one_line(folder, tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_report([str(tmp_path / "nowhere")], page)
    with pytest.raises(ValueError, match="name one of the runs in it: a&b, plain"):
        write_report([str(folder)], page)
    with pytest.raises(ValueError, match="0 are named"):
        write_report([], page)
    with pytest.raises(ValueError, match="given twice"):
        write_report([str(folder / "plain")] * 2, page)
    with pytest.raises(ValueError, match="choose another --output"):
        write_report([str(folder / "plain")], tmp_path / "nowhere" / "page.html")
    write_run(tmp_path / "lake", folder / "sea", data="lake/valid")
    with pytest.raises(ValueError, match=r"evaluated on sea/valid and .*lake/valid"):
        write_report([str(folder / "plain"), str(tmp_path / "lake")], page)


def test_setting_of_the_config_is_the_default(folder, tmp_path):
    write_run(tmp_path / "run", folder / "sea", settings=("one", "two"))
    path = tmp_path / "run" / "eval" / "5" / "two" / "metrics.json"
    write_json(path, json.loads(path.read_text()) | {"postprocess": {"voting": "variance"}})
    assert read_run(tmp_path / "run").setting == "two"
    assert read_run(tmp_path / "run", setting="one").setting == "one"
    one, two = (read_run(tmp_path / "run", setting=setting) for setting in ("one", "two"))
    assert len({run.label for run in as_compared([one, two])}) == 2
    write_run(tmp_path / "run", folder / "sea", settings=("",))
    assert read_run(tmp_path / "run").setting == ""


def test_curves_take_the_last_record_of_a_step_and_leave_holes_out(tmp_path):
    write_run(tmp_path / "run", tmp_path, settings=("one", "two"))
    lines = [
        {"step": 1, "train/loss": 1.0, "val/one/AP": 10.0, "val/two/AP": 20.0, "other": 1.0},
        {"step": 3, "train/loss": 5.0},
        {"step": 2, "train/loss": None, "nonfinite": {"train/loss": "nan"}},
        {"step": 3, "train/loss": 3.0, "val/one/AP": 11.0, "val/two/AP": 21.0, "train/once": 1.0},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves(read_run(tmp_path / "run", setting="two"))
    assert found == {"train/loss": ([1, 3], [1.0, 3.0]), "evaluation/AP": ([1, 3], [20.0, 21.0])}


def test_long_curves_are_thinned_to_means(tmp_path):
    write_run(tmp_path / "run", tmp_path)
    lines = [{"step": step, "train/loss": float(step % 2)} for step in range(600)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, values = curves(read_run(tmp_path / "run"))["train/loss"]
    assert values == [0.5] * 300
    assert steps == [2 * i + 0.5 for i in range(300)]


def test_flat_names_every_leaf():
    assert flat({"a": {"b": [1, 2], "c": {}}, "d": "é"}) == {"a.b": "[1, 2]", "a.c": "{}", "d": '"é"'}


def test_relative_sigma_is_the_mean_share_of_the_sides():
    boxes = np.array([[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 5.0, 9.0]])
    stds = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 0.5, 1.0]])
    # (1/10 + 2/20 + 3/10 + 4/20) / 4; a side of nothing counts as 1 px: (0.5/1 + 1/4 + 0.5/1 + 1/4) / 4.
    np.testing.assert_allclose(relative_sigma(boxes, stds), [0.175, 0.375])


def test_chart_places_points_and_leaves_holes():
    line = Series(name="<a>", xs=[0.0, 1.0, 2.0, 3.0, 4.0], ys=[0.0, 1.0, None, 1.0, 0.5], style=0)
    text = chart([line], title="<t>", x_range=(0.0, 4.0), y_range=(0.0, 1.0))
    # The paper spans x from 54 to 410 and y from 230 up to 28.
    assert 'd="M54.0 230.0L143.0 28.0M321.0 28.0L410.0 129.0"' in text
    assert "<a>" not in text
    assert "&lt;a&gt;" in text
    assert Page(text).all("svg")[0]["aria-label"] == "<t>"
    with pytest.raises(ValueError, match="nothing to draw"):
        chart([Series(name="", xs=[1.0], ys=[None], style=0)], title="t")


def test_logarithmic_chart_leaves_out_what_has_no_logarithm():
    dots = Series(name="", xs=[1.0, 10.0, 100.0, -1.0], ys=[1.0, 10.0, 0.0, 1.0], style=1, form="dots")
    text = chart([dots], title="t", log=True, x_range=(1.0, 100.0), y_range=(1.0, 100.0), diagonal=True)
    assert 'd="M54.0 230.0h0M232.0 129.0h0"' in text
    assert 'class="diagonal" d="M54.0 230.0L410.0 28.0"' in text


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
