"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Folder with public speech, noise and reference vectors; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("COMPRESS_BENCH_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set COMPRESS_BENCH_DATA")
    return folder
