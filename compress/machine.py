"""What this machine is: CPU, cores, NVIDIA driver and GPUs."""

import math
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress.tensorrt.target import cuda


@lru_cache
def cpu_info() -> dict[str, str]:
    """First processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit integers without saturating: AVX-512 VNNI, AVX VNNI, or Arm."""
    flags = cpu_info().get("flags", "").split()
    return bool({"avx512_vnni", "avx_vnni"} & set(flags)) or platform.machine() in ("aarch64", "arm64")


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16: AVX-512 BF16, AMX, or Arm."""
    info = cpu_info()
    return bool(
        {"avx512_bf16", "amx_bf16", "bf16"} & set(f"{info.get('flags', '')} {info.get('Features', '')}".split())
    )


def cores() -> int:
    """Cores that this process may use: its affinity, and no more than a container's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else min(allowed, max(1, math.ceil(quota)))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU time per wall time that the control group allows, in cores; None without a limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (``cpu.max``) and scheduler/sched-bwc.rst
    (``cpu.cfs_quota_us``, -1 for no limit).
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):  # no such control group, or a format of some other kernel
            continue
    return None


def describe() -> dict[str, Any]:
    """Describe the machine for a table: CPU, instruction sets, cores, operating system."""
    info = cpu_info()
    flags = set(info.get("flags", "").split())
    features = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in features if name in flags],
        "cores": cores(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpus": [device.name for device in probe_cuda().devices],
    }


@lru_cache
def probe_cuda() -> cuda.Driver:
    """What the NVIDIA driver says of itself and its GPUs; asked once."""
    return cuda.probe()
