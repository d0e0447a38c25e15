"""Place text beside dots so that labels cover neither each other nor the drawing."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in drawing units, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Area common to both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


class Point(NamedTuple):
    """A place in drawing units."""

    x: float
    y: float


DIRECTIONS = ((1.0, 0.0), (0.8, -0.8), (0.8, 0.8), (-1.0, 0.0), (-0.8, -0.8), (-0.8, 0.8), (0.0, -1.0), (0.0, 1.0))
DISTANCES = (9.0, 20.0, 34.0, 50.0)
MOST_COVERED = 0.2  # share of a label that may lie over something else or outside


def place_labels(
    anchors: Sequence[Point], widths: Sequence[float], height: float, obstacles: Sequence[Box], bounds: Box
) -> list[Box | None]:
    """Choose a box for each label: near its anchor, within bounds, over as little else as can be.

    Labels are placed in turn, each at the cheapest of eight directions and four distances.

    Args:
        anchors: The dots to be labelled.
        widths: Width of each label's text.
        height: Height of a line of text.
        obstacles: What labels should not cover (dots, error bars).
        bounds: The plot's inside.

    Returns:
        A box for each label; None for one that has no room.
    """
    placed: list[Box | None] = []
    for anchor, width in zip(anchors, widths, strict=True):
        taken = [*obstacles, *(box for box in placed if box is not None)]
        candidates = [
            (distance, _covered(box, taken, bounds), box)
            for distance in DISTANCES
            for dx, dy in DIRECTIONS
            for box in [_box_beside(anchor, width, height, dx * distance, dy * distance)]
        ]
        _, covered, best = min(candidates, key=lambda candidate: candidate[0] + 2 * candidate[1])
        placed.append(best if covered <= MOST_COVERED * width * height else None)
    return placed


def gap(anchor: Point, box: Box) -> tuple[float, Point]:
    """Measure how far a label lies from its anchor, and the point of the label nearest to it."""
    nearest = Point(min(max(anchor.x, box.left), box.right), min(max(anchor.y, box.top), box.bottom))
    return math.dist(anchor, nearest), nearest


def _box_beside(anchor: Point, width: float, height: float, dx: float, dy: float) -> Box:
    # the side of the label that faces the anchor lies at the offset; straight above and below it is centred
    left = anchor.x + dx - (width / 2 if dx == 0 else width if dx < 0 else 0)
    top = anchor.y + dy - (height / 2 if dy == 0 else height if dy < 0 else 0)
    return Box(left, top, left + width, top + height)


def _covered(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    """Add up the label's area that lies over something or outside; what is outside counts five times."""
    outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(bounds)
    return 5 * outside + sum(box.overlap(other) for other in taken)
