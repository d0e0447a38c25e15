"""Settings of a pass: from strings, YAML and Python to fields, or an error that says what was needed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact import Artifact, Format
from compress.errors import InputError, ModelError, SettingError
from compress.passes import Context, Pass, build


@dataclass(frozen=True)
class Every(Pass):
    """A pass with every kind of setting."""

    name: ClassVar[str] = "every"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.TORCH

    count: int = 1
    ratio: float = 0.5
    scope: str = "uniform"
    symmetric: bool = False
    limit: int | None = 3
    share: float | None = None
    skip: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        return artifact.with_model(artifact.module, self.step())


FLOATS = st.floats(allow_nan=False)
NAMES = st.text("abc.1_", min_size=1).filter(lambda name: name not in ("none", "null"))


@given(
    count=st.integers(),
    ratio=FLOATS,
    scope=NAMES,
    symmetric=st.booleans(),
    limit=st.none() | st.integers(),
    share=st.none() | FLOATS,
    skip=st.lists(NAMES).map(tuple),
    sizes=st.lists(st.integers()).map(tuple),
)
def test_settings_come_back_from_python_yaml_and_strings(**values: object) -> None:
    wanted = Every(**values)
    assert build(Every, wanted.settings) == wanted
    assert build(Every, values) == wanted
    assert build(Every, {name: as_typed(value) for name, value in values.items()}) == wanted


def as_typed(value: object) -> str:
    """A value as a person types it after ``--set``."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@given(value=st.integers(-(2**53), 2**53))
def test_whole_number_is_a_float_too(value: int) -> None:
    made = build(Every, {"ratio": value})
    assert made.ratio == value
    assert type(made.ratio) is float


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text()
    | st.lists(st.integers() | st.text() | st.none())
    | st.dictionaries(st.text(), st.integers())
)


@given(name=st.sampled_from(sorted(Every().settings)), value=VALUES)
def test_any_value_is_taken_or_refused_by_name(name: str, value: object) -> None:
    """Whatever YAML may hold: nothing but the field's type gets in, and nothing but a SettingError comes out."""
    refusal = ""
    try:
        got = getattr(build(Every, {name: value}), name)
    except SettingError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"every.{name} must be ")
        return
    kinds = {"limit": (int, type(None)), "share": (float, type(None)), "skip": (tuple,), "sizes": (tuple,)}
    assert type(got) in kinds.get(name, (type(getattr(Every(), name)),))
    if name == "sizes":
        assert all(type(item) is int for item in got)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": "many"}, r"every\.count must be int, got 'many'\."),
        ({"count": 2.5}, r"every\.count must be int, got 2\.5\."),
        ({"count": True}, r"every\.count must be int, got True\."),
        ({"ratio": "half"}, r"every\.ratio must be float, got 'half'\."),
        ({"symmetric": "yes"}, r"every\.symmetric must be bool, got 'yes'\."),
        ({"symmetric": 1}, r"every\.symmetric must be bool, got 1\."),
        ({"scope": 3}, r"every\.scope must be str, got 3\."),
        ({"limit": "few"}, r"every\.limit must be int, got 'few'\."),
        ({"sizes": "1,b"}, r"every\.sizes must be int, got 'b'\."),
        ({"sizes": 5}, r"every\.sizes must be a list, got 5\."),
        ({"ration": 0.4}, r"unknown setting of every 'ration'\. Did you mean 'ratio'\?"),
        (
            {"zzz": 1},
            r"unknown setting of every 'zzz'\. Known: count, limit, ratio, scope, share, sizes, skip, symmetric",
        ),
    ],
)
def test_wrong_setting_is_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build(Every, settings)


@given(listed=st.integers(0, 200), wanted=st.integers(0, 200))
def test_calibration_utterances_are_distinct_and_spread_over_the_list(listed: int, wanted: int) -> None:
    context = Context(calibration=[lambda i=i: np.full((1, 1), i, np.float32) for i in range(listed)])
    if listed < wanted:
        with pytest.raises(
            InputError, match=rf"every\.count: {wanted} calibration utterances were asked for"
        ) as caught:
            context.utterances(wanted, "every.count")
        assert f"the list has {listed}. Give a longer --calib list or set every.count={listed}." in str(caught.value)
        return
    chosen = [int(load()[0, 0]) for load in context.utterances(wanted, "every.count")]
    assert len(chosen) == wanted
    assert chosen == sorted(set(chosen))
    if wanted:
        gaps = np.diff([*chosen, listed])
        assert chosen[0] == 0
        assert gaps.max() - gaps.min() <= 1


def numbered(count: int, **others: object) -> Context:
    """A context whose calibration utterances are their places in the list."""
    return Context(calibration=[lambda i=i: np.full((1, 1), i, np.float32) for i in range(count)], **others)


@given(listed=st.integers(1, 300), wanted=st.integers(1, 40), seed=st.integers(0, 9))
def test_places_are_chosen_by_duration_and_level(listed: int, wanted: int, seed: int) -> None:
    wanted, measured = min(wanted, listed), []

    def measure(place: int) -> tuple[float, float]:
        measured.append(place)
        return place * 7 % 31, -float(place * 13 % 29)

    context = numbered(listed, measure=measure)
    places = context.places_by_level(wanted, seed)
    assert len(places) == wanted
    assert places == sorted(set(places))
    assert set(places) <= set(range(listed))
    assert len(measured) == (0 if listed == wanted else min(listed, 4 * wanted)), "the rest is never decoded"
    assert places == context.places_by_level(wanted, seed)


def test_all_durations_and_levels_are_there_where_the_list_repeats_itself() -> None:
    kinds = [(duration, level) for duration in (1.0, 3.0, 9.0, 20.0) for level in (-50.0, -40.0, -30.0, -20.0)]
    utterances = kinds * 5
    chosen = [utterances[i] for i in numbered(80, measure=utterances.__getitem__).places_by_level(20, 0)]
    evenly = [utterances[i] for i in range(0, 80, 4)]
    assert [len({kind[part] for kind in chosen}) for part in (0, 1)] == [4, 4]
    assert [len({kind[part] for kind in evenly}) for part in (0, 1)] == [4, 1]


def test_seeds_choose_differently() -> None:
    context = numbered(40, measure=lambda place: (place % 5, place % 7))
    assert len({tuple(context.places_by_level(10, seed)) for seed in range(5)}) > 1


def test_places_are_spread_evenly_where_there_is_no_audio() -> None:
    assert numbered(30).places_by_level(3, 0) == [0, 10, 20]


def test_deferred_artifact_is_refused(tiny_int8: Artifact) -> None:
    from compress.passes import PTQ, TRT

    deferred = TRT().run(tiny_int8, Context())
    for step in (Every(), PTQ(), TRT()):
        with pytest.raises(ModelError, match=rf"{step.name} takes \w+ artifacts; this one is deferred"):
            step.check_input(deferred)


def test_record_of_a_step_holds_its_settings_as_json_can() -> None:
    step = Every(skip=("head",)).step("a note")
    assert step.name == "every"
    assert step.settings["skip"] == ["head"]
    assert step.notes == ("a note",)
