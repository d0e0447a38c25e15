"""CPU time on one core: this package beside its peers, in one run; writes its section of docs/results.md.

    python benchmarks/cpu_peers.py --work DIR [--rounds 30] [--only int8,nncf] [--no-compile]

The embedded CAM++ on 1 x 300 frames, about 3 s; CAM++ from waveform to embedding; TDNN-BLSTM; FSMN-VAD. All variants
take turns in rotating order; the clock is the CPU time of the process; a ratio is the median over the rounds of base /
variant in the same round. The base is ONNX Runtime in FP32 on the plain export of the published network. Building takes
some 40 minutes of one core; what is built stays in DIR, so that a second run only times. Speech, and the weights of
FSMN-VAD, are in the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository). Peers:
`pip install -r benchmarks/requirements.txt`.
"""

# ruff: noqa: E402

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy: waiting BLAS threads spin and count as CPU time

import gc
import importlib.metadata
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from peers import CHAIN_FRAMES, TABLE_FRAMES, Workshop, dev_speech, published
from results import write_section

from compress import machine
from compress.artifact import versions
from compress.calibration import collect_ranges
from compress.features import SAMPLE_RATE, fbank_cmn
from compress.onnx_file import open_session
from compress.passes.base import Array
from compress.quantization import SCHEMES, plain_transposes, plan, quantize, slim, tensors
from compress.runners import open_runner
from compress.vectors import cosine

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
SPEECH = 10  # utterances on which outputs are compared
PEERS = ("nncf", "sherpa-onnx")

CAMPPLUS, CHAIN = "CAM++, 1 x 300", "CAM++ from a waveform of 3 s"
BLSTM, VAD = "TDNN-BLSTM, 1 x 300", "FSMN-VAD, 1 x 300"
PLAIN, SHERPA, BLSTM_BASE, VAD_BASE = "ORT FP32, plain export", "sherpa-onnx", "BLSTM ORT FP32", "VAD ORT FP32"
BASES = {CAMPPLUS: PLAIN, CHAIN: SHERPA, BLSTM: BLSTM_BASE, VAD: VAD_BASE}

