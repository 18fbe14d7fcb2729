"""Line and dot charts as SVG text for a web page; the page's style sheet sets colours and dashes by class."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 420.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 10.0, 28.0, 40.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of dots of a chart.

    Attributes:
        name: in the legend; "" for no entry.
        xs, ys: the points; a y of None leaves a gap.
        style: number of the class `s0`, `s1`, ... that sets the colour.
        dash: number of the class `d0`, `d1`, ... that sets the dash pattern; that of the colour by default.
        form: "line", "marked" (line with dots) or "dots".
    """

    name: str
    xs: Sequence[float | int]
    ys: Sequence[float | int | None]
    style: int
    form: str = "line"
    dash: int | None = None

    @property
    def css(self) -> str:
        """Returns the classes of the line."""
        return f"line s{self.style} d{self.style if self.dash is None else self.dash}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """Labels and scales of the axes of a chart.

    Attributes:
        x_label, y_label: printed next to the axes.
        x_range, y_range: first and last value of each axis; fitted to the points by default.
        log: both axes are logarithmic; points that are not above 0 are left out.
        diagonal: draw the line y = x.
    """

    x_label: str = ""
    y_label: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log: bool = False
    diagonal: bool = False


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Maps a value to a position in the drawing."""

    low: float | int
    high: float | int
    start: float
    end: float
    log: bool

    def __call__(self, value: float | int) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def chart(series: Sequence[Series], *, title: str, axes: Axes | None = None) -> str:
    """Returns a chart as an SVG element, followed by a legend if series have names.

    Args:
        series: with at least one point in total.
        title: printed above the chart, and its accessible name.
        axes: labels and scales.

    Raises:
        ValueError: there are no points.
    """
    axes = axes or Axes()
    points = [_points(one, log=axes.log) for one in series]
    xs = [x for places in points for x, y in places if y is not None]
    ys = [y for places in points for x, y in places if y is not None]
    if not xs:
        raise ValueError(f"chart {title!r} has no points")
    x_low, x_high = axes.x_range or _padded_range(min(xs), max(xs), log=axes.log)
    y_low, y_high = axes.y_range or _padded_range(min(ys), max(ys), log=axes.log)
    x_scale = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT, axes.log)
    y_scale = _Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, axes.log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
        *_grid(axes, x_scale, y_scale),
    ]
    low, high = max(x_low, y_low), min(x_high, y_high)
    if axes.diagonal and low < high:
        path = f"M{x_scale(low)} {y_scale(low)}L{x_scale(high)} {y_scale(high)}"
        parts.append(f'<path class="diagonal" d="{path}"/>')
    for one, values in zip(series, points, strict=True):
        places = [(x_scale(x), None if y is None else y_scale(y)) for x, y in values]
        parts += _series_elements(one, places, values)
    return "".join([*parts, "</svg>"]) + _legend(series)


def _grid(axes: Axes, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    """Returns the ticks, the grid lines and the labels of the axes."""
    parts = []
    for value in _ticks(x_scale.low, x_scale.high, log=axes.log):
        x = x_scale(value)
        parts.append(
            f'<text class="tick middle" x="{x}" y="{_HEIGHT - _BOTTOM + 15}">{_format(value)}</text>'
        )
        parts.append(f'<path class="grid" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for value in _ticks(y_scale.low, y_scale.high, log=axes.log):
        y = y_scale(value)
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 4:.1f}">{_format(value)}</text>')
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
    x, y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="tick middle" x="{x}" y="{_HEIGHT - 6}">{escape(axes.x_label)}</text>')
    rotated = f'transform="translate(12 {y}) rotate(-90)"'
    parts.append(f'<text class="tick middle" {rotated}>{escape(axes.y_label)}</text>')
    return parts


def _points(one: Series, *, log: bool) -> list[tuple[float | int, float | int | None]]:
    points = zip(one.xs, one.ys, strict=True)
    return [(x, y) for x, y in points if not log or (x > 0 and y is not None and y > 0)]


def _series_elements(one: Series, places: list, values: list) -> list[str]:
    parts = []
    if one.form != "dots":
        path, pen = [], "M"
        for x, y in places:
            if y is None:
                pen = "M"
                continue
            path.append(f"{pen}{x} {y}")
            pen = "L"
        parts.append(f'<path class="{one.css}" d="{"".join(path)}"/>')
    if one.form == "marked":
        parts += [
            f'<circle class="mark s{one.style}" cx="{x}" cy="{y}" r="3"><title>'
            f"{escape(one.name)} {_format(value[0])}: {_format(value[1])}</title></circle>"
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
    return f'<path class="{one.css}" d="M1 5H25"/>'


def _padded_range(low: float | int, high: float | int, *, log: bool) -> tuple[float | int, float | int]:
    """Returns the range of the points with some space around them."""
    if log:
        space = max((high / low) ** 0.04, 1.05)
        return low / space, high * space
    if low == high:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    space = 0.04 * (high - low)
    # A range that begins near 0 is extended to 0.
    return (0.0 if 0 <= low < 0.3 * high else low - space), high + space


def _ticks(low: float | int, high: float | int, *, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1,) if high / low > 1000 else (1, 2, 5)
        return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _format(value: float | int) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
