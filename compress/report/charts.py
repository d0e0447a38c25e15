"""The report's charts: error against cost, DET curves, score histograms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.report.entries import Entry, Metric
from compress.report.labels import Box, Point, gap, place_labels
from compress.report.markup import Markup, element, join
from compress.report.scales import Scale, det_scale, nice_ticks, scale_for
from compress.report.scores import Floats, TrialScores, det_points, error_rates, histogram
from compress.report.svg import CHARACTER_WIDTH, DASHES, Plot, line, marker, path, series_class, steps, text
from compress.units import format_percent

LONGEST_LABEL = 26


@dataclass(frozen=True)
class Dot:
    """One variant in a scatter plot: its cost (ms or MB) and error rate with interval, both in percent."""

    entry: Entry
    cost: float
    error: float
    interval: tuple[float, float] | None
    tip: str


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other one beats: lower in one value and not higher in the other.

    Returns:
        Indices of the front, by rising first value; equal points are all on it or all off it.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        lowest = points[front[-1]] if front else None
        if lowest is None or points[index][1] < lowest[1] or points[index] == lowest:
            front.append(index)
    return front


def scatter(dots: Sequence[Dot], cost_name: str, metric: Metric) -> tuple[Markup, list[Entry]]:
    """Draw error rate against cost: a dot per row, its 95 % interval, and the Pareto front as a staircase.

    Returns:
        The drawing, and the entries whose labels had no room in it.
    """
    heights = [height for dot in dots for height in (dot.error, *(dot.interval or ()))]
    x, y = scale_for([dot.cost for dot in dots], from_zero=True), scale_for(heights)
    plot = Plot(460, 330, x, y)
    front = pareto_front([(dot.cost, dot.error) for dot in dots])
    names = [f"{name}{', log scale' if scale.kind == 'log' else ''}" for name, scale in ((cost_name, x), ("", y))]
    corners = steps([plot.at(dots[index].cost, dots[index].error) for index in front], plot.inside.right)
    corners = [Point(corners[0].x, plot.inside.top), *corners]
    labels = _labels(plot, dots, corners)
    drawing = plot.drawing(
        f"{metric.name} against {cost_name}",
        plot.grid(names[0], f"{metric.name} (%{names[1]})"),
        path([*corners, Point(plot.inside.right, plot.inside.top)], closed=True, class_="beaten"),
        path(corners, class_="front"),
        *(_error_bar(plot, dot) for dot in dots),
        *(label for label in labels if label is not None),
        *(
            marker(
                dot.entry.series,
                plot.at(dot.cost, dot.error),
                class_=f"dot {series_class(dot.entry.series)}{'' if index in front else ' hollow'}",
                data_series=str(dot.entry.series),
                tip=dot.tip,
            )
            for index, dot in enumerate(dots)
        ),
    )
    return drawing, [dot.entry for dot, label in zip(dots, labels, strict=True) if label is None]


def _error_bar(plot: Plot, dot: Dot) -> Markup | None:
    if dot.interval is None:
        return None
    low, high = (plot.at(dot.cost, end) for end in dot.interval)
    caps = [line(Point(end.x - 4, end.y), Point(end.x + 4, end.y)) for end in (low, high)]
    style = f"interval {series_class(dot.entry.series)}"
    return element("g", line(low, high), *caps, class_=style, data_series=str(dot.entry.series))


def _labels(plot: Plot, dots: Sequence[Dot], front: Sequence[Point]) -> list[Markup | None]:
    """Write each dot's name beside it, with a line to it where the name had to go further away; None without room."""
    anchors = [plot.at(dot.cost, dot.error) for dot in dots]
    names = [_shortened(dot.entry.label) for dot in dots]
    obstacles = [
        Box(min(start.x, end.x) - 1, min(start.y, end.y) - 1, max(start.x, end.x) + 1, max(start.y, end.y) + 1)
        for start, end in pairwise(front)
    ]
    obstacles += [Box(anchor.x - 7, anchor.y - 7, anchor.x + 7, anchor.y + 7) for anchor in anchors]
    for dot in dots:
        if dot.interval is not None:
            low, high = (plot.at(dot.cost, end) for end in dot.interval)
            obstacles.append(Box(low.x - 5, high.y, low.x + 5, low.y))
    boxes = place_labels(anchors, [CHARACTER_WIDTH * len(name) for name in names], 15, obstacles, plot.inside)
    parts: list[Markup | None] = []
    for anchor, name, box in zip(anchors, names, boxes, strict=True):
        if box is None:
            parts.append(None)
            continue
        distance, nearest = gap(anchor, box)
        leader = line(anchor, nearest, class_="leader") if distance > 14 else None
        # text hugs the side that faces its dot, whatever its true width
        side, place = ("end", box.right) if box.right <= anchor.x else ("start", box.left)
        if box.left < anchor.x < box.right:
            side, place = "middle", (box.left + box.right) / 2
        label = text(name, place, box.bottom - 3.5, class_="label", text_anchor=side)
        parts.append(join(leader, label))
    return parts


