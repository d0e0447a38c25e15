"""``compress data check`` and ``compress data prepare``."""

import click

from compress.cli.display import Bars
from compress.data.check import Report, check_folder
from compress.data.prepare import prepare
from compress.units import format_seconds


@click.group("data")
def data_command() -> None:
    """Check data folders; make them from corpora."""


@data_command.command("check")
@click.argument("folder")
def check_command(folder: str) -> int:
    """Name every broken line, unusable audio file, outlier and unknown utterance of FOLDER."""
    with Bars().counter("decoding") as progress:
        report = check_folder(folder, progress=progress)
    for finding in report.findings:
        click.echo(str(finding))
    click.echo(summary(report))
    return 0 if report.ok else 2


@data_command.command("prepare")
@click.argument("corpus")
@click.argument("source")
@click.argument("out")
def prepare_command(corpus: str, source: str, out: str) -> None:
    """Make a data folder OUT from the corpus CORPUS (folder, speechocean762) downloaded to SOURCE."""
    with Bars().counter("reading") as progress:
        click.echo(f"{prepare(corpus, source, out, progress)} written. `compress data check {out}` looks it over.")


def summary(report: Report) -> str:
    """Say in a line what the folder holds and how many findings there are."""
    rates = ", ".join(f"{rate} Hz ({count})" for rate, count in report.sample_rates.items())
    trials = "".join(f", {name}: {t:,} targets, {n:,} non-targets" for name, (t, n) in report.trials.items())
    return (
        f"{report.folder}: {report.num_utterances:,} utterances, {report.num_speakers:,} speakers,"
        f" {format_seconds(report.duration_s)}, {rates}{trials}."
        f" {len(report.errors)} errors, {len(report.warnings)} warnings."
    )
