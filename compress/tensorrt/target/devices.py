"""What NVIDIA GPUs can do, which TensorRT suits them, and which one is installed; nothing of it is loaded.

Sources: NVIDIA, TensorRT support matrices of 8.5, 8.6 and 10 (hardware and precision), release notes of TensorRT and
JetPack.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cuda import Driver

LIBRARY_FOLDERS = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/local/lib", "usr/local/tensorrt/lib", "opt/tensorrt/lib")
TRTEXEC = ("usr/src/tensorrt/bin/trtexec", "opt/tensorrt/bin/trtexec")  # of JetPack, Debian packages and containers
PACKAGES = re.compile(r"tensorrt([-_]cu\d+)?([-_]bindings)?$")


@dataclass(frozen=True)
class Support:
    """What a generation of GPUs can do.

    Attributes:
        precisions: Of weighted layers, slowest first.
        tensorrt: Versions that suit it, as a sentence says them.
        oldest: Lowest version of TensorRT that builds for it; of those that this package speaks to.
        before: The first that does not any more; None if there is none.
    """

    generation: str
    precisions: tuple[str, ...]
    tensorrt: str
    oldest: tuple[int, ...] = (8, 5)
    before: tuple[int, ...] | None = None

    def suits(self, version: tuple[int, ...]) -> bool:
        """Whether a version of TensorRT builds for it."""
        return self.oldest <= version and (self.before is None or version < self.before)


TURING = ("fp32", "fp16", "int8")
AMPERE = ("fp32", "tf32", "fp16", "bf16", "int8")
ADA = (*AMPERE, "fp8")

SUPPORT = {
    (7, 0): Support("Volta", TURING, "8.5 to 10.4; INT8 without tensor cores", before=(10, 5)),
    (7, 2): Support("Xavier", TURING, "8.5, which JetPack 5 brings, its last", before=(10,)),
    (7, 5): Support("Turing", TURING, "8.5 to 10; 11 left it out of a release, try before you rely on it"),
    (8, 0): Support("Ampere", AMPERE, "8.5 to 11"),
    (8, 6): Support("Ampere", AMPERE, "8.5 to 11"),
    (8, 7): Support("Orin", AMPERE, "that of its JetPack: 8.5 (5.1), 8.6 (6.0), 10.3 (6.1, 6.2)"),
    (8, 9): Support("Ada", ADA, "8.6 to 11", oldest=(8, 6)),
    (9, 0): Support("Hopper", ADA, "8.6 to 11", oldest=(8, 6)),
}
NEWER = Support("newer than Hopper", ADA, "the newest; nothing else was read about it", oldest=(10,))
OLDER = Support("older than Volta", ("fp32",), "none that this package was made for")


def support(compute_capability: tuple[int, int]) -> Support:
    """What a GPU of this compute capability can do."""
    known = SUPPORT.get(compute_capability)
    if known is None:
        return NEWER if compute_capability > max(SUPPORT) else OLDER
    return known


@dataclass(frozen=True)
class Installed:
    """What there is of TensorRT.

    Attributes:
        python: Version of the package that this Python would import, or None.
        library: Version of the newest ``libnvinfer`` of the system, or None.
        trtexec: Where the program is, or None.
    """

    python: str | None
    library: str | None
    trtexec: str | None

    @property
    def version(self) -> str | None:
        """That of the package, or else that of the library."""
        return self.python or self.library


def find_tensorrt(root: str | Path = "/", path: list[str] | None = None) -> Installed:
    """Look for TensorRT without loading it: where there is no driver, loading 8.6 may end in a crash.

    Args:
        root: Below which the system lies.
        path: Where Python packages are looked for; None for where this Python does.
    """
    found = distributions() if path is None else distributions(path=path)
    names = {str(d.metadata["Name"]): d.version for d in found if PACKAGES.match(str(d.metadata["Name"]).lower())}
    python = names[min(names, key=len)] if names else None  # "tensorrt" itself before its parts
    libraries = [
        number(file.name) for folder in LIBRARY_FOLDERS for file in Path(root).glob(folder + "/libnvinfer.so.*")
    ]
    newest = max((version for version in libraries if len(version) > 1), default=None)
    here = (str(Path(root) / file) for file in TRTEXEC if (Path(root) / file).is_file())
    program = shutil.which("trtexec") or next(here, None)
    return Installed(python, ".".join(map(str, newest)) if newest else None, program)


def number(text: str) -> tuple[int, ...]:
    """The first dotted number in a text: "libnvinfer.so.8.6.1" is (8, 6, 1)."""
    found = re.search(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def advice(driver: Driver, installed: Installed, jetson: bool) -> list[str]:
    """What follows from driver, GPUs and TensorRT, and what to install, in sentences.

    Args:
        driver: From :func:`cuda.probe`.
        installed: From :func:`find_tensorrt`.
        jetson: Whether this is one.
    """
    if driver.missing:
        return [
            f"No engine can be built or run here: {driver.missing}.",
            "The trt pass writes a folder to copy to a machine with an NVIDIA GPU; build_engine.py in it builds there.",
        ]
    if installed.version is None:
        return ["TensorRT is not installed. " + how_to_install(driver, jetson)]
    said = []
    for capability in sorted({device.compute_capability for device in driver.devices}):
        known = support(capability)
        if not known.suits(number(installed.version)):
            said.append(
                f"TensorRT {installed.version} does not build for compute capability"
                f" {capability[0]}.{capability[1]} ({known.generation}); versions that do: {known.tensorrt}."
            )
    if installed.python is None:
        there = f"TensorRT {installed.library} is installed, but not for this Python."
        said.append(there + (" Run build_engine.py with the system's python3." if jetson else " pip install tensorrt."))
    return said or ["Engines can be built here."]


def how_to_install(driver: Driver, jetson: bool) -> str:
    """The command that installs a TensorRT that suits the GPUs and the driver."""
    if jetson:
        return "It belongs to JetPack: sudo apt install nvidia-jetpack; the system's python3 has it then."
    cuda = number(driver.cuda or "")
    if cuda < (12,):  # wheels are made for one CUDA, and 8.5.3 is the last for CUDA 11
        return "Install the one for CUDA 11, which is what the driver runs: pip install tensorrt==8.5.3.1."
    capabilities = {device.compute_capability for device in driver.devices}
    limits = [known.before for known in map(support, capabilities) if known.before]
    if (7, 5) in capabilities:
        limits.append((11,))
    limit = f"<{'.'.join(map(str, min(limits)))}" if limits else ""
    package = "tensorrt-cu12" if cuda < (13,) else "tensorrt"
    return f'Install it: pip install "{package}{limit}".'
