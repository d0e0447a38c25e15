"""The configuration of a run: one form for YAML, command line and Python; what is wrong in it is said."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.artifact import Format
from compress.cli.run import read_config, run_command
from compress.config import RunConfig, apply_settings, from_mapping, listed_passes, read_yaml, with_links
from compress.errors import CompressError, InputError, SettingError
from compress.passes import PTQ, TRT, Onnx, Pass, Prune

frames = st.lists(st.integers(3, 5000), min_size=3, max_size=3).map(sorted)
ptqs = st.builds(PTQ, utterances=st.integers(1, 1000), reduce_range=st.none() | st.booleans())
trts = st.builds(lambda sizes, batch: TRT(*sizes, max_batch=batch), frames, st.integers(1, 64))
onnxes = st.builds(Onnx, opset=st.integers(18, 23))
words = st.text("abcXYZ019_-./ é", min_size=1).filter(lambda text: text == text.strip() and not text.startswith("-"))
fractions = st.floats(0, 1, exclude_max=True)
elsewhere = st.builds(Prune, channels=words)
targets = st.one_of(
    st.builds(dict, ratio=fractions),
    st.builds(dict, macs_ratio=fractions),
    st.builds(dict, latency_ratio=fractions),
    st.builds(dict, params=st.integers(1, 10**9)),
    st.builds(dict, size_mb=st.floats(0, 1e4, exclude_min=True)),
    st.just({}),
)
prunes = elsewhere | st.builds(
    lambda target, **others: Prune(**target, **others),
    target=targets,
    scope=st.sampled_from(["uniform", "global", "sensitivity"]),
    score=st.sampled_from(["l1", "l2", "bn_scale", "activation", "taylor"]),
    normalise=st.sampled_from(["mean", "max", "none"]),
    score_utterances=st.integers(1, 1000),
    sensitivity=st.none() | words,
    sensitivity_loss=st.sampled_from(["cosine", "eer"]),
    sensitivity_utterances=st.integers(1, 1000),
    round_to=st.none() | st.integers(1, 64),
    keep=st.lists(words, max_size=3).map(tuple),
    bn_utterances=st.just(0) | st.integers(2, 1000),
)
configs = st.builds(
    RunConfig,
    passes=st.lists(prunes | ptqs | trts | onnxes, min_size=1, max_size=5).map(tuple),
    model=words,
    arch=st.none() | words,
    data=st.none() | words,
    trials=st.none() | words,
    calib=st.none() | words,
    out=st.none() | words,
    device=st.sampled_from(["cpu", "cuda"]),
    threads=st.integers(1, 1024),
    timing_s=st.floats(0, 3600),
)


def as_options(config: RunConfig) -> list[str]:
    """Write a configuration as the arguments of ``compress run``; each pass may occur once."""
    plain = {name: value for name, value in config.to_mapping().items() if name != "passes" and value is not None}
    options = [plain.pop("model")]
    for name, value in plain.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    options += ["--passes", ",".join(step.name for step in config.passes)]
    for step in config.passes:
        for key, value in step.settings.items():
            text = ",".join(value) if isinstance(value, list) else "none" if value is None else str(value)
            options += ["--set", f"{step.name}.{key}={text}"]
    return options


def from_options(options: list[str]) -> RunConfig:
    values = run_command.make_context("run", options).params
    for flag in ("resume", "dry_run", "strict", "as_json"):
        del values[flag]
    return read_config(values.pop("config"), values.pop("passes"), values.pop("assignments"), values)


@given(configs)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_yaml_and_python_give_the_same_configuration(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_mapping()), encoding="utf-8")
    assert from_mapping(read_yaml(path), "run.yaml") == config


@given(configs.filter(lambda config: len({step.name for step in config.passes}) == len(config.passes)))
def test_command_line_and_python_give_the_same_configuration(config: RunConfig) -> None:
    assert from_options(as_options(config)) == config


@given(configs, st.integers(1, 1024))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_option_takes_precedence_over_the_yaml_file(tmp_path: Path, config: RunConfig, threads: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_mapping()), encoding="utf-8")
    found = from_options(["--config", str(path), "--threads", str(threads)])
    assert found.threads == threads
    assert found.passes == config.passes


@pytest.mark.parametrize(
    "passes",
    [
        "prune, ptq",
        ["prune", "ptq"],
        [{"prune": None}, "ptq"],
        [{"prune": {}}, {"ptq": {"utterances": 40}}],
        {"prune": {"ratio": 0.4}, "ptq": None},
    ],
)
def test_a_list_of_passes_has_several_forms(passes: Any) -> None:
    assert from_mapping({"passes": passes}, "run.yaml").passes == (Prune(), PTQ())


def test_set_applies_to_passes_of_a_yaml_file_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    in_yaml = {"scope": "uniform"}
    for text, scope in (
        ("passes: prune,ptq", {}),
        ("passes: [prune, ptq]", {}),
        ("passes: {prune: {scope: uniform}, ptq: }", in_yaml),
    ):
        path.write_text(text)
        found = from_options(["--config", str(path), "--set", "prune.ratio=0.25", "--set", "ptq.reduce_range=true"])
        assert found.passes == (Prune(ratio=0.25, **scope), PTQ(reduce_range=True))


def test_set_applies_to_every_pass_of_that_name() -> None:
    changed = apply_settings(listed_passes("prune,prune", "here"), ["prune.ratio=0.1"])
    assert from_mapping({"passes": changed}, "here").passes == (Prune(ratio=0.1), Prune(ratio=0.1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"passes": "prune", "modle": "x"}, r"unknown key in run\.yaml: 'modle'\. Did you mean 'model'\?"),
        ({"passes": "prune", 7: "x"}, r"unknown key in run\.yaml: '7'\. Known: arch, calib, data, "),
        ({"passes": "prine"}, r"unknown pass 'prine'\. Did you mean 'prune'\?"),
        ({"passes": "zzz"}, r"unknown pass 'zzz'\. Known: (\w+, )*prune, (\w+, )*ptq\b.*\.$"),
        ({"passes": [{"prune": {"rato": 1}}]}, r"unknown setting of prune 'rato'\. Did you mean 'ratio'\?"),
        ({"passes": [{"prune": {"ratio": 1.0}}]}, r"prune\.ratio must be in 0\.\.1 .*, got 1\.0\."),
        ({"passes": [{"prune": {"ratio": "much"}}]}, r"prune\.ratio must be float, got 'much'\."),
        ({"passes": [{"ptq": {"utterances": 0}}]}, r"ptq\.utterances must be at least 1, got 0\."),
        ({"passes": [{"ptq": {"utterances": 2.5}}]}, r"ptq\.utterances must be int, got 2\.5\."),
        ({"passes": [{"ptq": {"utterances": [1]}}]}, r"ptq\.utterances must be int, got \[1\]\."),
        ({"passes": [{"prune": 0.4}]}, r"run\.yaml: the settings of prune must be a mapping, got 0\.4\."),
        ({"passes": [{"prune": {}, "ptq": {}}]}, r"run\.yaml: a pass is a name, or a name with its settings, got"),
        ({"passes": [["prune"]]}, r"run\.yaml: a pass is a name, or a name with its settings, got \['prune'\]\."),
        ({"passes": 3}, r"run\.yaml: passes must be a list such as \[prune, ptq\], got 3\."),
        ({"passes": None}, r"no passes were given\. Known: (\w+, )*prune, (\w+, )*ptq\b.*\.$"),
        ({"passes": " , "}, r"no passes were given"),
        ({}, r"no passes were given"),
        ({"passes": "prune", "threads": 0}, r"threads must be in 1\.\.1024, got 0\."),
        ({"passes": "prune", "threads": "two"}, r"run\.yaml: threads must be a whole number, got 'two'\."),
        ({"passes": "prune", "threads": True}, r"run\.yaml: threads must be a whole number, got True\."),
        ({"passes": "prune", "timing_s": -1}, r"timing_s must be in 0\.\.3600 seconds, got -1\."),
        ({"passes": "prune", "timing_s": float("nan")}, r"timing_s must be in 0\.\.3600 seconds, got nan\."),
        ({"passes": "prune", "device": "tpu"}, r"device must be cpu or cuda, got 'tpu'\."),
        ({"passes": "prune", "model": ["a"]}, r"run\.yaml: model must be text, got \['a'\]\."),
    ],
)
def test_a_wrong_configuration_is_named(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        from_mapping(values, "run.yaml")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prune=0.4", r"--set prune=0\.4: the form is pass\.key=value, for example prune\.ratio=0\.4\."),
        ("prune.ratio", r"--set prune\.ratio: the form is"),
        ("prune.=1", r"the form is"),
        ("=", r"the form is"),
        ("prine.ratio=0.4", r"unknown pass 'prine'\. Did you mean 'prune'\?"),
        ("ptq.utterances=4", r"--set ptq\.utterances=4: the pass ptq is not in --passes\."),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        apply_settings(listed_passes("prune", "here"), [assignment])


def test_a_value_may_hold_an_equals_sign() -> None:
    assert apply_settings([("prune", {})], ["prune.scope=a=b"]) == [{"prune": {"scope": "a=b"}}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"passes: [prune", r"run\.yaml is not valid YAML: "),
        (b"\xff\xfe\x00", r"run\.yaml is not valid YAML: "),
        (b"- prune", r"run\.yaml must hold a mapping \(keys such as model, passes, data\), not list\."),
        (b"", r"must hold a mapping .*, not NoneType"),
        (b"a: !!python/object/apply:os.system ['true']", r"is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_broken_yaml_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "run.yaml")


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml: no such configuration file\."):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} cannot be read (Is a directory).")):
        read_yaml(tmp_path)


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(["passes", "model", "threads"]), st.from_type(object)))
def test_any_mapping_is_read_or_refused_with_a_reason(values: dict[str, Any]) -> None:
    with contextlib.suppress(CompressError):
        assert from_mapping(values, "run.yaml").passes


@pytest.mark.parametrize(
    ("given_passes", "start", "expected"),
    [
        ((PTQ(),), Format.TORCH, ("onnx", "ptq")),
        ((PTQ(),), Format.ONNX, ("ptq",)),
        ((Prune(), PTQ(), TRT()), Format.TORCH, ("prune", "onnx", "ptq", "trt")),
        ((TRT(),), Format.TORCH, ("onnx", "trt")),
        ((Onnx(opset=19), PTQ()), Format.TORCH, ("onnx", "ptq")),
    ],
)
def test_missing_exports_are_inserted(given_passes: tuple[Pass, ...], start: Format, expected: tuple[str, ...]) -> None:
    found = with_links(RunConfig(given_passes), start).passes
    assert tuple(step.name for step in found) == expected
    assert [step for step in found if step in given_passes] == list(given_passes)


@pytest.mark.parametrize(
    ("given_passes", "start", "message"),
    [
        (
            (PTQ(), Prune()),
            Format.TORCH,
            r"prune takes torch, but there is onnx before it, and no pass leads from onnx",
        ),
        ((Prune(),), Format.ONNX, r"prune takes torch, but there is onnx before it"),
        (
            (TRT(), PTQ()),
            Format.ONNX,
            r"ptq takes onnx, but there is tensorrt before it, and no pass leads from tensorrt",
        ),
    ],
)
def test_an_impossible_order_is_refused(given_passes: tuple[Pass, ...], start: Format, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        with_links(RunConfig(given_passes), start)


@pytest.mark.parametrize(
    ("changes", "folder"),
    [
        ({}, "runs/campplus-prune-ptq"),
        ({"model": "models/net.v2.onnx"}, "runs/net.v2-prune-ptq"),
        ({"model": "runs/x/01-prune/"}, "runs/01-prune-prune-ptq"),
        ({"model": "."}, "runs/run-prune-ptq"),
        ({"out": "here"}, "here"),
    ],
)
def test_the_run_folder_is_named_after_model_and_passes(changes: dict[str, str], folder: str) -> None:
    assert RunConfig((Prune(), PTQ()), **changes).folder == Path(folder)


@pytest.mark.parametrize("make", [lambda: RunConfig(()), lambda: RunConfig((Prune(),), threads=0)])
def test_python_is_checked_alike(make: Callable[[], RunConfig]) -> None:
    with pytest.raises(SettingError):
        make()
