"""``compress passes`` and ``models``: what there is."""

import dataclasses
import inspect

import click

from compress.models import ARCHITECTURES
from compress.passes import passes


@click.command("passes")
def passes_command() -> None:
    """List the passes and their settings."""
    for kind in passes().values():
        click.echo(f"{kind.name}  ({kind.accepts.value} -> {kind.returns.value})")
        click.echo(f"    {(inspect.getdoc(kind) or '').splitlines()[0]}")
        for field in dataclasses.fields(kind):
            click.echo(f"    {kind.name}.{field.name} = {field.default}")


@click.command("models")
def models_command() -> None:
    """List the networks known by name."""
    for network in ARCHITECTURES.values():
        weights = "embedded trained weights" if network.weights else "needs a checkpoint"
        click.echo(f"{network.name:<12} {network.task:<4} {network.summary}; {weights}")
