"""The embedded CAM++ as this package and as its peers compress it; every variant is an artifact that is built once.

Peers start from the network as 3D-Speaker publishes it, whose context is computed for each frame: that is what their
users export. Ours start from the same weights. All are calibrated on the same utterances of train speakers.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import openvino
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional

from compress import openvino_file
from compress.artifact import FILE_NAMES, Artifact, Format, Step
from compress.data import DataFolder, read_scp
from compress.models.campplus import SEGMENT_FRAMES, CAMLayer
from compress.models.tdnn_blstm import TDNNBLSTM
from compress.passes import PTQ, Context, Onnx, OpenVINO, Optimize, Prune
from compress.passes.base import Array
from compress.passes.onnx_export import add_metadata, export

WEIGHTED = ["Conv", "MatMul", "Gemm"]
TABLE_FRAMES, CHAIN_FRAMES = 300, 298  # about 3 s, and exactly 3 s
SHORTEST_FOR_OPENVINO = 2 * SEGMENT_FRAMES  # it refuses a pooling longer than the input, which is halved before

Recipe = Callable[[Artifact, Context], Artifact]


class PublishedContext(nn.Module):
    """A context layer in the published formulation.

    The mean of each segment, by an average pooling whose last window may be short, is repeated over its frames and cut
    to their number; the gate is computed for each frame. Source: 3D-Speaker's network, described in own words.
    """

    def __init__(self, layer: CAMLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, _: object) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, frames)."""
        layer = self.layer
        means = functional.avg_pool1d(x, SEGMENT_FRAMES, SEGMENT_FRAMES, ceil_mode=True)
        repeated = means.unsqueeze(-1).expand(-1, -1, -1, SEGMENT_FRAMES).reshape(x.shape[0], x.shape[1], -1)
        context = repeated[..., : x.shape[-1]] + x.mean(-1, keepdim=True)
        mask = layer.sigmoid(layer.linear2(layer.relu(layer.linear1(context))))
        y: Tensor = layer.linear_local(x) * mask
        return y


def published(network: nn.Module) -> nn.Module:
    """A copy of CAM++ in the published formulation, with the same weights."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, CAMLayer) and not isinstance(module, PublishedContext):
                setattr(module, name, PublishedContext(child))
    return network.eval()


def plain_export(artifact: Artifact, _: Context) -> Artifact:
    """The export of the published formulation, with the metadata that sherpa-onnx demands."""
    graph = export(published(artifact.module), artifact.front_end.num_mel_bins, Onnx.opset)
    add_metadata(graph, artifact)
    return with_graph(artifact, graph, "export of the published formulation", "fp32")


def with_graph(artifact: Artifact, graph: onnx.ModelProto, name: str, precision: str) -> Artifact:
    """An ONNX artifact of a graph that was made outside of this package."""
    files = {FILE_NAMES[Format.ONNX]: graph.SerializeToString()}
    return artifact.with_files(files, Step(name, {}, ()), Format.ONNX, precision)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Utterances (frames, num_mel_bins), one by one."""

    def __init__(self, utterances: Sequence[Array], name: str) -> None:
        self.left: Iterator[Array] = iter(utterances)
        self.name = name

    def get_next(self) -> dict[str, Array] | None:
        """The next batch of one."""
        utterance = next(self.left, None)
        return None if utterance is None else {self.name: utterance[None]}


def static(prepare: bool = False, **options: Any) -> Recipe:
    """ONNX Runtime's ``quantize_static``.

    Args:
        prepare: Whether to run ``quant_pre_process`` before, as its documentation recommends.
        options: Of ``quantize_static``; none are its defaults.
    """

    def run(artifact: Artifact, context: Context) -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(artifact.onnx)
            if prepare:
                quant_pre_process(source, source, skip_symbolic_shape=True)  # which gives up on CAM++
            name = onnx.load(source).graph.input[0].name
            quantize_static(source, made, Reader(calibration(context), name), **options)
            return with_graph(artifact, onnx.load(made), "quantize_static", "int8")

    return run


def nncf(frames: int | None = None) -> Recipe:
    """NNCF's static quantization with its MIXED preset, which suits networks with other activations than ReLU.

    Args:
        frames: A length that OpenVINO compiles a network of its own for, as in the pass ``openvino``.
    """

    def run(artifact: Artifact, context: Context) -> Artifact:
        import nncf  # type: ignore[import-untyped,unused-ignore]

        network = openvino_file.read_network(artifact.onnx, b"")
        long = [utterance[None] for utterance in calibration(context) if len(utterance) >= SHORTEST_FOR_OPENVINO]
        quantized = nncf.quantize(
            network, nncf.Dataset(long), preset=nncf.QuantizationPreset.MIXED, subset_size=len(long)
        )
        return with_network(artifact, quantized, "NNCF", "int8", frames)

    return run


def with_network(
    artifact: Artifact, network: openvino.Model, name: str, precision: str, frames: int | None
) -> Artifact:
    """An OpenVINO artifact of a network that was made outside of this package."""
    told = {openvino_file.PRECISION: "f32", **({openvino_file.FRAMES: str(frames)} if frames else {})}
    for key, value in told.items():
        network.set_rt_info(value, [openvino_file.INFO, key])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / openvino_file.GRAPH
        openvino.save_model(network, path, compress_to_fp16=False)
        names = (openvino_file.GRAPH, openvino_file.WEIGHTS)
        files = {name: path.with_name(name).read_bytes() for name in names}
    return artifact.with_files(files, Step(name, {}, ()), Format.OPENVINO, precision)


def openvino_as_is(artifact: Artifact, _: Context) -> Artifact:
    """OpenVINO in FP32 on a graph as it is."""
    network = openvino_file.read_network(artifact.onnx, b"")
    return with_network(artifact, network, "OpenVINO", "fp32", TABLE_FRAMES)


