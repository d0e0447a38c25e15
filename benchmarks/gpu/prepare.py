"""Makes the folder that ``run.py`` measures: bundles, small graphs for the open questions, and what they should give.

Everything here is computed on a CPU. The networks are the embedded CAM++ and FSMN-VAD; its published weights are taken
from the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository) if they are there, and are
random numbers otherwise. The small graphs have random weights: they ask what TensorRT makes of a pattern.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import compress
from compress.artifact import Artifact
from compress.calibration import collect_ranges
from compress.cli.display import Bars
from compress.data import DataFolder, embedded_data
from compress.features import fbank_cmn
from compress.models import architecture, load_model
from compress.passes import PTQ, Context, Onnx
from compress.passes.base import Array
from compress.passes.onnx_export import export
from compress.pipeline import calibration_context
from compress.quantization import SCHEMES, plan, quantize, tensors
from compress.rewriting import conv1d_as_conv2d
from compress.tensorrt import target
from compress.tensorrt.bundle import BundleSettings, bundle, describe, references
from compress.tensorrt.forms import Forms, portable
from compress.tensorrt.islands import islands
from compress.tensorrt.qdq import float_weights, for_tensorrt
from compress.tensorrt.qdq import stored_weights as stored
from compress.tensorrt.typed import typed

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
MELS, LFR = 80, 400  # inputs of a frame: of CAM++, and of FSMN-VAD with 5 frames stacked
FRAMES = 298  # 3.0 s
LENGTHS = (50, 298, 437)  # on which small engines are checked
LONG = (100, 1000, 3000)
UTTERANCES = 8  # of the calibration, and on which small graphs are calibrated
SETTINGS = BundleSettings(min_frames=50, opt_frames=298, max_frames=600, opt_batch=1, max_batch=64)
TENSORRT = next(scheme for name, scheme in SCHEMES.items() if name == "tensorrt")


def prepare(folder: Path) -> None:
    """Write everything into a new folder."""
    bars = Bars()
    folder.mkdir(parents=True)
    speech = utterances()
    bars.say("CAM++: export, INT8, bundle")
    campplus(folder, speech)
    bars.say("FSMN-VAD: export, INT8, bundle")
    about_vad = fsmn_vad(folder, speech)
    cases = []
    for number, question in enumerate(QUESTIONS, start=1):
        bars.say(f"question {number}: {question.text}")
        torch.manual_seed(number)
        made = question.cases(speech) if question.cases else []
        cases += [write_case(folder, number, case) for case in made]
    for source in sorted(Path(target.__file__).parent.glob("*.py")):
        copy(source, folder / "target" / source.name)
    package = Path(compress.__file__).parent
    for source in (package / "__init__.py", package / "errors.py", *sorted((package / "models").glob("*.py"))):
        copy(source, folder / "pytorch" / "compress" / source.relative_to(package))
    copy(Path(__file__).with_name("run.py"), folder / "run.py")
    record = {
        "speech_compress": compress.__version__,
        "networks": {"campplus": "embedded weights", "fsmn_vad": about_vad},
        "questions": [question.text for question in QUESTIONS],
        "cases": cases,
        "frames": FRAMES,
    }
    (folder / "kit.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    bars.say(f"{folder}: {size / 1e6:.0f} MB. On the machine with the GPU: python {folder.name}/run.py")


def utterances() -> list[Array]:
    """Features (frames, 80) of calibration utterances of the embedded data."""
    data = DataFolder.read(embedded_data())
    return [fbank_cmn(data.waveform(name, 16000)) for name in data.calibration(None).utterances[:UTTERANCES]]


def copy(source: Path, there: Path) -> None:
    """Copy a file to where there may be no folder yet."""
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, there)


def write_bundle(folder: Path, name: str, model: onnx.ModelProto, features: Sequence[Array]) -> None:
    """Make a bundle that builds both precisions."""
    for file, data in bundle(model, features, SETTINGS, {"network": name}).items():
        path = folder / "bundles" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def campplus(folder: Path, speech: Sequence[Array]) -> None:
    """The bundle, the graphs for ONNX Runtime beside it, and weights for PyTorch."""
    artifact = Artifact.open("campplus")
    context = calibration_context(DataFolder.read(embedded_data()).calibration(None), artifact)
    exported = Onnx().run(artifact, Context())
    int8 = PTQ(utterances=UTTERANCES, target="tensorrt").run(exported, context)
    write_bundle(folder, "campplus", onnx.load_from_string(int8.onnx), speech)
    for name, made in (
        ("fp32", exported),
        ("int8", PTQ(utterances=UTTERANCES).run(exported, context)),
    ):
        path = folder / "onnxruntime" / f"campplus-{name}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made.onnx)
    features = np.concatenate(speech)[None, :FRAMES].astype(np.float32)
    with torch.no_grad():
        embedding = artifact.module(torch.from_numpy(features)).numpy()
    weights = {name: value.numpy().astype(np.float16) for name, value in artifact.module.state_dict().items()}
    (folder / "pytorch").mkdir()
    np.savez(folder / "pytorch" / "campplus.npz", **weights)
    np.savez(folder / "pytorch" / "features.npz", features=features, embedding=embedding)


def fsmn_vad(folder: Path, speech: Sequence[Array]) -> str:
    """The bundle; says whose weights it has."""
    published = BENCH_DATA / "fsmn_vad" / "model.pt"
    if published.is_file():
        network, about = load_model(published, arch="fsmn_vad"), "published weights"
    else:
        torch.manual_seed(0)
        network, about = architecture("fsmn_vad").build().eval(), "random weights"
    # Stacks of Fbank with their mean removed, not those of FunASR's front end: of the size that the network expects,
    # and what is compared is the engine with ONNX Runtime.
    frames = [stacked(utterance) for utterance in speech]
    write_bundle(folder, "fsmn_vad", int8_of(export(network, LFR, 18), frames), frames)
    return about


def stacked(features: Array) -> Array:
    """(frames, 80) -> (frames - 4, 400): five frames in a row each."""
    return np.concatenate([features[i : len(features) - 4 + i] for i in range(5)], axis=1)


def int8_of(
    model: onnx.ModelProto, speech: Sequence[Array], rows: bool = True, skips: bool = True, concat: str = ""
) -> onnx.ModelProto:
    """Quantize a graph as ``ptq.target=tensorrt`` does, or otherwise in one respect.

    Args:
        model: Float.
        speech: To calibrate on.
        rows: Write convolutions over frames as ones over two axes first.
        skips: Put Q/DQ on what a residual addition adds.
        concat: Quantize concatenations, too: ``own``, each input with its own scale, or ``one`` scale for all.
    """
    scheme = replace(TENSORRT, skips=skips)
    graph = conv1d_as_conv2d(model) if rows else model
    kinds = ("Conv", "Gemm", "MatMul", *(["Concat"] if concat else []))
    planned = plan(graph, scheme, kinds)
    found = dict(collect_ranges(graph, tensors(graph, planned, scheme), speech, symmetric=True).ranges)
    if concat == "one":
        widest = max(found.values(), key=lambda one: one.high)
        found = dict.fromkeys(found, widest)
    return quantize(graph, planned, found, scheme)


# --- The questions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A graph to build.

    Attributes:
        lengths: Frames of the utterances that it is checked on.
        int8_flag: Set the INT8 flag for a graph with Q/DQ.
        islands: Keep the FP32 islands in FP32.
        repeat: How often it is built.
        speech: Features that the utterances are cut from.
    """

    name: str
    made: Forms
    lengths: Sequence[int] = LENGTHS
    int8_flag: bool = True
    islands: bool = True
    repeat: int = 1
    speech: Sequence[Array] = field(default=(), repr=False)


