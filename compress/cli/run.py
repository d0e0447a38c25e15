"""``compress run``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from compress.cli import DONE, FAILED, INTERRUPTED
from compress.cli.display import Bars, print_rows, tell_assumption
from compress.config import RunConfig, apply_settings, from_mapping, listed_passes, read_yaml
from compress.pipeline import Plan, Run, plan
from compress.report import summarize


@click.command("run")
@click.argument("model", required=False)
@click.option("--passes", metavar="LIST", help="Passes in order, for example prune,ptq,trt.")
@click.option("--set", "assignments", multiple=True, metavar="PASS.KEY=VALUE", help="A setting of a pass; repeatable.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML; options given here take precedence.")
@click.option("--arch", metavar="NAME", help="Network of a checkpoint; `compress models` lists them.")
@click.option("--data", metavar="DIR", help="Data folder. Without it the embedded data are used.")
@click.option("--trials", metavar="FILE", help="Trial list: a name in the data folder, or a path.")
@click.option("--calib", metavar="FILE", help="Calibration list in the form of wav.scp. Default: calib.scp of --data.")
@click.option("--out", metavar="DIR", help="Run folder. Default: runs/MODEL-PASSES.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Device of the PyTorch rows. Default: cpu.")
@click.option("--threads", type=int, help="Threads of every runtime while latency is measured. Default: 1.")
@click.option("--timing-s", type=float, metavar="SECONDS", help="Time spent on timing each row. Default: 5.")
@click.option("--resume", is_flag=True, help="Reuse the finished steps of an earlier run in the same folder.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a step was deferred.")
@click.option("--json", "as_json", is_flag=True, help="Print table.json instead of the table.")
def run_command(
    passes: str | None,
    assignments: tuple[str, ...],
    config: Path | None,
    resume: bool,
    dry_run: bool,
    strict: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Run passes over MODEL and measure it after each.

    MODEL is a registry name (default: campplus), a checkpoint with --arch, an artifact folder or an .onnx file.
    """
    planned = plan(read_config(config, passes, assignments, given))
    tell_assumption(planned.config.model, planned.source)
    if dry_run:
        print_plan(planned)
        return DONE
    try:
        result = Run(planned, resume, Bars()).execute()
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted. The same command with --resume goes on in {planned.config.folder}.", err=True)
        return INTERRUPTED
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_rows(result["rows"], summarize(result))
        click.echo(f"\n{planned.config.folder}: table.json, table.csv, table.md, report.html")
    statuses = {figures["status"] for figures in result["rows"]}
    return FAILED if "failed" in statuses or (strict and "deferred" in statuses) else DONE


def read_config(
    config: Path | None, passes: str | None, assignments: Sequence[str], given: Mapping[str, Any]
) -> RunConfig:
    """Read the configuration from a YAML file and the options, which take precedence.

    Raises:
        SettingError: For an unknown key, pass or setting, or a value out of range.
    """
    source = str(config) if config else "the command line"
    values = read_yaml(config) if config else {}
    values |= {name: value for name, value in given.items() if value is not None}
    if passes is not None:
        values["passes"] = passes
    if assignments:
        values["passes"] = apply_settings(listed_passes(values.get("passes"), source), assignments)
    return from_mapping(values, source)


def print_plan(planned: Plan) -> None:
    """Print what a run would do."""
    trials = planned.verification.trials
    click.echo(f"model        {planned.config.model}: {planned.source.params:,} parameters")
    click.echo(f"data         {planned.data.root}: {len(trials.utterances)} utterances, {len(trials):,} trials")
    click.echo(f"calibration  {len(planned.calibration)} utterances")
    click.echo(f"out          {planned.config.folder}")
    for warning in planned.warnings:
        click.echo(warning, err=True)
    for step in planned.steps:
        click.echo(f"{step.folder.name:<12} {step.maker}" if step.maker else f"{step.folder.name:<12} as it is")
