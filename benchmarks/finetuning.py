"""EER of the embedded CAM++ before and after fine-tuning on 20 speakers; its section of docs/results.md.

    python benchmarks/finetuning.py [--choices 1,2,3] [--set steps=400] [--folders DIR] [--dry]

Of the dev speakers of speechocean762, in the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the
repository), 20 are drawn. Ten utterances of each are the own data, the other ten are tested on: all pairs of one
speaker, and all pairs of two speakers of the same gender and age group, as in `trials_hard`. The 30 other speakers, of
whom nothing is learned, are tested in the same way with every sixth utterance. The differences are paired, their
intervals a bootstrap over speakers; all figures are those that the pass tells.

`--folders` writes the three data folders of the first choice (`own`, `test`, `others`) there and measures nothing:
those of examples/06-finetune-own-data. `--set` changes a setting of the pass; `--dry` prints the table and writes
nothing.
"""

import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from pruning import BENCH_DATA, markdown
from results import write_section

from compress import machine
from compress.artifact import Artifact
from compress.cli.display import Bars
from compress.data import DataFolder, write_folder
from compress.errors import UnmetBudgetError
from compress.passes import Context, Finetune, build

OWN_SPEAKERS = 20
OWN_UTTERANCES = 10
ADULT_AGE = 18
OTHERS_STEP = 6
TOLD = re.compile(r"EER on (.+?), ([\d,]+) trials: (.+?) to (.+?), ([-+].+)")


@click.command()
@click.option("--choices", default="1,2,3", show_default=True, help="Which draws of 20 speakers.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting of finetune; repeatable.")
@click.option("--folders", metavar="DIR", help="Write the data folders of the first choice and stop.")
@click.option("--dry", is_flag=True, help="Print the table instead of writing it.")
def main(choices: str, assignments: tuple[str, ...], folders: str | None, dry: bool) -> None:
    """Draw speakers, fine-tune, measure, and write the table."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    dev = DataFolder.read(BENCH_DATA / "speechocean762" / "dev")
    if folders:
        write_parts(dev, 1, Path(folders))
        return
    settings = dict(assignment.split("=", 1) for assignment in assignments)
    rows = [row for choice in map(int, choices.split(",")) for row in measured(dev, choice, settings)]
    columns = ["choice", "tested on", "EER before (95 %)", "after (95 %)", "change (95 %)", "trials", "minutes", "kept"]
    settled = ", ".join(f"{name}={value}" for name, value in settings.items()) or "the default settings"
    about = (
        f"The embedded CAM++ learned 10 utterances of each of {OWN_SPEAKERS} speakers, with {settled}. `test` are 10"
        f" other utterances of the same speakers, `others` 30 speakers of whom nothing was learned."
        f" {machine.describe()['cpu']}, {torch.get_num_threads()} threads; minutes of the CPU."
    )
    text = f"## Fine-tuned on own speakers\n\n{markdown(columns, rows)}\n\n{about}"
    if dry:
        click.echo(text)
    else:
        write_section("finetuning", text)


def measured(dev: DataFolder, choice: int, settings: Mapping[str, str]) -> list[list[str]]:
    """Fine-tune on one choice of speakers; rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_parts(dev, choice, root)
        parts = {"data": "own", "trials": "test", "keep": "others"}
        maker = build(Finetune, {**settings, **{name: str(root / part) for name, part in parts.items()}})
        started = time.process_time()
        try:
            tuned, kept = maker.run(Artifact.open("campplus"), Context(progress=Bars())), "yes"
        except UnmetBudgetError as error:
            tuned, kept = error.best, "no"
        minutes = f"{(time.process_time() - started) / 60:.1f}"
    rows = []
    for part, note in zip(("test", "others"), tuned.history[-1].notes[2:4], strict=True):
        found = TOLD.fullmatch(note)
        assert found, note
        _, trials, before, after, change = found.groups()
        rows.append([str(choice), part, before, after, change, trials, minutes, kept])
    return rows


def write_parts(dev: DataFolder, choice: int, root: Path) -> None:
    """Write the data folders of one choice: ``own``, ``test`` and ``others``."""
    rng = np.random.default_rng(choice - 1)
    groups: dict[str, list[str]] = {}
    for name in sorted(dev.utterances):
        groups.setdefault(dev.speaker(name), []).append(name)
    chosen = sorted(rng.permutation(sorted(groups))[:OWN_SPEAKERS].tolist())
    own, test = [], []
    for speaker in chosen:
        order = rng.permutation(groups[speaker]).tolist()
        own += order[:OWN_UTTERANCES]
        test += order[OWN_UTTERANCES:]
    others = [name for speaker in sorted(set(groups) - set(chosen)) for name in groups[speaker][::OTHERS_STEP]]
    for part, names in (("own", own), ("test", test), ("others", others)):
        lists = {
            "wav.scp": [f"{name} {os.path.relpath(dev.path(name), root / part)}" for name in names],
            "utt2spk": [f"{name} {dev.speaker(name)}" for name in names],
        }
        write_folder(root / part, lists if part == "own" else {**lists, "trials": list(trials(dev, names))})


def trials(dev: DataFolder, names: Sequence[str]) -> Iterable[str]:
    """All pairs of one speaker, and of two of one gender and age group."""
    for one, other in itertools.combinations(names, 2):
        first, second = dev.speaker(one), dev.speaker(other)
        if first == second or group(dev, first) == group(dev, second):
            yield f"{int(first == second)} {one} {other}"


def group(dev: DataFolder, speaker: str) -> tuple[str, bool]:
    """Gender, and whether of age."""
    return dev.spk2gender[speaker], dev.spk2age[speaker] >= ADULT_AGE


if __name__ == "__main__":
    main()
