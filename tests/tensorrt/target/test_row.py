"""What build_engine.py writes is what ``compare`` takes: from the run's folder to its table, on the fakes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from compress.cli.target_rows import read_tables, with_target_rows


def test_the_row_of_a_built_engine_fills_the_table_of_its_run(
    tiny_run: Path, tmp_path: Path, fake_tensorrt: Callable[..., ModuleType]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    step = run / "02-trt"
    fake_tensorrt("10.3.0")
    command = [sys.executable, "build_engine.py", "--precision", "int8", "--no-measure"]
    subprocess.run(command, cwd=step, check=True, capture_output=True, env=os.environ)
    written = json.loads((step / "row.json").read_text())
    tables, given = read_tables([run])
    *_, row = with_target_rows(tables, given)[0]
    assert (row["status"], row["device"], row["runtime"]) == ("ok", "FakeDriver T4", "tensorrt 10.3.0")
    assert row["precision"] == "int8"
    assert row["size_bytes"] == (step / "model.plan").stat().st_size
    assert row["artifact"] == {"folder": "02-trt", "sha256": written["sha256"]}
    assert row["latency_ms"] is None, "it was not measured"