def det_chart(variants: Mapping[str, TrialScores], series: Mapping[str, int]) -> Markup:
    """Draw the DET curve of each variant on normal-deviate axes, with its own threshold marked."""
    curves = {name: det_points(trials) for name, trials in variants.items()}
    working = {name: error_rates(trials) for name, trials in variants.items()}
    scale = det_scale([rate for rates in working.values() for rate in rates])
    plot = Plot(500, 470, scale, scale)
    area = plot.inside
    clip = element(
        "clipPath",
        element("rect", x=area.left, y=area.top, width=area.right - area.left, height=area.bottom - area.top),
        id="det-area",
    )
    curve_paths = [
        path(
            [plot.at(x, y) for x, y in zip(*curve, strict=True)],
            class_=f"curve {series_class(series[name])}",
            stroke_dasharray=DASHES[series[name] % len(DASHES)],
            data_series=str(series[name]),
        )
        for name, curve in curves.items()
        if curve[0].size
    ]
    points = [
        marker(
            series[name],
            plot.at(fpr, fnr),
            class_=f"dot {series_class(series[name])}",
            data_series=str(series[name]),
            tip=f"{name} at its threshold {variants[name].threshold:.3f}\n"
            f"false acceptance {format_percent(fpr)}\nfalse rejection {format_percent(fnr)}",
        )
        for name, (fpr, fnr) in working.items()
        if scale.low <= fpr <= scale.high and scale.low <= fnr <= scale.high
    ]
    return plot.drawing(
        "DET curves",
        element("defs", clip),
        plot.grid("false acceptance rate (%)", "false rejection rate (%)"),
        line(plot.at(scale.low, scale.low), plot.at(scale.high, scale.high), class_="diagonal"),
        element("g", *curve_paths, clip_path="url(#det-area)"),
        *points,
    )


def curve_key(series: int) -> Markup:
    """Draw a variant's line and marker for a legend."""
    stroke = line(
        Point(1, 7), Point(33, 7), class_=f"curve {series_class(series)}", stroke_dasharray=DASHES[series % len(DASHES)]
    )
    dot = marker(series, Point(17, 7), 4.5, class_=f"dot {series_class(series)}")
    return element("svg", stroke, dot, class_="key", viewBox="0 0 34 14", aria_hidden="true")


def marker_key(series: int) -> Markup:
    """Draw a variant's marker for the table."""
    dot = marker(series, Point(7, 7), 4.5, class_=f"dot {series_class(series)}")
    return element("svg", dot, class_="key", viewBox="0 0 14 14", aria_hidden="true")


def histogram_chart(name: str, trials: TrialScores, edges: Floats, tallest: float) -> Markup:
    """Draw the shares of target and non-target scores per bin and the threshold, on axes common to all variants.

    Args:
        name: Of the variant.
        trials: Its scores.
        edges: Bins common to all variants, (bins + 1,).
        tallest: The largest share of any variant, the top of the axis.
    """
    low, high = float(edges[0]), float(edges[-1])
    ticks = tuple((tick, f"{tick:g}") for tick in nice_ticks(low, high))
    plot = Plot(250, 150, Scale(low, high, ticks), Scale(0.0, 1.18 * tallest, ()), left=8, right=8, top=6, bottom=38)
    areas = [
        path(_outline(plot, histogram(scores, edges), edges), closed=True, class_=f"bars {kind}")
        for kind, scores in (("nontarget", trials.nontargets), ("target", trials.targets))
    ]
    foot = plot.at(trials.threshold, 0)
    side, place = ("end", foot.x - 5) if foot.x > plot.width / 2 else ("start", foot.x + 5)
    return plot.drawing(
        f"Score histograms of {name}",
        plot.grid("cosine score", None),
        *areas,
        line(foot, Point(foot.x, plot.top), class_="threshold"),
        text(f"threshold {trials.threshold:.3f}", place, plot.top + 9, class_="label small", text_anchor=side),
    )


def tallest_bin(variants: Mapping[str, TrialScores], edges: Floats) -> float:
    """Find the largest share of scores in one bin, over all variants."""
    return max(
        float(histogram(scores, edges).max())
        for trials in variants.values()
        for scores in (trials.targets, trials.nontargets)
    )


def share_bar(share: float) -> Markup:
    """Draw a short bar as long as the share (0 to 1) of the table's largest figure."""
    full = element("rect", class_="track", width="100", height="3", rx="1.5")
    bar = element("rect", class_="fill", width=max(1.0, 100 * share), height="3", rx="1.5")
    return element(
        "svg", full, bar, class_="share", viewBox="0 0 100 3", preserveAspectRatio="none", aria_hidden="true"
    )


def _outline(plot: Plot, shares: Floats, edges: Floats) -> list[Point]:
    tops = [plot.at(edge, share) for edge, share in zip(edges[:-1], shares, strict=True)]
    end = plot.at(float(edges[-1]), 0)
    # runs of empty bins need no corners of their own
    corners = [Point(plot.at(float(edges[0]), 0).x, end.y), *steps(tops, end.x), end]
    return [
        corner
        for index, corner in enumerate(corners)
        if index in (0, len(corners) - 1) or not corners[index - 1].y == corner.y == corners[index + 1].y
    ]


def _shortened(label: str) -> str:
    """Keep the end of a long name, where the variants of one run differ."""
    return label if len(label) <= LONGEST_LABEL else f"…{label[-LONGEST_LABEL + 1 :]}"
