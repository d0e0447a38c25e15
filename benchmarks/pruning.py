"""EER against the fraction of parameters removed, without and with recovery; writes its section of docs/results.md.

    python benchmarks/pruning.py [--scopes uniform,global,sensitivity] [--ratios 0.2,0.4,0.6] [--only curve|latency]

The embedded CAM++ on the dev speakers of speechocean762, list `trials_hard`, in the folder that COMPRESS_BENCH_DATA
names (unset: ../shared/data beside the repository); calibration audio are train speakers. No labels are used. The
rise is paired with the network before pruning, its interval a bootstrap over speakers. Then the settings that look at
latency; the speed-up is the ratio of medians of the CPU time of one thread, ONNX Runtime, 3 s, FP32, taken in turns
with the export of the network before pruning.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from results import write_section

from compress import machine
from compress.artifact import MACS_SECONDS, Artifact, versions
from compress.cli.display import Bars
from compress.data import DataFolder, read_scp
from compress.evaluation.speakers import Verification, measure
from compress.passes import Context, Prune
from compress.passes.base import Array
from compress.passes.latency import Stopwatch
from compress.passes.planning import noise
from compress.runners import open_runner
from compress.units import format_interval, format_percent

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
TRIALS = "trials_hard"
KEPT = "Recovery is kept only where it raises the cosine on calibration audio: equal rows mean that it was not."


COLUMNS = ("EER (95 %)", "rise over the baseline, points (95 %)", "cosine")
FAST = ({"ratio": 0.4, "latency_ratio": 0.49}, {"latency_ratio": 0.49}, {"ratio": 0.4})


@click.command()
@click.option("--scopes", default="uniform,global,sensitivity", show_default=True)
@click.option("--ratios", default="0.2,0.4,0.6", show_default=True)
@click.option("--only", type=click.Choice(["curve", "latency"]), help="One of the two tables; by default both.")
def main(scopes: str, ratios: str, only: str | None) -> None:
    """Prune, without and with recovery, and write the tables."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    bench = Bench.open(Bars())
    if only != "latency":
        write_section("pruning", curve(bench, scopes.split(","), [float(ratio) for ratio in ratios.split(",")]))
    if only != "curve":
        write_section("pruning", latency(bench), "latency")


@dataclass(frozen=True)
class Bench:
    """What every variant is compared with, and on what."""

    dense: Artifact
    data: Verification
    context: Context
    baseline: Array
    bars: Bars

    @classmethod
    def open(cls, bars: Bars) -> "Bench":
        """Read the lists and embed the utterances with the network before pruning."""
        corpus, dense = BENCH_DATA / "speechocean762", Artifact.open("campplus")
        data = Verification.read(DataFolder.read(corpus / "dev"), TRIALS)
        baseline = data.embed(open_runner(dense, threads=1), bars, "baseline")
        return cls(dense, data, calibration_context(corpus / "train", dense, bars), baseline, bars)

    def cells(self, pruned: Artifact, name: str) -> list[str]:
        """Figures of a pruned network, for ``COLUMNS``."""
        found = measure(self.data, self.data.embed(open_runner(pruned, threads=1), self.bars, name), self.baseline)
        assert found.eer_rise is not None
        assert found.eer_rise_ci95 is not None
        low, high = (100 * bound for bound in found.eer_rise_ci95)
        return [
            f"{format_percent(found.eer)} ({format_interval(found.eer_ci95)})",
            f"{100 * found.eer_rise:+.2f} ({low:+.2f} to {high:+.2f})",
            f"{found.cosine_mean:.3f}",
        ]

    def about(self) -> str:
        """What was measured, with what."""
        tested = ", ".join(f"{name} {number}" for name, number in versions().items())
        trials = f"{len(self.data.trials.labels):,} trials"
        return f"`{TRIALS}`, {trials} of 50 speakers that were not trained on. {tested}."


def curve(bench: Bench, scopes: list[str], ratios: list[float]) -> str:
    """EER against the fraction removed."""
    rows = [["–", "0 %", "0.0 %", "–", format_percent(measure(bench.data, bench.baseline).eer), "–", "1.000"]]
    for scope, ratio, utterances in itertools.product(scopes, ratios, (0, 60)):
        pruned = Prune(scope=scope, ratio=ratio, bn_utterances=utterances).run(bench.dense, bench.context)  # type: ignore[arg-type]
        recovery = "batch norm re-estimated" if utterances else "none"
        removed = 1 - pruned.params / bench.dense.params
        cells = bench.cells(pruned, f"{scope} {ratio:.0%}, {recovery}")
        rows.append([scope, f"{ratio:.0%}", f"{removed:.1%}", recovery, *cells])
        bench.bars.say(" | ".join(rows[-1]))
    columns = ["scope", "asked", "removed", "recovery", *COLUMNS]
    return f"## EER against the fraction of parameters removed\n\n{markdown(columns, rows)}\n\n{bench.about()} {KEPT}"


def latency(bench: Bench) -> str:
    """EER and speed of the settings that look at latency."""
    rows = []
    for settings in FAST:
        pruned = Prune(**settings).run(bench.dense, bench.context)
        stopwatch = Stopwatch(bench.dense.module, noise(bench.dense, bench.dense.front_end.frames_of(MACS_SECONDS)))
        speed = 1 / (1 - stopwatch.saved(pruned.module))
        asked = ", ".join(f"{name}={value}" for name, value in settings.items())
        removed = [1 - pruned.params / bench.dense.params, 1 - pruned.macs / bench.dense.macs]
        rows.append([asked, *(f"{part:.1%}" for part in removed), f"{speed:.2f}×", *bench.cells(pruned, asked)])
        bench.bars.say(" | ".join(rows[-1]))
    columns = ["asked", "parameters removed", "MACs removed", "speed-up of the FP32 export", *COLUMNS]
    about = f"{bench.about()} {machine.describe()['cpu']}, one thread."
    return f"## Pruned for latency\n\n{markdown(columns, rows)}\n\n{about}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def calibration_context(train: Path, artifact: Artifact, bars: Bars) -> Context:
    """The calibration list of the train speakers, as features of the network."""
    folder, front_end = DataFolder.read(train), artifact.front_end
    names = [name for name, _ in read_scp(train / "calib.scp")]
    return Context(
        calibration=[
            lambda name=name: front_end(folder.waveform(name, front_end.sample_rate))  # type: ignore[misc]
            for name in names
        ],
        threads=machine.cores(),
        say=bars.say,
        speakers=[folder.speaker(name) for name in names],
        progress=bars,
    )


if __name__ == "__main__":
    main()
