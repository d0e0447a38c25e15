"""Runs that are killed or interrupted in a process of their own, and resumed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "compress", "run", "--timing-s", "0", "--out", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def events_of(folder: Path, kind: str) -> int:
    """How many events of a kind a run has noted."""
    path = folder / "events.jsonl"
    return path.read_text().count(f'"event": "{kind}"') if path.exists() else 0


def wait_for(process: "subprocess.Popen[str]", folder: Path, kind: str, count: int) -> None:
    """Wait until that many events are noted, or the process has ended."""
    while events_of(folder, kind) < count and process.poll() is None:
        time.sleep(0.002)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def end(process: "subprocess.Popen[str]", signal_number: int) -> int:
    """Send a signal to the process and its children, as a terminal does; returns the exit code."""
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.killpg(process.pid, signal_number)
    return finish(process)[0]


def check_killed_runs(
    tmp_path: Path, arguments: list[str], wanted: int, seconds: float, lasting: Callable[[Path], dict[str, Any]]
) -> None:
    """Kill a run so many times, up to ``seconds`` after its work begins, and resume it; compare with a whole run."""
    code, _, err = finish(start(tmp_path / "whole", *arguments))
    assert code == 0, err
    moments = random.Random(0)
    folder, number, kills = tmp_path / "killed-0", 0, 0
    while kills < wanted:
        starts = events_of(folder, "start")
        process = start(folder, "--resume", *arguments)
        wait_for(process, folder, "start", starts + 1)  # before that it only imports and reads
        time.sleep(moments.uniform(0, seconds))
        if end(process, signal.SIGKILL) == -signal.SIGKILL:
            kills += 1
            continue
        assert lasting(folder) == lasting(tmp_path / "whole")  # it was quicker: begin another
        number += 1
        folder = tmp_path / f"killed-{number}"
    code, out, err = finish(start(folder, "--resume", "--json", *arguments))
    assert code == 0, err
    assert json.loads(out) == json.loads((folder / "table.json").read_text())
    assert lasting(folder) == lasting(tmp_path / "whole")
    assert [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"] == []


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_table(
    kills: int, tmp_path: Path, tiny_graph: Path, speech_folder: Path, lasting: Callable[[Path], dict[str, Any]]
) -> None:
    arguments = [str(tiny_graph), "--data", str(speech_folder), "--passes", "ptq,trt", "--set", "ptq.utterances=8"]
    check_killed_runs(tmp_path, arguments, kills, 1.0, lasting)


@pytest.mark.slow
def test_a_longer_run_killed_at_ten_moments_ends_with_the_same_table(
    tmp_path: Path, small_checkpoint: Path, speech_folder: Path, lasting: Callable[[Path], dict[str, Any]]
) -> None:
    arguments = [str(small_checkpoint), "--arch", "campplus", "--data", str(speech_folder), "--passes", "prune,ptq"]
    settings = ["--set", "prune.scope=uniform", "--set", "prune.bn_utterances=8", "--set", "ptq.utterances=8"]
    check_killed_runs(tmp_path, arguments + settings, 10, 15.0, lasting)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, tiny_graph: Path, speech_folder: Path) -> None:
    arguments = [str(tiny_graph), "--data", str(speech_folder), "--passes", "ptq,trt", "--set", "ptq.utterances=8"]
    folder = tmp_path / "run"
    process = start(folder, "--timing-s", "600", *arguments)
    wait_for(process, folder, "measured", 3)  # what follows is timing
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert out == ""
    assert f"interrupted. The same command with --resume goes on in {folder}." in err
    assert "Traceback" not in err
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    code, _, err = finish(start(folder, "--resume", *arguments))
    assert code == 0
    assert err.count("unchanged, taken from the earlier run") == 3


@pytest.mark.parametrize("wait_s", [0.3, 0.8])
def test_an_interrupt_before_the_work_begins_is_quiet(
    tmp_path: Path, tiny_graph: Path, speech_folder: Path, wait_s: float
) -> None:
    process = start(tmp_path / "run", str(tiny_graph), "--data", str(speech_folder), "--passes", "trt")
    time.sleep(wait_s)  # it is importing
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code in (130, -signal.SIGINT)  # which a shell shows as 130 too
    assert "interrupted." in err
    assert not (tmp_path / "run").exists()
