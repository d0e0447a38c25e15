from hypothesis import given
from hypothesis import strategies as st

from compress.report import pareto_front
from compress.report.labels import Box, Point, place_labels

VALUES = st.integers(0, 6)  # few of them, so that ties are common


@given(points=st.lists(st.tuples(VALUES, VALUES), max_size=12))
def test_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


@given(places=st.lists(st.tuples(st.floats(20, 380), st.floats(20, 280)), max_size=15))
def test_labels_keep_apart_and_inside(places: list[tuple[float, float]]) -> None:
    anchors = [Point(*place) for place in places]
    bounds = Box(0, 0, 400, 300)
    boxes = place_labels(anchors, [60.0] * len(anchors), 15, [], bounds)
    placed = [box for box in boxes if box is not None]
    allowed = 0.2 * 60 * 15
    for index, box in enumerate(placed):
        assert 60 * 15 - box.overlap(bounds) <= allowed
        assert sum(box.overlap(other) for other in placed[:index]) <= allowed


def test_one_label_always_has_room() -> None:
    assert place_labels([Point(5, 5)], [60], 15, [], Box(0, 0, 400, 300)) != [None]
