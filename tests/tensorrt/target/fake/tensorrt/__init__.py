"""FakeTensorRT: what our code asks of NVIDIA's package, on the CPU, for tests on machines without a GPU.

Enums and the names of attributes are those that were recorded of a real version (``tests/tensorrt/attributes``), so a
name that a version does not have is an AttributeError here too. Its plans hold the ONNX file, and its engines run that
in ONNX Runtime, on memory of FakeDriver.

Environment: FAKE_TENSORRT_VERSION, and FAKE_TENSORRT_FAULT, one of the strings that are compared below.
"""

import ctypes
import enum
import json
import os
import re
import signal
from pathlib import Path

import numpy as np

ATTRIBUTES = Path(__file__).parents[3] / "attributes"

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "8.6.0")
RECORDED = json.loads((ATTRIBUTES / f"{__version__}.json").read_text())


def fault(name):
    return os.environ.get("FAKE_TENSORRT_FAULT") == name


if fault("no_cublas"):
    raise ImportError("libcublas.so.12: cannot open shared object file: No such file or directory")


def recorded_enum(name):
    """An enum with the members of the real one; some are new names of old members."""
    return enum.IntEnum(name.rpartition(".")[2], RECORDED[name])


BuilderFlag, DataType, MemoryPoolType = map(recorded_enum, ("BuilderFlag", "DataType", "MemoryPoolType"))
LayerInformationFormat, ProfilingVerbosity = map(recorded_enum, ("LayerInformationFormat", "ProfilingVerbosity"))
NetworkDefinitionCreationFlag = recorded_enum("NetworkDefinitionCreationFlag")
TacticSource, TensorIOMode = map(recorded_enum, ("TacticSource", "TensorIOMode"))


def recorded(kind):
    """Take from a class what the real one does not have; every name that it is asked for has to be there."""
    known = set(RECORDED[kind.__name__])
    for name in [name for name in vars(kind) if not name.startswith("_") and name not in known]:
        delattr(kind, name)

    def set_known(self, name, value):
        if not name.startswith("_") and name not in known:
            raise AttributeError(f"{kind.__name__} of TensorRT {__version__} has no {name}")
        object.__setattr__(self, name, value)

    kind.__setattr__ = set_known
    return kind


@recorded
class ILogger:
    Severity = recorded_enum("ILogger.Severity")

    def log(self, severity, message):
        raise NotImplementedError


def init_libnvinfer_plugins(logger, namespace):
    return True


class HostMemory(bytes):
    pass


@recorded
class ITensor:
    is_execution_tensor = True

    def __init__(self, dtype, is_shape=False):
        self.dtype, self.is_shape_tensor = dtype, is_shape


@recorded
class ILayer:
    def __init__(self, name, metadata, dtype, inputs=(DataType.FLOAT,)):
        self.name = name
        self._inputs = [ITensor(each) for each in inputs]
        self.num_inputs = len(self._inputs) + 1  # the last one is left out, as a parser may leave it
        if "metadata" in RECORDED["ILayer"]:
            self.metadata = metadata
        self.num_outputs = 1
        self._output, self._types = ITensor(dtype), {}

    def get_input(self, index):
        return self._inputs[index] if index < len(self._inputs) else None

    def get_output(self, index):
        return self._output

    def set_output_type(self, index, dtype):
        self._types[index] = dtype


@recorded
class INetworkDefinition:
    def __init__(self, flags):
        self._flags, self._onnx, self._layers, self.name = flags, b"", [], "network"

    @property
    def num_layers(self):
        return len(self._layers)

    def get_layer(self, index):
        return self._layers[index]


@recorded
class ParserError:
    def node(self):
        return 1

    def node_name(self):
        return "second"

    def node_operator(self):
        return "Det"

    def desc(self):
        return "No importer registered for op: Det"

    def file(self):
        return "ModelImporter.cpp"

    def line(self):
        return 771


@recorded
class OnnxParser:
    def __init__(self, network, logger):
        self._network = network
        self._errors = [ParserError()] if fault("parse") else []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def parse(self, data):
        import onnx

        self._network._onnx = data
        for node in onnx.load_from_string(data).graph.node:
            dtype = DataType.INT32 if node.op_type == "Shape" else DataType.FLOAT
            for suffix in ("", "_1"):
                layer = ILayer(node.name + suffix, f"[ONNX Layer: {node.name}]", dtype)
                self._network._layers.append(layer)
        return not self._errors


@recorded
class IOptimizationProfile:
    def set_shape(self, name, low, opt, high):
        self._shapes = name, [list(low), list(opt), list(high)]


