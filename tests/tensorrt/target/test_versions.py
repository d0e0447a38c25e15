"""The adapter against the names that real TensorRT bindings have, 8.5 to 11, and through FakeTensorRT of each."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress.tensorrt.target import child, cuda, engine, versions
from compress.tensorrt.target.versions import TensorRTError

HERE = Path(__file__).parent
ATTRIBUTES = {path.stem: json.loads(path.read_text()) for path in (HERE.parent / "attributes").glob("*.json")}
SOURCES = [Path(versions.__file__), Path(engine.__file__)]
UNTYPED = ["8.5.3.1", "8.6.0", "10.0.1", "10.3.0"]  # of 8.5: JetPack 5; of 10.3: JetPack 6
TYPED = ["10.12.0.36", "10.16.1.11", "11.0.0.114", "11.4.0.106"]

every_version = pytest.mark.parametrize("version", UNTYPED + TYPED)

# What objects in the code are, by the name of the variable or attribute that holds them.
KINDS = {
    "trt": "module",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "layer": "ILayer",
    "tensor": "ITensor",
    "made": "IOptimizationProfile",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
}
GUARDED = {  # asked for with hasattr, or on the side of a choice that a version does not take
    "ParserError": {"node_name", "node_operator"},
    "ILayer": {"precision", "set_output_type"},
    "module": {"__version__"},  # set by the package around the extension module
}


def used() -> set[tuple[str, str]]:
    """(class, name) of every attribute of TensorRT's that the code asks for by name."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            holder = node.value
            name = getattr(holder, "id", "") or getattr(holder, "attr", "")
            if name in KINDS:
                found.add((KINDS[name], node.attr))
            elif isinstance(holder, ast.Attribute) and getattr(holder.value, "id", "") == "trt" and name[0] != "_":
                found.add((name, node.attr))
    return found


def test_all_versions_are_recorded() -> None:
    assert set(ATTRIBUTES) == {*UNTYPED, *TYPED}
    assert all(record["version"] == name and "imported" in record["how"] for name, record in ATTRIBUTES.items())


def test_the_code_is_looked_through() -> None:
    found = used()
    assert {("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3")} <= found
    assert {("MemoryPoolType", "WORKSPACE"), ("DataType", "FLOAT"), ("TensorIOMode", "INPUT")} <= found
    assert len(found) > 40


@every_version
def test_every_name_that_is_used_is_there(version: str) -> None:
    record = ATTRIBUTES[version]
    missing = {
        f"{kind}.{name}"
        for kind, name in used()
        if name not in record[kind] and name not in GUARDED.get(kind, ()) and name[0] != "_"
    }
    assert not missing


