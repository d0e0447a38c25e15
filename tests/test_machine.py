"""What this machine is, in a form that a table can hold."""

import json
import os

from compress.machine import cores, cpu_info, describe, has_vnni, probe_cuda


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
    assert cores() == len(allowed)


def test_a_gpu_is_there_or_its_absence_has_a_reason() -> None:
    cuda = probe_cuda()
    assert bool(cuda.gpus) == (cuda.missing is None)
    assert describe()["gpus"] == [gpu.name for gpu in cuda.gpus]
    if cuda.missing is not None:
        assert "NVIDIA driver" in cuda.missing
    for gpu in cuda.gpus:
        assert gpu.compute_capability >= (3, 0)
