"""What GPUs can do, and which TensorRT is there and suits them. What the driver says is made up: there is no GPU."""

from pathlib import Path

import pytest

from compress.tensorrt.target.cuda import Device, Driver
from compress.tensorrt.target.devices import SUPPORT, Installed, advice, find_tensorrt, number, support

NOTHING = Installed(None, None, None)


def driver(*capabilities: tuple[int, int], cuda: str = "12.2") -> Driver:
    devices = tuple(Device(i, "some GPU", capability, 1 << 34, False) for i, capability in enumerate(capabilities))
    return Driver(cuda, "535.104.05", devices, None)


@pytest.mark.parametrize(
    ("capability", "has", "has_not"),
    [
        ((7, 2), {"fp16", "int8"}, {"bf16", "tf32", "fp8"}),  # AGX Xavier
        ((7, 5), {"fp16", "int8"}, {"bf16", "tf32", "fp8"}),  # T4
        ((8, 7), {"fp16", "int8", "bf16", "tf32"}, {"fp8"}),  # AGX Orin
        ((9, 0), {"fp16", "int8", "bf16", "fp8"}, set()),
        ((12, 0), {"fp16", "int8", "bf16", "fp8"}, set()),
        ((6, 1), {"fp32"}, {"int8", "fp16"}),
    ],
)
def test_precisions_by_compute_capability(capability: tuple[int, int], has: set[str], has_not: set[str]) -> None:
    found = set(support(capability).precisions)
    assert has <= found
    assert not has_not & found


@pytest.mark.parametrize(
    ("capability", "version", "suits"),
    [
        ((7, 2), "8.5.2", True),
        ((7, 2), "10.3.0", False),
        ((7, 5), "10.16.1", True),
        ((7, 0), "10.4.0", True),
        ((7, 0), "10.5.0", False),
        ((9, 0), "8.5.3", False),
        ((9, 0), "8.6.0", True),
    ],
)
def test_versions_by_compute_capability(capability: tuple[int, int], version: str, suits: bool) -> None:
    assert support(capability).suits(number(version)) == suits


def test_every_device_has_a_version_that_suits() -> None:
    for found in SUPPORT.values():
        assert found.suits(found.oldest)


def test_numbers_are_read_from_names() -> None:
    assert number("libnvinfer.so.8.6.1") == (8, 6, 1)
    assert number("10.3.0.post1") == (10, 3, 0)
    assert number("none") == ()


def test_tensorrt_is_found_without_loading_it(tmp_path: Path) -> None:
    library = tmp_path / "usr/lib/aarch64-linux-gnu"
    site = tmp_path / "site" / "tensorrt_cu12_bindings-10.3.0.dist-info"
    for folder in (library, site, tmp_path / "usr/src/tensorrt/bin"):
        folder.mkdir(parents=True)
    assert find_tensorrt(tmp_path, [str(tmp_path / "site")]).version is None
    for name in ("libnvinfer.so.8", "libnvinfer.so.8.5.2", "libnvinfer.so.10.3.0", "libnvinfer_plugin.so.99.1"):
        (library / name).write_bytes(b"")  # empty: whoever loads it fails
    (tmp_path / "usr/src/tensorrt/bin/trtexec").write_text("")
    found = find_tensorrt(tmp_path, [str(tmp_path / "site")])
    assert (found.python, found.library) == (None, "10.3.0")
    assert str(found.trtexec).endswith("trtexec")
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-cu12-bindings\nVersion: 10.3.0\n")
    assert find_tensorrt(tmp_path, [str(tmp_path / "site")]).python == "10.3.0"


def test_the_package_itself_goes_before_its_parts(tmp_path: Path) -> None:
    for name, version in (("tensorrt_cu12_bindings", "1"), ("tensorrt", "2"), ("tensorrt_llm", "3")):
        (tmp_path / f"{name}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(text)
    assert find_tensorrt(tmp_path, [str(tmp_path)]).python == "2"


def test_no_driver_is_said_before_anything_about_tensorrt() -> None:
    absent = Driver(None, None, (), "there is no NVIDIA driver")
    for installed in (NOTHING, Installed("8.6.0", None, None)):
        assert advice(absent, installed, False)[0] == "No engine can be built or run here: there is no NVIDIA driver."


@pytest.mark.parametrize(
    ("found", "jetson", "command"),
    [
        (driver((7, 5)), False, 'pip install "tensorrt-cu12<11"'),
        (driver((7, 0), (7, 5)), False, 'pip install "tensorrt-cu12<10.5"'),
        (driver((8, 9), cuda="13.0"), False, 'pip install "tensorrt"'),
        (driver((8, 6), cuda="11.8"), False, "pip install tensorrt==8.5.3.1"),
        (driver((8, 7)), True, "apt install nvidia-jetpack"),
    ],
)
def test_what_to_install_suits_gpus_and_driver(found: Driver, jetson: bool, command: str) -> None:
    (said,) = advice(found, NOTHING, jetson)
    assert said.startswith("TensorRT is not installed. ")
    assert command in said


def test_a_version_that_does_not_suit_is_named() -> None:
    (said,) = advice(driver((7, 2), (7, 2)), Installed("10.3.0", None, None), True)
    assert said.startswith("TensorRT 10.3.0 does not build for compute capability 7.2 (Xavier); versions that do: 8.5")
    assert advice(driver((7, 2)), Installed("8.5.2.2", None, None), True) == ["Engines can be built here."]


def test_a_library_without_its_package_is_told() -> None:
    (said,) = advice(driver((8, 7)), Installed(None, "10.3.0", None), True)
    assert said == (
        "TensorRT 10.3.0 is installed, but not for this Python. Run build_engine.py with the system's python3."
    )