@recorded
class ITimingCache:
    def __init__(self, data):
        self._data = data

    def serialize(self):
        return HostMemory(self._data + b"timed")


@recorded
class IBuilderConfig:
    def __init__(self):
        self._flags, self._pools, self._cache, self._sources = [], {}, None, None

    def set_flag(self, flag):
        self._flags.append(flag.name)

    def set_memory_pool_limit(self, pool, size):
        self._pools[pool.name] = size

    def set_tactic_sources(self, sources):
        self._sources = sources
        return True

    def get_tactic_sources(self):
        return 0b11111

    def add_optimization_profile(self, profile):
        self._profile = profile._shapes
        return -1 if fault("profile") else 0

    def create_timing_cache(self, data):
        return None if fault("unreadable_timings") and data else ITimingCache(bytes(data))

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return not (fault("foreign_timings") and cache._data)

    def get_timing_cache(self):
        return self._cache


@recorded
class Builder:
    def __init__(self, logger):
        if fault("nullptr"):
            logger.log(ILogger.Severity.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if fault("no_engine") or (fault("needs_cublas") and config._sources != 0b11111):
            self._logger.log(ILogger.Severity.ERROR, "10: Could not find any implementation for node first.")
            return None
        if fault("no_memory"):
            self._logger.log(ILogger.Severity.ERROR, "2: [virtualMemoryBuffer.cpp::resizePhysical] OutOfMemory")
            return None
        if fault("crash_build"):
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        kept = [layer.name for layer in network._layers if hasattr(layer, "precision")]
        told = {
            "flags": config._flags,
            "network": network._flags,
            "float": kept,
            "profile": config._profile,
            "sources": config._sources,
            "verbosity": config.profiling_verbosity.name,
        }
        return HostMemory(json.dumps(told).encode() + b"\n" + bytes(network._onnx))


@recorded
class EngineInspector:
    def __init__(self, told):
        self._told = told

    def get_engine_information(self, format):
        quantized = "INT8" in self._told["flags"] and not fault("silent_fallback")
        layer = {
            "LayerType": "CaskGemmConvolution",
            "ParameterType": "Convolution",
            "Weights": {"Type": "Int8" if quantized else "Half", "Count": 480},
            "Inputs": [{"Format/Datatype": "Row major Int8" if quantized else "Row major FP16"}],
            "TacticName": "sm75_i8i8" if quantized else "sm75_h884",
        }
        return json.dumps({"Layers": [layer, {"LayerType": "PointWise", "ParameterType": "PointWise"}]})


@recorded
class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shape, self._addresses = engine, None, {}

    def set_input_shape(self, name, shape):
        self._shape = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        rest = (size if isinstance(size, int) else self._shape[1] for size in self._engine._rest)  # a name is "frames"
        return self._shape if name == self._engine._names[0] else (self._shape[0], *rest)

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        arrays = {}
        for name, address in self._addresses.items():
            shape = self.get_tensor_shape(name)
            memory = (ctypes.c_float * int(np.prod(shape))).from_address(address)
            arrays[name] = np.ctypeslib.as_array(memory).reshape(shape)
        name, *outputs = self._engine._names
        for output, value in zip(outputs, self._engine._session.run(outputs, {name: arrays[name]}), strict=True):
            arrays[output][...] = value
            if fault("nan"):
                arrays[output][0, 0] = np.nan
            if fault("wrong"):
                arrays[output][...] = np.arange(value.size).reshape(value.shape)
        return True


@recorded
class ICudaEngine:
    def __init__(self, plan):
        import onnxruntime

        told, _, onnx = plan.partition(b"\n")
        self._told = json.loads(told)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        ends = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._names, self._rest = [end.name for end in ends], ends[-1].shape[1:]

    device_memory_size = 1 << 20
    device_memory_size_v2 = 1 << 20

    @property
    def num_io_tensors(self):
        return len(self._names)

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name == self._names[0] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType.FLOAT

    def get_tensor_profile_shape(self, name, index):
        return [tuple(shape) for shape in self._told["profile"][1]]

    def create_execution_context(self):
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self._told)


@recorded
class Runtime:
    def __init__(self, logger):
        if fault("crash_runtime"):
            print("[W] CUDA initialization failure with error: 35", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        if fault("no_load"):
            self._logger.log(ILogger.Severity.ERROR, "1: [stdArchiveReader.cpp] Version tag does not match.")
            return None
        assert re.match(rb'\{"flags"', plan), "only plans of FakeTensorRT"
        return ICudaEngine(plan)
