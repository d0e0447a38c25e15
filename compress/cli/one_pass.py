"""One pass as a command: MODEL in, artifact folder out; the options are the pass's fields."""

import dataclasses
import inspect
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from compress.artifact import Artifact
from compress.cli.display import Bars, open_model, print_table
from compress.data import DataFolder, embedded_data
from compress.data.folder import check_new
from compress.errors import UnmetBudgetError
from compress.machine import cores
from compress.models import ARCHITECTURES
from compress.passes import Pass, Preview, build
from compress.pipeline import calibration_context, check_calibration, check_files
from compress.runners import torch_threads


def command_of(kind: type[Pass]) -> click.Command:
    """Build the command of a pass."""

    def call(
        model: str,
        out: str | None,
        arch: str | None,
        calib: str | None,
        dry_run: bool,
        as_json: bool,
        **settings: Any,
    ) -> None:
        maker = build(kind, {name: value for name, value in settings.items() if value is not None})
        run_one(maker, model, out, arch, calib, dry_run, as_json)

    fields = dataclasses.fields(kind)
    options = [
        click.Option([f"--{f.name.replace('_', '-')}", f.name], metavar="VALUE", help=f"Default: {f.default}.")
        for f in fields
    ]
    return click.Command(
        kind.name,
        callback=call,
        params=[
            click.Argument(["model"]),
            click.Option(["--out"], metavar="DIR", help=f"Artifact folder. Default: MODEL-{kind.name}."),
            click.Option(["--arch"], metavar="NAME", help="Network of a checkpoint."),
            click.Option(["--calib"], metavar="FILE", help="List in the form of wav.scp. Default: the embedded one."),
            click.Option(["--dry-run"], is_flag=True, help="Check and tell what would be done; write nothing."),
            click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
            *options,
        ],
        help=inspect.getdoc(kind),
    )


def run_one(
    maker: Pass, model: str, out: str | None, arch: str | None, calib: str | None, dry_run: bool, as_json: bool
) -> None:
    """Run one pass and write the artifact folder; or tell what would be done.

    Raises:
        InputError: If the output folder holds something else, or the calibration list is too short.
    """
    artifact = open_model(model, arch)
    maker.check_input(artifact)
    check_files(maker)
    folder = Path(out or f"{Path(model).stem or Path(model).name}-{maker.name}")
    check_new(folder)
    bars = Bars()
    calibration = calibration_list(maker, calib, model, bars)
    context = replace(calibration_context(calibration, artifact), threads=cores(), say=bars.say, progress=bars)
    check_calibration(calibration, [maker], context)
    with torch_threads(cores()):
        if dry_run:
            print_preview(maker, maker.preview(artifact, context), model, artifact, folder, as_json)
            return
        try:
            result = maker.run(artifact, context)
        except UnmetBudgetError as error:
            error.best.save(folder)
            bars.say(f"{folder}: the nearest, for a look")
            raise
    result.save(folder)
    print_result(result, folder, as_json)


def print_preview(maker: Pass, preview: Preview, model: str, artifact: Artifact, folder: Path, as_json: bool) -> None:
    """Print what a pass would do."""
    if as_json:
        about = {"pass": maker.name, "settings": maker.settings, "model": model, "params": artifact.params}
        click.echo(json.dumps({**about, "out": str(folder), **asdict(preview)}, indent=2))
        return
    click.echo(f"{maker}\n{model}: {artifact.params:,} parameters, {artifact.format.value}")
    print_table(preview.rows)
    for note in preview.notes:
        click.echo(note)
    click.echo(f"would write {folder}")


def print_result(result: Artifact, folder: Path, as_json: bool) -> None:
    """Print what a pass did."""
    step = result.history[-1]
    if as_json:
        about = {"pass": step.name, "settings": dict(step.settings), "notes": list(step.notes), "out": str(folder)}
        deferred = asdict(result.deferred) if result.deferred else None
        figures = {"params": result.params, "size_bytes": result.size_bytes, "macs": result.macs, "deferred": deferred}
        click.echo(json.dumps({**about, **figures}, indent=2))
        return
    for note in step.notes:
        click.echo(note)
    if result.deferred:
        click.echo(f"deferred: {result.deferred.reason}\nin {folder} on the target run:\n    {result.deferred.command}")
    click.echo(f"{folder}: {result.params:,} parameters, {result.size_bytes:,} bytes")


def calibration_list(maker: Pass, calib: str | None, model: str, bars: Bars) -> DataFolder:
    """Read the calibration list, and tell which that is.

    Raises:
        InputError: If the list is missing or broken.
    """
    wanted = maker.calibration_utterances
    nothing = DataFolder(Path(), {})
    if not wanted and calib is None:
        return nothing
    listed = (DataFolder.read(embedded_data()) if calib is None else nothing).calibration(calib)
    bars.say(f"calibration: {wanted} utterances of {calib or 'the embedded synthetic voices'}")
    if calib is None and model not in ARCHITECTURES:
        bars.say("warning: calibrate your own model on your own speech, with --calib FILE.")
    return listed
