"""``compress threshold`` stores what ``compress verify`` decides by."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.artifact import Artifact
from compress.data import DataFolder, embedded_data
from compress.passes import Context, OpenVINO

QUICK = ("--fpr", "0.5")  # the folder has few trials


@pytest.fixture
def artifact(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of an INT8 artifact of a run."""
    return Path(shutil.copytree(tiny_run / "01-ptq", tmp_path / "artifact"))


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of ten speakers who are not in ``speech_folder``, whose audio is the package's."""
    folder = tmp_path_factory.mktemp("cohort") / "voices"
    folder.mkdir()
    source = DataFolder.read(embedded_data())
    chosen = [
        u for s in sorted(set(source.speakers.values()))[-10:] for u in source.utterances if source.speaker(u) == s
    ]
    (folder / "wav.scp").write_text("".join(f"{u} {source.path(u).resolve()}\n" for u in chosen))
    (folder / "utt2spk").write_text("".join(f"{u} {source.speaker(u)}\n" for u in chosen))
    return folder


@pytest.fixture
def audio(speech_folder: Path) -> list[Path]:
    return sorted((speech_folder / "wav").iterdir())


def test_the_artifact_decides_by_what_was_fitted(
    cli: Callable, artifact: Path, voices: Path, speech_folder: Path, audio: list[Path]
) -> None:
    weights = (artifact / "model.onnx").read_bytes()
    step = (artifact / "step.json").read_bytes()
    cohort = ("--cohort", voices, "--cohort-utterances", 1, "--top-n", 8)
    code, out, err = cli("threshold", artifact, "--data", speech_folder, *cohort, *QUICK, "--preset", "eer")
    assert code == 0, err
    assert "AS-Norm by the 8 nearest of 10 speakers of " in out
    assert re.search(r"^high-security +4\.60 +", out, re.M)
    assert "of speakers that took no part in the fit" in out
    assert ((artifact / "model.onnx").read_bytes(), (artifact / "step.json").read_bytes()) == (weights, step)
    decision = Artifact.load(artifact).decision
    assert decision is not None
    assert decision.cohort is not None
    assert (decision.preset, decision.runtime, decision.trials) == ("eer", "onnxruntime", "trials")
    for preset in ("eer", "general"):
        code, out, _ = cli("verify", artifact, audio[0], audio[5], *(("--preset", preset) if preset != "eer" else ()))
        assert code == 0
        found = re.match(r"(same|different) speakers?: log-odds (\S+) .* cosine \S+, AS-Norm \S+; preset (\S+), ", out)
        assert found is not None
        assert (found[1] == "same") == (float(found[2]) >= round(decision.point(preset).llr, 2))
        assert found[3] == preset
    assert cli("verify", artifact, audio[0], audio[5], "--threshold", -1)[1].startswith("same speaker: cosine ")


@pytest.mark.parametrize("format", ["torch", "openvino"])
def test_every_format_keeps_its_decision(
    format: str, cli: Callable, small_campplus: Artifact, tiny_graph: Path, speech_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / format
    made = small_campplus if format == "torch" else OpenVINO().run(Artifact.from_onnx(tiny_graph), Context())
    made.save(folder)
    code, out, err = cli("threshold", folder, "--data", speech_folder, *QUICK, "--quality", "duration", "--json")
    assert code == 0, err
    told = json.loads(out)
    stored = Artifact.load(folder).decision
    assert stored is not None
    record = json.loads(json.dumps(stored.record()))
    assert record == {name: told[name] for name in record}
    assert set(stored.log_odds.quality) == {"duration"}


def test_a_model_that_is_no_artifact_becomes_one(
    cli: Callable, tiny_graph: Path, speech_folder: Path, audio: list[Path]
) -> None:
    code, out, _ = cli("threshold", tiny_graph, "--data", speech_folder, *QUICK)
    assert code == 0
    assert "tiny-threshold: stored." in out
    code, out, _ = cli("verify", "tiny-threshold", audio[0], audio[0])
    assert code == 0
    assert "(fitted on " in out
    code, _, err = cli("threshold", tiny_graph, "--data", speech_folder, *QUICK)
    assert code == 2
    assert "tiny-threshold is not empty" in err


def test_a_pass_drops_the_decision(cli: Callable, artifact: Path, speech_folder: Path) -> None:
    assert cli("threshold", artifact, "--data", speech_folder, *QUICK)[0] == 0
    loaded = Artifact.load(artifact)
    assert loaded.decision is not None
    assert loaded.with_files(loaded.files, loaded.history[-1], loaded.format, "int8").decision is None


def test_a_damaged_cohort_is_named(cli: Callable, artifact: Path, voices: Path, speech_folder: Path) -> None:
    few = ("--cohort", voices, "--cohort-utterances", 1)
    assert cli("threshold", artifact, "--data", speech_folder, *few, *QUICK)[0] == 0
    (cohort,) = artifact.glob("cohort-*.npy")
    cohort.write_bytes(b"x")
    code, _, err = cli("eval", artifact)
    assert code == 2
    assert f"{cohort.name} cannot be read" in err
    assert "to null, and fit the thresholds again" in err
    np.save(cohort, np.ones((3, 24), np.float32))
    code, _, err = cli("eval", artifact)
    assert code == 2
    assert f"artifact.json is damaged (ValueError: {cohort.name} does not hold the cohort" in err


def test_another_cohort_takes_the_place_of_the_first(
    cli: Callable, artifact: Path, voices: Path, speech_folder: Path
) -> None:
    found = []
    for count in (1, 2):
        few = ("--cohort", voices, "--cohort-utterances", count)
        assert cli("threshold", artifact, "--data", speech_folder, *few, *QUICK)[0] == 0
        found.append([path.name for path in artifact.glob("cohort-*.npy")])
    assert [len(names) for names in found] == [1, 1]
    assert found[0] != found[1]
    assert cli("threshold", artifact, "--data", speech_folder, *QUICK)[0] == 0
    assert not list(artifact.glob("cohort-*.npy"))
    assert Artifact.load(artifact).decision is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--costs", "1"], "--costs takes two numbers, of a miss and a false acceptance, got '1'."),
        (["--top-n", "5"], "--top-n counts scores of a cohort: give one with --cohort DIR."),
        (["--fpr", "0.001"], "135 non-target trials cannot show an FPR of 0.1 %: about "),
        (["--preset", "cost"], "unknown preset 'cost'."),
    ],
)
def test_a_wrong_option_changes_nothing(
    options: list[str], message: str, cli: Callable, artifact: Path, speech_folder: Path, unchanged: Callable
) -> None:
    before = unchanged()
    code, out, err = cli("threshold", artifact, "--data", speech_folder, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert unchanged() == before


def test_the_cohort_may_not_be_the_trials(cli: Callable, artifact: Path, speech_folder: Path) -> None:
    code, _, err = cli("threshold", artifact, "--data", speech_folder, "--cohort", speech_folder, *QUICK)
    assert code == 2
    assert "has 6 speakers; 10 are needed" in err


def test_verify_says_what_it_lacks(cli: Callable, artifact: Path, audio: list[Path]) -> None:
    code, _, err = cli("verify", artifact, audio[0], audio[1], "--preset", "general")
    assert code == 2
    assert "has no presets; `compress threshold" in err
    code, _, err = cli("verify", artifact, audio[0], audio[1], "--preset", "general", "--threshold", 0.5)
    assert code == 2
    assert "--threshold and --preset both say where to decide: give one." in err