NETWORKS = {  # name in the table: what is built
    PLAIN: "plain",
    "ORT FP32, own plain export (`onnx.optimize=false`)": "own",
    "OpenVINO FP32, plain export, 300 frames": "openvino-plain",
    "`quantize_static`, defaults": "static-default",
    "`quantize_static`, U8S8 per channel, all operators": "static-all",
    "`quantize_static`, U8S8 per channel, Conv/MatMul/Gemm": "static-best",
    "`quantize_static`, the same as QOperator": "static-qoperator",
    "NNCF + OpenVINO, any length": "nncf",
    "NNCF + OpenVINO, 300 frames": "nncf-300",
    "ours: `onnx`, ORT FP32": "ort",
    "ours: `optimize.float_form`, ORT FP32": "ort-float",
    "ours: `openvino` FP32, any length": "openvino-298",
    "ours: `openvino` FP32, 300 frames": "openvino-300",
    "ours: `openvino` BF16, 300 frames": "openvino-bf16",
    "ours: `ptq`, ORT INT8": "ort-int8",
    "ours: `ptq`, OpenVINO INT8, any length": "openvino-int8-298",
    "ours: `ptq`, OpenVINO INT8, 300 frames": "openvino-int8-300",
    "ours: `ptq`, OpenVINO INT8 with BF16 elsewhere, 300 frames": "openvino-int8-bf16",
    "ours: ratio=0.4, ORT INT8": "pruned60-ort-int8",
    "ours: ratio=0.4, OpenVINO INT8 with BF16 elsewhere, 300 frames": "pruned60-openvino-int8",
    "ours: ratio=0.4 latency_ratio=0.4, ORT INT8": "pruned60-fast-ort-int8",
    "ours: ratio=0.4 latency_ratio=0.4, OpenVINO INT8 with BF16 elsewhere, 300 frames": "pruned60-fast-openvino-int8",
    "ours: ratio=0.6, ORT INT8": "pruned40-ort-int8",
    "ours: ratio=0.6, OpenVINO INT8 with BF16 elsewhere, 300 frames": "pruned40-openvino-int8",
    "ours: ratio=0.6 latency_ratio=0.6, ORT INT8": "pruned40-fast-ort-int8",
    "ours: ratio=0.6 latency_ratio=0.6, OpenVINO INT8 with BF16 elsewhere, 300 frames": "pruned40-fast-openvino-int8",
    "ours: ratio=0.6 scope=uniform, ORT INT8": "pruned40-uniform-ort-int8",
    "ours: ratio=0.6 scope=uniform, OpenVINO INT8 with BF16 elsewhere, 300 frames": "pruned40-uniform-openvino-int8",
    "ours: macs_ratio=0.45, ORT INT8": "macs60-ort-int8",
    "ours: macs_ratio=0.45, OpenVINO INT8 with BF16 elsewhere, 300 frames": "macs60-openvino-int8",
    "ours: macs_ratio=0.67, ORT INT8": "macs40-ort-int8",
    "ours: macs_ratio=0.67, OpenVINO INT8 with BF16 elsewhere, 300 frames": "macs40-openvino-int8",
}
CHAINS = {
    "own Fbank + ORT FP32": "ort-float",
    "own Fbank + ORT INT8": "ort-int8",
    "own Fbank + OpenVINO FP32, 298 frames": "openvino-298",
    "own Fbank + OpenVINO INT8, 298 frames": "openvino-int8-298",
    "own Fbank + OpenVINO INT8 with BF16 elsewhere, 298 frames": "openvino-int8-bf16-298",
}
BLSTMS = {
    BLSTM_BASE: "blstm",
    "BLSTM `quantize_static`, U8S8 per channel, Conv/MatMul/Gemm": "blstm-static",
    "BLSTM `ptq`, ORT INT8": "blstm-int8",
}


@dataclass(frozen=True)
class Bar:
    """What issue 4 of the plan asks of a variant: a speed relative to its base, a cosine, and a part of the file."""

    what: str
    variant: str
    speed: float | None = None
    stretch: float | None = None
    cosine: float | None = None
    size: float | None = None
    stretch_size: float | None = None