def calibration(context: Context) -> list[Array]:
    """The utterances that ``ptq`` takes by default."""
    return [load() for load in context.utterances(PTQ.utterances, "utterances")]


UNSIGNED = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
ONLY_WEIGHTED = {**UNSIGNED, "op_types_to_quantize": WEIGHTED}

RECIPES: dict[str, tuple[str, Recipe]] = {  # name: what it starts from, and how it is made
    "plain": ("campplus", plain_export),
    "own": ("campplus", Onnx(optimize=False).run),
    "ort": ("own", Optimize().run),  # what `onnx` gives by default
    "ort-float": ("own", Optimize(float_form=True).run),
    "ort-int8": ("ort", PTQ().run),
    "static-default": ("plain", static()),
    "static-best": ("plain", static(True, **ONLY_WEIGHTED)),
    "static-all": ("plain", static(True, **UNSIGNED)),
    "static-qoperator": ("plain", static(True, **ONLY_WEIGHTED, quant_format=QuantFormat.QOperator)),
    "openvino-plain": ("plain", openvino_as_is),
    "openvino-300": ("own", OpenVINO(frames=TABLE_FRAMES).run),
    "openvino-298": ("own", OpenVINO(frames=CHAIN_FRAMES).run),
    "openvino-bf16": ("own", OpenVINO(precision="bf16", frames=TABLE_FRAMES).run),
    "for-openvino": ("own", Optimize(runtime="openvino").run),
    "ptq-openvino": ("for-openvino", PTQ(target="openvino").run),
    "openvino-int8-300": ("ptq-openvino", OpenVINO(frames=TABLE_FRAMES).run),
    "openvino-int8-bf16": ("ptq-openvino", OpenVINO(precision="bf16", frames=TABLE_FRAMES).run),
    "openvino-int8-298": ("ptq-openvino", OpenVINO(frames=CHAIN_FRAMES).run),
    "openvino-int8-bf16-298": ("ptq-openvino", OpenVINO(precision="bf16", frames=CHAIN_FRAMES).run),
    "nncf": ("plain", nncf()),
    "nncf-300": ("plain", nncf(TABLE_FRAMES)),
    "blstm": ("tdnn_blstm", Onnx(optimize=False).run),
    "blstm-ort": ("blstm", Optimize().run),
    "blstm-int8": ("blstm-ort", PTQ().run),
    "blstm-static": ("blstm", static(True, **ONLY_WEIGHTED)),
}
PRUNED: Mapping[str, dict[str, float | str]] = {  # settings of prune
    "pruned60": {"ratio": 0.4},
    "pruned60-fast": {"ratio": 0.4, "latency_ratio": 0.4},
    "pruned40": {"ratio": 0.6},
    "pruned40-fast": {"ratio": 0.6, "latency_ratio": 0.6},
    "pruned40-uniform": {"ratio": 0.6, "scope": "uniform"},
    "macs60": {"macs_ratio": 0.45},
    "macs40": {"macs_ratio": 0.67},
}
for _name, _settings in PRUNED.items():
    RECIPES |= {
        _name: ("campplus", Prune(**_settings).run),  # type: ignore[arg-type]
        f"{_name}-own": (_name, Onnx(optimize=False).run),
        f"{_name}-ort": (f"{_name}-own", Optimize().run),
        f"{_name}-ort-int8": (f"{_name}-ort", PTQ().run),
        f"{_name}-for-openvino": (f"{_name}-own", Optimize(runtime="openvino").run),
        f"{_name}-ptq-openvino": (f"{_name}-for-openvino", PTQ(target="openvino").run),
        f"{_name}-openvino-int8": (f"{_name}-ptq-openvino", OpenVINO(precision="bf16", frames=TABLE_FRAMES).run),
    }


@dataclass(frozen=True)
class Workshop:
    """Builds variants, and keeps them in a folder.

    Attributes:
        work: The folder.
        corpus: speechocean762, for calibration.
        say: Takes a line about what is being built.
    """

    work: Path
    corpus: Path
    say: Callable[[str], None]

    def get(self, name: str) -> Artifact:
        """A variant, from the folder or built."""
        if name == "campplus":
            return Artifact.open(name)
        if name == "tdnn_blstm":
            import torch

            torch.manual_seed(0)
            return Artifact.from_module(TDNNBLSTM(), arch=name)
        folder = self.work / name
        if self.has(name):
            return Artifact.load(folder)
        start, recipe = RECIPES[name]
        parent = self.get(start)
        self.say(f"building {name}")
        made = recipe(parent, self.context)
        made.save(folder)
        return made

    def has(self, name: str) -> bool:
        """Whether a variant is in the folder."""
        return (self.work / name / "artifact.json").is_file()

    @cached_property
    def context(self) -> Context:
        """The calibration list of the train speakers, one thread."""
        folder, front_end = DataFolder.read(self.corpus / "train"), Artifact.open("campplus").front_end
        names = [name for name, _ in read_scp(self.corpus / "train" / "calib.scp")]
        return Context(
            calibration=[
                lambda name=name: front_end(folder.waveform(name, front_end.sample_rate))  # type: ignore[misc]
                for name in names
            ],
            say=self.say,
            speakers=[folder.speaker(name) for name in names],
        )


def dev_speech(corpus: Path, count: int) -> list[Array]:
    """Waveforms of dev utterances, each of another speaker."""
    folder, sample_rate = DataFolder.read(corpus / "dev"), Artifact.open("campplus").front_end.sample_rate
    one_each = {folder.speaker(name): name for name in folder.utterances}
    return [folder.waveform(name, sample_rate) for name in sorted(one_each.values())[:count]]
