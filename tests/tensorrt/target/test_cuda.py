"""The driver library by ctypes, with FakeDriver in its place: what is asked of it, and what its refusals become."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from compress.tensorrt.target import cuda
from compress.tensorrt.target.cuda import Context, CudaError, DeviceMemory, Event, PinnedMemory, Stream


def live(library: Path) -> int:
    """What was taken of FakeDriver and not given back."""
    found: int = ctypes.CDLL(str(library)).fakeLive()
    return found


def test_probe_tells_driver_and_devices(fake_driver: Path) -> None:
    found = cuda.probe()
    assert (found.cuda, found.missing) == ("12.2", None)
    assert found.devices == (cuda.Device(0, "FakeDriver T4", (7, 5), 16 << 30, integrated=False),)


def test_probe_without_a_driver(no_driver: None) -> None:
    found = cuda.probe()
    assert found.devices == ()
    assert found.missing == "there is no NVIDIA driver (libcuda-that-is-not-there.so.1 cannot be loaded)"
    with pytest.raises(CudaError, match="there is no NVIDIA driver"):
        cuda.Context()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAKE_CUDA_INIT", "100", r"does not start \(cuInit gives CUDA_ERROR_NO_DEVICE\)"),
        ("FAKE_CUDA_INIT", "999", r"does not start \(cuInit gives status 999\)"),
        ("FAKE_CUDA_DEVICES", "0", "the NVIDIA driver finds no GPU"),
    ],
)
def test_probe_says_what_is_wrong(fake_driver, monkeypatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(CudaError, match=message):
        cuda.library()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.3.0  Release Build\n", "540.3.0"),
        ("nothing of it\n", None),
    ],
)
def test_release_is_read_from_the_kernel_module(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert cuda.release(tmp_path / "version") == version
    assert cuda.release(tmp_path / "absent") is None


def test_what_goes_to_the_gpu_comes_back(fake_driver: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Context(), Stream() as stream, DeviceMemory(48) as memory, PinnedMemory(48) as there, PinnedMemory(64) as back:
        there.array((3, 4), np.float32)[...] = values
        stream.to_device(memory, there, 48)
        stream.to_host(back, memory, 48)
        stream.synchronize()
        assert (back.array((3, 4), np.float32) == values).all()
        with pytest.raises(ValueError, match="68 bytes do not fit into 64"):
            back.array((17,), np.float32)


def test_captured_work_is_done_when_it_is_launched(fake_driver: Path) -> None:
    with Context(), Stream() as stream, DeviceMemory(4) as memory, PinnedMemory(4) as there, PinnedMemory(4) as back:
        there.array((1,), np.float32)[...] = 7
        stream.begin_capture()
        stream.to_device(memory, there, 4)
        stream.to_host(back, memory, 4)
        with stream.end_capture() as graph:
            assert back.array((1,), np.float32)[0] == 0
            graph.launch(stream)
            assert back.array((1,), np.float32)[0] == 7


def test_events_tell_milliseconds(fake_driver: Path) -> None:
    with Context(), Stream() as stream, Event() as begin, Event(blocking=True) as end:
        begin.record(stream)
        end.record(stream)
        end.synchronize()
        assert 0 <= end.ms_since(begin) < 1000


def test_everything_is_given_back_and_only_once(fake_driver: Path) -> None:
    before = live(fake_driver)
    with Context() as context:
        things = [Stream(), Event(), DeviceMemory(10), PinnedMemory(10)]
        things[0].begin_capture()
        things.append(things[0].end_capture())
        assert live(fake_driver) == before + len(things)
        for thing in (*things, *things):
            thing.close()
        context.synchronize()
    assert live(fake_driver) == before
    assert ctypes.CDLL(str(fake_driver)).fakeReferences() == 0
    context.close()
    assert ctypes.CDLL(str(fake_driver)).fakeReferences() == 0


def test_a_context_that_is_there_already_is_used_and_stays(fake_driver: Path) -> None:
    driver = ctypes.CDLL(str(fake_driver))
    driver.fakeForeignContext(1)
    try:
        with Context() as context:
            assert context.foreign
            assert driver.fakeReferences() == 0
            assert context.device.name == "FakeDriver T4"
        current = ctypes.c_void_p()
        driver.cuCtxGetCurrent(ctypes.byref(current))
        assert current.value
    finally:
        driver.fakeForeignContext(0)


def test_out_of_memory_tells_how_much_there_is_and_what_to_do(fake_driver: Path, monkeypatch) -> None:
    with Context():
        monkeypatch.setenv("FAKE_CUDA_FREE", str(3 << 20))
        message = r"out of GPU memory while taking 4096 KiB: 3 of 16384 MiB are free\. End other programs"
        with pytest.raises(CudaError, match=message):
            DeviceMemory(4 << 20)
        with pytest.raises(CudaError, match="4096 KiB of pinned host memory"):
            PinnedMemory(4 << 20)


def test_a_function_that_an_old_driver_lacks_is_a_sentence(fake_driver: Path) -> None:
    with pytest.raises(cuda.CudaError, match=r"making it: this driver has no cuNewThing; it is too old"):
        cuda.call("cuNewThing", doing="making it")


def test_another_failure_names_function_and_status(fake_driver: Path) -> None:
    with pytest.raises(CudaError, match=r"asking for it: cuCtxGetDevice gives status 201\."):
        cuda.call("cuCtxGetDevice", ctypes.byref(ctypes.c_int()), doing="asking for it")