BARS = (
    Bar("lossless FP32, ORT", "ours: `optimize.float_form`, ORT FP32", 1.17, 1.25, 0.999999),
    Bar("lossless FP32, OpenVINO", "ours: `openvino` FP32, 300 frames", 1.25, 1.35, 0.999999),
    Bar("BF16, OpenVINO", "ours: `openvino` BF16, 300 frames", 2.25, 2.35),
    Bar("INT8, ORT", "ours: `ptq`, ORT INT8", 2.4, 3.2, None, 0.285, 0.26),
    Bar("INT8, OpenVINO", "ours: `ptq`, OpenVINO INT8, 300 frames", 3.3, 4.0, None, 0.285, 0.26),
    Bar("INT8, OpenVINO", "ours: `ptq`, OpenVINO INT8 with BF16 elsewhere, 300 frames", 3.3, 4.0, None, 0.285, 0.26),
    Bar("60 % of parameters + INT8, ORT", "ours: ratio=0.4, ORT INT8", 3.8),
    Bar("60 % of parameters + INT8, ORT", "ours: ratio=0.4 latency_ratio=0.4, ORT INT8", 3.8),
    Bar("60 % of parameters + INT8, OpenVINO", "ours: ratio=0.4, OpenVINO INT8 with BF16 elsewhere, 300 frames", 4.5),
    Bar(
        "60 % of parameters + INT8, OpenVINO",
        "ours: ratio=0.4 latency_ratio=0.4, OpenVINO INT8 with BF16 elsewhere, 300 frames",
        4.5,
    ),
    Bar("40 % of parameters + INT8, ORT", "ours: ratio=0.6, ORT INT8", 5.0, 6.0),
    Bar("40 % of parameters + INT8, ORT", "ours: ratio=0.6 latency_ratio=0.6, ORT INT8", 5.0, 6.0),
    Bar(
        "40 % of parameters + INT8, OpenVINO",
        "ours: ratio=0.6, OpenVINO INT8 with BF16 elsewhere, 300 frames",
        7.0,
        8.5,
    ),
    Bar(
        "40 % of parameters + INT8, OpenVINO",
        "ours: ratio=0.6 latency_ratio=0.6, OpenVINO INT8 with BF16 elsewhere, 300 frames",
        7.0,
        8.5,
    ),
    Bar("40 % of parameters + INT8, ORT", "ours: ratio=0.6 scope=uniform, ORT INT8", 5.0, 6.0),
    Bar(
        "40 % of parameters + INT8, OpenVINO",
        "ours: ratio=0.6 scope=uniform, OpenVINO INT8 with BF16 elsewhere, 300 frames",
        7.0,
        8.5,
    ),
    Bar("waveform to embedding, FP32", "own Fbank + ORT FP32", 1.2),
    Bar("waveform to embedding, INT8 ORT", "own Fbank + ORT INT8", 2.4),
    Bar("waveform to embedding, INT8 OpenVINO", "own Fbank + OpenVINO INT8, 298 frames", 3.2),
    Bar("waveform to embedding, INT8 OpenVINO", "own Fbank + OpenVINO INT8 with BF16 elsewhere, 298 frames", 3.2),
    Bar("TDNN-BLSTM INT8 hybrid", "BLSTM `ptq`, ORT INT8", 3.3, None, None, 0.26),
    Bar("FSMN-VAD INT8", "VAD `ptq`, ORT INT8", 2.6, None, 0.996, 0.30),
)


@dataclass(frozen=True, eq=False)
class Variant:
    """Something to be timed.

    Attributes:
        call: Does it once.
        outputs: On real speech, (count, size).
        size_bytes: Of its file; None if it has none.
        params: Left in the network, as a part; None where that is not the point.
    """

    name: str
    group: str
    call: Callable[[], object]
    outputs: Array
    size_bytes: int | None
    params: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of a variant.

    Attributes:
        ms: CPU time of one call, median.
        ratio: Base / variant, median over the rounds.
        spread: Its quartiles.
        cosine_mean: To the base's outputs.
    """

    variant: Variant
    ms: float
    ratio: float
    spread: tuple[float, float]
    cosine_mean: float
    cosine_min: float
    size: float | None


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder that keeps what is built.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--calls", default=2, show_default=True, help="Timed calls per variant and round.")
@click.option("--only", default="", help="Parts of names, with commas; the bases are always there.")
@click.option("--compile/--no-compile", default=True, show_default=True, help="torch.compile, which takes a minute.")
@click.option("--build/--no-build", default=True, show_default=True, help="Build what is not in DIR, or leave it out.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write docs/results.md.")
def main(work: Path, rounds: int, calls: int, only: str, compile: bool, build: bool, write: bool) -> None:
    """Build what is not there, time everything, and write the tables."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    os.environ["COMPRESS_CACHE"] = str(work / "cache")
    torch.set_num_threads(1)
    parts = [part for part in only.split(",") if part]
    bench = Bench(Workshop(work, BENCH_DATA / "speechocean762", click.echo), parts, compile, build)
    variants = list(bench.variants())
    click.echo(f"timing {len(variants)} variants, {rounds} rounds")
    rows = measured(variants, cpu_times_s(variants, rounds, calls))
    text = f"{bars_table(rows)}\n\n{full_table(rows)}\n\n{about(rounds, bench.skipped)}"
    if write:
        write_section("cpu_peers", text)
    click.echo(text)


