"""A student of an eighth of its teacher: learned from labels alone, and with each loss of distillation.

    compress train recipes/ecapa_tdnn_speechocean762.yaml --data DIR/train --noise NOISE --out runs/train-ecapa_tdnn
    python benchmarks/student.py runs/train-ecapa_tdnn/model [--seeds 1,2,3] [--rows NAME,...] [--out runs/student]

The teacher is the ECAPA-TDNN of our recipe with 512 channels, the student one with 128. All rows of a seed start from
the same weights and hear the same crops in the same order; only what they are asked to equal differs. They learn on
the train speakers of speechocean762 with the noise of ESC-10, in the folder that COMPRESS_BENCH_DATA names (unset:
../shared/data beside the repository), and are measured on the dev speakers, list `trials_hard`, of whom nothing is
learned. What a seed gave is stored in --out, so that an interrupted run goes on. On two cores three seeds take hours;
`--device cuda` takes minutes.
"""

import copy
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import torch
from pruning import BENCH_DATA, TRIALS, markdown
from results import write_section
from torch import Tensor
from torch.utils.data import DataLoader

from compress import machine
from compress.artifact import Artifact, versions
from compress.cli.display import Bars
from compress.data import DataFolder
from compress.evaluation.speakers import Verification, measure
from compress.passes.base import Array
from compress.runners import open_runner
from compress.training.corpus import Corpus
from compress.training.objective import Objective
from compress.training.prepare import list_noise, list_speech, prepare
from compress.training.recipe import Recipe, build_network, to_yaml
from compress.training.teacher import Answers
from compress.training.trainer import Crops, State, num_speeds, train_step
from compress.training.tutor import Tutor, find_tutor
from compress.units import format_interval, format_percent

LABELS = "labels alone"
ROWS: Mapping[str, Objective] = {
    LABELS: Objective(alpha=1.0),
    "labels, soft labels": Objective(alpha=1.0, beta=0.7),
    "labels, features": Objective(alpha=1.0, gamma=5.0),
    "labels, relations": Objective(alpha=1.0, delta=20.0),
    "labels, embeddings": Objective(alpha=1.0, embedding=10.0),
    "all of these": Objective(alpha=1.0, beta=0.7, gamma=5.0, delta=20.0, embedding=10.0),
}
STUDENT = Recipe(
    model="ecapa_tdnn",
    arguments={"embedding_size": 192, "channels": [128, 128, 128, 128, 384]},
    steps=1000,
    final_steps=120,
    learning_rate=2e-3,
    warmup_steps=100,
    margin_steps=(200, 600),
    speeds_from_step=200,
)


@dataclass(frozen=True, eq=False)
class SharedTutor(Tutor):
    """A teacher that answers every student of a batch at once."""

    last: list[tuple[Tensor, Answers]] = field(default_factory=list)

    def answers(self, features: Tensor) -> Answers:
        """What the teacher gives; computed once as long as the features stay the same."""
        if not self.last or self.last[0][0].data_ptr() != features.data_ptr():
            self.last[:] = [(features, super().answers(features))]  # kept, so that its place in memory stays taken
        return self.last[0][1]


