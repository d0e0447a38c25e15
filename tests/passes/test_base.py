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