class Bench:
    """Makes the variants."""

    def __init__(self, shop: Workshop, parts: Sequence[str], compile: bool, build: bool) -> None:
        self.shop, self.parts, self.compile, self.build = shop, parts, compile, build
        self.speech = dev_speech(shop.corpus, SPEECH)
        found = [fbank_cmn(waveform) for waveform in self.speech]
        self.features = np.stack([np.resize(features, (TABLE_FRAMES, features.shape[1])) for features in found])
        self.skipped: list[str] = []

    def wanted(self, name: str, built: str | None = None) -> bool:
        """Whether a variant is to be timed."""
        if built is not None and not self.build and not self.shop.has(built):
            return False
        return name in BASES.values() or not self.parts or any(part in name for part in self.parts)

    def variants(self) -> Iterator[Variant]:
        """All of them that are wanted."""
        for name, built in NETWORKS.items():
            if self.wanted(name, built):
                yield from self.network(name, built, CAMPPLUS)
        yield from self.torch()
        yield from self.chains()
        for name, built in BLSTMS.items():
            if self.wanted(name, built):
                yield from self.network(name, built, BLSTM)
        yield from self.vad()

    def network(self, name: str, built: str, group: str) -> Iterator[Variant]:
        """An artifact in its runtime; left out with the reason if it cannot be built."""
        try:
            artifact = self.shop.get(built)
            runner = open_runner(artifact, 1)
            outputs = np.concatenate([runner.run(features[None]) for features in self.features])
        except Exception as error:  # of many programs; the others are to be measured all the same
            self.skip(name, error)
            return
        first, whole = self.features[:1], self.shop.get("campplus").params
        params = artifact.params / whole if group == CAMPPLUS and "ratio=" in name else None
        yield Variant(name, group, partial(runner.run, first), outputs, artifact.size_bytes, params)

    def torch(self) -> Iterator[Variant]:
        """PyTorch, eager and compiled, on the published network."""
        network, inputs = published(self.shop.get("campplus").module), torch.from_numpy(self.features)

        def variant(name: str, model: Callable[[torch.Tensor], torch.Tensor]) -> Variant:
            def call(which: int = 0) -> Array:
                with torch.inference_mode():
                    found: Array = model(inputs[which : which + 1]).numpy()
                return found

            outputs = np.concatenate([call(i) for i in range(len(inputs))])
            return Variant(name, CAMPPLUS, call, outputs, None)

        if self.wanted("torch, eager"):
            yield variant("torch, eager", network)
        if self.compile and self.wanted("torch.compile"):
            click.echo("compiling")
            try:
                yield variant("torch.compile", torch.compile(network, dynamic=False))
            except Exception as error:  # of a compiler, of which there are many
                self.skip("torch.compile", error)

    def chains(self) -> Iterator[Variant]:
        """From samples to an embedding."""
        waveforms = [np.resize(waveform, 3 * SAMPLE_RATE) for waveform in self.speech]
        try:
            sherpa = sherpa_extractor(self.shop.work / "plain" / "model.onnx")
            outputs = np.stack([sherpa(waveform) for waveform in waveforms])
            yield Variant(SHERPA, CHAIN, partial(sherpa, waveforms[0]), outputs, None)
        except ImportError as error:
            self.skip(SHERPA, error)
            return
        for name, built in CHAINS.items():
            if self.wanted(name, built):
                runner = open_runner(self.shop.get(built), 1)
                outputs = np.stack([runner.embed(waveform, SAMPLE_RATE) for waveform in waveforms])
                yield Variant(name, CHAIN, partial(runner.embed, waveforms[0], SAMPLE_RATE), outputs, None)

    def vad(self) -> Iterator[Variant]:
        """FSMN-VAD with its real weights: calibrated on the first 7 s of a recording, compared on the rest."""
        folder = BENCH_DATA / "fsmn_vad"
        path, reference = folder / "fsmnvad-offline.onnx", folder / "reference" / "vad_example.frontend_first10s.npz"
        if not path.is_file():
            self.skip("FSMN-VAD", FileNotFoundError(path))
            return
        features = np.load(reference)["lfr_cmvn"]
        graph = onnx.load(path)
        known = [features[start : start + TABLE_FRAMES] for start in range(0, 401, 50)]
        made = {VAD_BASE: graph, "VAD `ptq`, ORT INT8": quantized_vad(graph, known)}
        inputs = {graph.graph.input[0].name: features[None, 700 : 700 + TABLE_FRAMES]}
        for name, model in made.items():
            if self.wanted(name):
                session = open_session(model.SerializeToString(), 1)
                outputs = session.run(None, inputs)[0][0]
                yield Variant(name, VAD, partial(session.run, None, inputs), outputs, model.ByteSize())

    def skip(self, name: str, error: BaseException) -> None:
        """Note why a variant is not there."""
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        self.skipped.append(f"{name}: {type(error).__name__}: {reason}")
        click.echo(f"left out {self.skipped[-1]}")


