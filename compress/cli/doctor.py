"""``compress doctor``: what this machine can run, what is missing, and whether INT8 pays on its CPU."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from compress import __version__, machine, openvino_file
from compress.evaluation.int8_probe import advice, probe_int8
from compress.files import CACHE_VARIABLE
from compress.runners import RUNNERS
from compress.tensorrt.target import devices, sensors
from compress.units import format_bytes, format_ms, format_speedup

NEEDED = ("torch", "onnx", "onnxruntime", "soundfile", "av")
NARROWEST = 18  # characters of the first column


@click.command("doctor")
@click.option("--int8", "measure", is_flag=True, help="Measure whether INT8 pays on this CPU; takes 20 s at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(measure: bool, as_json: bool) -> None:
    """Tell what this machine can run, and what is missing."""
    if measure and not as_json:
        click.echo("timing a small network in each precision, with one thread", err=True)
    found = about_int8() if measure else about_machine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    lines = int8_lines(found) if measure else machine_lines(found)
    width = max(NARROWEST, *(len(name) + 2 for name in lines))
    for name, text in lines.items():
        click.echo(f"{name:<{width}}{text}")
    for sentence in found.get("verdict", ()):
        click.echo(f"\n{sentence}")


def about_machine() -> dict[str, Any]:
    """CPU, packages, runtimes and what there is for a GPU, as JSON holds it."""
    about = machine.describe()
    return {
        "compress": __version__,
        "python": about["python"],
        "cpu": about["cpu"],
        "cores": about["cores"],
        "instructions": about["cpu_features"],
        "vnni": machine.has_vnni(),
        "bf16": machine.has_bf16(),
        "packages": {name: installed(name) for name in NEEDED},
        "runtimes": {kind.runtime: {"version": installed(kind.runtime), "missing": kind.missing()} for kind in RUNNERS},
        "compiled_networks": about_cache(),
        "gpu": about_gpu(),
    }


def machine_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """The same in a line each."""
    cache = found["compiled_networks"]
    kept = "" if cache["writable"] else " cannot be written: networks are compiled at each start"
    return {
        "compress": found["compress"],
        "cpu": f"{found['cpu']}, {found['cores']} cores",
        "instructions": ", ".join(found["instructions"]) or "none of those that matter",
        "int8 on this cpu": ("fast (VNNI)" if found["vnni"] else "no VNNI: 7-bit weights are used, little gain")
        + "; compress doctor --int8 measures it",
        "bf16 on this cpu": "fast; the pass openvino uses it with precision=bf16" if found["bf16"] else "none",
        "python": found["python"],
        **{
            name: number or "NOT INSTALLED, but needed: install speech-compress again"
            for name, number in found["packages"].items()
        },
        **{f"runs {name}": about["missing"] or about["version"] for name, about in found["runtimes"].items()},
        "openvino cache": f"{cache['folder']}{kept}" if cache["folder"] else f"off ({CACHE_VARIABLE}=off)",
        **gpu_lines(found["gpu"]),
    }


def installed(package: str) -> str | None:
    """Version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def about_cache() -> dict[str, Any]:
    """Where compiled networks are kept (None: nowhere), and whether they can be."""
    folder = openvino_file.cache_folder()
    if folder is None:
        return {"folder": None, "writable": False}
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "writable": there.is_dir() and os.access(there, os.W_OK)}


def about_gpu() -> dict[str, Any]:
    """NVIDIA driver and GPUs, which TensorRT is there, and what follows from it."""
    driver, installed, jetson = machine.probe_cuda(), devices.find_tensorrt(), sensors.is_jetson()
    return {
        "driver": driver.release,
        "cuda": driver.cuda,
        "gpus": [
            {
                "name": device.name,
                "compute_capability": list(device.compute_capability),
                "memory_bytes": device.memory_bytes,
                "precisions": list(devices.support(device.compute_capability).precisions),
                "tensorrt": devices.support(device.compute_capability).tensorrt,
            }
            for device in driver.devices
        ],
        "missing": driver.missing,
        "board": sensors.board(),
        "tensorrt": asdict(installed),
        "advice": devices.advice(driver, installed, jetson),
    }


def gpu_lines(gpu: Mapping[str, Any]) -> dict[str, str]:
    """The same in a line each."""
    runs = f"{gpu['driver'] or 'version not told'}, runs CUDA up to {gpu['cuda']}"
    installed = gpu["tensorrt"]
    of_tensorrt = [
        f"{installed['python']} for this Python" if installed["python"] else "none for this Python",
        *([f"{installed['library']} of the system"] if installed["library"] else []),
    ]
    return {
        "nvidia driver": gpu["missing"] or runs,
        **({"board": gpu["board"]} if gpu["board"] else {}),
        **{f"gpu {number}": gpu_line(device) for number, device in enumerate(gpu["gpus"])},
        **({} if gpu["gpus"] else {"gpus": "none"}),
        "tensorrt": "; ".join(of_tensorrt),
        "trtexec": installed["trtexec"] or "not found; it comes with JetPack and TensorRT's packages, not with pip",
        "tensorrt engines": " ".join(gpu["advice"]),
    }


def gpu_line(device: Mapping[str, Any]) -> str:
    """One GPU: what it is, what it computes in and which TensorRT builds for it."""
    major, minor = device["compute_capability"]
    precisions = ", ".join(name.upper() for name in device["precisions"])
    return (
        f"{device['name']}, {format_bytes(device['memory_bytes'])}, compute capability {major}.{minor}: {precisions};"
        f" TensorRT {device['tensorrt']}"
    )


def about_int8() -> dict[str, Any]:
    """What the probe measured and what follows from it, as JSON holds it."""
    probe = probe_int8()
    about = {"cpu": machine.describe()["cpu"], "cores": machine.cores(), "threads": 1}
    return about | asdict(probe) | {"verdict": advice(probe)}


def int8_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """The same in a line each, without the verdict."""
    speedups = found["speedups"]
    return {
        "cpu": found["cpu"],
        "instructions": ", ".join(found["instructions"]) or "none of those that matter",
        "threads": f"{found['threads']} of {found['cores']}; CPU time, taking turns",
        **{name: f"{format_ms(ms)}  {format_speedup(speedups[name])}" for name, ms in found["milliseconds"].items()},
    }
