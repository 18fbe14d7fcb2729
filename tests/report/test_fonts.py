import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from klbox_jax.report import fonts
from klbox_jax.report.fonts import text_line


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Fonts that are installed besides matplotlib's: a list to fill."""
    files = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: list(files))
    caches = (fonts._find_font, fonts._font_files, fonts._code_points, fonts._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield files
    for cache in caches:
        cache.cache_clear()


def make_font(path, characters, *, width=900):
    """Writes a font in which every character is a full square."""
    names = [".notdef", *(f"glyph{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(
        {ord(character): name for character, name in zip(characters, names[1:], strict=True)}
    )
    pen = TTGlyphPen(None)
    for move, *points in (("moveTo", (100, 0)), ("lineTo", (100, 700), (800, 700), (800, 0))):
        for point in points:
            getattr(pen, move)(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (width, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return str(path)


def drawn(text):
    picture = Image.new("L", (400, 40), 0)
    text_line(text, size=14).draw(ImageDraw.Draw(picture), (4, 24), fill=(255,))
    return np.asarray(picture)


def texts(text):
    return [part for _, part, _ in text_line(text, size=14).runs]


def test_ascii_has_the_default_font_and_needs_no_other(monkeypatch):
    monkeypatch.setattr(fonts, "_font_files", lambda: 1 / 0)
    (run,) = text_line("cat 0.87", size=14).runs
    assert run[2].getname()[0] == "Aileron"
    assert text_line("", size=14).runs == ()


@pytest.mark.parametrize("text", ["žába 0.87", "Жук", "λύκος"])
def test_letters_of_europe_need_no_installed_font(installed, text):
    (run,) = text_line(text, size=14).runs
    assert run[2].getname()[0] == "DejaVu Sans"
    assert run[1] == text


def test_an_installed_font_that_has_the_characters_is_found(installed, tmp_path):
    installed.append(make_font(tmp_path / "Other.ttf", "ก"))
    installed.append(make_font(tmp_path / "Han-Bold.ttf", "猫犬"))
    installed.append(make_font(tmp_path / "Han.ttf", "猫犬"))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed.append(str(tmp_path / "broken.ttf"))
    line = text_line("猫犬 0.9", size=14)
    # The font has no ASCII: the rest is in the default one.
    assert [(part, font.getname()[0]) for _, part, font in line.runs] == [
        ("猫犬", "Han"),
        (" 0.9", "Aileron"),
    ]
    assert line.runs[1][0] == pytest.approx(line.runs[0][2].getlength("猫犬"))
    assert drawn("猫").sum() > 255 * 40  # a square, not an empty frame


def test_a_font_that_has_all_is_used_for_all(installed, tmp_path):
    installed.append(make_font(tmp_path / "Thai.ttf", "แมว 0.87"))
    assert [(part, font.getname()[0]) for _, part, font in text_line("แมว 0.87", size=14).runs] == [
        ("แมว 0.87", "Thai")
    ]


def test_characters_without_a_font_are_escaped_and_warned_of_once(installed, caplog):
    assert texts("猫 0.9") == ["\\u732b 0.9"]
    assert texts("猫🐈") == ["\\u732b\\U0001f408"]
    assert (drawn("猫") != drawn("犬")).any()  # no empty boxes that look alike
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if "U+732B" in message or "732B" in message]) == 1


def test_invisible_characters_and_spaces(installed):
    assert texts("a\u00a0b\u2009c") == ["a b c"]
    assert texts("a\nb\x00") == ["a\\nb\\x00"]
    assert texts("a\udc80") == ["a\\udc80"]
    # A joiner that no font has is left out.
    assert texts("猫\U000e0020猫") == ["\\u732b\\u732b"]


def test_bitmap_fonts_are_passed_over(installed, tmp_path, monkeypatch):
    path = make_font(tmp_path / "Emoji.ttf", "猫")
    installed.append(path)
    load = fonts._load

    def of_one_size(name, size):
        if name == path:
            raise OSError("invalid pixel size")
        return load(name, size)

    monkeypatch.setattr(fonts, "_load", of_one_size)
    assert texts("猫") == ["\\u732b"]


def test_the_box_holds_what_is_drawn(installed):
    for text in ("gj 0.87", "žába", "猫 x"):
        left, top, right, bottom = text_line(text, size=14).box
        rows, columns = np.nonzero(drawn(text))
        assert columns.min() >= 4 + left - 1
        assert columns.max() <= 4 + right
        assert rows.min() >= 24 + top - 1
        assert rows.max() <= 24 + bottom
        assert right - left < columns.max() - columns.min() + 4
