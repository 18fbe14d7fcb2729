"""Line and dot charts as SVG text for a web page; colours and dashes are the page's, by class."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 420.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 10.0, 28.0, 40.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend; "" for none.
        xs, ys: the points; a y of None leaves a hole.
        style: class `s0`, `s1`, ... of the colour and dash.
        form: "line", "marked" (line with dots) or "dots".
    """

    name: str
    xs: Sequence[float | int]
    ys: Sequence[float | int | None]
    style: int
    form: str = "line"


@dataclasses.dataclass(frozen=True)
class _Axis:
    """From a value to a place on the paper."""

    low: float | int
    high: float | int
    start: float
    end: float
    log: bool

    def __call__(self, value: float | int) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    log: bool = False,
    diagonal: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG element of the points, with axes, a legend if there are names, and a title.

    Args:
        series: at least one point in all.
        title: printed above, and read out.
        x_label, y_label: what the axes mean.
        log: both axes are logarithmic; points that are not above 0 are left out.
        diagonal: a line marks where both are equal.
        x_range, y_range: what the axes span; the points by default.

    Raises:
        ValueError: no points.
    """
    points = [_points(one, log=log) for one in series]
    xs = [x for places in points for x, y in places if y is not None]
    ys = [y for places in points for x, y in places if y is not None]
    if not xs:
        raise ValueError(f"{title}: nothing to draw")
    x_low, x_high = x_range or _spread(min(xs), max(xs), log=log)
    y_low, y_high = y_range or _spread(min(ys), max(ys), log=log)
    across = _Axis(x_low, x_high, _LEFT, _WIDTH - _RIGHT, log)
    up = _Axis(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for value in _ticks(x_low, x_high, log=log):
        x = across(value)
        parts.append(f'<text class="tick middle" x="{x}" y="{_HEIGHT - _BOTTOM + 15}">{_shown(value)}</text>')
        parts.append(f'<path class="grid" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for value in _ticks(y_low, y_high, log=log):
        y = up(value)
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 4:.1f}">{_shown(value)}</text>')
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="tick middle" x="{middle_x}" y="{_HEIGHT - 6}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="tick middle" transform="translate(12 {middle_y}) rotate(-90)">{escape(y_label)}</text>'
    )
    low, high = max(x_low, y_low), min(x_high, y_high)
    if diagonal and low < high:
        parts.append(f'<path class="diagonal" d="M{across(low)} {up(low)}L{across(high)} {up(high)}"/>')
    for one, values in zip(series, points, strict=True):
        places = [(across(x), None if y is None else up(y)) for x, y in values]
        parts += _drawn(one, places, values)
    return "".join([*parts, "</svg>"]) + _legend(series)


def _points(one: Series, *, log: bool) -> list[tuple[float | int, float | int | None]]:
    points = zip(one.xs, one.ys, strict=True)
    return [(x, y) for x, y in points if not log or (x > 0 and y is not None and y > 0)]


def _drawn(one: Series, places: list, values: list) -> list[str]:
    parts = []
    if one.form != "dots":
        path, pen = [], "M"
        for x, y in places:
            if y is None:
                pen = "M"
                continue
            path.append(f"{pen}{x} {y}")
            pen = "L"
        parts.append(f'<path class="line s{one.style}" d="{"".join(path)}"/>')
    if one.form == "marked":
        parts += [
            f'<circle class="mark s{one.style}" cx="{x}" cy="{y}" r="3"><title>'
            f"{escape(one.name)} {_shown(value[0])}: {_shown(value[1])}</title></circle>"
            for (x, y), value in zip(places, values, strict=True)
            if y is not None
        ]
    if one.form == "dots":
        path = "".join(f"M{x} {y}h0" for x, y in places if y is not None)  # round caps make them dots
        parts.append(f'<path class="dots s{one.style}" d="{path}"/>')
    return parts


def _legend(series: Sequence[Series]) -> str:
    names = {one.name: one for one in series if one.name}
    entries = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true">{_sample(one)}</svg>{escape(name)}</li>'
        for name, one in names.items()
    )
    return f'<ul class="legend">{entries}</ul>' if entries else ""


def _sample(one: Series) -> str:
    if one.form == "dots":
        return f'<path class="dots s{one.style}" d="M6 5h0M13 3h0M20 6h0"/>'
    return f'<path class="line s{one.style}" d="M1 5H25"/>'


def _spread(low: float | int, high: float | int, *, log: bool) -> tuple[float | int, float | int]:
    """The range of the points with a little air around them."""
    if log:
        air = max((high / low) ** 0.04, 1.05)
        return low / air, high * air
    if low == high:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    air = 0.04 * (high - low)
    # What begins near zero begins at zero.
    return (0.0 if 0 <= low < 0.3 * high else low - air), high + air


def _ticks(low: float | int, high: float | int, *, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1,) if high / low > 1000 else (1, 2, 5)
        return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _shown(value: float | int) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
