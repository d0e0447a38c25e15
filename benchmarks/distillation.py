"""EER of the pruned CAM++ without recovery, with batch norm re-estimated and distilled; its section of docs/results.md.

    python benchmarks/distillation.py [--ratios 0.4,0.6] [--set steps=250] [--set crops=1000] [--dry]

The embedded CAM++ is pruned at the default settings and learns from its unpruned self on the train speakers of
speechocean762, without labels, in the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the
repository). Measured is on the dev speakers, list `trials_hard`; of them nothing is learned. The rise is paired with
the network before pruning, its interval a bootstrap over speakers.

`--set` changes a setting of the pass `distill` for all ratios; `--dry` prints the table and writes nothing.
"""

import copy
import sys
import time
from dataclasses import fields, replace

import click
from pruning import BENCH_DATA, COLUMNS, Bench, markdown
from results import write_section

from compress import machine
from compress.artifact import Artifact, Step
from compress.cli.display import Bars
from compress.evaluation.speakers import measure
from compress.passes import Distill, Prune, build
from compress.passes.recovery import reestimate_batch_norm
from compress.runners import torch_threads
from compress.units import format_percent

BN_UTTERANCES = 60


@click.command()
@click.option("--ratios", default="0.4,0.6", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting of distill; repeatable.")
@click.option("--dry", is_flag=True, help="Print the table instead of writing it.")
def main(ratios: str, assignments: tuple[str, ...], dry: bool) -> None:
    """Prune, recover in each way, measure, and write the table."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    settings = dict(assignment.split("=", 1) for assignment in assignments)
    maker = build(Distill, {"data": str(BENCH_DATA / "speechocean762" / "train"), **settings})
    bench = Bench.open(Bars())
    text = section(bench, [float(ratio) for ratio in ratios.split(",")], maker)
    if dry:
        click.echo(text)
    else:
        write_section("distillation", text)


def section(bench: Bench, ratios: list[float], maker: Distill) -> str:
    """The table, and what the pass told."""
    rows = [["0 %", "–", f"{bench.dense.params / 1e6:.2f} M", "–", format_percent(baseline_eer(bench)), "–", "1.000"]]
    notes = []
    for ratio in ratios:
        pruned = Prune(ratio=ratio, bn_utterances=0).run(bench.dense, bench.context)
        started = time.monotonic()
        with torch_threads(machine.cores()):
            taught = maker.run(pruned, replace(bench.context, source=bench.dense))
        minutes = (time.monotonic() - started) / 60
        variants = {"none": pruned, "batch norm re-estimated": reestimated(pruned, bench), "distilled": taught}
        for name, artifact in variants.items():
            cells = bench.cells(artifact, f"{ratio:.0%}, {name}")
            took = f"{minutes:.1f} min" if artifact is taught else "–"
            rows.append([f"{ratio:.0%}", name, f"{artifact.params / 1e6:.2f} M", took, *cells])
            bench.bars.say(" | ".join(rows[-1]))
        notes += [f"- {ratio:.0%}: {note}" for note in taught.history[-1].notes]
    columns = ["removed", "recovery", "params", "time", *COLUMNS]
    about = f"{bench.about()} {machine.describe()['cpu']}, {machine.cores()} threads. `{shown(maker)}`"
    told = "\n".join(notes)
    return f"## Distilled after pruning\n\n{markdown(columns, rows)}\n\n{about}\n\n{told}"


def baseline_eer(bench: Bench) -> float:
    """EER of the network before pruning."""
    return measure(bench.data, bench.baseline).eer


def reestimated(pruned: Artifact, bench: Bench) -> Artifact:
    """The pruned network with batch norm re-estimated, whether that brings it nearer to the dense one or not."""
    model = copy.deepcopy(pruned.module)
    load = bench.context.utterances(BN_UTTERANCES, "BN_UTTERANCES")
    reestimate_batch_norm(model, [utterance() for utterance in load])
    return pruned.with_model(model, Step("batch_norm", {"utterances": BN_UTTERANCES}))


def shown(maker: Distill) -> str:
    """The settings that are not at their defaults, and the name of the data without the folder of this machine."""
    changed = {f.name: getattr(maker, f.name) for f in fields(maker) if getattr(maker, f.name) != f.default}
    return f"distill({', '.join(f'{name}={value}' for name, value in (changed | {'data': 'train'}).items())})"


if __name__ == "__main__":
    main()