@every_version
def test_no_version_has_lost_what_it_is_guarded_for(version: str) -> None:
    typed = version in TYPED
    record = ATTRIBUTES[version]
    assert typed or {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"} <= set(record["BuilderFlag"])
    assert typed or {"precision", "set_output_type"} <= set(record["ILayer"])
    assert version.startswith("8") or {"node_name", "node_operator"} <= set(record["ParserError"])


@every_version
def test_form_and_flags(fake_tensorrt, quantized_graph: onnx.ModelProto, version: str) -> None:
    trt = fake_tensorrt(version)
    typed = versions.wants_typed(trt)
    assert typed == (version in TYPED)
    told, about = built(trt, quantized_graph, typed=typed)
    if typed:
        assert about["builder_flags"] == told["flags"] == told["float"] == []
        assert about["network_flags"] == ["STRONGLY_TYPED"]
        assert told["network"] == 1 << ATTRIBUTES[version]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    else:
        assert about["builder_flags"] == told["flags"] == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
        assert about["network_flags"] == (["EXPLICIT_BATCH"] if version.startswith("8") else [])
        assert told["network"] == (1 if version.startswith("8") else 0)
        assert told["float"] == ["pool", "pool_1"]
    assert told["verbosity"] == "DETAILED"
    assert told["profile"] == ["feats", [[1, 10, 16], [1, 40, 16], [2, 60, 16]]]
    assert told["sources"] == (0b11000 if version.startswith("8") else None)  # without cuBLAS, cuBLASLt and cuDNN


def test_a_float_graph_asks_for_fp16_alone(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    told, about = built(fake_tensorrt("8.6.0"), quantized_graph, quantized=False, float_nodes=[])
    assert told["flags"] == about["builder_flags"] == ["FP16"]


def test_an_untyped_graph_for_11_is_refused(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    with pytest.raises(TensorRTError, match=r"TensorRT 11\.4\.0\.106 has no FP16 flag; build its typed graph"):
        built(fake_tensorrt("11.4.0.106"), quantized_graph, float_nodes=[])


def built(trt: Any, model: onnx.ModelProto, **graph: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What FakeTensorRT was asked, and what the build tells of it."""
    about = {"typed": False, "quantized": True, "float_nodes": ["pool", "gone"], "nodes": [], **graph}
    profile = {"input": "feats", "min": [1, 10, 16], "opt": [1, 40, 16], "max": [2, 60, 16]}

    class OnnxFile:
        name = "portable.onnx"

        def read_bytes(self) -> bytes:
            return model.SerializeToString()

    plan, record = engine.build(trt, cuda.probe(), OnnxFile(), about, profile, 1 << 20, None, lambda _: None)  # type: ignore[arg-type]
    told: dict[str, Any] = json.loads(plan.partition(b"\n")[0])
    return told, record


def test_nodes_without_a_layer_are_told(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    _, about = built(fake_tensorrt("8.6.0"), quantized_graph)
    assert about["notes"] == ["no layer was found for the FP32 nodes gone"]
    assert about["float_layers"] == 2


@pytest.mark.parametrize(
    ("layer", "metadata", "node"),
    [
        ("node_add_1", "", None),  # another node's own name
        ("node_add_2", "", "node_add"),
        ("pool", "", "pool"),
        ("pool_3", "", "pool"),
        ("pool_3", "", "pool_3"),
        ("ONNXTRT_cast", "[ONNX Layer: pool]", "pool"),
        ("pool_x", "[ONNX Layer: other]", None),
        ("spool", "", None),
    ],
)
def test_layers_are_found_by_the_name_of_their_node(layer: str, metadata: str, node: str | None) -> None:
    class Layer:
        pass

    made = Layer()
    made.name, made.metadata = layer, metadata  # type: ignore[attr-defined]
    names = {"pool", "pool_3"} if node == "pool_3" else {"pool", "node_add"}
    assert versions.node_of(made, names, {*names, "node_add_1"}) == node


@pytest.mark.parametrize("shape", [False, True])
def test_casts_and_arithmetic_of_lengths_keep_their_type(fake_tensorrt, shape: bool) -> None:
    trt = fake_tensorrt("8.6.0")
    network = trt.INetworkDefinition(0)
    types = (trt.DataType.FLOAT,) if shape else (trt.DataType.FLOAT, trt.DataType.INT32)
    network._layers = [trt.ILayer(name, "", trt.DataType.FLOAT, types) for name in ("length", "plain")]
    network._layers[0].get_input(0).is_shape_tensor = shape
    network._layers[1]._inputs[1:] = []
    assert versions.keep_in_float(trt, network, ["length", "plain"]) == (1, ("length",))
    assert not hasattr(network._layers[0], "precision")
    assert network._layers[1].precision == trt.DataType.FLOAT


@pytest.mark.parametrize(
    ("message", "package"),
    [
        ("libcublas.so.12: cannot open shared object file", "libcublas.so.12 is missing. Install nvidia-cublas-cu12"),
        ("libcublasLt.so.11: cannot open shared object file", "nvidia-cublas-cu11"),
        ("libcudnn.so.8: cannot open shared object file: No such file", "nvidia-cudnn-cu12==8.9.7.29"),
        (
            "libnvonnxparser.so.11: cannot open shared object file",
            "libnvonnxparser.so.11 is missing. Install tensorrt-",
        ),
        ("libnvinfer.so.10: cannot open shared object file", "libnvinfer.so.10 is missing. Install tensorrt-cu12-libs"),
        ("libnvinfer_plugin.so.8: cannot open", "libnvinfer-plugin"),
        ("undefined symbol: foo", "importing tensorrt fails: undefined symbol: foo. Install TensorRT again"),
    ],
)
def test_a_missing_library_is_named_with_what_brings_it(message: str, package: str) -> None:
    assert package in versions.missing_library(message)


def test_import_errors_are_sentences(fake_tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="libcublas"):
        fake_tensorrt(fault="no_cublas")
    with pytest.raises(TensorRTError, match=r"libcublas\.so\.12 is missing\. Install nvidia-cublas-cu12"):
        versions.import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TensorRTError, match=r"TensorRT for Python is not installed\. .* JetPack"):
        versions.import_tensorrt()


def test_versions_before_8_5_are_refused(fake_tensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt(), "__version__", "8.4.1.5")
    with pytest.raises(TensorRTError, match=r"TensorRT 8\.4\.1\.5 is too old; 8\.5 or later is needed"):
        versions.import_tensorrt()


def test_an_older_driver_is_told_with_both_versions(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    message = r"(?s)TensorRT 8\.6\.0 does not start with this driver \(.*CUDA 12\.2 at most\): the .*says:\n  CUDA"
    with pytest.raises(TensorRTError, match=message):
        built(fake_tensorrt(fault="nullptr"), quantized_graph)


@pytest.mark.parametrize(("version", "where"), [("8.6.0", "second one (Det)"), ("10.3.0", "second (Det)")])
def test_what_the_parser_refuses_is_named(fake_tensorrt, quantized_graph, version: str, where: str) -> None:
    with pytest.raises(TensorRTError) as caught:
        built(fake_tensorrt(version, fault="parse"), quantized_graph, nodes=["first one (Conv)", "second one (Det)"])
    assert f"\n  {where}: No importer registered for op: Det [ModelImporter.cpp:771]\n" in str(caught.value)
    assert f"compress lint portable.onnx --version {version}" in str(caught.value)


def test_no_engine_comes_with_the_last_errors(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    with pytest.raises(
        TensorRTError, match=r"built no engine of portable\.onnx\. TensorRT says:\n  10: Could not find"
    ):
        built(fake_tensorrt(fault="no_engine"), quantized_graph)


def test_a_build_of_8_that_fails_without_cublas_is_tried_with_it(fake_tensorrt, quantized_graph) -> None:
    told, about = built(fake_tensorrt("8.5.3.1", fault="needs_cublas"), quantized_graph)
    assert told["sources"] == 0b11111
    assert about["notes"][-1].startswith("no engine came out without cuBLAS and cuDNN; built with them")
    with pytest.raises(TensorRTError, match="built no engine"):
        built(fake_tensorrt("10.3.0", fault="needs_cublas"), quantized_graph)


def test_too_little_gpu_memory_for_building_is_told(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    message = r"out of GPU memory, 1024 of 16384 MiB are free\. End other programs .* --workspace-mb\. TensorRT says"
    with cuda.Context(), pytest.raises(TensorRTError, match=message):
        built(fake_tensorrt(fault="no_memory"), quantized_graph)


def test_a_refused_profile_is_told(fake_tensorrt, quantized_graph: onnx.ModelProto) -> None:
    with pytest.raises(TensorRTError, match=r"the optimization profile \[\(1, 10, 16\).*\] of feats is refused"):
        built(fake_tensorrt(fault="profile"), quantized_graph)


@pytest.mark.slow
def test_the_real_package_has_the_recorded_names() -> None:
    """COMPRESS_TENSORRT_PYTHON is a Python that imports NVIDIA's tensorrt; it may need LD_LIBRARY_PATH."""
    python = os.environ.get("COMPRESS_TENSORRT_PYTHON")
    if not python:
        pytest.skip("COMPRESS_TENSORRT_PYTHON names no Python with tensorrt")
    names = sorted(used())
    code = (
        "import json, sys, tensorrt\n"
        "def has(kind, name):\n"
        "    holder = tensorrt if kind == 'module' else getattr(tensorrt, kind)\n"
        "    return hasattr(holder, name)\n"
        "names = json.loads(sys.argv[1])\n"
        "print(tensorrt.__version__)\n"
        "print(json.dumps([n for n in names if not has(*n)]))\n"
    )
    done = subprocess.run([python, "-c", code, json.dumps(names)], capture_output=True, text=True, check=True)
    version, missing = done.stdout.splitlines()[-2:]
    recorded = ATTRIBUTES.get(version)
    allowed = {(kind, name) for kind, names_ in GUARDED.items() for name in names_}
    assert {(kind, name) for kind, name in json.loads(missing)} <= allowed
    assert recorded is None or recorded["version"] == version


def test_child_reports_the_form(fake_tensorrt) -> None:
    fake_tensorrt("11.0.0.114")
    found = child.identify({"device": 0})
    assert found["typed"]
    assert found["identity"]["compute_capability"] == [7, 5]
