import io
import re

import pytest
from PIL import Image

from klbox_jax.report.__main__ import write_report
from tests.report import chromium
from tests.report.chromium import Browser
from tests.report.page_runs import CLASSES, NUM_IMAGES, Page, write_data, write_run

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs the program chromium")
LIGHT, DARK = (255, 255, 255), (0x15, 0x17, 0x1B)
WIDE, NARROW = 1366, 390


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    write_data(root / "sea")
    write_run(root / "kl", root / "sea")
    write_run(root / "plain", root / "sea", with_stds=False)
    write_report([str(root / "kl"), str(root / "plain")], root / "page.html")
    write_report([str(root / "kl")], root / "one.html")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return Page((folder / "page.html").read_text()).block("data")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile"), width=WIDE) as browser:
        yield browser


@pytest.fixture
def page(browser, folder):
    """The report of two runs, just opened; nothing may be on its console at the end."""
    browser.messages.clear()
    address(browser, folder)
    yield browser
    assert browser.messages == []


def address(browser, folder, state="", name="page.html"):
    browser.open(f"file://{folder / name}#{state}")


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
    place = f'document.querySelector("[data-count=\\"{run}\\"]")'
    own, total = (int(page.run(f"{place}.dataset.{name}")) for name in ("shown", "shownInAll"))
    assert page.run(f"{place}.textContent").startswith(f"{own} of ")
    assert f"image, {total} of " in page.run(f"{place}.textContent")
    return own, total


def drawn(page, run):
    label = page.run(f'document.querySelector("[data-picture=\\"{run}\\"] svg").getAttribute("aria-label")')
    return int(re.search(r"with (\d+) boxes", label)[1])


def number_of(page, selector):
    return page.run(f"document.querySelectorAll({selector!r}).length")


def value(page, name):
    return page.run(f"document.getElementById({name!r}).value")


def focus(page, selector):
    page.run(f"document.querySelector({selector!r}).focus()")


