"""What holds for every registered pass."""

import json
from dataclasses import fields, replace

import pytest

from compress.artifact import Artifact, Format
from compress.errors import ModelError, SettingError
from compress.passes import Context, Pass, build, pass_named, passes

KINDS = list(passes().values())
QUICK = {name: {"steps": 4, "crops": 128} for name in ("distill", "finetune")}  # where time does not matter
every_pass = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture
def inputs(tiny: Artifact, tiny_onnx: Artifact) -> dict[Format, Artifact]:
    return {Format.TORCH: tiny, Format.ONNX: tiny_onnx}


@pytest.fixture(autouse=True)
def _inputs_are_unchanged(inputs: dict[Format, Artifact], fresh_tiny):
    """Fails a test after which an input differs from what it was before."""
    before = {format: fingerprint(artifact) for format, artifact in inputs.items()}
    yield
    assert {format: fingerprint(artifact) for format, artifact in inputs.items()} == before


def fingerprint(artifact: Artifact) -> object:
    """Everything of an artifact that a pass could change; its weights are hashed anew."""
    fresh = Artifact(**{field.name: getattr(artifact, field.name) for field in fields(Artifact)})
    modes = [module.training for module in artifact.model.modules()] if artifact.model else []
    grads = [p.requires_grad for p in artifact.model.parameters()] if artifact.model else []
    return fresh.sha256, fresh.history, fresh.params, fresh.macs, fresh.precision, modes, grads


@every_pass
def test_defaults_run_on_a_tiny_network(kind: type[Pass], inputs, tiny_context: Context) -> None:
    artifact = inputs[kind.accepts]
    result = kind().run(artifact, tiny_context)
    assert result.format == kind.returns
    assert result is not artifact
    assert [step.name for step in result.history] == [*(step.name for step in artifact.history), kind.name]
    step = result.history[-1]
    assert json.loads(json.dumps(step.settings)) == kind().settings
    assert step.notes
    assert all(isinstance(note, str) and note for note in step.notes)
    assert (result.front_end, result.task, result.embedding_size) == (
        artifact.front_end,
        artifact.task,
        artifact.embedding_size,
    )
    assert result.size_bytes > 0
    assert result.precision == kind().precision_after(artifact.precision)


@every_pass
def test_same_settings_give_the_same_artifact(kind: type[Pass], inputs, tiny_context: Context) -> None:
    maker = kind(**QUICK.get(kind.name, {}))
    first, second = (maker.run(inputs[kind.accepts], tiny_context) for _ in range(2))
    assert first.sha256 == second.sha256


@every_pass
def test_wrong_format_is_refused(kind: type[Pass], inputs, tiny_context: Context) -> None:
    for format, artifact in inputs.items():
        if format != kind.accepts:
            with pytest.raises(
                ModelError, match=rf"{kind.name} takes {kind.accepts.value} artifacts; this one is {format.value}"
            ):
                kind().run(artifact, tiny_context)


@every_pass
def test_unknown_setting_offers_the_nearest(kind: type[Pass]) -> None:
    for field in fields(kind):
        with pytest.raises(
            SettingError, match=rf"unknown setting of {kind.name} '{field.name}x'\. Did you mean '{field.name}'"
        ):
            build(kind, {f"{field.name}x": 1})


@every_pass
def test_record_rebuilds_the_pass(kind: type[Pass]) -> None:
    made = kind()
    stored = json.loads(json.dumps(made.settings))
    assert build(kind, stored) == made
    assert repr(build(kind, stored)) == repr(made)
    typed = {
        name: "none" if value is None else str(value) for name, value in stored.items() if not isinstance(value, list)
    }
    assert build(kind, typed) == made


@every_pass
def test_calibration_is_checked_before_anything_runs(kind: type[Pass], inputs, tiny_context: Context) -> None:
    wanted = kind().calibration_utterances
    assert 0 <= wanted <= 60, "the defaults must fit the embedded calibration list"
    asked: list[int] = []
    original = tiny_context.calibration
    spy = [lambda i=i: asked.append(i) or original[i]() for i in range(len(original))]
    context = replace(tiny_context, calibration=spy)
    kind(**QUICK.get(kind.name, {})).run(inputs[kind.accepts], context)
    assert sorted(set(asked)) == kind().calibration_places(context)
    assert len(set(asked)) == wanted


@every_pass
def test_pass_is_found_by_name_and_tells_what_it_does(kind: type[Pass]) -> None:
    assert pass_named(kind.name) is kind
    assert kind.__doc__
    assert isinstance(kind.accepts, Format)
    assert isinstance(kind.returns, Format)


def test_unknown_pass_offers_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown pass 'prun'\. Did you mean 'prune'\?"):
        pass_named("prun")
