"""``compress train``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.cli.display import Bars
from compress.errors import MachineError, SettingError
from compress.files import sha256_of
from compress.machine import cores, probe_cuda
from compress.training.parallel import join_processes
from compress.training.recipe import read_recipe
from compress.training.stages import BASE, BOARD, CURVES, FINETUNE, MODEL, STAGES, Plan, run_stages
from compress.training.watch import Line, plot_curves, reporter, summary_writer, tensorboard


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DIR", help="Data folder with wav.scp and utt2spk, or folder of shards.")
@click.option("--noise", type=click.Path(path_type=Path), help="Noise recordings, in the form of wav.scp.")
@click.option("--dev", metavar="DIR", help="Data folder to measure on: must share no speaker and no audio with --data.")
@click.option("--trials", metavar="NAME", help="Trial list of --dev whose EER is shown. Default: its only one.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the stages and the artifact.")
@click.option(
    "--init", metavar="MODEL", help="Start from these weights: artifact folder, registered model, checkpoint."
)
@click.option("--max-unreadable", default="0%", show_default=True, help="Utterances that may be left out.")
@click.option("--stage", type=click.IntRange(1, len(STAGES)), help="Start anew with this stage, on those before it.")
@click.option("--resume", is_flag=True, help="Go on with what is in --out.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Of each process. Default: all cores, shared out.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes that make batches."
)
@click.option("--tensorboard", "board", is_flag=True, help="Write the figures for TensorBoard into --out, too.")
@click.option("--half", is_flag=True, help="Store the weights in half precision.")
def train_command(
    recipe: Path,
    data: str,
    noise: Path | None,
    dev: str | None,
    trials: str | None,
    out: Path,
    init: str | None,
    max_unreadable: str,
    stage: int | None,
    resume: bool,
    device: str,
    threads: int | None,
    workers: int,
    board: bool,
    half: bool,
) -> None:
    """Train a speaker-embedding network by the YAML file RECIPE, in four stages; its weights become an artifact."""
    settings = read_recipe(recipe)
    share = read_share(max_unreadable)
    if trials and not dev:
        raise SettingError("--trials is a list of --dev, and there is none. Give its folder with --dev DIR.")
    if device == "cuda" and probe_cuda().missing:
        raise MachineError(f"device cuda: {probe_cuda().missing}. Use --device cpu.")
    if board:
        summary_writer()  # not installed: told at once
    processes = join_processes(device)
    torch.set_num_threads(threads or max(1, cores() // processes.count))
    bars = Bars(quiet=not processes.writes)
    plan = Plan(settings, data, out, noise, dev, trials, init, share, device, workers, stage, resume)

    @contextmanager
    def watch() -> Iterator[Callable[[Line], None]]:
        folder = out / BOARD if board and processes.writes else None
        with (
            bars.counter("training") as advance,
            tensorboard(folder, reporter(settings.steps, bars.say, advance)) as report,
        ):
            yield report

    try:
        state = run_stages(plan, bars, watch, processes)
    except KeyboardInterrupt:
        bars.say(f"the same command with --resume{' in place of --stage' if stage else ''} goes on in {out}")
        raise
    if not processes.writes:
        return
    bars.say(plot_curves([out / name / "train.jsonl" for name in (BASE, FINETUNE)], out / CURVES))
    trained = Artifact.from_module(state.average.cpu(), arch=settings.model, arguments=settings.arguments)
    if half:
        trained = replace(trained, model=trained.module.half())
    model = out / MODEL
    weights = model / FILE_NAMES[Format.TORCH]
    if weights.is_file() and sha256_of(weights) == trained.sha256:  # of this training, perhaps with a threshold since
        bars.say(f"{model}: made before")
    else:
        trained.save(model)
    click.echo(f"{model}: {trained.params:,} parameters, {trained.size_bytes:,} bytes. Measure it with")
    chosen = f" --trials {trials}" if trials else ""
    click.echo(f"    compress eval {model} --data {dev or 'DIR'}{chosen}")


def read_share(text: str) -> float:
    """Read a share such as ``1%`` or ``0.01``.

    Raises:
        SettingError: If it is none in 0..1.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SettingError(f"--max-unreadable must be a share such as 1% or 0.01, got '{text}'.")
    return share
