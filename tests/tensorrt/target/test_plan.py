"""Plans that may be loaded and those that may not, the lock, and the timing cache."""

import json
import threading
from pathlib import Path

import pytest

from compress.tensorrt.target import plan
from compress.tensorrt.target.plan import PlanError

KEY = {
    "tensorrt": "8.6.0",
    "gpu": "Tesla T4",
    "compute_capability": [7, 5],
    "driver": "535.104.05",
    "graph_sha256": "ab",
    "precision": "int8",
    "profile": {"min": [1, 50, 80]},
    "float_nodes": ["pool"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    plan.write_plan(tmp_path / "model.plan", b"native code", KEY, {"build_s": 1.5})
    return tmp_path / "model.plan"


def test_a_plan_of_ours_is_read(path: Path) -> None:
    data, record = plan.read_plan(path)
    assert data == b"native code"
    assert (record["key"], record["build_s"]) == (KEY, 1.5)
    assert plan.why_build(path, KEY) is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.plan", "model.plan.json"]


@pytest.mark.parametrize(
    "sidecar",
    [None, "", "[]", "{}", '{"written_by": "x"}', '{"schema": 1, "written_by": "speech-compress", "key": 1}', "\x00"],
)
def test_a_foreign_plan_is_refused(path: Path, sidecar: str | None) -> None:
    beside = plan.sidecar_of(path)
    beside.unlink() if sidecar is None else beside.write_text(sidecar)
    message = r"was not built here: model\.plan\.json beside it .* foreign ones are not loaded"
    with pytest.raises(PlanError, match=message):
        plan.read_plan(path)
    assert plan.why_build(path, KEY) == "the one that is there is damaged or foreign"


@pytest.mark.parametrize("data", [b"", b"native cod", b"other code!", b"native code "])
def test_a_damaged_plan_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(PlanError, match=r"is damaged or was exchanged: its SHA-256 .* Build it again: .* --force"):
        plan.read_plan(path)


def test_a_sidecar_without_a_sum_vouches_for_nothing(path: Path) -> None:
    record = json.loads(plan.sidecar_of(path).read_text())
    del record["sha256"]
    plan.sidecar_of(path).write_text(json.dumps(record))
    with pytest.raises(plan.PlanError, match="is damaged or was exchanged"):
        plan.read_plan(path)


def test_no_plan_tells_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no such file\. Build it: python build_engine\.py"):
        plan.read_plan(tmp_path / "model.plan")
    assert plan.why_build(tmp_path / "model.plan", KEY) == "there is none yet"


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("tensorrt", "10.3.0", "TensorRT was 8.6.0 and is 10.3.0"),
        ("gpu", "Orin", "the GPU was Tesla T4 and is Orin"),
        ("compute_capability", [8, 7], "the compute capability was [7, 5] and is [8, 7]"),
        ("driver", "550.54", "the driver was 535.104.05 and is 550.54"),
        ("graph_sha256", "cd", "the graph is another one"),
        ("precision", "fp16", "the precision was int8 and is fp16"),
        ("profile", {"min": [1, 60, 80]}, "the optimization profile is another one"),
        ("float_nodes", [], "the choice of FP32 nodes is another one"),
    ],
)
def test_a_plan_for_something_else_is_rebuilt_with_the_reason(path: Path, part: str, value: object, reason) -> None:
    assert plan.why_build(path, {**KEY, part: value}) == reason


def test_a_killed_writer_leaves_no_plan_that_is_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plan.write_file

    def die_at_sidecar(file: Path, data: bytes) -> None:
        if file.name.endswith(".json"):
            raise KeyboardInterrupt
        real(file, data)

    monkeypatch.setattr(plan, "write_file", die_at_sidecar)
    with pytest.raises(KeyboardInterrupt):
        plan.write_plan(path, b"newer", KEY, {})
    with pytest.raises(PlanError):
        plan.read_plan(path)


def test_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    path, order, inside = tmp_path / "model.plan", [], threading.Event()

    def second() -> None:
        inside.wait()
        with plan.lock(path, lambda: order.append("waits")):
            order.append("second")

    other = threading.Thread(target=second)
    with plan.lock(path, lambda: order.append("never")):
        other.start()
        inside.set()
        while "waits" not in order:
            other.join(0.01)
        order.append("first")
    other.join()
    assert order == ["waits", "first", "second"]


def test_timings_are_kept_for_one_gpu_and_version(tmp_path: Path) -> None:
    cache = tmp_path / plan.cache_name(KEY)
    assert plan.read_cache(cache) == (b"", None)
    assert plan.write_cache(cache, b"timings") is None
    assert plan.read_cache(cache) == (b"timings", None)
    assert plan.cache_name({**KEY, "driver": "1"}) == cache.name
    assert plan.cache_name({**KEY, "tensorrt": "8.6.1"}) != cache.name


def test_damaged_timings_are_not_given_to_tensorrt(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    plan.write_cache(cache, b"timings")
    cache.write_bytes(cache.read_bytes()[:-1])
    data, problem = plan.read_cache(cache)
    assert data == b""
    assert "is damaged; building without it" in str(problem)


def test_no_space_for_timings_is_told_and_does_not_matter(small_disk: Path) -> None:
    problem = plan.write_cache(small_disk / "timing.cache", bytes(1 << 20))
    assert "was not written: no space for 1024 KiB. The engine is good" in str(problem)
    assert list(small_disk.iterdir()) == []


def test_timings_without_a_folder_are_told(tmp_path: Path) -> None:
    assert "No such file or directory" in str(plan.write_cache(tmp_path / "absent" / "timing.cache", b""))
    (tmp_path / "folder").mkdir()
    assert "cannot be read (Is a directory)" in str(plan.read_cache(tmp_path / "folder")[1])


def test_sidecar_is_json(path: Path) -> None:
    record = json.loads(plan.sidecar_of(path).read_text())
    assert record["sha256"] == plan.sha256(b"native code") == plan.sha256_of(path)
