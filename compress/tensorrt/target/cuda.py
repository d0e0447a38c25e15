"""The CUDA driver library by ctypes: what GPUs there are, memory, streams, events and graphs.

The driver library is on every machine with a GPU, so nothing has to be installed (pycuda has no wheels for Jetson).

Source: NVIDIA, "CUDA Driver API". Where a function has versions, the one named here is that of ``cuda.h`` since 11.4,
the CUDA of JetPack 5; the driver keeps exporting it.
"""

from __future__ import annotations

import ctypes
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

LIBRARY = "libcuda.so.1"

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
MAJOR, MINOR, INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, _INTEGRATED
SPIN, BLOCKING = 0x01, 0x04  # CU_CTX_SCHED_SPIN, CU_CTX_SCHED_BLOCKING_SYNC
NON_BLOCKING = 0x1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream
BLOCKING_EVENT = 0x1  # CU_EVENT_BLOCKING_SYNC
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do does not spoil the capture


class CudaError(Exception):
    """What the driver refused, as a sentence."""


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        compute_capability: For example (7, 5) for a T4.
        memory_bytes: All of it; on a Jetson the memory that it shares with the CPU.
        integrated: Whether it has no memory of its own, as on a Jetson.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    integrated: bool


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says.

    Attributes:
        cuda: Newest CUDA version that it runs, for example "12.2"; None without a driver.
        release: Its own version, for example "535.104.05"; None where the system does not tell.
        missing: Why no GPU can be used, or None.
    """

    cuda: str | None
    release: str | None
    devices: tuple[Device, ...]
    missing: str | None


def probe() -> Driver:
    """Ask the driver what there is, without making a context. Takes less than a millisecond where there is none.

    This comes before TensorRT is touched: ``Runtime()`` of TensorRT 8.6 ends in a crash where there is no driver.
    """
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return Driver(None, None, (), f"there is no NVIDIA driver ({LIBRARY} cannot be loaded)")
    status = cuda.cuInit(0)
    if status != 0:
        return Driver(
            None, release(), (), f"the NVIDIA driver does not start (cuInit gives {error_name(cuda, status)})"
        )
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    devices = tuple(describe(cuda, index) for index in range(number.value))
    return Driver(version, release(), devices, None if devices else "the NVIDIA driver finds no GPU")


def describe(cuda: ctypes.CDLL, index: int) -> Device:
    """Ask the driver about one GPU."""
    device, number, size, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    found = []
    for attribute in (MAJOR, MINOR, INTEGRATED):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        found.append(number.value)
    return Device(index, name.value.decode(), (found[0], found[1]), size.value, bool(found[2]))


def release(version_file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The driver's own version, where the kernel module tells it (not on a Jetson before JetPack 6)."""
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", version_file.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def error_name(cuda: ctypes.CDLL, status: int) -> str:
    """The driver's name of a status, for example CUDA_ERROR_NO_DEVICE."""
    name = ctypes.c_char_p()
    known = cuda.cuGetErrorName(status, ctypes.byref(name)) == 0 and name.value
    return name.value.decode() if known and name.value else f"status {status}"


@lru_cache
def library() -> ctypes.CDLL:
    """The driver, initialised.

    Raises:
        CudaError: If there is none, or it does not start.
    """
    found = probe()
    if found.missing:
        raise CudaError(f"{found.missing}.")
    return ctypes.CDLL(LIBRARY)


def call(function: str, *arguments: Any, doing: str) -> None:
    """Call a function of the driver.

    Raises:
        CudaError: If it fails: what was being done, and the driver's word for why.
    """
    cuda = library()
    try:
        found = getattr(cuda, function)
    except AttributeError:
        raise CudaError(f"{doing}: this driver has no {function}; it is too old for that. Update the driver.") from None
    status = found(*arguments)
    if status == OUT_OF_MEMORY:
        free, total = memory_info()
        raise CudaError(
            f"out of GPU memory while {doing}: {free >> 20} of {total >> 20} MiB are free. End other programs that use"
            " the GPU, or build with smaller max_frames and max_batch."
        )
    if status != 0:
        raise CudaError(f"{doing}: {function} gives {error_name(cuda, status)}.")


