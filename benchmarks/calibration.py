"""Time and memory of calibrating CAM++, beside ONNX Runtime's calibrators; writes its section of docs/results.md.

    python benchmarks/calibration.py [--count 200] [--many 1000] [--threads 2]

Takes some 10 minutes of a quiet machine with two cores. The audio is that of train speakers of speechocean762, in the
folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository), or the embedded one without it.
This package gets the utterances as they are; ONNX Runtime, whose histograms need equal lengths, gets the same frames
cut into as many utterances of one length. Each way runs in a process of its own, one after the other.
"""

import logging
import os
import tempfile
from pathlib import Path
from statistics import median

import calibrators
import click
import numpy as np
import onnx
from calibrators import Cost, Ends, Features
from results import write_section

from compress import machine
from compress.artifact import Artifact, FrontEnd, versions
from compress.cli.display import Bars
from compress.data import DataFolder, embedded_data
from compress.evaluation.memory import peak_rss_of
from compress.passes import Context, Onnx

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
METHODS = ("minmax", "percentile", "entropy", "mse")
PEERS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
COMPARED = 20  # utterances on which both choose ranges
WALL, MEMORY_GB, GROWTH = 0.5, 0.7, 0.05  # bars: of the wall time of quantize_static, gigabytes, from few to many


@click.command()
@click.option("--count", default=200, show_default=True, help="Utterances of the comparison.")
@click.option("--few", default=50, show_default=True, help="ONNX Runtime's histograms need 7 GB for 50.")
@click.option("--many", default=1000, show_default=True, help="Utterances of the memory test; 0 leaves it out.")
@click.option("--threads", default=machine.cores, type=int, show_default="all cores")
@click.option("--onnx", "graph", type=click.Path(exists=True), help="Plain export of CAM++, if there is one already.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write docs/results.md.")
def main(count: int, few: int, many: int, threads: int, graph: str | None, write: bool) -> None:
    """Calibrate in every way and write the tables."""
    bars = Bars()
    with tempfile.TemporaryDirectory() as folder:
        path = graph or f"{folder}/campplus.onnx"
        if graph is None:
            bars.say("exporting")
            Path(path).write_bytes(Onnx().run(Artifact.open("campplus"), Context()).onnx)
        bars.say("computing features")
        features, corpus = write_features(Path(folder) / "features", max(count, many, few))
        tensors = len(set(calibrators.inputs_of_weighted(onnx.load(path))))
        parts = [
            "## Calibration",
            cost_table(path, features.head(count), threads, bars),
            memory_table(path, features, (few, many) if many else (few,), threads, bars),
            agreement_table(path, features.head(COMPARED).equal(), threads, bars),
            f"CAM++, {tensors} tensors: the inputs of convolutions and matrix products with weights. Audio: {corpus}."
            f" {machine.describe()['cpu']}; {threads} thread(s) for compress and plain inference, ONNX Runtime's"
            f" calibrators take all {machine.cores()} cores. "
            + ", ".join(f"{name} {number}" for name, number in versions().items())
            + ".",
        ]
    text = "\n\n".join(parts)
    if write:
        write_section("calibration", text)
    click.echo(text)


def write_features(path: Path, count: int) -> tuple[Features, str]:
    """Compute features of utterances in random order, again from the start if there are too few."""
    corpus = BENCH_DATA / "speechocean762" / "train"
    folder, front_end = DataFolder.read(corpus if corpus.is_dir() else embedded_data()), FrontEnd()
    order = np.random.default_rng(0).permutation(len(folder))
    frames = []
    with path.open("wb") as file:
        for i in range(count):
            utterance = folder.utterances[order[i % len(folder)]]
            found = front_end(folder.waveform(utterance, front_end.sample_rate))
            found.tofile(file)
            frames.append(len(found))
    name = "speechocean762, train speakers" if corpus.is_dir() else "the embedded data"
    return Features(str(path), front_end.num_mel_bins, tuple(frames)), name


