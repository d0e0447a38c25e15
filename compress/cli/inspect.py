"""``compress eval``, ``bench``, ``compare``, ``check``, ``embed`` and ``verify``: looking at models and runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from compress.artifact import Artifact
from compress.audio import read_audio
from compress.cli.display import Bars, open_model, print_rows
from compress.cli.target_rows import read_tables, with_target_rows
from compress.data import DataFolder, embedded_data
from compress.decision import Decision, Verdict
from compress.errors import InputError, ModelError, SettingError
from compress.evaluation.side_by_side import time_runners
from compress.evaluation.speakers import Verification, measure
from compress.files import replaced_file
from compress.runners import Runner, open_runner
from compress.units import format_bytes, format_interval, format_ms, format_percent, format_speedup
from compress.vectors import cosine

GOLDEN_COSINE = 0.999  # kernels of other CPUs round INT8 differently; FP32 agrees to 0.999999
LATENCY_SECONDS = 3.0

arch_option = click.option("--arch", metavar="NAME", help="Network of a checkpoint.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("eval")
@click.argument("model")
@click.option("--data", metavar="DIR", help="Data folder. Default: the embedded data.")
@click.option("--trials", metavar="FILE", help="Trial list: a name in the data folder, or a path.")
@arch_option
@json_option
def eval_command(model: str, data: str | None, trials: str | None, arch: str | None, as_json: bool) -> None:
    """Measure EER, minDCF and threshold of MODEL on a trial list."""
    artifact = open_model(model, arch)
    verification = Verification.read(DataFolder.read(data or embedded_data()), trials)
    runner = open_runner(artifact, threads=1)
    figures = measure(verification, verification.embed(runner, Bars(), f"{runner.runtime}: embedding"))
    if as_json:
        click.echo(json.dumps({name: value for name, value in asdict(figures).items() if value is not None}))
        return
    interval = format_interval(figures.eer_ci95) if figures.eer_ci95 else "too few speakers for an interval"
    click.echo(f"EER        {format_percent(figures.eer)}  (95 %: {interval}, bootstrap over speakers)")
    click.echo(f"minDCF     {figures.min_dcf:.4f}  (p_target 0.01)")
    click.echo(f"threshold  {figures.threshold:.4f}  (cosine, at the EER point)")
    click.echo(f"trials     {figures.n_trials:,}")


@click.command("bench")
@click.argument("models", nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=LATENCY_SECONDS, show_default=True, help="Of audio."
)
@click.option("--budget", type=click.FloatRange(0, 3600), default=5.0, show_default=True, help="Seconds per model.")
@arch_option
@json_option
def bench_command(
    models: tuple[str, ...], threads: int, seconds: float, budget: float, arch: str | None, as_json: bool
) -> None:
    """Time MODELS side by side in one process, batch 1; the first is the reference of the speed-ups."""
    runners = [open_runner(open_model(model, arch), threads) for model in models]
    data = DataFolder.read(embedded_data())
    Bars().say(f"timing {len(models)} models on {seconds:g} s of audio, {threads} thread(s)")
    timings = time_runners(runners, data, data.utterances, seconds, budget)
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "runtime": runner.runtime,
            "latency_ms": timing.model.as_dict(),
            "e2e_latency_ms": timing.whole.as_dict(),
            "speedup": timing.speedup,
            "runs": timing.model.runs,
            "front_end_in_graph": runner.artifact.front_end.in_graph,
        }
        for model, runner, timing in zip(models, runners, timings, strict=True)
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for figures in rows:
        latency, whole = figures["latency_ms"], figures["e2e_latency_ms"]
        timed = "model with the front end in its graph" if figures["front_end_in_graph"] else "model"
        click.echo(
            f"{figures['model']} ({figures['runtime']}): {timed} p50 {format_ms(latency['p50'])}, p95"
            f" {format_ms(latency['p95'])}, p99 {format_ms(latency['p99'])}; from samples p50"
            f" {format_ms(whole['p50'])};"
            f" {format_speedup(figures['speedup'])} over {figures['runs']} rounds"
        )


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def compare_command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Print the tables of several RUNS as one, each variant with its run's name.

    A row.json that an engine's own machine wrote is taken into the table of its run: from the step's folder, or given
    beside the runs.
    """
    tables, given = read_tables(runs)
    rows = [
        figures | {"variant": f"{source.content['run']}: {figures['variant']}"}
        for source, merged in zip(tables, with_target_rows(tables, given), strict=True)
        for figures in merged
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    print_rows(rows)
    if len(tables) > 1:
        click.echo("\nSpeed-ups are over each run's own baseline; latencies of different runs were not interleaved.")
    targets = sorted({figures["device"] for figures in rows if figures["format"] == "tensorrt" and figures["device"]})
    if targets:
        click.echo(f"\nMeasured on the target, without a speed-up over rows of other machines: {', '.join(targets)}.")
    machines = {source.content["machine"]["cpu"] for source in tables}
    if len(machines) > 1:
        click.echo(f"The runs are from different machines: {', '.join(sorted(machines))}.")


@click.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
def check_command(folder: Path) -> None:
    """Verify an artifact FOLDER: hashes of its files, and its golden outputs on this machine."""
    artifact = Artifact.load(folder)
    click.echo(f"{folder}: {artifact.format.value}, {artifact.precision}, {artifact.params:,} parameters")
    click.echo(f"files: {len(artifact.payload)} with the recorded SHA-256, {format_bytes(artifact.size_bytes)}")
    if artifact.deferred:
        click.echo(f"golden outputs: none yet. {artifact.deferred.reason} On the target run in this folder:")
        click.echo(f"    {artifact.deferred.command}")
        return
    if not artifact.golden:
        raise ModelError(f"{folder} has no golden outputs to verify. They are written by `compress run`.")
    worst = golden_cosine(open_runner(artifact), artifact)
    if not worst >= GOLDEN_COSINE:
        raise ModelError(
            f"{folder}: embeddings here differ from the recorded ones (cosine {worst:.4f}, needed {GOLDEN_COSINE})."
            " Do not deploy it on this machine; export or quantize again here."
        )
    click.echo(f"golden outputs: cosine {worst:.6f} or better")


def golden_cosine(runner: Runner, artifact: Artifact) -> float:
    """Lowest cosine between this machine's embeddings of the golden inputs and the recorded ones."""
    cosines = []
    for i in range(len(artifact.golden) // 2):
        expected = artifact.golden[f"embedding_{i}"][0]
        found = runner.run(artifact.golden[f"{artifact.front_end.input_name}_{i}"])[0]
        cosines.append(cosine(found, expected))
    return min(cosines)


@click.command("embed")
@click.argument("model")
@click.argument("audio", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write an .npz of file name -> embedding.")
@arch_option
def embed_command(model: str, audio: tuple[str, ...], out: Path | None, arch: str | None) -> None:
    """Compute the embedding of AUDIO files with MODEL; JSON lines on standard output, or an .npz with --out."""
    runner = open_runner(open_model(model, arch))
    rate = runner.artifact.front_end.sample_rate
    embeddings = {path: runner.embed(read_audio(path, rate), rate) for path in audio}
    if out is not None:
        with replaced_file(out) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **embeddings)  # type: ignore[arg-type]
        click.echo(f"{out}: {len(embeddings)} embeddings of width {runner.artifact.embedding_size}")
        return
    for path, embedding in embeddings.items():
        click.echo(json.dumps({"file": path, "embedding": [round(float(value), 6) for value in embedding]}))


@click.command("verify")
@click.argument("model")
@click.argument("enroll")
@click.argument("test")
@click.option("--threshold", type=float, help="Cosine score to accept from. Default: the artifact's own.")
@click.option("--preset", metavar="NAME", help="Operating point, one that `compress threshold` stored.")
@arch_option
def verify_command(
    model: str, enroll: str, test: str, threshold: float | None, preset: str | None, arch: str | None
) -> None:
    """Compare the speakers of two audio files, ENROLL and TEST, with MODEL."""
    artifact = open_model(model, arch)
    if threshold is not None and preset is not None:
        raise SettingError("--threshold and --preset both say where to decide: give one.")
    decision = artifact.decision if threshold is None else None
    if preset is not None and decision is None:
        raise InputError(f"{model} has no presets; `compress threshold {model} --data DIR` fits and stores them.")
    if decision is not None:
        decision.point(preset)  # a wrong name is told before the work
    elif threshold is None and artifact.threshold is None:
        raise InputError(f"{model} has no threshold; give one with --threshold, or take an artifact of `compress run`.")
    runner = open_runner(artifact)
    rate = artifact.front_end.sample_rate
    audio = [read_audio(path, rate) for path in (enroll, test)]
    a, b = (runner.embed(waveform, rate) for waveform in audio)
    if decision is not None:
        click.echo(sentence(decision, decision.decide(a, b, (len(audio[0]) / rate, len(audio[1]) / rate), preset)))
        return
    score = cosine(a, b)
    if threshold is None:
        assert artifact.threshold is not None, "checked above"
        threshold, source = artifact.threshold.value, f"fitted on {artifact.threshold.data}/{artifact.threshold.trials}"
    else:
        source = "given"
    click.echo(f"{verdict(score >= threshold)}: cosine {score:.4f}, threshold {threshold:.4f} ({source})")


def sentence(decision: Decision, found: Verdict) -> str:
    """Say what a stored decision gives."""
    normalized = f", AS-Norm {found.score:.3f}" if decision.cohort is not None else ""
    return (
        f"{verdict(found.accepted)}: log-odds {found.llr:.2f} (probability {found.probability:.4f} where half of the"
        f" pairs are one speaker's), cosine {found.cosine:.4f}{normalized}; preset {found.point.name}, from log-odds"
        f" {found.point.llr:.2f} on (fitted on {decision.data}/{decision.trials})"
    )


def verdict(accepted: bool) -> str:
    """Say what a decision means."""
    return "same speaker" if accepted else "different speakers"
