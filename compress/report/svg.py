"""Small inline SVG charts: a plot area with axes, and marks placed by value. Colours come from the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.labels import Box, Point
from compress.report.markup import Attribute, Markup, element, join, number
from compress.report.scales import Scale

NUM_COLOURS = 7  # .s0 to .s6 in report.css; s0, a neutral grey, is the baseline's
NUM_MARKERS = 5
DASHES = (None, "7 3", "2 2.5", "9 3 2 3")
CHARACTER_WIDTH = 7.4  # of the 12-unit interface font, with room for wide fonts


@dataclass(frozen=True)
class Plot:
    """A plot area within a drawing, in units of about one pixel, and the two scales that fill it."""

    width: float
    height: float
    x: Scale
    y: Scale
    left: float = 50
    right: float = 12
    top: float = 12
    bottom: float = 42

    @property
    def inside(self) -> Box:
        """The area between the axes."""
        return Box(self.left, self.top, self.width - self.right, self.height - self.bottom)

    def at(self, x: float, y: float) -> Point:
        """Find the place of a pair of values."""
        area = self.inside
        return Point(
            area.left + self.x.fraction(x) * (area.right - area.left),
            area.bottom - self.y.fraction(y) * (area.bottom - area.top),
        )

    def grid(self, x_label: str, y_label: str | None) -> Markup:
        """Draw grid lines, tick labels and axis names; no y axis where it has no name."""
        area = self.inside
        parts = []
        for value, label in self.x.ticks:
            place = self.at(value, self.y.low).x
            parts.append(line(Point(place, area.top), Point(place, area.bottom), class_="grid"))
            parts.append(text(label, place, area.bottom + 16, class_="tick", text_anchor="middle"))
        for value, label in self.y.ticks if y_label else ():
            place = self.at(self.x.low, value).y
            parts.append(line(Point(area.left, place), Point(area.right, place), class_="grid"))
            parts.append(text(label, area.left - 7, place + 4, class_="tick", text_anchor="end"))
        parts.append(line(Point(area.left, area.bottom), Point(area.right, area.bottom), class_="axis"))
        middle = (area.left + area.right) / 2
        parts.append(text(x_label, middle, self.height - 6, class_="axis-name", text_anchor="middle"))
        if y_label:
            turn = f"rotate(-90 12 {number((area.top + area.bottom) / 2)})"
            middle = (area.top + area.bottom) / 2
            parts.append(text(y_label, 12, middle, class_="axis-name", text_anchor="middle", transform=turn))
        return join(*parts)

    def drawing(self, title: str, *parts: Markup | None) -> Markup:
        """Wrap up the chart as one picture with a title for screen readers."""
        view = f"0 0 {number(self.width)} {number(self.height)}"
        return element("svg", *parts, class_="chart", viewBox=view, role="img", aria_label=title)


def series_class(series: int) -> str:
    """Name the CSS class that carries a variant's colour."""
    # the grey of s0 stays the baseline's alone
    return f"s{series if series == 0 else 1 + (series - 1) % (NUM_COLOURS - 1)}"


def line(start: Point, end: Point, **attributes: Attribute) -> Markup:
    """Draw a straight line."""
    return element("line", x1=start.x, y1=start.y, x2=end.x, y2=end.y, **attributes)


def text(content: str, x: float, y: float, **attributes: Attribute) -> Markup:
    """Write one line of text."""
    return element("text", content, x=float(x), y=float(y), **attributes)


def path(points: Sequence[Point], title: Markup | None = None, closed: bool = False, **attributes: Attribute) -> Markup:
    """Draw straight lines from point to point."""
    places = "L".join(f"{point.x:.1f} {point.y:.1f}" for point in points)
    return element("path", title, d=f"M{places}{'Z' if closed else ''}", **attributes)


def steps(points: Sequence[Point], until: float) -> list[Point]:
    """Turn points into a staircase that holds each height until the next point, and the last one to the end."""
    ends = [*(point.x for point in points[1:]), until]
    return [corner for point, end in zip(points, ends, strict=True) for corner in (point, Point(end, point.y))]


def marker(series: int, centre: Point, radius: float = 5.5, tip: str | None = None, **attributes: Attribute) -> Markup:
    """Draw a variant's dot: circle, square, diamond or triangle, so that it is known without colour too.

    Args:
        series: Number of the variant.
        centre: Where.
        radius: Of the circle; the other shapes look as large.
        tip: Text shown while the dot is pointed at.
        attributes: Further ones of the element.
    """
    title = element("title", tip) if tip else None
    attributes |= {"data_tip": tip, "tabindex": "0" if tip else None}
    shape = series % NUM_MARKERS
    if shape == 0:
        return element("circle", title, cx=centre.x, cy=centre.y, r=float(radius), **attributes)
    # (corners, angle of the first one, size that looks alike)
    corners, turn, grow = ((4, 45, 1.25), (4, 0, 1.25), (3, -90, 1.3), (3, 90, 1.3))[shape - 1]
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    reach = radius * grow
    around = [Point(centre.x + reach * math.cos(angle), centre.y + reach * math.sin(angle)) for angle in angles]
    return path(around, title, closed=True, **attributes)
