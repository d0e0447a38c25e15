"""``compress train``."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch

from compress.artifact import Artifact
from compress.cli.display import Bars
from compress.data import DataFolder
from compress.errors import InputError, MachineError
from compress.files import is_temporary, write_text
from compress.machine import cores, probe_cuda
from compress.surgery import count_parameters
from compress.training.corpus import fingerprint, load_noise, load_speech
from compress.training.recipe import build_network, read_recipe, to_yaml
from compress.training.trainer import Crops, State, train
from compress.training.tutor import find_tutor

LINE_EVERY = 50  # steps


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DIR", help="Data folder with wav.scp and utt2spk.")
@click.option("--noise", type=click.Path(path_type=Path), help="Noise recordings, in the form of wav.scp.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of checkpoints and the artifact.")
@click.option("--init", metavar="MODEL", help="Start from the weights of this artifact folder or registered model.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: all cores.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes that make batches."
)
@click.option("--half", is_flag=True, help="Store the weights in half precision.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def train_command(
    recipe: Path,
    data: str,
    noise: Path | None,
    out: Path,
    init: str | None,
    device: str,
    threads: int | None,
    workers: int,
    half: bool,
    resume: bool,
) -> None:
    """Train a speaker-embedding network by the YAML file RECIPE; the averaged weights become an artifact folder."""
    settings = read_recipe(recipe)
    check_out(out, resume)
    if device == "cuda" and probe_cuda().missing:
        raise MachineError(f"device cuda: {probe_cuda().missing}. Use --device cpu.")
    torch.set_num_threads(threads or cores())
    torch.manual_seed(settings.seed)
    model = build_network(settings)
    initial = Artifact.open(init).module.state_dict() if init else None
    width = Artifact.from_module(model).embedding_size
    bars = Bars()
    folder = DataFolder.read(data)
    utterances, speakers = load_speech(folder, bars)
    crops = Crops(settings, utterances, speakers, load_noise(noise, bars))
    num_classes = crops.num_speakers * len(settings.speeds)
    tutor = find_tutor(settings, model, crops, device)
    if tutor:
        bars.say(f"learning from {settings.teacher}, {count_parameters(tutor.module):,} parameters")
    state = State(model, width, num_classes, settings, device, fingerprint(folder, noise), tutor)
    checkpoint = out / "checkpoint.pt"
    if resume and checkpoint.exists():
        state.load(checkpoint)
        bars.say(f"going on after step {state.step}")
    elif initial:
        state.start_from(initial, crops)
        bars.say(f"starting from the weights of {init}")
    write_text(out / "recipe.yaml", to_yaml(settings))
    with bars.counter("training") as advance:
        train(state, settings, crops, out, reporter(bars, settings.steps, advance), workers=workers)
    trained = Artifact.from_module(state.average.cpu(), arch=settings.model, arguments=settings.arguments)
    if half:
        trained = replace(trained, model=trained.module.half())
    trained.save(out / "model")
    click.echo(f"{out / 'model'}: {trained.params:,} parameters, {trained.size_bytes:,} bytes. Measure it with")
    click.echo(f"    compress eval {out / 'model'} --data DIR")


def check_out(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, or a training when ``resume`` was not asked for.

    Raises:
        InputError: Naming what is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file. Choose another --out folder.")
    begun = any((out / name).exists() for name in ("checkpoint.pt", "train.jsonl"))
    if begun and not resume:
        raise InputError(f"{out} holds a training already. Go on with it by --resume, or choose another --out folder.")
    foreign = [path.name for path in out.iterdir() if not is_temporary(path) and path.name != "recipe.yaml"]
    if foreign and not begun:
        raise InputError(f"{out} is not empty and not a training. Choose another --out folder.")


def reporter(bars: Bars, steps: int, advance: Callable[[int, int], None]) -> Callable[[dict[str, float]], None]:
    """Move the bar at every step, and print loss and accuracy now and then."""
    recent: list[dict[str, float]] = []

    def report(line: dict[str, float]) -> None:
        step = int(line["step"])
        advance(step, steps)
        recent.append(line)
        if step % LINE_EVERY == 0 or step == steps:
            mean = {name: sum(x[name] for x in recent) / len(recent) for name in line}
            terms = [name for name in mean if name not in ("step", "accuracy", "step_s")]
            said = [f"{name} {mean[name]:.3f}" for name in (terms if len(terms) > 2 else terms[:1])]
            said += [f"accuracy {mean['accuracy']:.1%}"] if "accuracy" in mean else []
            bars.say(f"step {step} of {steps}: {', '.join(said)}, {mean['step_s']:.2f} s a step")
            recent.clear()

    return report