def memory_info() -> tuple[int, int]:
    """Free and total memory of the current context's GPU in bytes; zeros where the driver does not tell."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


class Owned(ABC):
    """Something of the driver's that has to be given back: a ``with`` block or :meth:`close` does it."""

    handle: ctypes.c_void_p

    @abstractmethod
    def close(self) -> None:
        """Give it back; a second time does nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Context(Owned):
    """The CUDA context that this process works in, current in the thread that makes it.

    Where the thread has one already, made by pycuda for example, that one is used and left as it is. Otherwise it is
    the primary context of ``device``, which TensorRT and every CUDA runtime in the process share.

    Args:
        device: Index of the GPU.
        blocking: Let a waiting thread sleep and not spin. It is decided when the primary context is made, once in a
            process; an event may still block (see :class:`Event`).
    """

    def __init__(self, device: int = 0, blocking: bool = False) -> None:
        self.handle = ctypes.c_void_p()
        number = ctypes.c_int(device)
        call("cuCtxGetCurrent", ctypes.byref(self.handle), doing="looking for a context")
        self.foreign = bool(self.handle)
        if self.foreign:
            call("cuCtxGetDevice", ctypes.byref(number), doing="asking for the GPU of the context")
        else:
            flags = ctypes.c_uint(BLOCKING if blocking else SPIN)
            library().cuDevicePrimaryCtxSetFlags_v2(number, flags)  # refused by old drivers while it is in use
            call("cuDevicePrimaryCtxRetain", ctypes.byref(self.handle), number, doing=f"opening GPU {device}")
            self.make_current()
        self.device = describe(library(), number.value)
        self._open = True

    def make_current(self) -> None:
        """Make it the context of the calling thread."""
        call("cuCtxSetCurrent", self.handle, doing="changing to the context")

    def synchronize(self) -> None:
        """Wait for everything on the GPU."""
        call("cuCtxSynchronize", doing="waiting for the GPU")

    def close(self) -> None:
        """Let go of the primary context; a foreign one stays."""
        if self._open and not self.foreign:
            library().cuCtxSetCurrent(ctypes.c_void_p())
            library().cuDevicePrimaryCtxRelease_v2(ctypes.c_int(self.device.index))
        self._open = False


class DeviceMemory(Owned):
    """Memory on the GPU; ``address`` is what TensorRT is given."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self._address = size_bytes, ctypes.c_uint64()
        size = ctypes.c_size_t(max(size_bytes, 1))
        call("cuMemAlloc_v2", ctypes.byref(self._address), size, doing=f"taking {size_bytes >> 10} KiB")

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._address.value

    def close(self) -> None:
        """Free it."""
        if self._address:
            library().cuMemFree_v2(self._address)
        self._address = ctypes.c_uint64()


class PinnedMemory(Owned):
    """Memory of the host that the GPU reads and writes without a copy between; only such copies are asynchronous."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.handle = size_bytes, ctypes.c_void_p()
        size = ctypes.c_size_t(max(size_bytes, 1))
        doing = f"taking {size_bytes >> 10} KiB of pinned host memory"
        call("cuMemHostAlloc", ctypes.byref(self.handle), size, ctypes.c_uint(0), doing=doing)

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.handle.value or 0

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Its beginning as an array, without a copy. Not to be used after :meth:`close`."""
        import numpy

        wanted: np.dtype[Any] = numpy.dtype(dtype)
        count = 1
        for length in shape:
            count *= length
        if count * wanted.itemsize > self.size_bytes:
            raise ValueError(f"{count * wanted.itemsize} bytes do not fit into {self.size_bytes}")
        view = memoryview((ctypes.c_char * self.size_bytes).from_address(self.address))
        return numpy.frombuffer(view, wanted, count).reshape(shape)

    def close(self) -> None:
        """Free it."""
        if self.handle:
            library().cuMemFreeHost(self.handle)
        self.handle = ctypes.c_void_p()


