"""What INT8 costs in accuracy, here and by the peers' tools; writes its section of docs/results.md.

    python benchmarks/int8_accuracy.py --work DIR [--only ptq,nncf]

The embedded CAM++ on the dev speakers of speechocean762, lists `trials_full` and `trials_hard`, in the folder that
COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository); calibration audio are train speakers. The rise
is paired with FP32, its interval a bootstrap over speakers. What is built and the embeddings stay in DIR, which
`benchmarks/cpu_peers.py` can share. Peers: `pip install -r benchmarks/requirements.txt`.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from peers import SHORTEST_FOR_OPENVINO, Workshop
from results import write_section

from compress import machine
from compress.artifact import Artifact, versions
from compress.cli.display import Bars
from compress.data import DataFolder
from compress.evaluation.speakers import Figures, Verification, measure
from compress.passes.base import Array
from compress.runners import OpenVinoRunner, Runner, open_runner
from compress.units import format_interval, format_percent

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
LISTS = ("trials_full", "trials_hard")
MOST_RISE, MOST_FLIPS = 0.001, 0.003  # as fractions
FP32 = "FP32"
OURS = {
    "ours: `ptq`, ORT": "ort-int8",
    "ours: `ptq` and `openvino`": "openvino-int8-298",
}
PEERS = {
    "`quantize_static`, defaults": "static-default",
    "`quantize_static`, U8S8 per channel, all operators": "static-all",
    "`quantize_static`, U8S8 per channel, Conv/MatMul/Gemm": "static-best",
    "NNCF + OpenVINO, any length": "nncf",
}
OTHERS = {
    "ours: BF16, OpenVINO": "openvino-bf16",
    "ours: ratio=0.4, FP32": "pruned60-ort",
    "ours: ratio=0.4, INT8 ORT": "pruned60-ort-int8",
    "ours: macs_ratio=0.45, FP32": "macs60-ort",
    "ours: macs_ratio=0.45, INT8 ORT": "macs60-ort-int8",
    "ours: macs_ratio=0.67, FP32": "macs40-ort",
    "ours: macs_ratio=0.67, INT8 ORT": "macs40-ort-int8",
    "ours: ratio=0.6 latency_ratio=0.6, FP32": "pruned40-fast-ort",
    "ours: ratio=0.6 latency_ratio=0.6, INT8 ORT": "pruned40-fast-ort-int8",
}


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder that keeps what is built.")
@click.option("--only", default="", help="Parts of names, with commas; FP32 is always there.")
@click.option("--write/--no-write", default=True, show_default=True, help="Write docs/results.md.")
def main(work: Path, only: str, write: bool) -> None:
    """Embed with every variant and write the tables."""
    corpus = BENCH_DATA / "speechocean762"
    if not corpus.is_dir():
        sys.exit(f"no speech at {corpus}; set COMPRESS_BENCH_DATA")
    os.environ["COMPRESS_CACHE"] = str(work / "cache")
    bench = Bench.open(Workshop(work, corpus, click.echo))
    parts = [part for part in only.split(",") if part]
    wanted = {
        name: built
        for name, built in (OURS | PEERS | OTHERS).items()
        if not parts or any(part in name for part in parts)
    }
    found, skipped = bench.measure(wanted)
    text = "\n\n".join(
        ["## Accuracy of INT8", bars_table(found), *(bench.table(name, found) for name in LISTS), bench.about(skipped)]
    )
    if write:
        write_section("int8_accuracy", text)
    click.echo(text)


Found = Mapping[str, Mapping[str, Figures]]  # by variant, then by list


class Repeating(OpenVinoRunner):
    """Brings utterances to the length that OpenVINO needs for the published pooling, by repeating them."""

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins) -> (batch, embedding_size)."""
        short = SHORTEST_FOR_OPENVINO - inputs.shape[1]
        return super().run(inputs if short <= 0 else np.pad(inputs, ((0, 0), (0, short), (0, 0)), mode="wrap"))


