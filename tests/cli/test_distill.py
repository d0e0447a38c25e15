"""``compress distill``, and ``distill`` as a step of a run that is resumed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.artifact import Artifact
from compress.models import architecture

QUICK = ("--steps", 2, "--crops", 16, "--crop-s", 0.5)


def network(seed: int) -> Artifact:
    """The TDNN-BLSTM of 20 thousand weights: few layers, so it runs quickly."""
    torch.manual_seed(seed)
    arguments = {"embedding_size": 12, "channels": 24, "hidden_size": 16, "attention_channels": 8}
    built = architecture("tdnn_blstm").build(**arguments)
    return Artifact.from_module(built, arch="tdnn_blstm", arguments=arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small network as an artifact folder."""
    network(0).save(tmp_path / "small")
    return tmp_path / "small"


def test_a_pass_alone_needs_a_teacher_and_learns_from_it(
    cli: Callable, folder: Path, speech_folder: Path, tmp_path: Path
) -> None:
    given = ("distill", folder, "--data", speech_folder, *QUICK)
    code, _, err = cli(*given)
    assert code == 2
    assert "Name one with distill.teacher (--teacher)" in err
    network(1).save(tmp_path / "teacher")
    code, out, _ = cli(
        *given, "--teacher", tmp_path / "teacher", "--learning-rate", "1e-4", "--out", tmp_path / "taught"
    )
    assert code == 0
    assert "16 crops of 0.5 s from 15 utterances" in out
    taught = Artifact.load(tmp_path / "taught")
    assert taught.params == network(0).params
    assert taught.history[-1].settings["teacher"] == str(tmp_path / "teacher")


@pytest.mark.slow
def test_a_run_with_distill_is_resumed(
    cli: Callable,
    small_campplus: Artifact,
    speech_folder: Path,
    other_speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "small"
    small_campplus.save(folder)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    settings = {
        "prune.ratio": 0.3,
        "prune.scope": "uniform",
        "prune.bn_utterances": 0,
        "distill.data": other_speech,
        "distill.steps": 2,
        "distill.crops": 16,
        "distill.crop_s": 0.5,
        "ptq.utterances": 8,
    }
    assignments = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    run = [
        "run",
        folder,
        "--passes",
        "prune,distill,ptq",
        "--data",
        speech_folder,
        "--out",
        tmp_path / "run",
        *assignments,
    ]
    run += ["--timing-s", "0"]
    code, _, _ = cli(*run)
    assert code == 0
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["rows"]
    assert [row["variant"] for row in rows][-2:] == ["prune+distill+onnx", "prune+distill+ptq"]
    taught = Artifact.load(tmp_path / "run" / "02-distill")
    assert taught.history[-1].notes[0].startswith("teacher: the network that the run started from")
    (tmp_path / "run" / "03-onnx" / "step.json").unlink()
    code, _, err = cli(*run, "--resume")
    assert code == 0
    assert "02-distill: unchanged, taken from the earlier run" in err
    code, _, err = cli(*run, "--resume", "--set", "distill.steps=3")
    assert code == 0
    assert "02-distill: its input, settings, data or code changed; made anew" in err
    notes = Artifact.load(tmp_path / "run" / "02-distill").history[-1].notes
    assert "read from the cache" in " ".join(notes)
