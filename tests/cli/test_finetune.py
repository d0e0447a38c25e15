"""``compress finetune``, and ``finetune`` as a step of a run that is resumed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.artifact import Artifact
from compress.models import architecture

QUICK = ("--steps", 2, "--crops", 16, "--crop-s", 0.5)


@pytest.fixture
def small() -> Artifact:
    """The TDNN-BLSTM of 20 thousand weights: few layers, so it runs quickly."""
    torch.manual_seed(0)
    arguments = {"embedding_size": 12, "channels": 24, "hidden_size": 16, "attention_channels": 8}
    built = architecture("tdnn_blstm").build(**arguments)
    return Artifact.from_module(built, arch="tdnn_blstm", arguments=arguments)


@pytest.fixture
def folder(small: Artifact, tmp_path: Path) -> Path:
    small.save(tmp_path / "small")
    return tmp_path / "small"


def test_a_model_learns_own_speech(cli: Callable, folder: Path, speech_folder: Path, tmp_path: Path) -> None:
    given = ("finetune", folder, "--data", speech_folder, "--out", tmp_path / "tuned", *QUICK)
    code, out, _ = cli(*given, "--dry-run")
    assert code == 0
    assert "last layer" in out
    assert not (tmp_path / "tuned").exists()
    code, out, _ = cli(*given, "--learning-rate", "1e-6")
    assert code == 0
    assert "learned from 10 utterances of 5 speakers in" in out
    assert "EER on 8 held-back utterances of 6 speakers, 28 trials:" in out
    tuned = Artifact.load(tmp_path / "tuned")
    assert tuned.sha256 != Artifact.load(folder).sha256
    assert tuned.history[-1].settings["data"] == str(speech_folder)


def test_what_is_refused_is_the_model_as_it_was_and_the_exit_code_tells(
    cli: Callable, folder: Path, speech_folder: Path, other_speech: Path, tmp_path: Path
) -> None:
    given = ("finetune", folder, "--data", speech_folder, "--keep", other_speech, "--keep-points", 0)
    outcomes = set()
    for seed in (1, 2, 3):
        out = tmp_path / f"tuned{seed}"
        code, _, err = cli(*given, "--learning-rate", 1.0, "--seed", seed, "--out", out, *QUICK)
        refused = Artifact.load(out).sha256 == Artifact.load(folder).sha256
        assert (code == 1) == refused == ("The network was left as it was" in err)
        outcomes.add(refused)
    assert True in outcomes


@pytest.mark.slow
def test_a_run_with_finetune_is_resumed(
    cli: Callable, folder: Path, speech_folder: Path, other_speech: Path, tmp_path: Path
) -> None:
    settings = {
        "prune.ratio": 0.4,
        "prune.scope": "uniform",
        "prune.bn_utterances": 0,
        "finetune.data": other_speech,
        "finetune.steps": 2,
        "finetune.crops": 16,
        "finetune.crop_s": 0.5,
        "finetune.learning_rate": 1e-6,
        "ptq.utterances": 8,
    }
    assignments = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    run = ["run", folder, "--passes", "prune,finetune,ptq", "--data", speech_folder, "--out", tmp_path / "run"]
    run += [*assignments, "--timing-s", "0"]
    code, _, _ = cli(*run)
    assert code == 0
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["rows"]
    assert [row["variant"] for row in rows][-2:] == ["prune+finetune+onnx", "prune+finetune+ptq"]
    (tmp_path / "run" / "03-onnx" / "step.json").unlink()
    code, _, err = cli(*run, "--resume")
    assert code == 0
    assert "02-finetune: unchanged, taken from the earlier run" in err
    code, _, err = cli(*run, "--resume", "--set", "finetune.steps=3")
    assert code == 0
    assert "02-finetune: its input, settings, data or code changed; made anew" in err
