"""Models timed side by side: the first is the reference, and work on samples includes the features."""

from pathlib import Path

import pytest

from compress.artifact import Artifact
from compress.data import DataFolder
from compress.evaluation.side_by_side import time_runners
from compress.runners import open_runner


def test_each_runner_is_timed_over_the_first(tiny_graph: Path, speech_folder: Path) -> None:
    data = DataFolder.read(speech_folder)
    runners = [open_runner(Artifact.open(tiny_graph), 1) for _ in range(2)]
    first, second = time_runners(runners, data, data.utterances, duration_s=1.0, budget_s=0.0)
    assert first.speedup == 1
    assert second.speedup == pytest.approx(1, rel=0.9)
    for timing in (first, second):
        assert timing.model.runs == timing.whole.runs == 20
        assert 0 < timing.model.p50 < timing.whole.p50
