"""How near both graph forms for TensorRT are to the float graph, in ONNX Runtime; a section of docs/results.md.

    python benchmarks/tensorrt_forms.py --work DIR

Exported graphs stay in DIR. The embedded CAM++ is calibrated on train speakers of speechocean762 and compared on dev
speakers, in the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository); without it, on the
embedded speech. The other registered networks have no trained weights here: theirs are random, their input is noise,
and only their float graphs are compared, for quantized noise in random weights tells nothing.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import torch
from results import write_section
from torch import nn

from compress import machine
from compress.artifact import Artifact, versions
from compress.data import DataFolder, embedded_data
from compress.lint import lint
from compress.models import ARCHITECTURES
from compress.passes import PTQ, TRT, Context, Onnx
from compress.passes.base import Array, spread
from compress.passes.onnx_export import export
from compress.pipeline import calibration_context
from compress.rewriting import conv1d_as_conv2d
from compress.tensorrt.forms import Forms, forms
from compress.tensorrt.typed import FP16_UNSAFE_OPTIMIZERS
from compress.vectors import cosine

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
CALIBRATION, TESTED, RANGED = 40, 40, 8  # utterances
BAR = 0.999  # cosine
NOISE = ((1, 200), (2, 345), (1, 97))  # batch, frames
PORTABLE_VERSIONS, TYPED_VERSIONS = ((8, 5), (8, 6), (10, 0)), ((10, 12), (11, 0))
HEAD = [
    "portable, optimized by ONNX Runtime",
    "portable, as written",
    "typed, optimized",
    "typed, as written",
    "nodes in FP32",
    "`lint`",
]


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder that keeps exported graphs.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write docs/results.md.")
def main(work: Path, write: bool) -> None:
    """Make both forms of every network and write the tables."""
    work.mkdir(parents=True, exist_ok=True)
    trained = [
        f"| graph of the embedded CAM++ | {' | '.join(HEAD)} |",
        "| --- |" + " --- |" * len(HEAD),
        *trained_rows(work),
    ]
    random = [
        f"| network, random weights, float | {' | '.join(HEAD)} |",
        "| --- |" + " --- |" * len(HEAD),
        *random_rows(work),
    ]
    tested = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = "\n\n".join(
        [
            "## The two forms of a graph for TensorRT",
            "Cosine to the float graph as ONNX Runtime computes it on a CPU, mean / least over the inputs. This tells"
            " what Q/DQ and FP16 cost, and nothing of TensorRT's kernels or speed.",
            "\n".join(trained),
            f"{TESTED} {source()[1]}, calibrated on {CALIBRATION} {source()[0]}.",
            "\n".join(random),
            f"{machine.describe()['cpu']}; {tested}.",
        ]
    )
    if write:
        write_section("tensorrt_forms", text)
    click.echo(text)


def source() -> tuple[str, str]:
    """What is calibrated and what is compared on."""
    if (BENCH_DATA / "speechocean762").is_dir():
        return "of its train speakers", "utterances of dev speakers of speechocean762"
    return "of its calibration list", "utterances of the embedded speech"


def speech(artifact: Artifact) -> tuple[Context, list[Array]]:
    """The calibration list, as a run hands it to passes, and features of utterances to compare on."""
    corpus = BENCH_DATA / "speechocean762"
    listed, tested = (corpus / "train", corpus / "dev") if corpus.is_dir() else (embedded_data(), embedded_data())
    folder = DataFolder.read(tested)
    rate = artifact.front_end.sample_rate
    chosen = [artifact.front_end(folder.waveform(name, rate)) for name in spread(list(folder.utterances), TESTED)]
    return calibration_context(DataFolder.read(listed).calibration(), artifact), chosen


def trained_rows(work: Path) -> Iterator[str]:
    """Of the embedded CAM++: float, quantized for TensorRT, and quantized for x86."""
    network = Artifact.open("campplus")
    kept = work / "campplus"
    if not kept.is_dir():
        Onnx().run(network, Context()).save(kept)
    plain = Artifact.load(kept)
    context, tested = speech(plain)
    graphs = {"float": plain}
    for target in ("tensorrt", "onnxruntime"):
        graphs[f"`ptq`, target={target}"] = PTQ(utterances=CALIBRATION, target=target).run(plain, context)
    inputs = [features[None] for features in tested]
    seen = [utterance()[None] for utterance in context.utterances(RANGED, "RANGED")]
    expected = run(onnx.load_from_string(plain.onnx), inputs)
    for name, artifact in graphs.items():
        click.echo(name, err=True)
        yield row(name, forms(onnx.load_from_string(artifact.onnx), seen), inputs, expected)


def random_rows(work: Path) -> Iterator[str]:
    """Of the other networks."""
    rng = np.random.default_rng(0)
    for name in sorted(ARCHITECTURES.keys() - {"campplus"}):
        click.echo(name, err=True)
        num_mel_bins = 400 if name == "fsmn_vad" else 80
        path = work / f"{name}.onnx"
        if not path.is_file():
            onnx.save(random_graph(name, num_mel_bins), str(path))
        model = onnx.load(str(path))
        inputs = [rng.standard_normal((*size, num_mel_bins), dtype=np.float32) for size in NOISE]
        yield row(f"`{name}`", forms(model, inputs), inputs, run(model, inputs))


def random_graph(name: str, num_mel_bins: int) -> onnx.ModelProto:
    """Export a network whose batch norms have random weights and the statistics of noise."""
    torch.manual_seed(0)
    module = ARCHITECTURES[name].build()
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.3)
    with torch.no_grad():
        module.train()(torch.randn(4, 120, num_mel_bins))
    return conv1d_as_conv2d(export(module.eval(), num_mel_bins, 18))


def row(name: str, made: Forms, inputs: Sequence[Array], expected: Sequence[Array]) -> str:
    """One graph in both forms."""
    cells = [name]
    for model in (made.portable, made.typed):
        onnx.checker.check_model(model, full_check=True)
        for optimized in (True, False):
            found = [cosine(a.ravel(), b.ravel()) for a, b in zip(run(model, inputs, optimized), expected, strict=True)]
            under = sum(similarity < BAR for similarity in found)
            cells.append(f"{np.mean(found):.6f} / {min(found):.6f}{f', {under} under {BAR}' if under else ''}")
    profile = TRT().profile("feats", inputs[0].shape[2])
    findings = [f for version in PORTABLE_VERSIONS for f in lint(made.portable, profile, version)]
    findings += [f for version in TYPED_VERSIONS for f in lint(made.typed, profile, version)]
    return f"| {' | '.join([*cells, str(len(made.float_nodes)), str(len(findings)) if findings else 'clean'])} |"


def run(model: onnx.ModelProto, inputs: Sequence[Array], optimized: bool = True) -> list[Array]:
    """First output for each input; ENABLE_ALL ends the process on an LSTM in FP16 (ONNX Runtime 1.31.1)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if optimized else levels.ORT_DISABLE_ALL
    is_typed = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=FP16_UNSAFE_OPTIMIZERS if is_typed else [],
    )
    return [session.run(None, {session.get_inputs()[0].name: batch})[0] for batch in inputs]


if __name__ == "__main__":
    main()