def cost_table(path: str, features: Features, threads: int, bars: Bars) -> str:
    """Time and memory of every way that can take so many utterances."""
    equal = features.equal()
    rows: dict[str, tuple[Cost, int]] = {}

    def measure(name: str, *call: object) -> None:
        bars.say(name)
        rows[name] = peak_rss_of(*call)  # type: ignore[arg-type]

    measure("plain inference, mixed lengths", calibrators.inference, path, features, threads)
    for method in METHODS:
        measure(f"compress {method}, mixed lengths", calibrators.own, path, features, threads, method)
    measure("ORT calibrator MinMax alone", calibrators.onnxruntime_calibrator, path, equal, "MinMax")
    measure("`quantize_static` MinMax, the same operators", calibrators.quantize_static, path, equal, False)
    measure("`quantize_static` MinMax, all operators (its default)", calibrators.quantize_static, path, equal, True)
    base = rows["`quantize_static` MinMax, all operators (its default)"][0].wall_s
    lines = [
        f"{len(features.frames)} utterances, {sum(features.frames):,} frames: {min(features.frames)} to"
        f" {max(features.frames)} in one; `quantize_static` and ORT's calibrator: all of {equal.frames[0]}.\n",
        "| | wall | of `quantize_static` | CPU | peak memory |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {cost.wall_s:.1f} s | {cost.wall_s / base:.2f} | {cost.cpu_s:.1f} s | {peak / 1e9:.2f} GB |"
            for name, (cost, peak) in rows.items()
        ),
    ]
    worst = max(cost.wall_s / base for name, (cost, _) in rows.items() if name.startswith("compress"))
    lines.append(f"\nBar: each method at most {WALL:.2f} of `quantize_static`: {held(worst <= WALL)}, {worst:.2f}.")
    return "\n".join(lines)


def memory_table(path: str, features: Features, counts: tuple[int, ...], threads: int, bars: Bars) -> str:
    """Peak memory against the number of utterances."""
    lines = ["| utterances | " + " | ".join(map(str, counts)) + " |", "| --- |" + " --- |" * len(counts)]
    worst_peak, worst_growth = 0, 0.0
    for method in METHODS:
        peaks = []
        for count in counts:
            bars.say(f"memory: compress {method}, {count} utterances")
            peaks.append(peak_rss_of(calibrators.own, path, features.head(count), threads, method)[1])
        worst_peak, worst_growth = max(worst_peak, *peaks), max(worst_growth, peaks[-1] / peaks[0] - 1)
        lines.append(f"| compress {method} | " + " | ".join(f"{peak / 1e9:.3f} GB" for peak in peaks) + " |")
    for name in PEERS.values():
        bars.say(f"memory: ORT {name}, {counts[0]} utterances")
        equal = features.head(counts[0]).equal()
        peak = peak_rss_of(calibrators.onnxruntime_calibrator, path, equal, name)[1]
        lines.append(f"| ORT {name} | {peak / 1e9:.3f} GB |" + " not run |" * (len(counts) - 1))
    lines.append(
        f"\nBars: at most {MEMORY_GB} GB: {held(worst_peak / 1e9 <= MEMORY_GB)}, {worst_peak / 1e9:.2f} GB; growth from"
        f" {counts[0]} to {counts[-1]} at most {GROWTH:.0%}: {held(worst_growth <= GROWTH)}, {worst_growth:.1%}."
    )
    return "\n".join(lines)


def agreement_table(path: str, equal: Features, threads: int, bars: Bars) -> str:
    """Widths of the ranges against all that was seen, here and by ONNX Runtime, on the same utterances."""
    bars.say("comparing ranges")
    lines = [
        f"Width of the chosen range as part of that of the extremes, on {len(equal.frames)} utterances of one length"
        f" (percentile {calibrators.PERCENTILE}):\n",
        "| | median, 10 to 90 % of the tensors | the same by ORT | median difference |",
        "| --- | --- | --- | --- |",
    ]
    full: Ends = peak_rss_of(calibrators.own, path, equal, threads, "minmax")[0].ends
    for method in METHODS:
        ours = widths(peak_rss_of(calibrators.own, path, equal, threads, method)[0].ends, full)
        cells = ["–", "–"]
        if method in PEERS:
            peer = peak_rss_of(calibrators.onnxruntime_calibrator, path, equal, PEERS[method])[0]
            theirs = widths(peer.ends, full)
            cells = [spread(theirs), f"{median(abs(theirs[name] - ours[name]) for name in ours):.4f}"]
        lines.append(f"| {method} | {spread(ours)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def widths(ends: Ends, full: Ends) -> dict[str, float]:
    """Width of each tensor's range, 0 included, relative to the full one."""
    return {
        name: (max(ends[name][1], 0) - min(ends[name][0], 0)) / (high - low)
        for name, (low, high) in full.items()
        if high > low
    }


def spread(relative: dict[str, float]) -> str:
    """Median and the range of most."""
    low, middle, high = np.quantile(list(relative.values()), (0.1, 0.5, 0.9))
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def held(good: bool) -> str:
    """Say whether a bar was held."""
    return "held" if good else "missed"


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime's advice to fold batch norms
    main()