@click.command()
@click.argument("teacher")
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--rows", default=",".join(str(i) for i in range(len(ROWS))), show_default=True, help="Which to train.")
@click.option("--steps", type=int, default=STUDENT.steps, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--workers", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/student"), show_default=True)
@click.option("--dry", is_flag=True, help="Print the table instead of writing it.")
def main(
    teacher: str, seeds: str, rows: str, steps: int, device: str, threads: int, workers: int, out: Path, dry: bool
) -> None:
    """Train what is not in OUT, measure, and write the table."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    torch.set_num_threads(threads)
    bars = Bars()
    wanted = {"0", *rows.split(",")}  # all are compared with labels alone
    asked = {name: objective for i, (name, objective) in enumerate(ROWS.items()) if str(i) in wanted}
    recipe = replace(STUDENT, steps=steps, final_steps=min(steps, STUDENT.final_steps))
    check_out(out, recipe, teacher)
    for seed in seeds.split(","):
        folder = out / f"seed-{seed}"
        missing = {name: asked[name] for name in asked if not student_folder(folder, name).exists()}
        if missing:
            students(missing, replace(recipe, seed=int(seed)), teacher, device, workers, folder, bars)
    text = section(list(asked), [out / f"seed-{seed}" for seed in seeds.split(",")], teacher, recipe, bars)
    if dry:
        click.echo(text)
    else:
        write_section("student", text)


def check_out(out: Path, recipe: Recipe, teacher: str) -> None:
    """Refuse a folder of students of another recipe, other objectives or another teacher."""
    made_of = f"{to_yaml(recipe)}{dict(ROWS)}\n{Artifact.open(teacher).sha256}\n"
    path = out / "made-of.txt"
    if path.exists() and path.read_text() != made_of:
        sys.exit(f"{out} holds students of another recipe, objective or teacher; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(made_of)


def student_folder(folder: Path, row: str) -> Path:
    """Where the student of a row is stored."""
    return folder / str(list(ROWS).index(row))


def students(
    rows: Mapping[str, Objective],
    recipe: Recipe,
    teacher: str,
    device: str,
    workers: int,
    folder: Path,
    bars: Bars,
) -> None:
    """Train the student of every row on the same crops, and store them."""
    data = folder.parent / "data"
    data.mkdir(parents=True, exist_ok=True)
    speech, noise = BENCH_DATA / "speechocean762" / "train", BENCH_DATA / "noise" / "esc10" / "wav.scp"
    prepare(list_speech(str(speech)), list_noise(noise), data, 0.0, workers, bars)
    corpus = Corpus.open(data)
    crops = Crops(recipe, corpus.utterances, corpus.speakers, corpus.noises)
    torch.manual_seed(recipe.seed)
    model = build_network(recipe)
    width = Artifact.from_module(model).embedding_size
    recipes = {
        name: replace(recipe, objective=objective, teacher=teacher if objective.needs_teacher else "")
        for name, objective in rows.items()
    }
    of_all = find_tutor(replace(recipe, objective=ROWS["all of these"], teacher=teacher), model, crops, device)
    assert of_all is not None
    last: list[tuple[Tensor, Answers]] = []
    states = {}
    for name, own in recipes.items():
        comparison = copy.deepcopy(of_all.comparison)
        comparison.objective = replace(own.objective, margin=own.margin, scale=own.scale[1])
        tutor = SharedTutor(of_all.module, of_all.taps, comparison, of_all.sha256, last) if own.teacher else None
        torch.manual_seed(recipe.seed)
        classes = crops.num_speakers * len(own.speeds)
        states[name] = State(copy.deepcopy(model), width, classes, own, device, tutor=tutor)
    loader = DataLoader(crops, batch_size=None, sampler=range(recipe.steps), num_workers=workers, prefetch_factor=8)
    with bars.counter(f"seed {recipe.seed}") as advance:
        for step, (features, labels) in enumerate(loader):
            classes = crops.num_speakers if num_speeds(recipe, step) == 1 else None
            told = {}
            batch = features.to(device), labels.to(device)
            for name, state in states.items():
                if 0 < step == recipe.speeds_from_step:
                    state.spread_classes(crops.num_speakers)
                told[name] = train_step(state, recipes[name], *batch, classes)
                state.step += 1
                state.update_average(recipe.average_decay)
            advance(step + 1, recipe.steps)
            if (step + 1) % 50 == 0:
                bars.say(f"step {step + 1}: {'; '.join(terms(name, line) for name, line in told.items())}")
    for name, state in states.items():
        trained = Artifact.from_module(state.average.cpu(), arch=recipe.model, arguments=recipe.arguments)
        trained.save(student_folder(folder, name))


def terms(name: str, line: Mapping[str, float]) -> str:
    """One student's terms of a step."""
    return f"{name}: " + " ".join(f"{term} {value:.3f}" for term, value in line.items() if term != "loss")


