"""HTML of the galleries and of the image browser of the report page; the scripts fill them."""

from collections.abc import Sequence
from html import escape

from klbox_jax.report.page_data import Run
from klbox_jax.report.page_examples import GALLERIES


def galleries(runs: Sequence[Run], content: dict) -> str:
    """Returns the headings and empty lists of the galleries.

    Args:
        runs: one or two.
        content: see `klbox_jax.report.page_examples.Examples`.
    """
    hint = (
        "<p>Dashed lines show the object matched with the detection, or all objects of the image if it has none. "
        "Shaded bands are one and two sigma of each edge. A link leads to the whole image.</p>"
    )
    parts = []
    for key, heading in GALLERIES.items():
        for number, gallery in enumerate(content["galleries"]):
            if gallery["key"] == key:
                of_run = f" ({escape(runs[gallery['run']].label)})" if len(runs) > 1 else ""
                items = f'<ul class="gallery" data-gallery="{number}"></ul>'
                why_empty = f"<p>{_why_empty(content, gallery)}</p>"
                parts.append(f"<h3>{escape(heading)}{of_run}</h3>{items if gallery['items'] else why_empty}")
    return hint + "".join(parts)


def _why_empty(content: dict, gallery: dict) -> str:
    if gallery["key"] == "uncertain" and not content["runs"][gallery["run"]]["stds"]:
        return "The run predicts no sigma."
    return "There are none."


def browser(runs: Sequence[Run], content: dict) -> str:
    """Returns the controls, the list of images and the empty pictures of the image browser."""
    panels = "".join(_panel(run.label, number) for number, run in enumerate(runs))
    num_extra = sum(image["extra"] for image in content["images"])
    count = len(content["images"])
    note = (
        f" {num_extra} of them are here for the galleries only and do not count in the totals."
        if num_extra
        else ""
    )
    return f"""<p>{count} images.{note} The left and right arrow keys go to the previous and the next image.</p>
<div class="browser"><div><ul class="legend" id="kinds"></ul><div class="panels">{panels}</div></div>
<div class="side">{_controls(runs, content)}
<h3 id="grid-heading">All images</h3><p id="grid-count" role="status"></p>
<ul id="grid" aria-labelledby="grid-heading"></ul></div></div>"""


def _panel(label: str, number: int) -> str:
    return (
        f'<div class="panel"><h3>{escape(label)}</h3><div data-picture="{number}"></div>'
        f'<p class="count" role="status" data-count="{number}"></p>'
        f"<details><summary>Boxes of this image as a table</summary><div data-rows='{number}'></div></details></div>"
    )


def _controls(runs: Sequence[Run], content: dict) -> str:
    classes = "".join(
        f'<option value="{i}">{escape(name)}</option>' for i, name in enumerate(content["classes"])
    )
    sigma = ""
    if content["sigma_limits"]:
        sigma = (
            _slider("sigma", "Largest sigma", 'min="0"')
            + _choice("unit", "Unit of sigma", {"px": "pixels", "relative": "share of the box"})
            + _choice(
                "bands", "Bands of sigma", {"filled": "filled", "outlines": "outlines", "none": "hidden"}
            )
        )
    orders = {
        "": "as in the data set",
        "false": "most false detections first",
        "missed": "most missed objects first",
        **({"sigma": "largest mean sigma first"} if sigma else {}),
        **({"difference": "largest difference between the runs first"} if len(runs) > 1 else {}),
    }
    return f"""<form id="filters">
{_slider("image", "Image", 'min="0" value="0"')}
<div class="buttons"><button type="button" id="previous">Previous image</button>
<button type="button" id="next">Next image</button></div>
{_slider("score", "Least score", 'min="0" max="1" step="0.01" value="0.5"')}{sigma}
<div class="control"><label for="class">Class</label>
<select id="class"><option value="">all classes</option>{classes}</select></div>
<div class="check"><input type="checkbox" id="objects" checked><label for="objects">true boxes (dashed)</label></div>
<div class="control"><label for="find">Find images by name</label>
<input type="search" id="find" autocomplete="off"></div>
{_choice("order", "Order of images", orders)}</form>"""


def _slider(name: str, label: str, attributes: str) -> str:
    return (
        f'<div class="control"><label for="{name}">{label}</label> <output id="{name}-shown" for="{name}"></output>'
        f'<input type="range" id="{name}" {attributes}></div>'
    )


def _choice(name: str, label: str, options: dict[str, str]) -> str:
    items = "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())
    return (
        f'<div class="control"><label for="{name}">{label}</label><select id="{name}">{items}</select></div>'
    )
