"""Whether making batches keeps up with learning on two cores; its section of docs/results.md.

    python benchmarks/data_loading.py [--steps 20] [--batches 10] [--utterances 600] [--threads 2] [--profile] [--dry]

The recipe of the embedded CAM++ on train speakers of speechocean762, with ESC-10 as noise, from the folder that
COMPRESS_BENCH_DATA names (unset: ../shared/data beside the repository). As `compress train` does by default, one
process learns on all cores (or `--threads`), and one makes batches beside it. Audio is held in memory, read from the
shards of stage 1, or replaced by the stored features of stage 2.

CPU time moves little with other work on the machine: where a step takes more of it than a batch, one process keeps up.
The share that waits for data is of the wall time of the steps; the first five are left out, while the loader fills.
`--profile` prints where the time of a live batch goes. `--dry` prints the table and writes nothing.
"""

import cProfile
import os
import pstats
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from pruning import markdown
from results import write_section

from compress import machine
from compress.artifact import Artifact, versions
from compress.cli.display import Bars
from compress.training.augment import PCM
from compress.training.corpus import Corpus
from compress.training.prepare import Files, list_noise, list_speech, prepare
from compress.training.recipe import Recipe, build_network, read_recipe
from compress.training.stored import StoredCrops, store_features
from compress.training.trainer import Crops, State, batches, train_step

BENCH_DATA = Path(os.environ.get("COMPRESS_BENCH_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
RECIPE = Path(__file__).parent.parent / "recipes" / "campplus_speechocean762.yaml"
FILLING = 5  # steps while the loader fills
COLUMNS = ("audio", "features", "crop", "batch, CPU", "step, CPU", "CPU of a step / of a batch", "step, wall", "waits")


@dataclass(frozen=True)
class Timing:
    """What was measured of a way to make batches."""

    batch_cpu_s: float  # medians
    step_cpu_s: float
    step_s: float
    waiting: float  # share of the wall time of all steps


@click.command()
@click.option("--steps", default=20, show_default=True, help="Of learning, after those while the loader fills.")
@click.option("--batches", "alone", default=10, show_default=True, help="That are timed alone.")
@click.option("--utterances", default=600, show_default=True)
@click.option("--threads", default=machine.cores(), show_default=True, help="Of the process that learns.")
@click.option("--profile", is_flag=True, help="Print where the time of a live batch goes, and end.")
@click.option("--dry", is_flag=True, help="Print the table instead of writing it.")
def main(steps: int, alone: int, utterances: int, threads: int, profile: bool, dry: bool) -> None:
    """Prepare data, time every way to make batches, and write the table."""
    speech = BENCH_DATA / "speechocean762" / "train"
    if not speech.is_dir():
        sys.exit(f"no speech at {speech}; set COMPRESS_BENCH_DATA")
    torch.set_num_threads(threads)
    bars = Bars()
    recipe = replace(read_recipe(RECIPE), speeds_from_step=0, copies=1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        corpus = few(speech, utterances, folder, bars)
        live = Crops(recipe, corpus.utterances, corpus.speakers, corpus.noises)
        if profile:
            print_profile(live, alone)
            return
        in_memory = Crops(
            recipe, list(map(copied, corpus.utterances)), corpus.speakers, list(map(copied, corpus.noises))
        )
        store_features(replace(recipe, features="stored"), corpus, folder, 1, bars)
        stored = StoredCrops(recipe, corpus, folder)
        ways = {("in memory", "live"): in_memory, ("shards", "live"): live, ("-", "stored"): stored}
        rows = []
        for first, crop_s in ((0, recipe.crop_s), (recipe.steps - recipe.final_steps, recipe.final_crop_s)):
            for (audio, features), crops in ways.items():
                found = measure(recipe, crops, first, steps, alone)
                bars.say(f"{audio}, {features}, {crop_s:g} s: {found}")
                rows.append(row(audio, features, crop_s, found))
    text = (
        f"## Data loading\n\n{markdown(COLUMNS, rows)}"
        + f"\n\nCAM++ by `{RECIPE.name}`: batches of {recipe.batch_size} crops, {recipe.precision}. {utterances}"
        + f" utterances of speechocean762. One process makes batches, one learns with {threads} thread(s).\n"
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + f". {machine.describe()['cpu']}, {machine.cores()} cores."
    )
    if dry:
        click.echo(text)
    else:
        write_section("data_loading", text)


def few(speech: Path, utterances: int, folder: Path, bars: Bars) -> Corpus:
    """Prepare some utterances, evenly spread over the list, and the noise."""
    listed = [one for part in list_speech(str(speech)) if isinstance(part, Files) for one in part.listed]
    chosen = listed[:: max(1, len(listed) // utterances)][:utterances]
    noise = BENCH_DATA / "noise" / "esc10" / "wav.scp"
    prepare([Files(tuple(chosen))], list_noise(noise if noise.is_file() else None), folder, 0.0, 1, bars)
    return Corpus.open(folder)


def copied(samples: PCM) -> PCM:
    """Hold in memory what is mapped."""
    return samples.copy()


def measure(recipe: Recipe, crops: Crops, first: int, steps: int, alone: int) -> Timing:
    """Time batches alone, then steps with a process beside that makes them."""
    made = []
    for step in range(first, first + alone):
        started = time.process_time()
        crops[step]
        made.append(time.process_time() - started)

    torch.manual_seed(0)
    model = build_network(recipe)
    width = Artifact.from_module(model).embedding_size
    state = State(model, width, crops.num_speakers * len(recipe.speeds), recipe)
    loader = iter(batches(crops, range(first, first + FILLING + steps), workers=1))
    waited, learned, computed = [], [], []
    for _ in range(FILLING + steps):
        started = time.monotonic()
        features, labels = next(loader)
        there, before = time.monotonic(), time.process_time()
        train_step(state, recipe, features, labels)
        waited.append(there - started)
        learned.append(time.monotonic() - there)
        computed.append(time.process_time() - before)
    waiting, learning = sum(waited[FILLING:]), sum(learned[FILLING:])
    medians = [statistics.median(times) for times in (made, computed[FILLING:], learned[FILLING:])]
    return Timing(*medians, waiting / (waiting + learning))


def row(audio: str, features: str, crop_s: float, found: Timing) -> list[str]:
    """A line of the table."""
    seconds = [f"{found.batch_cpu_s:.3f} s", f"{found.step_cpu_s:.2f} s"]
    ratio = f"{found.step_cpu_s / found.batch_cpu_s:.0f}"
    return [audio, features, f"{crop_s:g} s", *seconds, ratio, f"{found.step_s:.2f} s", f"{found.waiting:.1%}"]


def print_profile(crops: Crops, count: int) -> None:
    """Print the functions that take most time."""
    crops[0]
    profile = cProfile.Profile()
    profile.enable()
    for step in range(1, 1 + count):
        crops[step]
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