@dataclass(frozen=True, eq=False)
class Bench:
    """The lists, and who embeds them."""

    shop: Workshop
    lists: Mapping[str, Verification]
    everything: Verification  # the list whose utterances are those of all

    @classmethod
    def open(cls, shop: Workshop) -> "Bench":
        """Read the lists."""
        folder = DataFolder.read(shop.corpus / "dev")
        lists = {name: Verification.read(folder, name) for name in LISTS}
        return cls(shop, lists, max(lists.values(), key=lambda data: len(data.trials.utterances)))

    def measure(self, wanted: Mapping[str, str]) -> tuple[Found, list[str]]:
        """Figures of every variant on every list, and what was left out and why."""
        baseline, found, skipped = self.embed("ort"), {}, []
        found[FP32] = {name: measure(data, self.part(data, baseline)) for name, data in self.lists.items()}
        for name, built in wanted.items():
            try:
                embeddings = self.embed(built)
            except Exception as error:  # of many programs; the others are to be measured all the same
                skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                click.echo(f"left out {skipped[-1]}")
                continue
            found[name] = {
                key: measure(data, self.part(data, embeddings), self.part(data, baseline))
                for key, data in self.lists.items()
            }
        return found, skipped

    def embed(self, built: str) -> Array:
        """Embeddings of all utterances, from the folder or computed."""
        artifact = self.shop.get(built)
        kept = self.shop.work / "embeddings" / f"{artifact.sha256}.npy"
        if not kept.is_file():
            embeddings = self.everything.embed(runner_of(artifact, built), Bars(), built)
            kept.parent.mkdir(exist_ok=True)
            np.save(kept, embeddings)
        found: Array = np.load(kept)
        return found

    def part(self, data: Verification, embeddings: Array) -> Array:
        """Those of the utterances of one list."""
        place = {utterance: i for i, utterance in enumerate(self.everything.trials.utterances)}
        return embeddings[[place[utterance] for utterance in data.trials.utterances]]

    def table(self, which: str, found: Found) -> str:
        """All variants on one list."""
        lines = [
            f"`{which}`:\n",
            "| variant | EER (95 %) | rise over FP32, points (95 %) | flips | cosine, mean / least |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, by_list in found.items():
            of = by_list[which]
            cells = [name, f"{format_percent(of.eer)} ({format_interval(of.eer_ci95)})", "–", "–", "–"]
            if of.decision_flips is not None:
                cells[2:] = [rise(of), format_flips(of), f"{of.cosine_mean:.5f} / {of.cosine_min:.5f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def about(self, skipped: Sequence[str]) -> str:
        """What was measured, with what."""
        utterances = len(self.everything.trials.utterances)
        trials = ", ".join(f"{len(data.trials.labels):,} in `{name}`" for name, data in self.lists.items())
        tested = ", ".join(f"{name} {number}" for name, number in versions().items())
        lines = [
            f"{utterances:,} utterances of speakers that were not trained on; trials: {trials}. All calibrated on the"
            " same utterances of train speakers.",
            "OpenVINO refuses the plain export on utterances under"
            f" {SHORTEST_FOR_OPENVINO} frames; for NNCF they were repeated. Its row tells of a fault of OpenVINO"
            " rather than of NNCF: while the number of frames is free, the network comes out wrong. Compiled for 300"
            " frames alone, the same network has the far higher cosine that `cpu_peers` shows.",
            f"{machine.describe()['cpu']}; {tested}.",
        ]
        if skipped:
            lines.append("Left out: " + "; ".join(skipped) + ".")
        return "\n\n".join(lines)


def runner_of(artifact: Artifact, built: str) -> Runner:
    """The runner of a variant, one thread."""
    return Repeating(artifact, 1) if built == "nncf" else open_runner(artifact, 1)


def rise(of: Figures) -> str:
    """Rise of the EER in points, with its interval."""
    assert of.eer_rise is not None
    if of.eer_rise_ci95 is None:
        return f"{100 * of.eer_rise:+.2f}"
    low, high = (100 * bound for bound in of.eer_rise_ci95)
    return f"{100 * of.eer_rise:+.2f} ({low:+.2f} to {high:+.2f})"


def format_flips(of: Figures) -> str:
    """Decisions that changed."""
    return f"{of.decision_flips:,} ({flips(of):.2%})"


def flips(of: Figures) -> float:
    """Decisions that changed, as a fraction."""
    return (of.decision_flips or 0) / of.n_trials


def bars_table(found: Found) -> str:
    """Our INT8 against the bars and against the best of the peers."""
    lines = [
        "| list | variant | what | measured | bar | | best peer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for which in LISTS:
        peers = [found[name][which] for name in PEERS if name in found]
        for name in OURS:
            if name not in found:
                continue
            of = found[name][which]
            assert of.eer_rise is not None
            low = of.eer_rise_ci95[0] if of.eer_rise_ci95 else of.eer_rise
            verdict = "held" if of.eer_rise <= MOST_RISE else "inside the interval" if low <= MOST_RISE else "missed"
            rises = [f"{100 * peer.eer_rise:+.2f}" for peer in peers if peer.eer_rise is not None]
            flipped = min((flips(peer) for peer in peers), default=None)
            held = "held" if flips(of) <= MOST_FLIPS else f"missed by {100 * (flips(of) - MOST_FLIPS):.2f} points"
            lines += [
                f"| `{which}` | {name} | EER rise, points | {rise(of)} | at most {100 * MOST_RISE:.2f} | {verdict}"
                f" | {min(rises, key=float, default='–')} |",
                f"| `{which}` | {name} | decision flips | {flips(of):.2%} | at most {MOST_FLIPS:.1%} | {held}"
                f" | {'–' if flipped is None else f'{flipped:.2%}'} |",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)
    main()
