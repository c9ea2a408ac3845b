"""Time against T in SVG: lines on logarithmic axes, one panel beside the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import final
from xml.sax.saxutils import escape

import attrs

_WIDTH, _HEIGHT = 420, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 40, 46
_LEGEND_LINE = 16
_COLUMNS = 2
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_FLOOR = "#57606a"
_FONT = 'font-family="sans-serif" font-size="11"'


@final
@attrs.frozen(kw_only=True)
class Line:
    """Points (x, y), both positive; a dashed grey line where it is a limit."""

    label: str
    points: tuple[tuple[float, float], ...]
    limit: bool = False


@final
@attrs.frozen(kw_only=True)
class Panel:
    """One diagram."""

    title: str
    lines: tuple[Line, ...]


def draw(panels: Sequence[Panel], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG document; the legend is each panel's own, a label's colour the same in all of them.

    A panel with nothing but a limit is left out.
    """
    shown = [
        panel for panel in panels if any(line.points for line in panel.lines if not line.limit)
    ]
    colours = _colours(shown)
    most = max((len(panel.lines) for panel in shown), default=0)
    height = _HEIGHT + _LEGEND_LINE * most
    rows = -(-len(shown) // _COLUMNS)
    columns = min(_COLUMNS, max(1, len(shown)))
    size = (columns * _WIDTH, 30 + rows * height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" {_FONT}>',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="13">{escape(title)}</text>',
    ]
    for number, panel in enumerate(shown):
        x, y = number % _COLUMNS * _WIDTH, 30 + number // _COLUMNS * height
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(panel, colours, x_label, y_label)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


@final
@attrs.frozen(kw_only=True)
class _Axis:
    """A range of decades (or of powers of two) on so many pixels, from `first` on."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        span = math.log(self.high / self.low)
        share = math.log(value / self.low) / span if span else 0.5
        return self.first + share * (self.last - self.first)


def _colours(panels: Sequence[Panel]) -> dict[str, str]:
    """Each label's, in the order in which they come; limits are all grey."""
    lines = [line for panel in panels for line in panel.lines]
    labels = dict.fromkeys(line.label for line in lines if not line.limit)
    return dict(zip(labels, itertools.cycle(_COLOURS), strict=False)) | {
        line.label: _FLOOR for line in lines if line.limit
    }


def _panel(panel: Panel, colours: Mapping[str, str], x_label: str, y_label: str) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = _Axis(low=xs[0], high=xs[-1], first=_LEFT, last=right)
    decades = 10.0 ** math.floor(math.log10(min(ys))), 10.0 ** math.ceil(math.log10(max(ys)))
    up = _Axis(low=decades[0], high=max(decades[1], 10 * decades[0]), first=bottom, last=_TOP)
    parts = [f'<text x="{_LEFT}" y="{_TOP - 14}" font-size="12">{escape(panel.title)}</text>']
    for x in xs:
        parts.append(_grid(across.at(x), _TOP, across.at(x), bottom))
        parts.append(_text(across.at(x), bottom + 16, f"{x:g}", "middle"))
    for power in range(round(math.log10(up.low)), round(math.log10(up.high)) + 1):
        y = up.at(10.0**power)
        parts.append(_grid(_LEFT, y, right, y))
        parts.append(_text(_LEFT - 6, y + 4, f"{10.0**power:g}", "end"))
    parts.append(_text((_LEFT + right) / 2, bottom + 34, x_label, "middle"))
    parts.append(
        f'<text transform="translate(14 {(_TOP + bottom) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for number, line in enumerate(panel.lines):
        colour = colours[line.label]
        parts += _line(line, across, up, colour)
        at = _HEIGHT + _LEGEND_LINE * number
        parts.append(
            f'<line x1="{_LEFT}" y1="{at - 4}" x2="{_LEFT + 24}" y2="{at - 4}" {_stroke(line, colour)}/>'
        )
        parts.append(_text(_LEFT + 30, at, line.label, "start"))
    return parts


def _line(line: Line, across: _Axis, up: _Axis, colour: str) -> list[str]:
    pixels = [(across.at(x), up.at(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    parts = [f'<polyline points="{path}" fill="none" {_stroke(line, colour)}/>'] if path else []
    if not line.limit:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in pixels]
    return parts


def _stroke(line: Line, colour: str) -> str:
    dashes = ' stroke-dasharray="5 4"' if line.limit else ""
    return f'stroke="{colour}" stroke-width="2"{dashes}'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d8dee4"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
