"""``compress doctor``: what this machine can run, what is missing, and whether INT8 pays on its CPU."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from compress import __version__, machine, openvino_file
from compress.evaluation.int8_probe import advice, probe_int8
from compress.runners import RUNNERS
from compress.units import format_ms, format_speedup

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
    gpu, cache = found["gpu"], found["compiled_networks"]
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
        "openvino cache": f"{cache['folder']}{kept}"
        if cache["folder"]
        else f"off ({openvino_file.CACHE_VARIABLE}=off)",
        "nvidia driver": f"CUDA {gpu['driver']}" if gpu["driver"] else gpu["missing"],
        "gpus": ", ".join(gpu["gpus"]) or "none",
        "tensorrt engines": "built on the target by trtexec; the trt pass writes the graph and the command",
        "trtexec": gpu["trtexec"] or "not found; it comes with TensorRT and JetPack",
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
    """NVIDIA driver and GPUs, and what TensorRT engines are built with."""
    cuda = machine.probe_cuda()
    gpus = [f"{gpu.name} (SM {gpu.compute_capability[0]}.{gpu.compute_capability[1]})" for gpu in cuda.gpus]
    return {"driver": cuda.driver, "gpus": gpus, "missing": cuda.missing, "trtexec": shutil.which("trtexec")}


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
