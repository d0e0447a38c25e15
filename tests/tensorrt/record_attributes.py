"""Records the public names of TensorRT's Python bindings, by importing the real extension module of a wheel.

    python -m pip download --no-deps tensorrt==8.6.0          # or tensorrt-cu12-bindings==10.3.0, ...
    python tests/tensorrt/record_attributes.py WHEEL...       # with the Python that the wheels are for; needs cc

The extension asks the loader for TensorRT's libraries, of which it calls a handful of C functions. Here these libraries
are empty ones, so nothing but names can be read: no driver, GPU or library of NVIDIA's is needed. One file a version is
written to ``tests/tensorrt/attributes``.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).parent / "attributes"

CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "Runtime",
    "TacticSource",
    "TensorIOMode",
)

READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt
def public(thing):
    return sorted(name for name in dir(thing) if not name.startswith("_"))
found = {"module": public(tensorrt)}
for name in sys.argv[2:]:
    kind = getattr(tensorrt, name, None)
    if kind is None:
        continue
    members = getattr(kind, "__members__", None)
    found[name] = public(kind) if members is None else {key: int(value) for key, value in members.items()}
found["ILogger.Severity"] = {key: int(value) for key, value in tensorrt.ILogger.Severity.__members__.items()}
print(json.dumps(found))
"""


def stub_libraries(extension: Path, folder: Path) -> None:
    """Build empty libraries for those of NVIDIA's that an extension module links against, with what it calls."""
    dynamic = subprocess.run(["readelf", "-dW", extension], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["readelf", "-W", "--dyn-syms", extension], capture_output=True, text=True, check=True)
    names = sorted(set(re.findall(r"FUNC +GLOBAL +DEFAULT +UND (\w+)$", symbols.stdout, re.M)))
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for library in re.findall(r"\(NEEDED\).*\[(libnv[\w.]+)\]", dynamic):
        build = ["cc", "-shared", "-fPIC", "-s", source, "-o", folder / library, f"-Wl,-soname,{library}"]
        subprocess.run(build, check=True)


def read(wheel: Path) -> dict[str, object]:
    """Names of the module, and of the classes and enums that building and running engines needs."""
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as archive:
        folder = Path(name)
        extension = folder / "tensorrt.so"
        inside = next(path for path in archive.namelist() if path.endswith("/tensorrt.so"))
        extension.write_bytes(archive.read(inside))
        stub_libraries(extension, folder)
        run = subprocess.run(
            [sys.executable, "-c", READ, folder, *CLASSES],
            capture_output=True,
            text=True,
            check=True,
            env={"LD_LIBRARY_PATH": str(folder), "PATH": "/usr/bin:/bin"},
        )
    found: dict[str, object] = json.loads(run.stdout)
    return found


def main() -> None:
    """Record every wheel that was named."""
    for wheel in map(Path, sys.argv[1:]):
        version = wheel.name.split("-")[1]
        found = read(wheel)
        how = f"extension module of {wheel.name}, imported with empty libraries"
        lines = [f'"version": "{version}"', f'"how": "{how}"']
        lines += [f'"{name}": {json.dumps(names)}' for name, names in found.items()]
        (OUT / f"{version}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{version}: {len(found)} classes and enums")


if __name__ == "__main__":
    main()
