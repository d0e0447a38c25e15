"""``compress passes``, ``models`` and ``doctor``: what there is, and what this machine can run."""

import dataclasses
import inspect
import shutil
from importlib.metadata import PackageNotFoundError, version

import click

from compress import __version__, machine
from compress.models import ARCHITECTURES
from compress.passes import passes


@click.command("passes")
def passes_command() -> None:
    """List the passes and their settings."""
    for kind in passes().values():
        click.echo(f"{kind.name}  ({kind.accepts.value} -> {kind.returns.value})")
        click.echo(f"    {(inspect.getdoc(kind) or '').splitlines()[0]}")
        for field in dataclasses.fields(kind):
            click.echo(f"    {kind.name}.{field.name} = {field.default}")


@click.command("models")
def models_command() -> None:
    """List the networks known by name."""
    for network in ARCHITECTURES.values():
        weights = "embedded trained weights" if network.weights else "needs a checkpoint"
        click.echo(f"{network.name:<12} {network.task:<4} {network.summary}; {weights}")


@click.command("doctor")
def doctor_command() -> None:
    """Tell what this machine can run, and what is missing."""
    about = machine.describe()
    cuda = machine.probe_cuda()
    lines = {
        "compress": __version__,
        "cpu": f"{about['cpu']}, {about['cores']} cores",
        "instructions": ", ".join(about["cpu_features"]) or "none of those that matter",
        "int8 on this cpu": "fast (VNNI)" if machine.has_vnni() else "no VNNI: 7-bit weights are used, little gain",
        "python": about["python"],
        **{name: _version(name) for name in ("torch", "onnx", "onnxruntime", "soundfile", "av")},
        "nvidia driver": f"CUDA {cuda.driver}" if cuda.driver else cuda.missing,
        "gpus": ", ".join(f"{g.name} (SM {g.compute_capability[0]}.{g.compute_capability[1]})" for g in cuda.gpus)
        or "none",
        "tensorrt engines": "built on the target by trtexec; the trt pass writes the graph and the command",
        "trtexec": shutil.which("trtexec") or "not found; it comes with TensorRT and JetPack",
    }
    for name, text in lines.items():
        click.echo(f"{name:<18}{text}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "NOT INSTALLED, but needed: install speech-compress again"
