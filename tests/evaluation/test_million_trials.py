"""The benchmark of scoring: that it runs and that its results are right; its times are for people to read."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_benchmark_finds_the_rate_its_random_embeddings_must_have() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "million_trials.py"), "--trials", "100000"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"100,000 trials, EER ([\d.]+)% \(([\d.]+)% to ([\d.]+)%\)", done.stdout)
    assert found is not None
    rate, low, high = map(float, found.groups())
    # A target pair's cosine is about normal(1 / (1 + 1.65^2), 1 / sqrt(192)), a non-target pair's normal(0, same).
    assert 2.0 < rate < 5.0
    assert low < rate < high
    assert "Peak RSS" in done.stdout
