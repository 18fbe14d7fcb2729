"""Renders one HTML page of the pictures that a prediction drew; it links to them by relative path."""

import dataclasses
import html
import urllib.parse
from collections.abc import Mapping, Sequence

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c1c1c; background: #fafafa; }
ul.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; padding: 0;
          list-style: none; }
ul.grid li { background: #fff; border: 1px solid #d5d5d5; border-radius: 6px; padding: .6rem; }
ul.grid img { width: 100%; height: 12rem; object-fit: contain; background: #e8e8e8; display: block; }
.name { font-weight: 600; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #161616; }
  ul.grid li { background: #222; border-color: #3d3d3d; }
  ul.grid img { background: #0d0d0d; }
  a { color: #8ab4f8; }
}
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of the page.

    Attributes:
        name: file name.
        picture: path of the drawn picture, relative to the page, or None.
        counts: number of objects found, by class name.
    """

    name: str
    picture: str | None
    counts: Mapping[str, int]


def render(
    entries: Sequence[Entry], *, title: str, failed: Mapping[str, str], score_threshold: int | float
) -> str:
    """Returns the page.

    Args:
        entries: the images, in order.
        title: title of the page.
        failed: for each image that could not be read, its file name and the reason.
        score_threshold: lowest score of the counted objects.
    """
    objects = sum(sum(entry.counts.values()) for entry in entries)
    summary = (
        f"{_number(len(entries), 'image')}, {_number(objects, 'object')} with a score of {score_threshold:g} or "
        "more. The bands around each line are one and two standard deviations of its edge."
    )
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{_text(title)}</h1>\n<p>{_text(summary)}</p>",
    ]
    if failed:
        parts.append(f"<h2>{_number(len(failed), 'file')} left out</h2>\n<ul>")
        parts += [
            f'<li><span class="name">{_text(name)}</span>: {_text(reason)}</li>'
            for name, reason in failed.items()
        ]
        parts.append("</ul>")
    parts.append('<ul class="grid">')
    parts += [_item(entry) for entry in entries]
    parts.append("</ul>\n</body>\n</html>\n")
    return "\n".join(parts)


def _item(entry: Entry) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in entry.counts.items()) or "nothing found"
    image = ""
    if entry.picture is not None:
        link = urllib.parse.quote(entry.picture)
        image = f'<a href="{link}"><img src="{link}" alt="{_text(entry.name)}" loading="lazy"></a>'
    return f'<li>{image}<div class="name">{_text(entry.name)}</div><div>{_text(counts)}</div></li>'


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _text(text: str) -> str:
    # A file name may have bytes that are not text.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
