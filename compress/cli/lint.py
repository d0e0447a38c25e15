"""``compress lint``: what a target would refuse of a graph, before the target is at hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.cli import DONE, FAILED
from compress.errors import InputError, ModelError
from compress.lint import DEFAULT_VERSION, Profile, Shapes, Version, errors, lint, read_version
from compress.onnx_file import load_reachable_data, read_graph
from compress.passes import TRT
from compress.tensorrt.target.versions import TYPED_FROM

if TYPE_CHECKING:
    import onnx


@click.command("lint")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["tensorrt"]), default="tensorrt", show_default=True)
@click.option(
    "--version",
    metavar="VERSION",
    default=".".join(map(str, DEFAULT_VERSION)),
    show_default=True,
    help="Of the target's TensorRT, 8.5 to 11.",
)
@click.option(
    "--shapes",
    metavar="INPUT:MIN,OPT,MAX",
    multiple=True,
    help="Profile of an input, for example feats:1x50x80,1x300x80,1x3000x80. Default: that of the pass trt.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def lint_command(model: Path, target: str, version: str, shapes: tuple[str, ...], as_json: bool) -> int:
    """Check MODEL, an ONNX file or an artifact folder with one, against what the target's parser demands.

    Prints a finding a line: what is wrong with which node, and the remedy. Exit code 1 if one is an error.
    """
    reader = read_version(version)
    graph, settings = open_graph(model, reader)
    profile = read_profile(shapes) if shapes else default_profile(graph, settings)
    findings = lint(graph, profile, reader)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(str(finding))
        wrong = len(errors(findings))
        counts = f"errors: {wrong}, warnings: {len(findings) - wrong}" if findings else "clean"
        click.echo(f"{model}: {counts} ({target} {version}, {len(graph.graph.node)} nodes)")
    return FAILED if errors(findings) else DONE


def open_graph(path: Path, version: Version) -> "tuple[onnx.ModelProto, TRT]":
    """Read the graph of a file or an artifact folder, and the settings of the pass trt if that made it.

    Of the two forms that trt makes, it is the one that this version builds from.

    Raises:
        ModelError: If it cannot be read, or the artifact has no ONNX graph.
    """
    if not path.is_dir():
        graph = read_graph(path)
        load_reachable_data(graph, path.parent)
        return graph, TRT()
    artifact = Artifact.load(path)
    name = FILE_NAMES[Format.ONNX]
    if artifact.format == Format.TENSORRT:
        name = "typed.onnx" if version >= TYPED_FROM else "portable.onnx"
    if name not in artifact.files:
        raise ModelError(
            f"{path} is a {artifact.format.value} artifact without an ONNX graph. Make one: compress onnx."
        )
    last = artifact.history[-1] if artifact.history else None
    return read_graph(path / name), TRT(**last.settings) if last is not None and last.name == TRT.name else TRT()


def default_profile(graph: "onnx.ModelProto", settings: TRT) -> Profile:
    """The profile of the pass trt, where the graph takes features (batch, frames, num_mel_bins) as its one input."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in weights]
    axes = [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    takes_features = len(axes) == 3 and axes[0] in (0, 1) and axes[1] == 0 and axes[2] > 0
    return settings.profile(inputs[0].name, axes[2]) if takes_features else {}


def read_profile(texts: tuple[str, ...]) -> Profile:
    """``feats:1x50x80,1x300x80,1x3000x80`` -> the shapes of feats.

    Raises:
        InputError: If a text is not of that form.
    """
    profile = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        shapes = [size.split("x") for size in sizes.split(",")]
        if not name or len(shapes) != 3 or not all(number.isdecimal() for shape in shapes for number in shape):
            raise InputError(f"--shapes {text}: INPUT:MIN,OPT,MAX was expected, as feats:1x50x80,1x300x80,1x3000x80.")
        profile[name] = Shapes(*(tuple(map(int, shape)) for shape in shapes))
    return profile
