"""What this machine is, in a form that a table can hold."""

import json
import math
import os
from pathlib import Path

import pytest

from compress.machine import cores, cpu_info, cpu_quota, describe, has_vnni, probe_cuda


def test_description_is_json_and_names_the_processor() -> None:
    found = describe()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["cores"] == cores() >= 1


def test_instruction_sets_are_those_that_the_kernel_lists() -> None:
    flags = cpu_info().get("flags", "").split()
    found = describe()["cpu_features"]
    assert set(found) <= set(flags)
    assert has_vnni() or not {"avx512_vnni", "avx_vnni"} & set(found)


def test_cores_follow_the_affinity_of_the_process() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    quota = cpu_quota()
    assert cores() == min(len(allowed), len(allowed) if quota is None else max(1, math.ceil(quota)))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "something else\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == expected


def test_a_gpu_is_there_or_its_absence_has_a_reason() -> None:
    driver = probe_cuda()
    assert bool(driver.devices) == (driver.missing is None)
    assert describe()["gpus"] == [device.name for device in driver.devices]
    if driver.missing is not None:
        assert "NVIDIA driver" in driver.missing
    for device in driver.devices:
        assert device.compute_capability >= (3, 0)