def section(rows: list[str], folders: list[Path], teacher: str, recipe: Recipe, bars: Bars) -> str:
    """The table: a row for every objective, a column for every seed."""
    data = Verification.read(DataFolder.read(BENCH_DATA / "speechocean762" / "dev"), TRIALS)
    tutor, student = Artifact.open(teacher), Artifact.open(str(student_folder(folders[0], rows[0])))
    heard = features(data, tutor, bars)
    theirs = measure(data, embeddings(heard, tutor))
    baselines = [embeddings(heard, Artifact.open(str(student_folder(folder, LABELS)))) for folder in folders]
    of_teacher = f"{format_percent(theirs.eer)} ({format_interval(theirs.eer_ci95)})"
    cells, notes = [["the teacher itself", *["–"] * len(folders), of_teacher, "–"]], []
    mean_of_labels = 0.0
    for row in rows:
        found = []
        for folder, baseline in zip(folders, baselines, strict=True):
            found.append(measure(data, embeddings(heard, Artifact.open(str(student_folder(folder, row)))), baseline))
            bars.say(f"{folder.name}, {row}: EER {format_percent(found[-1].eer)}")
        mean = float(np.mean([figures.eer for figures in found]))
        if row == LABELS:
            mean_of_labels = mean
        cells.append(
            [
                row,
                *(f"{format_percent(figures.eer)} ({format_interval(figures.eer_ci95)})" for figures in found),
                format_percent(mean),
                "–" if row == LABELS else f"{mean / mean_of_labels - 1:+.1%}",
            ]
        )
        if row != LABELS:
            rises = [figures.eer_rise_ci95 for figures in found]
            told = ", ".join(f"{100 * low:+.2f} to {100 * high:+.2f}" for low, high in (r for r in rises if r))
            notes.append(f"- {row}: paired difference to labels alone, points (95 %), seed by seed: {told}")
    columns = ["learned from", *(f.name.replace("-", " ") for f in folders), "mean EER", "to labels alone"]
    tested = ", ".join(f"{name} {number}" for name, number in versions().items())
    about = (
        f"Teacher: ECAPA-TDNN, {tutor.params / 1e6:.2f} M parameters; student: {student.params / 1e6:.2f} M,"
        f" {student.params / tutor.params:.1%} of it. {recipe.steps} steps of {recipe.batch_size} crops of"
        f" {recipe.crop_s:g} s. `{TRIALS}`, {len(data.trials.labels):,} trials of 50 speakers that were not trained on."
        f" {machine.describe()['cpu']}. {tested}."
    )
    weights = [f"- {row}: {weighed(ROWS[row])}" for row in rows]
    title = "## A student of an eighth of its teacher"
    return "\n\n".join([title, markdown(columns, cells), about, "\n".join(weights), "\n".join(notes)])


def weighed(objective: Objective) -> str:
    """The weights that are not 0."""
    named = {name: getattr(objective, name) for name in ("alpha", "beta", "gamma", "delta", "embedding")}
    return ", ".join(f"{name} {value:g}" for name, value in named.items() if value)


def features(data: Verification, artifact: Artifact, bars: Bars) -> list[Array]:
    """Features (1, frames, num_mel_bins) of the utterances of the trials: all networks here take the same."""
    front_end, names = artifact.front_end, data.trials.utterances
    heard = bars.track(names, "features")
    return [front_end(data.folder.waveform(name, front_end.sample_rate))[None] for name in heard]


def embeddings(heard: list[Array], artifact: Artifact) -> Array:
    """What a network gives for each utterance: (utterances, embedding_size)."""
    runner = open_runner(artifact, threads=1)
    with ThreadPoolExecutor(machine.cores()) as pool:
        return np.concatenate(list(pool.map(runner.run, heard)))


if __name__ == "__main__":
    main()
