r"""Text in pictures, in fonts that have its characters.

Pillow's default font has ASCII only. Other characters are drawn in matplotlib's DejaVu Sans (Latin, Greek, Cyrillic,
Arabic, ...) or in an installed font. A character that no font has is drawn as its escaped code point, such as \u732b.
"""

import dataclasses
import functools
import os
import unicodedata

import numpy as np
from absl import logging
from jaxtyping import UInt32
from numpy import ndarray
from PIL import ImageDraw, ImageFont

# Words in file names of fonts that are used only if no plainer font has the characters.
_STYLES = (
    "bold",
    "italic",
    "oblique",
    "black",
    "heavy",
    "thin",
    "light",
    "medium",
    "condensed",
    "narrow",
    "mono",
)
_DEFAULT = ""  # stands for Pillow's default font, which is not a file


@dataclasses.dataclass(frozen=True)
class TextLine:
    """A line of text, divided into runs of one font each.

    Attributes:
        runs: x offset, text and font of each run.
        box: left, top, right and bottom of the drawn text, relative to the start of the baseline.
    """

    runs: tuple[tuple[float, str, ImageFont.FreeTypeFont], ...]
    box: tuple[float, float, float, float]

    def draw(self, draw: ImageDraw.ImageDraw, start: tuple, *, fill: tuple) -> None:
        """Draws the text from `start`, the left end of its baseline."""
        for x, text, font in self.runs:
            draw.text((start[0] + x, start[1]), text, fill=fill, font=font, anchor="ls")


def text_line(text: str, *, size: int) -> TextLine:
    """Chooses fonts for a text of one line, and measures it.

    Spaces of any kind are drawn as spaces, and control characters as escaped code points. A font is used for the whole
    text if it has all of its characters.

    Args:
        text: of any characters.
        size: of the fonts, in pixels.
    """
    runs, x, boxes = [], 0.0, []
    for part, path in _divide(_drawable(text)):
        font = _load(path, size)
        left, top, right, bottom = font.getbbox(part, anchor="ls")
        boxes.append((x + left, top, x + right, bottom))
        runs.append((x, part, font))
        x += font.getlength(part)
    lows, highs = [box[:2] for box in boxes], [box[2:] for box in boxes]
    box = (*np.min(lows, axis=0).tolist(), *np.max(highs, axis=0).tolist()) if boxes else (0.0, 0.0, 0.0, 0.0)
    return TextLine(runs=tuple(runs), box=box)


def _drawable(text: str) -> str:
    characters = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Zs", "Zl", "Zp"):
            characters.append(" ")
        elif category in ("Cc", "Cs"):
            characters.append(_escaped(character))
        else:
            characters.append(character)
    return "".join(characters)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _divide(text: str) -> list[tuple[str, str]]:
    """Divides a text into runs of characters, each with the path of its font."""
    whole = _find_font(frozenset(text))
    if whole is not None:
        return [(text, whole)] if text else []
    runs: list[tuple[str, str]] = []
    for character in text:
        path = runs[-1][1] if runs else _DEFAULT
        # Stay in the font of the run, so that letters and their marks are shaped together.
        if not _has(path, frozenset(character)):
            path = _find_font(frozenset(character))
        if path is None:
            if unicodedata.category(character) == "Cf":
                continue  # an invisible joiner or mark of direction
            _warn_once(character)
            character, path = _escaped(character), _DEFAULT
        if runs and runs[-1][1] == path:
            runs[-1] = (runs[-1][0] + character, path)
        else:
            runs.append((character, path))
    return runs


@functools.cache
def _find_font(characters: frozenset[str]) -> str | None:
    """Returns the path of the first font that has all the characters, or None."""
    if _has(_DEFAULT, characters):
        return _DEFAULT
    return next((path for path in _font_files() if _has(path, characters) and _is_scalable(path)), None)


@functools.cache
def _font_files() -> list[str]:
    """Returns the font files of matplotlib and of the system, plain ones first."""
    from matplotlib import font_manager, get_data_path  # only pictures with other letters need it

    def rank(path: str) -> tuple:
        name = os.path.basename(path).lower()
        return any(word in name for word in _STYLES), "sans" not in name, name, path

    own = os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return [own, *sorted(font_manager.findSystemFonts(), key=rank)]


def _has(path: str, characters: frozenset[str]) -> bool:
    if path == _DEFAULT:
        return all(character.isascii() for character in characters)
    return bool(np.isin([ord(character) for character in characters], _code_points(path)).all())


@functools.cache
def _code_points(path: str) -> UInt32[ndarray, " _"]:
    """Returns the code points of a font file; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return np.fromiter(FT2Font(path).get_charmap(), np.uint32)
    except (OSError, RuntimeError):
        return np.zeros(0, np.uint32)


def _is_scalable(path: str) -> bool:
    """Returns False for fonts of bitmaps, such as colour emojis, which have one size only."""
    try:
        _load(path, 14)
    except OSError:
        return False
    return True


@functools.cache
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def _warn_once(character: str) -> None:
    logging.warning(
        "no installed font has the character %s (%s); pictures show %s. Install a font that has it, such as Noto Sans",
        character,
        unicodedata.name(character, "without name"),
        _escaped(character),
    )
