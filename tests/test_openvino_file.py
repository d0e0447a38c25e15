"""Compiled networks are kept whole or not at all, and nothing but time is lost without them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import openvino_file
from compress.artifact import Artifact
from compress.errors import ModelError
from compress.files import KEPT_DAYS, keep, read_kept
from compress.openvino_file import (
    cache_folder,
    configuration,
    executed_precisions,
    fixed_frames_of,
    key_of,
    load_network,
    precision_of,
    read_network,
    reason_of,
)

pytest.importorskip("openvino")

Load = Callable[..., tuple[np.ndarray, bool]]


@pytest.fixture
def load(tiny_openvino: Artifact) -> Load:
    """Loads the tiny network and runs it: its embedding, and whether it came from the folder."""
    features = np.random.default_rng(0).standard_normal((1, 70, 16)).astype(np.float32)

    def call(cache: Path | None) -> tuple[np.ndarray, bool]:
        network, kept = load_network(*files(tiny_openvino), 1, cache)
        return network({0: features})[0], kept

    return call


def files(artifact: Artifact) -> tuple[bytes, bytes]:
    return artifact.files["model.xml"], artifact.files["model.bin"]


def test_second_load_comes_from_the_folder_and_is_equal(load: Load, tmp_path: Path) -> None:
    (first, kept), (second, again) = load(tmp_path / "new"), load(tmp_path / "new")
    assert (kept, again) == (False, True)
    assert np.array_equal(first, second)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:30],
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + bytes(100) + data[len(data) // 2 + 100 :],
        lambda data: b"0" * 64 + data[64:],
    ],
    ids=["empty", "no digest", "half", "a hole", "another digest"],
)
def test_damaged_network_is_compiled_anew(load: Load, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    right, _ = load(tmp_path)
    (blob,) = tmp_path.iterdir()
    blob.write_bytes(damage(blob.read_bytes()))
    found, kept = load(tmp_path)
    assert not kept
    assert np.array_equal(found, right)
    assert load(tmp_path)[1]  # it was written again


def test_folder_that_cannot_be_written_costs_time_alone(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    right, _ = load(None)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        found, kept = load(folder)
        assert not kept
        assert np.array_equal(found, right)


def test_full_disk_costs_time_alone(load: Load, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(40_000))
    right, _ = load(None)
    for _ in range(2):
        found, kept = load(small_disk / "cache")
        assert not kept
        assert np.array_equal(found, right)
    assert not list((small_disk / "cache").iterdir())


def test_networks_that_nobody_loads_are_removed(tmp_path: Path) -> None:
    old = time.time() - (KEPT_DAYS + 1) * 24 * 3600
    for name in ("old", "used"):
        keep(tmp_path / f"{name}.blob", name.encode())
        os.utime(tmp_path / f"{name}.blob", (old, old))
    assert read_kept(tmp_path / "used.blob") == b"used"
    keep(tmp_path / "new.blob", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.blob", "used.blob"]


def test_key_tells_networks_threads_and_versions_apart(
    tiny_openvino: Artifact, tiny_bf16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        key_of(*files(tiny_openvino), 1),
        key_of(*files(tiny_openvino), 1, (1, 50, 16)),
        key_of(*files(tiny_openvino), 2),
        key_of(*files(tiny_bf16), 1),
    }
    monkeypatch.setattr("openvino.__version__", "2000.1")
    keys.add(key_of(*files(tiny_openvino), 1))
    monkeypatch.setattr(openvino_file, "cpu_info", lambda: {"model name": "another"})
    keys.add(key_of(*files(tiny_openvino), 1))
    assert len(keys) == 6


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "openvino"
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "compress" / "openvino"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "compress" / "openvino"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_graph_cut_short_is_refused(tiny_openvino: Artifact, share: float) -> None:
    graph, weights = files(tiny_openvino)
    with pytest.raises(ModelError, match=r"OpenVINO \S+ cannot read the graph: \S"):
        read_network(graph[: int(share * len(graph))], weights)


def test_weights_cut_short_are_refused(tiny_openvino: Artifact) -> None:
    graph, weights = files(tiny_openvino)
    with pytest.raises(ModelError, match=r"OpenVINO \S+ cannot (read|compile) the graph: \S"):
        load_network(graph, weights[: len(weights) // 2], 1, None)


def test_precision_is_that_of_the_graph(tiny_openvino: Artifact, tiny_bf16: Artifact) -> None:
    found = [precision_of(files(artifact)[0]) for artifact in (tiny_openvino, tiny_bf16)]
    assert found == ["f32", "bf16"]
    assert precision_of(b"<net></net>") == "f32"
    assert fixed_frames_of(b'<fixed_frames value="298" />') == 298
    assert fixed_frames_of(files(tiny_openvino)[0]) is None
    assert configuration(2, "bf16")["INFERENCE_PRECISION_HINT"] == "bf16"


def test_precisions_are_read_from_what_is_run(tiny_openvino: Artifact, tiny_openvino_int8: Artifact) -> None:
    floats, integers = (
        executed_precisions(load_network(*files(artifact), 1, None)[0])
        for artifact in (tiny_openvino, tiny_openvino_int8)
    )
    assert set(floats) == {"f32"}
    assert set(integers) <= {"u8", "i8"}
    assert sum(floats.values()) == sum(integers.values()) == 3


def test_reason_leaves_out_where_it_was_raised() -> None:
    text = "Exception from src/core.cpp:117:\nCheck 'x' failed at src/y.cpp:2:\nno such operator\n"
    assert reason_of(RuntimeError(text)) == "no such operator"
    assert reason_of(RuntimeError("Exception from src/core.cpp:117:")) == "Exception from src/core.cpp:117:"
    assert reason_of(RuntimeError("")) == "RuntimeError"


def test_small_deployed_process_loads_no_pytorch(tiny_openvino: Artifact, tmp_path: Path) -> None:
    tiny_openvino.save(tmp_path / "artifact")
    code = (
        "import sys; from compress.openvino_file import run_once;"
        f" run_once({str(tmp_path / 'artifact')!r}, (1, 50, 16), 1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
