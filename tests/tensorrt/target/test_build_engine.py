"""From a bundle to an engine, with FakeDriver and FakeTensorRT: child processes and files are real, the GPU is not."""

import ast
import functools
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from compress.tensorrt.target import build_engine, child, cuda, devices, engine, plan
from compress.tensorrt.target.build_engine import choose, main, problem_of, trtexec_command, trtexec_times
from compress.tensorrt.target.versions import TensorRTError

Fake = Callable[..., ModuleType]
QUICK = ("--no-measure",)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in this process: quicker, where it does not matter that they are children."""

    def call(step: str, request: Any, doing: str, say: Any, log: Any) -> dict[str, Any]:
        try:
            return json.loads(json.dumps(child.STEPS[step](json.loads(json.dumps(request)))))  # type: ignore[no-any-return]
        except child.ERRORS as error:
            raise child.StepError(str(error)) from error

    monkeypatch.setattr(child, "call", call)


def test_files_for_the_target_are_python_3_8(bundle_folder: Path) -> None:
    files = [bundle_folder / "build_engine.py", *(bundle_folder / "target").iterdir()]
    assert len(files) > 8
    for path in files:
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_files_for_the_target_import_nothing_else(bundle_folder: Path) -> None:
    known = set(sys.stdlib_module_names) | {"numpy", "tensorrt", "target"}
    for path in [bundle_folder / "build_engine.py", *(bundle_folder / "target").iterdir()]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= known, path.name


def test_without_a_driver_it_says_so_and_fails(bundle_folder: Path) -> None:
    """As on the target: another process, without this package on its path; the driver's name leads nowhere."""
    library = bundle_folder / "target" / "cuda.py"
    text = library.read_text().replace('"libcuda.so.1"', '"libcuda-not-there.so.1"')
    library.write_text(text)
    record = read(bundle_folder, "bundle.json")
    record["sha256"]["target/cuda.py"] = plan.sha256(text.encode())
    (bundle_folder / "bundle.json").write_text(json.dumps(record))
    done = subprocess.run([sys.executable, "build_engine.py"], cwd=bundle_folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: there is no NVIDIA driver (libcuda-not-there.so.1 cannot be loaded). An engine is" in done.stderr
    assert not (bundle_folder / "model.plan").exists()


def test_help_is_one_screen(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(bundle_folder, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert any("best: both" in line for line in lines)


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engine, "SECONDS", 0.02)


def test_both_precisions_are_built_in_children_and_the_faster_is_kept(bundle_folder, fake_tensorrt, capsys) -> None:
    built = bundle_folder
    fake_tensorrt()
    assert main(built, QUICK) == 0
    record = read(built, "model.plan.json")
    assert record["sha256"] == plan.sha256_of(built / "model.plan")
    assert record["key"]["gpu"] == "FakeDriver T4"
    assert record["key"]["tensorrt"] == "8.6.0"
    about = read(built, "build.json")
    assert [entry["precision"] for entry in about["candidates"]] == ["int8", "fp16"]
    assert [entry["problem"] for entry in about["candidates"]] == [None, None]
    assert about["chosen"] == record["key"]["precision"]
    int8, fp16 = about["candidates"]
    assert (int8["builder_flags"][:2], fp16["builder_flags"][:1]) == (["FP16", "INT8"], ["FP16"])
    assert (int8["int8_layers"], int8["weighted_layers"], fp16["int8_layers"]) == (1, 1, 0)
    lengths = {entry["frames"] for entry in int8["agreement"]["graph"]}
    assert lengths == {10, 40, 51, 60}
    assert {entry["batch"] for entry in int8["agreement"]["graph"]} == {1, 2}
    assert all(entry["cosine"] > 0.999999 for entry in int8["agreement"]["graph"])
    assert 0.99 < min(entry["cosine"] for entry in int8["agreement"]["fp32"]) < 1
    row = read(built, "row.json")
    assert (row["pass"], row["status"], row["format"]) == ("trt", "ok", "tensorrt")
    assert row["runtime"] == "tensorrt 8.6.0"
    assert row["sha256"] == record["sha256"]
    assert row["size_bytes"] == (built / "model.plan").stat().st_size
    assert {"model.layers.json", "build.log", plan.cache_name(record["key"])} <= {path.name for path in built.iterdir()}
    assert not [path for path in built.iterdir() if path.name.startswith((".int8", ".fp16"))]
    printed = capsys.readouterr()
    assert "<- model.plan" in printed.out
    assert "building int8 and fp16: there is none yet" in printed.err

    assert main(built, QUICK) == 0
    assert "fits" in capsys.readouterr().err


def test_a_plan_is_kept_or_rebuilt_with_the_reason(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt()
    fp16 = [*QUICK, "--precision", "fp16"]
    assert main(bundle_folder, fp16) == main(bundle_folder, fp16) == 0
    assert "model.plan fits; nothing to do" in capsys.readouterr().err
    assert main(bundle_folder, [*fp16, "--max-frames", "70"]) == 0
    assert "building fp16: the optimization profile is another one" in capsys.readouterr().err
    record = read(bundle_folder, "model.plan.json")
    record["key"]["driver"] = "1.0"
    (bundle_folder / "model.plan.json").write_text(json.dumps(record))
    assert main(bundle_folder, fp16) == 0
    assert "building fp16: the driver was 1.0 and is CUDA 12.2; the opt" in capsys.readouterr().err
    assert main(bundle_folder, [*fp16, "--force"]) == 0
    assert "building fp16: --force" in capsys.readouterr().err
    (bundle_folder / "row.json").unlink()
    assert main(bundle_folder, fp16) == 0
    assert "building fp16: it was not finished" in capsys.readouterr().err
    assert main(bundle_folder, QUICK) == 0
    assert "was built with --precision fp16, the other was not tried" in capsys.readouterr().err


def test_two_at_once_build_one_plan(bundle_folder: Path, fake_tensorrt: Fake, in_process, capsys) -> None:
    fake_tensorrt()
    codes: list[int] = []
    arguments = [*QUICK, "--precision", "fp16"]
    with plan.lock(bundle_folder / "model.plan", lambda: None):
        both = [threading.Thread(target=lambda: codes.append(main(bundle_folder, arguments))) for _ in range(2)]
        both[0].start()
        both[1].start()
        for thread in both:
            thread.join(0.3)
        assert codes == []
    for thread in both:
        thread.join()
    told = capsys.readouterr().err
    assert codes == [0, 0]
    assert told.count("another process builds this plan; waiting for it") == 2
    assert (told.count("building fp16"), told.count("nothing to do")) == (1, 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_cublas", r"libcublas\.so\.12 is missing\. Install nvidia-cublas-cu12"),
        ("nullptr", r"does not start with this driver .* the driver is older than the CUDA"),
        ("parse", r"(?s)does not take portable-fp16\.onnx:\n  .*No importer registered for op: Det"),
        ("no_engine", r"built no engine of portable-fp16\.onnx\. TensorRT says:\n  10: Could not find"),
        ("no_load", r"does not load the engine, which was built by TensorRT 8\.6\.0 on FakeDriver T4 \(SM 7\.5\)"),
        ("nan", r"embedding has \d+ values that are NaN or infinite at 10 frames: FP16 overflows"),
        ("wrong", r"outputs differ from ONNX Runtime on the same graph: cosine \S+, needed 0\.9999"),
    ],
)
def test_failures_are_sentences(bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch, fault, message) -> None:
    try:
        fake_tensorrt(fault=fault)
    except ImportError:
        assert fault == "no_cublas"
    assert main(bundle_folder, [*QUICK, "--precision", "fp16"]) == 1
    assert_error(capsys.readouterr().err, message)
    assert not (bundle_folder / "model.plan").exists()
    assert not [path for path in bundle_folder.iterdir() if path.name.startswith(".fp16")]


def assert_error(printed: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(printed[printed.index("error: ") :])


@pytest.mark.parametrize("fault", ["crash_build", "crash_runtime"])
def test_a_crash_is_an_error_with_the_last_lines(bundle_folder: Path, fake_tensorrt: Fake, capsys, fault: str) -> None:
    fake_tensorrt(fault=fault)
    assert main(bundle_folder, [*QUICK, "--precision", "fp16"]) == 1
    said = "about to crash" if fault == "crash_build" else r"\[W\] CUDA initialization failure with error: 35"
    message = rf"(?s)the fp16 engine: the process crashed with SIGSEGV\. The last lines of its log:\n  {said}\n$"
    assert_error(capsys.readouterr().err, message)
    log = (bundle_folder / "build.log").read_text()
    assert ("about to crash" in log) == (fault == "crash_build")


def test_silent_fallback_is_an_error_unless_it_is_wanted(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt(fault="silent_fallback")
    assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 1
    message = r"silent fallback: 0 of 1 layers with weights run in INT8, the graph asks for 1 of 2\. --allow"
    assert_error(capsys.readouterr().err, message)
    assert main(bundle_folder, [*QUICK, "--precision", "int8", "--allow-float"]) == 0


def test_int8_that_the_inspector_does_not_tell_is_a_note(
    bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch
) -> None:
    fake_tensorrt()
    monkeypatch.setattr(engine.Engine, "inspect", lambda _: '{"Layers": [')
    assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 0
    printed = capsys.readouterr()
    assert "whether INT8 is used is not told: the inspector names 0 of 2 layers with weights" in printed.err
    assert "not told" in printed.out
    (about,) = read(bundle_folder, "build.json")["candidates"]
    assert about["notes"][-1].startswith("whether INT8 is used is not told")


def test_a_coarser_engine_is_accepted_where_it_is_asked(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt(fault="wrong")
    assert main(bundle_folder, [*QUICK, "--precision", "fp16", "--needed-cosine", "-1"]) == 0


@pytest.mark.parametrize("fault", ["foreign_timings", "unreadable_timings"])
def test_unusable_timings_are_told_and_do_not_matter(bundle_folder, fake_tensorrt, in_process, capsys, fault) -> None:
    trt = fake_tensorrt(fault=fault)
    driver = cuda.probe()
    cache = bundle_folder / plan.cache_name(engine.identity(trt, driver.devices[0], driver))
    plan.write_cache(cache, b"of another GPU")
    assert main(bundle_folder, [*QUICK, "--precision", "fp16"]) == 0
    assert "is of another TensorRT or GPU; building without it" in capsys.readouterr().err
    assert plan.read_cache(cache) == (b"timed", None)


def test_another_gpu_is_refused_by_number(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt()
    assert main(bundle_folder, ["--device", "3"]) == 1
    assert "there is no GPU 3; there is 0 (FakeDriver T4). Give another --device." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-frames", "41"], "1 <= --min-frames <= --opt-frames <= --max-frames must hold, got (41, 40, 60)"),
        (["--max-frames", "30"], "must hold, got (10, 40, 30)"),
        (["--opt-batch", "3"], "--opt-batch must be in 1..2 (--max-batch), got 3"),
        (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
    ],
)
def test_a_profile_that_cannot_be_is_wrong_usage(bundle_folder: Path, capsys, arguments, message: str) -> None:
    assert main(bundle_folder, arguments) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_that_is_not_whole_is_refused(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle_folder / "portable.onnx").write_bytes(b"other")
    assert main(bundle_folder, []) == 1
    assert "portable.onnx was altered. Copy the whole folder" in capsys.readouterr().err
    (bundle_folder / "portable.onnx").unlink()
    assert main(bundle_folder, []) == 1
    assert "portable.onnx is missing. Copy the whole folder" in capsys.readouterr().err
    (bundle_folder / "bundle.json").write_text("{")
    assert main(bundle_folder, []) == 1
    assert "bundle.json cannot be read" in capsys.readouterr().err


def test_a_precision_without_a_graph_names_those_there_are(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt()
    record = read(bundle_folder, "bundle.json")
    record["graphs"] = [graph for graph in record["graphs"] if graph["precision"] == "fp16"]
    (bundle_folder / "bundle.json").write_text(json.dumps(record))
    assert main(bundle_folder, ["--precision", "int8"]) == 1
    assert "the bundle has no int8 graph, only fp16. Run ptq before trt" in capsys.readouterr().err


def test_the_other_form_can_be_asked_for(bundle_folder, fake_tensorrt, in_process, capsys) -> None:
    fake_tensorrt("10.12.0.36")
    assert main(bundle_folder, [*QUICK, "--precision", "int8", "--form", "portable"]) == 0
    (about,) = read(bundle_folder, "build.json")["candidates"]
    assert (about["file"], about["builder_flags"][:2]) == ("portable.onnx", ["FP16", "INT8"])
    fake_tensorrt("11.4.0.106")
    assert main(bundle_folder, [*QUICK, "--precision", "int8", "--form", "portable"]) == 1
    assert "has no FP16 flag; build its typed graph" in capsys.readouterr().err


def test_a_folder_without_space_is_told(bundle_folder: Path, fake_tensorrt, small_disk: Path, capsys) -> None:
    fake_tensorrt()
    small = small_disk / "bundle"
    (small / "target").mkdir(parents=True)
    record = read(bundle_folder, "bundle.json")
    needed = ("portable-fp16.onnx", "references.npz")
    record["sha256"] = {name: record["sha256"][name] for name in needed}
    (small / "bundle.json").write_text(json.dumps(record))
    for name in needed:
        (small / name).symlink_to(bundle_folder / name)
    (small_disk / "more").write_bytes(bytes(_free(small_disk)))
    assert main(small, [*QUICK, "--precision", "fp16"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (small / "model.plan").exists()


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


# --- Loaded engines -----------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(bundle_folder: Path, fake_tensorrt: Fake, in_process) -> Any:
    """A context and an engine of the small graph in it."""
    fake_tensorrt()
    assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 0
    driver = cuda.probe()
    with cuda.Context(), engine.load(bundle_folder / "model.plan", driver.devices[0], driver) as found:
        yield found


def test_engine_gives_what_the_graph_gives(loaded: engine.Engine, bundle_folder: Path) -> None:
    with np.load(bundle_folder / "references.npz") as arrays:
        for i in range(4):
            found = loaded.run(arrays[f"features_{i}"])
            assert np.allclose(found["embedding"], arrays[f"int8_output0_{i}"], atol=1e-5)
    assert loaded.profile == {"min": (1, 10, 16), "opt": (1, 40, 16), "max": (2, 60, 16)}


def test_steps_of_a_run_can_be_taken_apart_and_repeated(loaded: engine.Engine) -> None:
    features = np.random.default_rng(0).standard_normal((2, 50, 16)).astype(np.float32)
    whole = loaded.run(features)["embedding"]
    with cuda.Stream() as stream, loaded.another() as other:
        other.set_shape(2, 50)
        other.host_input[...] = features
        other.copy_in(stream)
        other.enqueue(stream)
        other.copy_out(stream)
        stream.synchronize()
        assert (other.host_outputs["embedding"] == whole).all()
        assert engine.compute_ms(other, 40, 0.01) > 0


@pytest.mark.parametrize(
    ("batch", "frames", "message"),
    [
        (1, 61, r"feats: 61 frames are outside the optimization profile \(10 to 60\)\. .* --max-frames 61 \(trt\.max_"),
        (1, 9, r"feats: 9 frames are outside .* --min-frames 9 \(trt\.min_frames of the pass\)"),
        (3, 20, r"feats: 3 utterances in a batch are outside .* \(1 to 2\)\. .* --max-batch 3 \(trt\.max_batch"),
    ],
)
def test_a_shape_outside_the_profile_names_range_and_setting(loaded, batch: int, frames: int, message: str) -> None:
    with pytest.raises(TensorRTError, match=message):
        loaded.run(np.zeros((batch, frames, 16), np.float32))


def test_other_mel_bins_are_told_by_shape(loaded: engine.Engine) -> None:
    with pytest.raises(TensorRTError, match=r"feats: shape \(batch, frames, 16\) was expected, got \(1, 40, 8\)"):
        loaded.run(np.zeros((1, 40, 8), np.float32))


def test_outputs_are_in_the_order_of_the_graph(loaded: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded.record["outputs"] == ["embedding"]
    other = loaded._engine
    monkeypatch.setattr(type(other), "num_io_tensors", 3)
    monkeypatch.setattr(type(other), "get_tensor_name", lambda _, i: ["feats", "second", "first"][i])
    trt = sys.modules["tensorrt"]
    modes = {"feats": trt.TensorIOMode.INPUT}
    monkeypatch.setattr(type(other), "get_tensor_mode", lambda _, name: modes.get(name, trt.TensorIOMode.OUTPUT))
    record = {**loaded.record, "outputs": ["first", "second"]}
    with engine.Engine(trt, loaded._data, record, cuda.probe()) as made:
        assert made.outputs == ["first", "second"]


@pytest.mark.parametrize(("error", "advice"), [(OSError("libx.so: no such file"), False), (OSError(28, "full"), True)])
def test_advice_on_space_is_given_for_space(monkeypatch, tmp_path: Path, error: OSError, advice: bool) -> None:
    def fails(_: Any) -> None:
        raise error

    monkeypatch.setitem(child.STEPS, "measure", fails)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["child", "measure", str(tmp_path / "answer.json")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    assert child.main() == 1
    assert ("Free some space" in read(tmp_path, "answer.json")["error"]) == advice


def test_a_shape_that_failed_is_set_anew(loaded: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((1, 40, 16)).astype(np.float32)
    before = loaded.run(features)["embedding"]
    with monkeypatch.context() as patch:
        patch.setattr(type(loaded._context), "set_tensor_address", lambda *_: False)
        with pytest.raises(TensorRTError, match="does not take the buffer"):
            loaded.run(np.zeros((2, 60, 16), np.float32))
    assert (loaded.run(features)["embedding"] == before).all()
    assert loaded.shape == (1, 40, 16)


def test_a_plan_for_another_gpu_is_not_deserialized(loaded, bundle_folder: Path, monkeypatch) -> None:
    driver = cuda.probe()
    other = cuda.Device(0, "Orin", (8, 7), 1, integrated=True)
    monkeypatch.setattr(engine, "Engine", None)
    message = r"built for something else: the GPU was FakeDriver T4 and is Orin; the compute"
    with pytest.raises(plan.PlanError, match=message):
        engine.load(bundle_folder / "model.plan", other, driver)
    (bundle_folder / "model.plan").write_bytes(b"exchanged")
    with pytest.raises(plan.PlanError, match="is damaged or was exchanged"):
        engine.load(bundle_folder / "model.plan", driver.devices[0], driver)


# --- What is decided ----------------------------------------------------------------------------------------------


def entry(precision: str, ms: float, to_graph: float = 1.0, to_fp32: float | None = None, **more: Any) -> Any:
    agreement = {"graph": [{"cosine": to_graph, "not_finite": 0, "output": "embedding", "frames": 50}]}
    if to_fp32 is not None:
        agreement["fp32"] = [{"cosine": to_fp32, "not_finite": 0, "output": "embedding", "frames": 50}]
    found = {"precision": precision, "compute_ms": ms, "agreement": agreement, "problem": None}
    return {**found, "int8_layers": 90, "weighted_layers": 100, **more}


def test_the_faster_that_holds_the_budget_is_kept() -> None:
    chosen, reason = choose([entry("int8", 1.0, to_fp32=0.99), entry("fp16", 1.5)], 0.98)
    assert chosen is not None
    assert chosen["precision"] == "int8"
    assert reason == "kept int8; fp16 takes 1.50 times as long"
    chosen, reason = choose([entry("int8", 2.0, to_fp32=0.99), entry("fp16", 1.0)], 0.98)
    assert chosen is not None
    assert chosen["precision"] == "fp16"
    chosen, reason = choose([entry("int8", 1.0, to_fp32=0.97), entry("fp16", 1.5)], 0.98)
    assert chosen is not None
    assert reason == "kept fp16; int8 is out: cosine to FP32 0.97000, the budget is 0.98"
    chosen, reason = choose([entry("int8", 1.0, to_fp32=0.97), entry("fp16", 1.5, problem="it crashed")], 0.98)
    assert chosen is None
    assert "no engine is good enough. fp16 is out: it crashed; int8 is out" in reason


def test_what_is_wrong_with_an_engine() -> None:
    graph = {"quantized_layers": 95, "weighted_layers": 100}
    assert problem_of(entry("int8", 1.0), graph, False) is None
    assert "silent fallback" in str(problem_of(entry("int8", 1.0, int8_layers=70), graph, False))
    assert problem_of(entry("int8", 1.0, int8_layers=70), graph, True) is None
    assert problem_of(entry("int8", 1.0, int8_layers=0, weighted_layers=0), graph, False) is None  # nothing is told
    assert "cosine 0.998000, needed 0.999" in str(problem_of(entry("int8", 1.0, to_graph=0.998), graph, False))
    for named in (0, 2, 49):  # Myelin took over the others
        assert problem_of(entry("int8", 1.0, int8_layers=0, weighted_layers=named), graph, False) is None
    assert "silent" in str(problem_of(entry("int8", 1.0, int8_layers=0, weighted_layers=50), graph, False))
    assert "needed 0.9999" in str(problem_of(entry("fp16", 1.0, to_graph=0.9998), graph, False))
    assert "--needed-cosine" in str(problem_of(entry("fp16", 1.0, to_graph=0.9998), graph, False))
    assert problem_of(entry("fp16", 1.0, to_graph=0.9998), graph, False, 0.999) is None


def test_inspected_layers_are_counted_by_precision() -> None:
    layers = [
        {"LayerType": "CaskConvolution", "ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 9}},
        {"LayerType": "CaskConvolution", "ParameterType": "Convolution", "Weights": {"Type": "Half", "Count": 9}},
        {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}], "TacticName": "x"},
        {"LayerType": "CaskConvolution", "ParameterType": "Convolution", "Weights": {"Type": "Float", "Count": 0}},
        {"LayerType": "kgen", "Inputs": []},
        "only a name",
    ]
    assert engine.int8_layers(json.dumps({"Layers": layers})) == (2, 3)
    layers[2]["Name"] = "a raw\ttab"  # type: ignore[index]
    assert engine.int8_layers(json.dumps({"Layers": layers}).replace("\\t", "\t")) == (2, 3)
    assert engine.int8_layers("{") == engine.int8_layers("[1]") == (0, 0)


def test_agreement_counts_what_is_not_a_number() -> None:
    wanted = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    same = engine.agreement(wanted, wanted)
    assert same == {"cosine": 1.0, "max_abs": 0.0, "relative_l2": 0.0, "not_finite": 0}
    worse = engine.agreement(wanted, np.array([[1.0, 0.0], [2.0, np.nan]], np.float32))
    assert (worse["cosine"], worse["not_finite"]) == (0.0, 1)


def test_trtexec_is_asked_for_the_same_in_every_version() -> None:
    profile = {"input": "feats", "min": [1, 10, 16], "opt": [4, 40, 16], "max": [8, 60, 16]}
    older = trtexec_command("trtexec", Path("model.plan"), profile, "10.3.0")
    assert older[1:3] == ["--loadEngine=model.plan", "--shapes=feats:1x40x16"]
    assert older[3:] == ["--noDataTransfers", "--useSpinWait", "--useCudaGraph"]
    assert trtexec_command("trtexec", Path("model.plan"), profile, "11.0.0") == older[:3]


def test_times_of_trtexec_are_read() -> None:
    printed = (
        "[I] H2D Latency: min = 0.01 ms, max = 0.02 ms, mean = 0.01 ms, median = 0.01 ms, percentile(90%) = 0.01 ms\n"
        "[I] GPU Compute Time: min = 1.25 ms, max = 2.5 ms, mean = 1.3 ms, median = 1.29 ms, percentile(90%) = 1.4 ms,"
        " percentile(95%) = 1.5 ms, percentile(99%) = 2 ms\n"
    )
    found = trtexec_times(printed)
    assert (found["median"], found["percentile(99%)"]) == (1.29, 2.0)
    assert trtexec_times("nothing") == {}


# --- Child processes ----------------------------------------------------------------------------------------------


def test_how_a_process_ended() -> None:
    assert child.ending(-11) == "the process crashed with SIGSEGV"
    assert child.ending(-9) == "the process crashed with SIGKILL (out of memory, most likely)"
    assert child.ending(3) == "the process ended with status 3"


def test_a_long_step_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STILL_S", 0.05)
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(0.3); print('done', end='')"], stdout=subprocess.PIPE
    )
    told: list[float] = []
    assert list(child.lines_of(process, told.append)) == ["done"]
    process.wait()
    assert told


def test_children_find_the_package_wherever_it_lies() -> None:
    root = Path(child.environment()["PYTHONPATH"].split(os.pathsep)[0])
    assert root / "compress" / "tensorrt" / "target" / "child.py" == Path(child.__file__).resolve()


def test_steps_are_known_by_name() -> None:
    assert set(child.STEPS) == {"identify", "build", "check", "measure", "figures"}
    assert build_engine.NEEDED_COSINE == {"fp16": 0.9999, "int8": 0.999}


# --- Measuring ----------------------------------------------------------------------------------------------------


def test_what_is_measured_is_recorded(bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch) -> None:
    """The figures are of FakeDriver and mean nothing; that they arrive is what is tested."""
    fake_tensorrt()
    short = {"warmup_s": 0.0, "seconds": 0.01, "iterations": 2, "rounds": 1, "batches": (1, 2), "streams": (1, 2)}
    monkeypatch.setattr(child.measure_, "Settings", functools.partial(child.measure_.Settings, **short, energy_s=0.0))
    assert main(bundle_folder, ["--precision", "fp16"]) == 0
    measured, row = read(bundle_folder, "build.json")["measured"], read(bundle_folder, "row.json")
    assert measured["shape"] == [1, 60, 16]  # 3 s are outside the profile
    assert [entry["batch"] for entry in measured["throughput"]] == [1, 2]
    assert row["latency_ms"]["p50"] > 0
    assert row["rtf"] == pytest.approx(row["latency_ms"]["mean"] / 1000 / 0.62)
    assert "end to end" in capsys.readouterr().out


def test_a_plan_whose_measuring_failed_is_measured_later_and_has_no_old_row(
    bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch
) -> None:
    fake_tensorrt()
    assert main(bundle_folder, [*QUICK, "--precision", "fp16"]) == 0
    old = read(bundle_folder, "row.json")

    def refused(_: Any) -> dict[str, Any]:
        raise TensorRTError("it does not run")

    figures = {"measured": {"energy": {}}, "row": {"qps": 7.0}, "report": "table"}
    with monkeypatch.context() as patch:
        patch.setitem(child.STEPS, "figures", refused)  # type: ignore[arg-type]
        assert main(bundle_folder, ["--precision", "int8"]) == 1
    row = read(bundle_folder, "row.json")
    assert row["sha256"] == plan.sha256_of(bundle_folder / "model.plan") != old["sha256"]
    assert read(bundle_folder, "build.json")["measured"] is None
    monkeypatch.setitem(child.STEPS, "figures", lambda _: figures)  # type: ignore[arg-type]
    capsys.readouterr()
    assert main(bundle_folder, ["--precision", "int8"]) == 0
    told = capsys.readouterr()
    assert "was not measured" in told.err
    assert "building" not in told.err
    assert read(bundle_folder, "row.json") == {**row, "qps": 7.0}
    assert read(bundle_folder, "build.json")["measured"] == figures["measured"]
    assert main(bundle_folder, ["--precision", "int8"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_plan_beside_the_row_of_another_is_built_again(
    bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch
) -> None:
    fake_tensorrt()
    assert main(bundle_folder, [*QUICK, "--precision", "fp16"]) == 0
    row = (bundle_folder / "row.json").read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_engine.Builder, "record", killed)
        assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 130
    assert not (bundle_folder / "row.json").exists()
    assert not (bundle_folder / "build.json").exists()
    assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 0
    assert "building int8: it was not finished" in capsys.readouterr().err
    (bundle_folder / "row.json").write_bytes(row)
    assert main(bundle_folder, [*QUICK, "--precision", "int8"]) == 0
    assert "building int8: it was not finished" in capsys.readouterr().err


def test_trtexec_is_a_check_from_outside(bundle_folder, fake_tensorrt, in_process, capsys, monkeypatch) -> None:
    fake_tensorrt()
    program = bundle_folder.parent / "trtexec"
    program.write_text("#!/bin/sh\necho \"$@\" > asked\necho '[I] GPU Compute Time: min = 1 ms, median = 1.5 ms'\n")
    program.chmod(0o755)
    monkeypatch.chdir(bundle_folder.parent)
    found = devices.Installed(None, None, str(program))
    monkeypatch.setattr(devices, "find_tensorrt", lambda: found)
    assert main(bundle_folder, [*QUICK, "--precision", "fp16", "--trtexec"]) == 0
    assert "trtexec: median 1.500 ms of GPU compute" in capsys.readouterr().err
    assert read(bundle_folder, "build.json")["trtexec"]["gpu_compute_ms"] == {"min": 1.0, "median": 1.5}
    assert f"--loadEngine={bundle_folder / 'model.plan'} --shapes=feats:1x40x16" in Path("asked").read_text()
    program.write_text("#!/bin/sh\nexit 3\n")
    assert main(bundle_folder, [*QUICK, "--precision", "fp16", "--trtexec", "--force"]) == 0
    assert "trtexec gives no times (status 3)" in capsys.readouterr().err
