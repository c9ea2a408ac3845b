"""The picture of times: an SVG document with its points where logarithms put them."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from typed_moe.cli._picture import Line, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


def _drawn(*panels: Panel) -> ET.Element:
    text = draw(panels, title="A < B & C", x_label="T", y_label="µs")
    return ET.fromstring(text)


def _points(element: ET.Element) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in element.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_equal_ratios_are_equal_distances() -> None:
    times = ((1.0, 10.0), (10.0, 100.0), (100.0, 1000.0))
    root = _drawn(Panel(title="one", lines=(Line(label="a", points=times),)))
    (line,) = root.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = _points(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1
    assert y1 < y0  # up is less in SVG


def test_a_limit_is_dashed_and_has_no_dots() -> None:
    lines = (
        Line(label="floor", points=((1, 5), (8, 6)), limit=True),
        Line(label="us", points=((1, 7), (8, 9))),
    )
    root = _drawn(Panel(title="one", lines=lines))
    floor, ours = root.iter(f"{SVG}polyline")
    assert "stroke-dasharray" in floor.attrib
    assert "stroke-dasharray" not in ours.attrib
    assert len(list(root.iter(f"{SVG}circle"))) == 2
    said = {text.text for text in root.iter(f"{SVG}text")}
    assert {"A < B & C", "one", "floor", "us", "T", "µs", "1", "8"} <= said


def test_panels_without_points_are_left_out() -> None:
    limit = Line(label="floor", points=((8, 5),), limit=True)
    empty = Panel(title="nothing", lines=(limit, Line(label="a", points=())))
    full = Panel(title="something", lines=(Line(label="a", points=((8, 5),)),))
    said = {text.text for text in _drawn(empty, full).iter(f"{SVG}text")}
    assert "something" in said
    assert "nothing" not in said
    assert not list(_drawn().iter(f"{SVG}polyline"))


def test_a_label_has_one_colour_in_every_panel() -> None:
    ours, theirs, other = (Line(label=label, points=((1, 5), (8, 6))) for label in "abc")
    both = Panel(title="one", lines=(ours, theirs, other))
    without = Panel(title="two", lines=(ours, other))
    drawn = [line.attrib["stroke"] for line in _drawn(both, without).iter(f"{SVG}polyline")]
    a, b, c, *again = drawn
    assert len({a, b, c}) == 3
    assert again == [a, c]