def choose(page, name, option):
    """Changes a select as a user's choice does."""
    page.run(
        f"(() => {{ const one = document.getElementById({name!r}); one.value = {option!r};"
        "one.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    page.settle()


def listed(page):
    """Returns the names of the images in the list, in order."""
    return page.run("[...document.querySelectorAll('#grid li:not([hidden]) span')].map((e) => e.textContent)")


def current(page):
    return page.run("[...document.querySelectorAll('#grid [aria-current] span')].map((e) => e.textContent)")


def test_address_sets_the_filters(browser, folder, data):
    address(browser, folder, "image=1&score=0.4&unit=px&sigma=4")
    for run in (0, 1):
        expected = count(data, run, score=0.4, pixels=4.0)
        assert shown(browser, run) == (expected[1], sum(expected))
        assert drawn(browser, run) == expected[1]
    # The filters do something, and a run without sigmas is not filtered by them.
    by_sigma = sum(count(data, 0, score=0.4, pixels=4.0))
    assert 0 < by_sigma < sum(count(data, 1, score=0.4)) < sum(count(data, 1))
    expected = [count(data, 0, score=0.4, pixels=4.0)[1], count(data, 1, score=0.4)[1]]
    assert number_of(browser, "[data-picture] .tag") == sum(expected)
    # Every band of a box that is shown, and of one in a gallery.
    in_galleries = sum(len(g["items"]) for g in data["galleries"] if data["runs"][g["run"]]["stds"])
    assert number_of(browser, ".band2") == in_galleries + expected[0]
    address(browser, folder, "score=0&unit=relative&sigma=0.06&class=1")
    expected = count(data, 0, share=0.06, class_index=1)
    assert shown(browser, 0)[1] == sum(expected)
    assert 0 < sum(expected) < sum(count(data, 0, class_index=1))


def test_all_controls_have_names(page):
    roles = ("slider", "combobox", "checkbox", "searchbox", "button", "link", "img", "list")
    tree = page.accessibility_tree()
    names = {role: [node["name"] for node in tree if node["role"] == role] for role in roles}
    assert names["slider"] == ["Image", "Least score", "Largest sigma"]
    assert names["combobox"] == ["Unit of sigma", "Bands of sigma", "Class", "Order of images"]
    assert names["searchbox"] == ["Find images by name"]  # the config is folded
    assert names["checkbox"] == ["true boxes (dashed)"]
    assert {"Previous image", "Next image"} < set(names["button"])
    for role in ("button", "link", "img"):
        assert all(names[role]), role
    assert "All images" in names["list"]
    # The slider of images says which image it is at, not only a number.
    values = page.run("document.getElementById('image').getAttribute('aria-valuetext')")
    assert re.fullmatch(r"1 of 4: .*\.png \(id 10\)", values)


def test_sliders_and_lists_work_by_keyboard(page, data):
    focus(page, "#score")
    before = sum(count(data, 0, score=0.5))
    assert shown(page, 0)[1] == before
    page.press("ArrowRight", times=30)
    assert float(value(page, "score")) == pytest.approx(0.8)
    assert shown(page, 0)[1] == sum(count(data, 0, score=0.8)) < before
    focus(page, "#sigma")
    page.press("ArrowLeft", times=10)
    limit = float(value(page, "sigma"))
    assert limit == pytest.approx(data["sigma_limits"]["px"] - 1.0)
    assert shown(page, 0)[1] == sum(count(data, 0, score=0.8, pixels=limit))
    assert page.run("document.getElementById('sigma').getAttribute('aria-valuetext')") == f"{limit:g} px"
    focus(page, "#image")
    page.press("End")
    assert current(page) == ["3.png"]
    # The arrows of a slider are its own; elsewhere they go through the images.
    focus(page, "#main")
    page.press("ArrowLeft")
    assert current(page) == ["2.png"]
    page.press("ArrowRight", times=5)
    assert current(page) == ["3.png"]
    focus(page, "#previous")
    page.press("Enter")
    assert current(page) == ["2.png"]
    focus(page, "#objects")
    number = number_of(page, "[data-picture] .truth")
    page.press(" ")
    assert number_of(page, "[data-picture] .truth") == 0 < number


def test_the_list_of_images_is_one_stop_and_moves_by_arrows(page):
    assert number_of(page, '#grid button[tabindex="0"]') == 1
    focus(page, "#order")
    page.press("Tab")
    assert page.run("document.activeElement.closest('#grid') !== null")
    page.press("ArrowRight")
    assert current(page) == ["1.png"]
    assert page.run("document.activeElement.getAttribute('aria-current')") == "true"
    page.press("End")
    assert current(page) == ["3.png"]
    page.press("Home")
    page.press("ArrowDown")  # the columns of the wide page are more than one
    assert len(current(page)) == 1
    page.press("Tab")
    assert not page.run("document.activeElement.closest('#grid') !== null")


def test_images_are_found_by_name_class_and_errors(page, data):
    assert len(listed(page)) == NUM_IMAGES
    focus(page, "#find")
    page.write("2.PNG")
    assert listed(page) == current(page) == ["2.png"]
    assert value(page, "image") == "0"
    assert page.run("document.getElementById('grid-count').textContent") == "1 of 4 images match."
    page.write("nothing")
    assert listed(page) == []
    assert "No image matches" in page.run("document.getElementById('grid-count').textContent")
    assert current(page) == ["2.png"]  # the picture stays
    page.run("document.getElementById('find').value = ''")
    choose(page, "class", "0")
    assert len(listed(page)) == 1
    choose(page, "class", "")
    false = []
    for image in data["images"]:
        rows = [row for found in image["found"] for row in found if row[4] >= 0.5]
        false.append(sum(row[6] != 0 for row in rows))
    choose(page, "order", "false")
    names = [image["name"] for image in data["images"]]
    assert listed(page) == [names[i] for i in sorted(range(NUM_IMAGES), key=lambda i: -false[i])]
    assert len(set(false)) > 1
    # Previous and next follow the order of the list.
    page.run("document.querySelector('#grid button').click()")
    page.run("document.getElementById('next').click()")
    page.settle()
    assert current(page) == listed(page)[1:2]
    assert "found" in page.run("document.querySelector('#grid small').textContent")


def test_every_picture_of_a_gallery_leads_to_its_image(page, data):
    links = page.run("[...document.querySelectorAll('.gallery a')].map((e) => e.textContent)")
    items = [item for gallery in data["galleries"] for item in gallery["items"]]
    assert len(links) == len(items)
    choose(page, "class", "0")
    page.run("document.getElementById('find').value = 'no image'")
    for place in (0, len(links) - 1):
        page.run(f"document.querySelectorAll('.gallery a')[{place}].click()")
        page.settle()
        wanted = links[place].removeprefix("image ")
        names = [image["name"] for image in data["images"] if f"{image['id']}" == wanted]
        assert current(page) == names
    # Once more after another image was chosen: the address stays the same.
    page.run("document.getElementById('previous').click()")
    page.run(f"document.querySelectorAll('.gallery a')[{len(links) - 1}].click()")
    page.settle()
    assert current(page) == names


def test_bands_do_not_hide_small_objects(browser, folder):
    address(browser, folder, "score=0", name="one.html")
    opacities = browser.run(
        "[...document.querySelectorAll('[data-picture] g[opacity]')].map((e) => Number(e.getAttribute('opacity')))"
    )
    # In the order of drawing, the best one last: sigma 9 of a box of 40 x 60; 5 and 1 of 40 x 60 and 40 x 50; 1 to 4.
    inner = [(40 - 36) * (60 - 36), (40 - 20) * (60 - 20), (40 - 4) * (50 - 4), (40 - 8) * (60 - 12)]
    sizes = [40 * 60, 40 * 60, 40 * 50, 40 * 60]
    expected = [1 - 0.7 * (1 - part / size) for part, size in zip(inner, sizes, strict=True)]
    assert opacities == pytest.approx(expected, abs=0.006)
    choose(browser, "bands", "outlines")
    assert number_of(browser, "[data-picture] .band2") == 0
    assert number_of(browser, "[data-picture] .border") == 4
    choose(browser, "bands", "none")
    assert number_of(browser, "[data-picture] .border") == 0


def test_skip_link_and_glossary_work_by_keyboard(page):
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the report"
    page.press("Enter")
    assert page.run("document.activeElement.id") == "main"
    focus(page, 'a[href="#about-ence"]')
    page.press("Enter")
    assert page.run("location.hash") == "#about-ence"
    top, height = page.run(
        "(() => { const box = document.querySelector('#about-ence').getBoundingClientRect();"
        "return [box.top, innerHeight]; })()"
    )
    bar = page.run("document.querySelector('nav').getBoundingClientRect().bottom")
    assert bar <= top < height  # not under the bar of links


def test_config_is_filtered(page):
    page.run("document.getElementById('config-filter').closest('details').open = true")
    focus(page, "#config-filter")
    page.write("SEED")
    rows = page.run(
        "[...document.querySelectorAll('#config-table tbody tr:not([hidden])')].map((e) => e.cells[0].textContent)"
    )
    assert rows == ["seed"]


@pytest.mark.parametrize("name", ["page.html", "one.html"])
@pytest.mark.parametrize(("width", "scheme", "paper"), [(WIDE, "light", LIGHT), (NARROW, "dark", DARK)])
def test_page_fits_the_window_in_both_schemes(folder, tmp_path, name, width, scheme, paper):
    with Browser(tmp_path, width=width, scheme=scheme) as page:
        page.open(f"file://{folder / name}")
        # Nothing is wider than the window, with everything unfolded.
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.settle()
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        with Image.open(io.BytesIO(page.picture())) as image:
            assert image.convert("RGB").getpixel((2, 2)) == paper
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > 5
        assert min(contrasts.values()) >= 4.5, contrasts
        charts = page.run(
            "[...document.querySelectorAll('#evaluation .chart')].map((e) => e.getBoundingClientRect().right)"
        )
        side, picture = (
            page.run(
                f"(({{ left, top }}) => [left, top])(document.querySelector('{one}').getBoundingClientRect())"
            )
            for one in (".side", ".panels")
        )
        if width == WIDE:
            assert max(charts) > 0.9 * width
            assert side[0] > picture[0] + 0.5 * width  # next to the picture
        else:
            assert len(set(charts)) == 1  # one column
            assert side[0] == picture[0]
        assert page.messages == []


# The contrast of text with its background by WCAG, for kinds of text.
CONTRASTS = """(() => {
  const light = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const share = color.startsWith("color(") ? Number(part) : part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(color) && color !== "transparent") return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const kind of ["p", "a", ".term", "thead th", ".facts dt, .facts th", "label", "output", "button", "#grid small",
                      ".shade5", ".count", "dd", "summary"]) {
    const element = document.querySelector(kind);
    if (element === null) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    found[kind] = (a + 0.05) / (b + 0.05);
  }
  const tick = document.querySelector(".chart .tick");
  const [a, b] = [light(getComputedStyle(tick).fill), light(behind(tick))].sort((x, y) => y - x);
  found.tick = (a + 0.05) / (b + 0.05);
  return found;
})()"""


def test_policy_stops_other_scripts(browser, folder):
    """Checks these tests themselves: a violation of the policy is among the messages."""
    text = (folder / "page.html").read_text()
    (folder / "foreign.html").write_text(
        text.replace("</body>", "<script>document.title = 1</script></body>")
    )
    browser.messages.clear()
    address(browser, folder, name="foreign.html")
    assert "Content Security Policy" in str(browser.messages)
    assert browser.run("document.title") != "1"


def test_hostile_names_are_shown_as_text(page):
    assert page.run("[...document.querySelectorAll('#class option')].map((e) => e.textContent)")[1:] == list(
        CLASSES
    )
    assert number_of(page, "img[src^=x], main script") == 0