@dataclass(frozen=True)
class Question:
    """One of what was open; ``cases`` is None where the bundles answer it."""

    text: str
    cases: Callable[[Sequence[Array]], list[Case]] | None = None


def write_case(folder: Path, number: int, case: Case) -> dict[str, Any]:
    """Write a case's graphs and references; gives its entry of ``kit.json``."""
    name = f"{number:02d}-{case.name}"
    where = folder / "cases"
    where.mkdir(exist_ok=True)
    row = np.concatenate(case.speech)
    row = np.concatenate([row] * -(-max(case.lengths) // len(row)))
    inputs = [np.ascontiguousarray(row[None, :length], np.float32) for length in case.lengths]
    data, outputs = references(inputs, {"graph": case.made.portable})
    (where / f"{name}.npz").write_bytes(data)
    graphs = {}
    for kind in ("portable", "typed"):
        graph = getattr(case.made, kind)
        (where / f"{name}-{kind}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        about = describe(f"cases/{name}-{kind}.onnx", "case", kind == "typed", graph, case.made)
        about["asked_for_int8"] = about["quantized"]
        about["quantized"] = about["quantized"] and case.int8_flag
        graphs[kind] = about if case.islands else {**about, "float_nodes": []}
    return {
        "question": number,
        "name": case.name,
        "graphs": graphs,
        "references": f"cases/{name}.npz",
        "outputs": outputs["graph"],
        "input": case.made.portable.graph.input[0].name,
        "lengths": list(case.lengths),
        "repeat": case.repeat,
        "only_with_flags": not case.int8_flag,
    }


class TDNN(nn.Module):
    """Three convolutions over frames, written over one axis, over columns or over rows, with the same weights."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        sizes = ((MELS, 128, 5, 2, 1), (128, 128, 1, 0, 1), (128, 128, 3, 2, 2))
        layers = [(self.conv(*size), nn.ReLU()) for size in sizes]
        self.layers = nn.Sequential(*(layer for pair in layers for layer in pair))

    def conv(self, channels: int, out: int, taps: int, pad: int, dilation: int) -> nn.Module:
        """A convolution over frames."""
        if self.form == "1d":
            return nn.Conv1d(channels, out, taps, padding=pad, dilation=dilation)
        along: Callable[[int, int], tuple[int, int]] = (
            (lambda n, other: (n, other)) if self.form == "columns" else (lambda n, other: (other, n))
        )
        return nn.Conv2d(channels, out, along(taps, 1), padding=along(pad, 0), dilation=along(dilation, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, 128)."""
        y = x.transpose(1, 2)
        if self.form != "1d":
            y = y.unsqueeze(-1 if self.form == "columns" else 2)
        y = self.layers(y)
        return y.mean(2) if self.form == "1d" else y.mean((2, 3))


class Residual(nn.Module):
    """Two residual blocks over the spectrogram, as in the front of CAM++."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, 32)."""
        y = torch.relu(self.first(x.transpose(1, 2).unsqueeze(1)))
        for block in self.blocks:
            y = torch.relu(block(y) + y)
        return y.mean((2, 3))


class Dense(nn.Module):
    """Densely connected layers: each sees the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(MELS, 128, 1)
        self.layers = nn.ModuleList(nn.Conv2d(128 + 32 * i, 32, (1, 3), padding=(0, 1)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, 256)."""
        y = torch.relu(self.first(x.transpose(1, 2).unsqueeze(2)))
        for layer in self.layers:
            y = torch.cat([y, torch.relu(layer(y))], 1)
        return y.mean((2, 3))


class Statistics(nn.Module):
    """Mean and standard deviation of large values: their squares leave the range of FP16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(MELS, 128, 1), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, 64)."""
        y = 100 * torch.relu(self.layer(x.transpose(1, 2).unsqueeze(2))).squeeze(2)
        mean = y.mean(2)
        deviation = torch.sqrt(((y - mean[:, :, None]) ** 2).mean(2) + 1e-5)
        return self.last(torch.cat([mean, deviation], 1))  # type: ignore[no-any-return]


class BLSTM(nn.Module):
    """A bidirectional LSTM over all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 128, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, 256)."""
        return self.lstm(x)[0].mean(1)  # type: ignore[no-any-return]


def float_graph(network: nn.Module) -> onnx.ModelProto:
    """Export a small network."""
    return export(network.eval(), MELS, 18)


def tdnn(form: str) -> onnx.ModelProto:
    """The same weights in each form."""
    torch.manual_seed(1)
    return float_graph(TDNN(form))


def as_it_is(made: onnx.ModelProto, speech: Sequence[Array]) -> Forms:
    """Both forms of a graph at opset 17 whose Q/DQ stand where they are asked about, also where ours would not."""
    found = islands(made, [utterance[None] for utterance in speech])
    return Forms(made, typed(made, found), found)


def both_forms(model: onnx.ModelProto, speech: Sequence[Array]) -> Forms:
    """The same of a graph as it comes from :func:`int8_of` or the exporter, weights stored as ours are."""
    made = portable(for_tensorrt(stored(model)))
    return replace(as_it_is(made, speech), portable=float_weights(made))


def conv_forms(speech: Sequence[Array]) -> list[Case]:
    """Question 1."""
    names = {"1d": "Conv1d", "columns": "Conv2d-k1", "rows": "Conv2d-1k"}
    graphs = {name: int8_of(tdnn(form), speech, rows=False) for form, name in names.items()}
    return [Case(name, both_forms(graph, speech), speech=speech) for name, graph in graphs.items()]


def skip_branches(speech: Sequence[Array]) -> list[Case]:
    """Question 2."""
    graph = float_graph(Residual())
    made = {"with": int8_of(graph, speech), "without": int8_of(graph, speech, skips=False)}
    return [Case(f"{name}-skip-QDQ", both_forms(model, speech), speech=speech) for name, model in made.items()]


def concats(speech: Sequence[Array]) -> list[Case]:
    """Question 3."""
    graph = float_graph(Dense())
    names = {"": "no-QDQ", "own": "own-scales", "one": "one-scale"}
    made = {name: both_forms(int8_of(graph, speech, concat=kind), speech) for kind, name in names.items()}
    return [Case(name, both, speech=speech) for name, both in made.items()]


def statistics(speech: Sequence[Array]) -> list[Case]:
    """Question 4."""
    both = both_forms(float_graph(Statistics()), speech)
    flat = Forms(both.portable, typed(both.portable, {}), {})
    return [
        Case("FP32-island", both, speech=speech),
        Case("all-FP16", flat, islands=False, speech=speech),
    ]


def long_lstm(speech: Sequence[Array]) -> list[Case]:
    """Question 5."""
    return [Case("BLSTM", both_forms(float_graph(BLSTM()), speech), LONG, speech=speech)]


def stored_weights(speech: Sequence[Array]) -> list[Case]:
    """Question 6."""
    made = portable(for_tensorrt(int8_of(tdnn("rows"), speech, rows=False)))
    return [
        Case("INT8+DQ", as_it_is(stored(made), speech), speech=speech),
        Case("FP32+Q+DQ", as_it_is(float_weights(stored(made)), speech), speech=speech),
    ]


def no_flag(speech: Sequence[Array]) -> list[Case]:
    """Question 7."""
    both = both_forms(int8_of(tdnn("rows"), speech, rows=False), speech)
    return [Case("FP16-flag-alone", both, int8_flag=False, speech=speech)]


def marked(speech: Sequence[Array]) -> list[Case]:
    """Question 9."""
    both = both_forms(int8_of(tdnn("rows"), speech, rows=False), speech)
    return [
        Case("plain", both, speech=speech),
        Case("marked", Forms(with_output(both.portable), with_output(both.typed), both.float_nodes), speech=speech),
    ]


def with_output(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the result of the first activation an output, too; as FP32."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    relu = next(node for node in result.graph.node if node.op_type == "Relu")
    result.graph.node.append(
        onnx.helper.make_node("Cast", [relu.output[0]], ["marked"], name="marked", to=onnx.TensorProto.FLOAT)
    )
    result.graph.output.append(onnx.helper.make_tensor_value_info("marked", onnx.TensorProto.FLOAT, None))
    return result


def rebuilt(speech: Sequence[Array]) -> list[Case]:
    """Question 10."""
    return [Case("three-builds", both_forms(int8_of(float_graph(Dense()), speech), speech), repeat=3, speech=speech)]


QUESTIONS = (
    Question("do convolutions over frames run in INT8 as Conv1d, and in either orientation of Conv2d?", conv_forms),
    Question("does Q/DQ on the skip branch fuse a residual addition?", skip_branches),
    Question("which scales may a concatenation have?", concats),
    Question("does pooling of statistics need its FP32 island?", statistics),
    Question("does an FP16 BLSTM drift over long utterances?", long_lstm),
    Question("are weights taken that are stored as INT8?", stored_weights),
    Question("what is said of a Q/DQ graph without the INT8 flag?", no_flag),
    Question("does a CUDA graph give the same, and how much faster?"),
    Question("does marking an output change fusion?", marked),
    Question("how much do two builds differ?", rebuilt),
)
