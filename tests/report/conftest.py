"""A run as the report gets it, made of random scores."""

from typing import Any

import numpy as np
import pytest

from compress.report import TrialScores

FIELDS = (
    *("reason", "command", "format", "runtime", "precision", "device", "threads", "params", "size_bytes", "macs"),
    *("eer", "eer_ci95", "min_dcf", "threshold", "decision_flips", "n_trials", "cosine_mean", "cosine_min"),
    *("latency_ms", "e2e_latency_ms", "rtf", "qps", "peak_rss_bytes", "build_s", "artifact", "speedup"),
)


def make_row(name: str, **figures: Any) -> dict[str, Any]:
    """Build one row of table.json with nothing measured but the figures given."""
    row = dict.fromkeys(FIELDS) | {"variant": name, "pass": name, "settings": {}, "notes": [], "status": "ok"}
    assert set(figures) <= set(row)
    return row | figures


def make_table(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "run": "demo",
        "created": "2025-03-04T12:30:05+00:00",
        "machine": {"cpu": "some CPU", "cores": 2, "torch": "2.9.1"},
        "data": {"folder": "calib_data", "n_trials": 8000, "trials": "trials", "calibration": {"utterances": 200}},
        "rows": list(rows),
    }


def make_scores(seed: int = 0, trials: int = 2000) -> TrialScores:
    random = np.random.default_rng(seed)
    labels = random.random(trials) < 0.3
    return TrialScores(labels, np.where(labels, random.normal(0.5, 0.15, trials), random.normal(0, 0.15, trials)), 0.25)


@pytest.fixture
def table() -> dict[str, Any]:
    """A baseline, an INT8 row and a deferred TensorRT row."""
    latency = {"mean": 31.9, "p50": 31.4, "p95": 35.0, "p99": 40.0}
    baseline = make_row(
        "baseline",
        runtime="torch",
        precision="fp32",
        device="cpu",
        params=6_850_000,
        size_bytes=27_500_000,
        eer=0.034,
        eer_ci95=[0.028, 0.041],
        threshold=0.25,
        decision_flips=0,
        n_trials=8000,
        latency_ms=latency,
        speedup=1.0,
        artifact={"folder": "00-baseline", "sha256": "ab" * 32},
    )
    quantized = baseline | {
        "variant": "prune+ptq",
        "pass": "ptq",
        "runtime": "onnxruntime",
        "precision": "int8",
        "size_bytes": 4_400_000,
        "eer": 0.039,
        "eer_ci95": [0.032, 0.046],
        "decision_flips": 61,
        "latency_ms": {key: value / 4 for key, value in latency.items()},
        "speedup": 4.0,
        "settings": {"method": "entropy", "skip": ["head"], "per_channel": True, "seed": None},
        "notes": ["104 of 108 layers in INT8"],
        "artifact": {"folder": "03-ptq", "sha256": "cd" * 32},
    }
    deferred = make_row(
        "prune+trt", status="deferred", reason="No NVIDIA GPU was found.", command="compress trt 02-onnx --out 04-trt"
    )
    return make_table(baseline, quantized, deferred)


@pytest.fixture
def scores() -> dict[str, TrialScores]:
    return {"baseline": make_scores(0), "prune+ptq": make_scores(1)}
