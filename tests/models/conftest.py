"""Reference checkpoints of the networks, and the names and shapes of their full-size ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Shapes = dict[str, tuple[int, ...]]


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.fixture(scope="session")
def shapes() -> Callable[[torch.nn.Module], Shapes]:
    """Gives the key names and shapes of a network's state dict."""
    return shapes_of


@pytest.fixture(scope="session")
def reference(bench_data: Path) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Finds a reference checkpoint by its file name: its path, and inputs and outputs of the original network."""

    def find(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        path = bench_data / "reference" / "checkpoints" / name
        if not path.is_file():
            pytest.skip(f"no reference checkpoint at {path}")
        with np.load(path.parent / f"{path.stem}.vectors.npz") as vectors:
            return path, dict(vectors)

    return find


@pytest.fixture(scope="session")
def full_size(bench_data: Path) -> Callable[[str], tuple[dict[str, Any], int, Shapes]]:
    """Finds an original full-size network by name: its arguments, parameters, and key names with shapes."""

    def find(name: str) -> tuple[dict[str, Any], int, Shapes]:
        path = bench_data / "reference" / "checkpoints" / "full_size_state_dicts.json"
        if not path.is_file():
            pytest.skip(f"no list of full-size networks at {path}")
        entry = json.loads(path.read_text())[name]
        state = {key: tuple(value["shape"]) for key, value in entry["state_dict"].items()}
        return entry["arguments"], entry["parameters"], state

    return find


@torch.inference_mode()
def check_vectors(model: torch.nn.Module, vectors: dict[str, np.ndarray]) -> None:
    """Compare a network with the original's outputs: relative error 1e-4 of the largest value."""
    cases = [name.removeprefix("in_") for name in vectors if name.startswith("in_")]
    assert cases
    for case in cases:
        expected = vectors[f"out_{case}"]
        found = model(torch.from_numpy(vectors[f"in_{case}"])).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), case


@pytest.fixture(scope="session")
def same_vectors() -> Callable[[torch.nn.Module, dict[str, np.ndarray]], None]:
    """Checks that a network reproduces reference vectors."""
    return check_vectors