def quantized_vad(graph: onnx.ModelProto, utterances: Sequence[Array]) -> onnx.ModelProto:
    """Quantize a graph of frames to frames, which is no artifact, by the parts of ``ptq``."""
    scheme, graph = SCHEMES["onnxruntime"], plain_transposes(graph)
    planned = plan(graph, scheme, ("Conv", "Gemm", "MatMul"))
    ranges = collect_ranges(graph, tensors(graph, planned, scheme), utterances).ranges
    return slim(quantize(graph, planned, ranges, scheme))


def sherpa_extractor(path: Path) -> Callable[[Array], Array]:
    """sherpa-onnx on an ONNX file: samples to an embedding, features in C++."""
    import sherpa_onnx  # type: ignore[import-untyped,unused-ignore]

    config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path), num_threads=1)
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)

    def embed(waveform: Array) -> Array:
        stream = extractor.create_stream()
        stream.accept_waveform(SAMPLE_RATE, waveform)
        stream.input_finished()
        return np.array(extractor.compute(stream), np.float32)

    return embed


def cpu_times_s(variants: Sequence[Variant], rounds: int, calls: int) -> dict[str, list[float]]:
    """Time every variant once a round, in an order that rotates; CPU seconds for one call."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    gc.disable()
    for turn in range(rounds):
        shift = turn % len(variants)
        for variant in (*variants[shift:], *variants[:shift]):
            variant.call()  # the others have emptied the caches: not timed
            start = time.process_time()
            for _ in range(calls):
                variant.call()
            times[variant.name].append((time.process_time() - start) / calls)
        gc.collect()
    return times


def measured(variants: Sequence[Variant], times: dict[str, list[float]]) -> list[Row]:
    """Compare every variant with the base of its group."""
    bases = {variant.group: variant for variant in variants if variant.name == BASES[variant.group]}
    rows = []
    for variant in variants:
        base = bases[variant.group]
        ratios = np.divide(times[base.name], times[variant.name])
        low, middle, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
        cosines = [cosine(a.astype(float), b.astype(float)) for a, b in zip(variant.outputs, base.outputs, strict=True)]
        size = variant.size_bytes / base.size_bytes if variant.size_bytes and base.size_bytes else None
        ms = 1000 * statistics.median(times[variant.name])
        rows.append(Row(variant, ms, middle, (low, high), float(np.mean(cosines)), min(cosines), size))
    return rows


def bars_table(rows: Sequence[Row]) -> str:
    """Every bar with what was measured."""
    found = {row.variant.name: row for row in rows}
    lines = [
        "## Bars\n",
        "| what | variant | of what | measured | at least | stretch | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for bar in BARS:
        row = found.get(bar.variant)
        if row is None:
            lines.append(f"| {bar.what} | {bar.variant} | | not measured | | | |")
            continue
        left = f", {row.variant.params:.1%} of the parameters left" if row.variant.params else ""
        lines += [
            f"| {bar.what} | {bar.variant}{left} | {cells} |"
            for cells in (
                speed_cells(row.ratio, bar.speed, bar.stretch),
                cosine_cells(row, bar.cosine),
                size_cells(row.size, bar.size, bar.stretch_size),
            )
            if cells
        ]
    return "\n".join(lines)


def speed_cells(ratio: float, least: float | None, stretch: float | None) -> str:
    """Speed against its bar."""
    if least is None:
        return ""
    verdict = f"missed by {1 - ratio / least:.1%}" if ratio < least else "held"
    if stretch and ratio >= least:
        verdict = "held, stretch too" if ratio >= stretch else f"held, stretch missed by {1 - ratio / stretch:.1%}"
    return f"speed | {ratio:.2f}× | {least:g}× | {f'{stretch:g}×' if stretch else ''} | {verdict}"


def cosine_cells(row: Row, least: float | None) -> str:
    """Cosine, on average, against its bar."""
    if least is None:
        return ""
    verdict = "held" if row.cosine_mean >= least else f"missed by {least - row.cosine_mean:.1e}"
    return f"cosine | {row.cosine_mean:.7f} | {least:g} | | {verdict}"


def size_cells(size: float | None, most: float | None, stretch: float | None) -> str:
    """The part of the FP32 file against its bar."""
    if most is None or size is None:
        return ""
    verdict = "held" if size <= most else f"missed by {100 * (size - most):.1f} points"
    if stretch and size <= most:
        beyond = f"missed by {100 * (size - stretch):.1f} points" if size > stretch else "too"
        verdict = f"held, stretch {beyond}"
    return f"file | {size:.1%} | at most {most:.1%} | {f'{stretch:.0%}' if stretch else ''} | {verdict}"


def full_table(rows: Sequence[Row]) -> str:
    """All variants, by group."""
    lines = ["## Everything that was timed, one core"]
    for group, base in BASES.items():
        lines += [
            f"\n{group}; ratio to {base}:\n",
            "| variant | CPU time, ms | ratio (quartiles) | cosine to the base, mean / least | file | of the base's |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in (row for row in rows if row.variant.group == group):
            low, high = row.spread
            size_bytes = row.variant.size_bytes
            files = [f"{size_bytes / 1e6:.2f} MB" if size_bytes else "–", f"{row.size:.1%}" if row.size else "–"]
            lines.append(
                f"| {row.variant.name} | {row.ms:.2f} | {row.ratio:.2f} ({low:.2f}–{high:.2f})"
                f" | {row.cosine_mean:.6f} / {row.cosine_min:.6f} | {' | '.join(files)} |"
            )
    return "\n".join(lines)


def about(rounds: int, skipped: Sequence[str]) -> str:
    """What was measured, where, with what."""
    found = machine.describe()
    tested = [f"{name} {number}" for name, number in versions().items()]
    tested += [f"{name} {importlib.metadata.version(name)}" for name in PEERS if has(name)]
    lines = [
        f"Median over {rounds} rounds of the CPU time of the process. Speech: {SPEECH} dev utterances of"
        f" speechocean762, brought to the length; {CHAIN_FRAMES} frames are 3 s. Calibration: train speakers. Plain"
        " export: the network as published, its context computed for each frame, exported with PyTorch; our own network"
        " computes it once per segment. Pruned networks are compared with the network before. TDNN-BLSTM has random"
        " weights. sherpa-onnx computes other features, hence the cosine of the chains.",
        f"{found['cpu']} ({', '.join(found['cpu_features'])}), 1 thread. {', '.join(tested)}.",
    ]
    if skipped:
        lines.append("Left out: " + "; ".join(skipped) + ".")
    return "\n\n".join(lines)


def has(package: str) -> bool:
    """Whether a package is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)
    main()
