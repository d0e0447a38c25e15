"""The main jobs on real speech and on the embedded data; their sections of docs/results.md.

    python benchmarks/main_job.py [--jobs plain,recovered-40,recovered-60,embedded] [--threads 1]

A job is one `compress run`, and its table. Real speech is speechocean762 in the folder that COMPRESS_BENCH_DATA names
(unset: ../shared/data beside the repository), with its 50 dev speakers for trials and its train speakers for
calibration and, without their labels, to distil on. Without it only the embedded data are measured. Latencies are
interleaved in each run.
"""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from results import write_section

from compress import table
from compress.artifact import Artifact
from compress.cli.display import Bars
from compress.config import from_mapping
from compress.data import DataFolder
from compress.evaluation.speakers import Verification, measure
from compress.pipeline import run
from compress.runners import open_runner
from compress.units import format_interval, format_percent, format_speedup

REPOSITORY = Path(__file__).parent.parent
BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", REPOSITORY / ".." / "shared" / "data"))
CORPUS = BENCH_DATA / "speechocean762"
FULL_EER, HARD_EER = 0.035, 0.055
LDA_BASELINE = "4.96 % on `trials_full`, 8.47 % on `trials_hard`"  # from the corpus folder's README
INT8_SIZE, INT8_SPEED, INT8_EER_RISE = 0.32, 1.8, 0.003  # bars: of the FP32 ONNX file, times its speed, fraction
RECOVERED = {40: 0.002, 60: 0.006}  # percent removed -> bar for the rise of the EER after distilling, fraction
JOBS = ("plain", *(f"recovered-{removed}" for removed in RECOVERED), "embedded")


@click.command()
@click.option("--jobs", default=",".join(JOBS), show_default=True, help="Which, with commas between.")
@click.option("--threads", default=1, show_default=True)
def main(jobs: str, threads: int) -> None:
    """Run the jobs and write each one's section of docs/results.md."""
    bars = Bars()
    for job in jobs.split(","):
        if job not in JOBS:
            raise click.BadParameter(f"unknown job '{job}'; there are {', '.join(JOBS)}")
        if job != "embedded" and not CORPUS.is_dir():
            bars.say(f"{job}: no speech at {CORPUS}; set COMPRESS_BENCH_DATA")
            continue
        text = measured(job, threads, bars)
        write_section("main_job", text, job)
        click.echo(text)


def measured(job: str, threads: int, bars: Bars) -> str:
    """Run one job; its section."""
    if job == "embedded":
        passes: Any = "prune,ptq,trt"
    elif job == "plain":
        passes = "prune,ptq"
    else:
        ratio = float(job.removeprefix("recovered-")) / 100
        passes = [{"prune": {"ratio": ratio}}, {"distill": {"data": str(CORPUS / "train")}}, "ptq"]
    speech = {"data": str(CORPUS / "dev"), "trials": "trials_hard", "calib": str(CORPUS / "train" / "calib.scp")}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"passes": passes, "out": f"{folder}/run", "threads": threads}
        result = run(from_mapping(settings if job == "embedded" else settings | speech, "benchmark"), progress=bars)
    if job == "embedded":
        return section("Embedded data (what `make demo` runs)", result)
    title = "on speechocean762, dev speakers, `trials_hard`"
    if job == "plain":
        weights = weights_section(CORPUS / "dev", bars, result["rows"][0])
        parts = [weights, section(f"prune, ptq {title}", result), quantization_section(result["rows"])]
        return "\n".join(parts)
    removed = int(job.removeprefix("recovered-"))
    parts = [section(f"prune {removed} %, distill, ptq {title}", result), recovery_section(result["rows"], removed)]
    return "\n".join(parts)


def weights_section(dev: Path, bars: Bars, hard: dict[str, Any]) -> str:
    """EER of the embedded weights on both trial lists; the run's baseline row has measured the hard one."""
    runner = open_runner(Artifact.open("campplus"), threads=1)
    data = Verification.read(DataFolder.read(dev), "trials_full")
    full = asdict(measure(data, data.embed(runner, bars, "trials_full")))
    lines = ["## Embedded weights on speechocean762, dev speakers\n", "| trials | EER (95 %) | minDCF | bar |"]
    lines.append("| --- | --- | --- | --- |")
    for name, figures, bar in (("trials_full", full, FULL_EER), ("trials_hard", hard, HARD_EER)):
        eer = f"{format_percent(figures['eer'])} ({format_interval(figures['eer_ci95'])})"
        verdict = f"at most {format_percent(bar)}: {held(figures['eer'] <= bar)}"
        lines.append(f"| `{name}` | {eer} | {figures['min_dcf']:.3f} | {verdict} |")
    lines.append(f"\nMean and deviation of Fbank with LDA, cosine: {LDA_BASELINE}.")
    return "\n".join(lines) + "\n"


def held(good: bool) -> str:
    """Say whether a bar holds."""
    return "held" if good else "MISSED"


def section(title: str, result: dict[str, Any]) -> str:
    """One run: its table, data and machine."""
    machine, data = result["machine"], result["data"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    about = (
        f"{data['n_utterances']:,} utterances of {data['n_speakers']} speakers, {data['n_trials']:,} trials"
        f" ({data['trials']}). {machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['cores']} cores,"
        f" {machine['threads']} thread(s) per runtime; Python {machine['python']}, {versions}."
    )
    notes = [f"- {figures['variant']}: {note}" for figures in result["rows"] for note in figures["notes"]]
    return "\n".join([f"## {title}\n", table.to_markdown(result["rows"]), about, "", *notes]) + "\n"


def quantization_section(rows: list[dict[str, Any]]) -> str:
    """INT8 against its own FP32 ONNX parent, and whether the bars hold."""
    parent = next(figures for figures in rows if figures["pass"] == "onnx")
    int8 = next(figures for figures in rows if figures["pass"] == "ptq")
    size = int8["size_bytes"] / parent["size_bytes"]
    speed = int8["speedup"] / parent["speedup"]
    rise = int8["eer"] - parent["eer"]

    lines = [
        "## INT8 against its FP32 ONNX parent in the same run\n",
        "| what | measured | bar | |",
        "| --- | --- | --- | --- |",
        f"| size | {size:.1%} | at most {INT8_SIZE:.0%} | {held(size <= INT8_SIZE)} |",
        f"| speed | {format_speedup(speed)} | at least {INT8_SPEED}x | {held(speed >= INT8_SPEED)} |",
        f"| EER rise | {100 * rise:.2f} points | at most {100 * INT8_EER_RISE:.1f} | {held(rise <= INT8_EER_RISE)} |",
    ]
    return "\n".join(lines) + "\n"


def recovery_section(rows: list[dict[str, Any]], removed: int) -> str:
    """Rise of the EER over the unpruned network, and whether the bar for the distilled one holds."""
    dense = rows[0]
    lines = ["| after | EER, points over the baseline | bar | |", "| --- | --- | --- | --- |"]
    for figures in rows[1:]:
        rise, bar = figures["eer"] - dense["eer"], RECOVERED[removed]
        wanted = [f"at most {100 * bar:.1f}", held(rise <= bar)] if "distill" in figures["variant"] else ["–", "–"]
        lines.append(f"| {figures['variant']} | {100 * rise:+.2f} | {' | '.join(wanted)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
