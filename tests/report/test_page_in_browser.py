import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from klbox_jax.report.__main__ import write_report
from tests.report.page_runs import Page, write_data, write_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
LIGHT, DARK = (255, 255, 255), (0x15, 0x17, 0x1B)


def chromium(folder, address, *options):
    """Returns the standard output of headless Chromium for a page; its console must stay empty."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def dumped(folder, name, state=""):
    return Page(
        chromium(folder, f"file://{folder / name}#{state}", "--dump-dom", "--virtual-time-budget=5000")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    write_data(root / "sea")
    write_run(root / "kl", root / "sea")
    write_run(root / "plain", root / "sea", with_stds=False)
    write_report([str(root / "kl"), str(root / "plain")], root / "page.html")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return Page((folder / "page.html").read_text()).block("data")


def count(data, run, *, score=0.0, pixels=None, share=None, class_index=None):
    """Returns the number of boxes of each image that pass the filters."""
    counts = []
    for image in data["images"]:
        left = 0
        for x1, y1, x2, y2, *rest in image["found"][run]:
            found_score, found_class, stds = rest[0], rest[1], rest[4:]
            keep = found_score >= score and class_index in (None, found_class)
            if stds and pixels is not None:
                keep = keep and sum(stds) / 4 <= pixels
            if stds and share is not None:
                across = [x2 - x1, y2 - y1, x2 - x1, y2 - y1]
                keep = keep and sum(std / side for std, side in zip(stds, across, strict=True)) / 4 <= share
            left += keep
        counts.append(left)
    return counts


def shown(page, run):
    """Returns the counts of boxes of this image and of all images that the page shows."""
    (place,) = [e for e in page.elements if e.get("data-count") == str(run)]
    said = int(place["data-shown"]), int(place["data-shown-in-all"])
    assert place["text"].startswith(f"{said[0]} of ")
    assert f"; {said[1]} of " in place["text"]
    return said


def drawn(page, run):
    (picture,) = [e for e in page.elements if e.get("aria-label", "").endswith(f"boxes of {run}")]
    return int(re.search(r"with (\d+) boxes", picture["aria-label"])[1])


def test_address_sets_the_filters(folder, data):
    page = dumped(folder, "page.html", "image=1&score=0.4&unit=px&sigma=4")
    for run, name in enumerate(("kl", "plain")):
        expected = count(data, run, score=0.4, pixels=4.0)
        assert shown(page, run) == (expected[1], sum(expected))
        assert drawn(page, name) == expected[1]
    # The filters do something, and a run without sigmas is not filtered by them.
    assert (
        0 < sum(count(data, 0, score=0.4, pixels=4.0)) < sum(count(data, 1, score=0.4)) < sum(count(data, 1))
    )
    tags = [e["text"] for e in page.all("text") if e.get("class") == "tag"]
    assert len(tags) == count(data, 0, score=0.4, pixels=4.0)[1] + count(data, 1, score=0.4)[1]
    # Every band of a box that is shown and of one in a gallery, twice.
    in_galleries = sum(len(g["items"]) for g in data["galleries"] if data["runs"][g["run"]]["stds"])
    bands = [e for e in page.all("path") if e.get("class") == "band2"]
    assert len(bands) == in_galleries + count(data, 0, score=0.4, pixels=4.0)[1]


def test_class_and_relative_sigma_filter(folder, data):
    page = dumped(folder, "page.html", "score=0&unit=relative&sigma=0.06&class=1")
    expected = count(data, 0, share=0.06, class_index=1)
    assert shown(page, 0) == (expected[0], sum(expected))
    assert 0 < sum(expected) < sum(count(data, 0, class_index=1))


def test_keys_sliders_and_the_config_filter_work(folder, data):
    """In a copy without the policy, a script at the end acts like a user."""
    script = """
      const seen = [], note = () => seen.push([document.querySelector("#image").value,
        ...[...document.querySelectorAll("[data-count]")].map((e) => Number(e.dataset.shownInAll))]);
      const press = (key, on) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const set = (id, value) => { const input = document.getElementById(id); input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true })); };
      note();
      press("ArrowRight", document.body); press("ArrowRight", document.body); note();
      press("ArrowLeft", document.body); press("ArrowLeft", document.querySelector("#score")); note();
      document.querySelector("#next").click(); set("score", 0.8); note();
      set("sigma", 3); note();
      set("unit", "relative"); note();
      set("class", 0); note();
      set("config-filter", "SEED");
      const rows = [...document.querySelectorAll("#config-table tbody tr")].filter((row) => !row.hidden);
      document.body.dataset.seen = JSON.stringify({ seen, rows: rows.map((row) => row.cells[0].textContent) });
    """
    text = (folder / "page.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (folder / "driven.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    found_state = json.loads(dumped(folder, "driven.html").all("body")[0]["data-seen"])

    def both(image, **limits):
        return [image, *(sum(count(data, run, **limits)) for run in (0, 1))]

    assert found_state["seen"] == [
        both("0", score=0.5),
        both("2", score=0.5),
        both("1", score=0.5),
        both("2", score=0.8),
        both("2", score=0.8, pixels=3.0),
        both("2", score=0.8),
        both("2", score=0.8, class_index=0),
    ]
    assert found_state["rows"] == ["seed"]


def test_policy_stops_other_scripts_and_the_network(folder):
    """Checks these tests themselves: a violation of the policy does reach the console."""
    text = (folder / "page.html").read_text()
    (folder / "foreign.html").write_text(
        text.replace("</body>", "<script>document.title = 1</script></body>")
    )
    with pytest.raises(AssertionError, match="Content Security Policy"):
        dumped(folder, "foreign.html")


@pytest.mark.parametrize(("scheme", "paper"), [(1, LIGHT), (0, DARK)])
def test_page_is_light_or_dark_as_the_reader_wants(folder, scheme, paper):
    picture = folder / f"{scheme}.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
    chromium(folder, f"file://{folder / 'page.html'}", *options, "--window-size=480,400")
    with Image.open(io.BytesIO(picture.read_bytes())) as image:
        assert image.convert("RGB").getpixel((2, 2)) == paper