class Event(Owned):
    """A mark in a stream, by which work on the GPU is timed and waited for.

    Args:
        blocking: Let :meth:`synchronize` put the thread to sleep and not spin.
    """

    def __init__(self, blocking: bool = False) -> None:
        self.handle = ctypes.c_void_p()
        flags = ctypes.c_uint(BLOCKING_EVENT if blocking else 0)
        call("cuEventCreate", ctypes.byref(self.handle), flags, doing="making an event")

    def record(self, stream: Stream) -> None:
        """Mark what the stream has been given so far."""
        call("cuEventRecord", self.handle, stream.handle, doing="recording an event")

    def synchronize(self) -> None:
        """Wait until the stream has come to the mark."""
        call("cuEventSynchronize", self.handle, doing="waiting for the GPU")

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds between two marks that were both reached; the resolution is about 0.5 microseconds."""
        elapsed = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(elapsed), earlier.handle, self.handle, doing="reading an event")
        return elapsed.value

    def close(self) -> None:
        """Give it back."""
        if self.handle:
            library().cuEventDestroy_v2(self.handle)
        self.handle = ctypes.c_void_p()


class Stream(Owned):
    """Work for the GPU that is done in order, beside that of other streams."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(self.handle), ctypes.c_uint(NON_BLOCKING), doing="making a stream")

    @property
    def address(self) -> int:
        """What TensorRT is given."""
        return self.handle.value or 0

    def to_device(self, target: DeviceMemory, source: PinnedMemory, size_bytes: int) -> None:
        """Copy the first bytes to the GPU."""
        sizes = ctypes.c_uint64(target.address), source.handle, ctypes.c_size_t(size_bytes)
        call("cuMemcpyHtoDAsync_v2", *sizes, self.handle, doing="copying to the GPU")

    def to_host(self, target: PinnedMemory, source: DeviceMemory, size_bytes: int) -> None:
        """Copy the first bytes from the GPU."""
        sizes = target.handle, ctypes.c_uint64(source.address), ctypes.c_size_t(size_bytes)
        call("cuMemcpyDtoHAsync_v2", *sizes, self.handle, doing="copying from the GPU")

    def synchronize(self) -> None:
        """Wait until everything is done that it was given."""
        call("cuStreamSynchronize", self.handle, doing="waiting for the GPU")

    def begin_capture(self) -> None:
        """Collect what is given from now on instead of doing it."""
        call("cuStreamBeginCapture_v2", self.handle, ctypes.c_int(THREAD_LOCAL), doing="beginning a CUDA graph")

    def end_capture(self) -> Graph:
        """What was collected, to be launched at once.

        Raises:
            CudaError: If something was in it that cannot be captured, such as taking memory.
        """
        graph = ctypes.c_void_p()
        call("cuStreamEndCapture", self.handle, ctypes.byref(graph), doing="ending a CUDA graph")
        return Graph(graph)

    def close(self) -> None:
        """Give it back."""
        if self.handle:
            library().cuStreamDestroy_v2(self.handle)
        self.handle = ctypes.c_void_p()


class Graph(Owned):
    """Work that was captured: one launch instead of one for every kernel. Made by :meth:`Stream.end_capture`."""

    def __init__(self, captured: ctypes.c_void_p) -> None:
        self.handle = ctypes.c_void_p()
        doing = "making a CUDA graph"
        try:
            call("cuGraphInstantiateWithFlags", ctypes.byref(self.handle), captured, ctypes.c_uint64(0), doing=doing)
        finally:
            library().cuGraphDestroy(captured)

    def launch(self, stream: Stream) -> None:
        """Give it to a stream."""
        call("cuGraphLaunch", self.handle, stream.handle, doing="launching a CUDA graph")

    def close(self) -> None:
        """Give it back."""
        if self.handle:
            library().cuGraphExecDestroy(self.handle)
        self.handle = ctypes.c_void_p()
