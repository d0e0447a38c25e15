"""EER against the fraction of parameters removed, without and with recovery; writes its section of docs/results.md.

    python benchmarks/pruning.py [--scopes uniform,global,sensitivity] [--ratios 0.2,0.4,0.6]

The embedded CAM++ on the dev speakers of speechocean762, list `trials_hard`, in the folder that COMPRESS_BENCH_DATA
names (unset: ../shared/data beside the repository); calibration audio are train speakers. No labels are used. The
rise is paired with the network before pruning, its interval a bootstrap over speakers.
"""

import os
import sys
import tempfile
from pathlib import Path

import click
from results import write_section

from compress import machine
from compress.artifact import Artifact, versions
from compress.cli.display import Bars
from compress.data import DataFolder, read_scp
from compress.evaluation.speakers import Verification, measure
from compress.passes import Context, Prune
from compress.runners import open_runner
from compress.units import format_interval, format_percent

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
TRIALS = "trials_hard"
KEPT = "Recovery is kept only where it raises the cosine on calibration audio: equal rows mean that it was not."


@click.command()
@click.option("--scopes", default="uniform,global,sensitivity", show_default=True)
@click.option("--ratios", default="0.2,0.4,0.6", show_default=True)
def main(scopes: str, ratios: str) -> None:
    """Prune at every scope and ratio, without and with recovery, and write the table."""
    corpus = BENCH_DATA / "speechocean762"
    if not corpus.is_dir():
        sys.exit(f"no speech at {corpus}; set COMPRESS_BENCH_DATA")
    bars = Bars()
    dense = Artifact.open("campplus")
    data = Verification.read(DataFolder.read(corpus / "dev"), TRIALS)
    context = calibration_context(corpus / "train", dense, bars)
    baseline = data.embed(open_runner(dense, threads=1), bars, "baseline")
    eer = measure(data, baseline).eer
    lines = [
        "| scope | asked | removed | recovery | EER (95 %) | rise over the baseline, points (95 %) | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| – | 0 % | 0.0 % | – | {format_percent(eer)} | – | 1.000 |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for scope in scopes.split(","):
            for ratio in map(float, ratios.split(",")):
                for utterances in (0, 60):
                    settings = {"scope": scope, "ratio": ratio, "bn_utterances": utterances}
                    if scope == "sensitivity":
                        settings["sensitivity"] = f"{folder}/sensitivity.json"  # measured once
                    pruned = Prune(**settings).run(dense, context)  # type: ignore[arg-type]
                    name = f"{scope} {ratio:.0%}, {'batch norm re-estimated' if utterances else 'none'}"
                    found = measure(data, data.embed(open_runner(pruned, threads=1), bars, name), baseline)
                    assert found.eer_rise is not None
                    assert found.eer_rise_ci95 is not None
                    low, high = (100 * bound for bound in found.eer_rise_ci95)
                    lines.append(
                        f"| {scope} | {ratio:.0%} | {1 - pruned.params / dense.params:.1%} |"
                        f" {'batch norm re-estimated' if utterances else 'none'} |"
                        f" {format_percent(found.eer)} ({format_interval(found.eer_ci95)}) |"
                        f" {100 * found.eer_rise:+.2f} ({low:+.2f} to {high:+.2f}) | {found.cosine_mean:.3f} |"
                    )
                    bars.say(lines[-1])
    about = about_run(len(data.trials.labels))
    text = "\n".join(["## EER against the fraction of parameters removed\n", *lines, "", about])
    write_section("pruning", text)
    click.echo(text)


def about_run(trials: int) -> str:
    """What was measured, with what."""
    tested = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"`{TRIALS}`, {trials:,} trials of 50 speakers that were not trained on. {tested}. {KEPT}"


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
