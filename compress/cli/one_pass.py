"""One pass as a command: MODEL in, artifact folder out; the options are the pass's fields."""

import dataclasses
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import click

from compress.artifact import Artifact
from compress.cli.display import Bars
from compress.data import DataFolder, embedded_data
from compress.data.folder import check_new
from compress.machine import cores
from compress.models import ARCHITECTURES
from compress.passes import Context, Pass, build
from compress.pipeline import calibration_features, check_calibration
from compress.runners import torch_threads


def command_of(kind: type[Pass]) -> click.Command:
    """Build the command of a pass."""

    def call(model: str, out: str | None, arch: str | None, calib: str | None, dry_run: bool, **settings: Any) -> None:
        maker = build(kind, {name: value for name, value in settings.items() if value is not None})
        run_one(maker, model, out, arch, calib, dry_run)

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
            *options,
        ],
        help=inspect.getdoc(kind),
    )


def run_one(maker: Pass, model: str, out: str | None, arch: str | None, calib: str | None, dry_run: bool) -> None:
    """Run one pass and write the artifact folder.

    Raises:
        InputError: If the output folder holds something else, or the calibration list is too short.
    """
    artifact = Artifact.open(model, arch)
    maker.check_input(artifact)
    folder = Path(out or f"{Path(model).stem or Path(model).name}-{maker.name}")
    check_new(folder)
    bars = Bars()
    calibration = calibration_list(maker, calib, model, bars)
    check_calibration(calibration, [maker], artifact)
    if dry_run:
        click.echo(f"{maker!r}\n{model}: {artifact.params:,} parameters, {artifact.format.value}\nwould write {folder}")
        return
    features = [partial(calibration_features, calibration, u, artifact) for u in calibration.utterances]
    with torch_threads(cores()):
        result = maker.run(artifact, Context(features, cores(), say=bars.say))
    result.save(folder)
    for note in result.history[-1].notes:
        click.echo(note)
    if result.deferred:
        click.echo(f"deferred: {result.deferred.reason}\nin {folder} on the target run:\n    {result.deferred.command}")
    click.echo(f"{folder}: {result.params:,} parameters, {result.size_bytes:,} bytes")


def calibration_list(maker: Pass, calib: str | None, model: str, bars: Bars) -> DataFolder:
    """Read as much of the calibration list as the pass asks for, and tell which list that is.

    Raises:
        InputError: If the list is missing or too short.
    """
    wanted = maker.calibration_utterances
    nothing = DataFolder(Path(), {})
    if not wanted and calib is None:
        return nothing
    listed = (DataFolder.read(embedded_data()) if calib is None else nothing).calibration(calib, count=wanted)
    bars.say(f"calibration: {wanted} utterances of {calib or 'the embedded synthetic voices'}")
    if calib is None and model not in ARCHITECTURES:
        bars.say("warning: calibrate your own model on your own speech, with --calib FILE.")
    return listed
