"""The embedded speech as trials, and the tiny network to judge on them."""

from pathlib import Path

import pytest

from compress.artifact import Artifact
from compress.data import DataFolder
from compress.evaluation.speakers import Verification
from compress.runners import OnnxRuntimeRunner


@pytest.fixture(scope="session")
def verification(speech_folder: Path) -> Verification:
    return Verification.read(DataFolder.read(speech_folder))


@pytest.fixture(scope="session")
def runner(tiny_graph: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(Artifact.from_onnx(tiny_graph), 1)
