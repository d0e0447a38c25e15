"""INT8 of the embedded CAM++ by `ptq` alone and after learning with rounded numbers; its section of docs/results.md.

    python benchmarks/qat.py [--steps 40] [--learning-rate 1e-5] [--dry]

The student of `distill` with `qat` is CAM++ itself, its teacher the same in float; it learns on the train speakers of
speechocean762, without labels, in the folder that COMPRESS_BENCH_DATA names (unset: ../shared/data beside the
repository). Both networks are exported and quantized with the default settings of `ptq`. Measured is on the dev
speakers, list `trials_hard`; the rise is paired with the float network, its interval a bootstrap over speakers.
"""

import sys

import click
from distillation import shown
from pruning import BENCH_DATA, COLUMNS, Bench, markdown
from results import write_section

from compress import machine
from compress.cli.display import Bars
from compress.passes import PTQ, Distill, Onnx
from compress.runners import torch_threads


@click.command()
@click.option("--steps", type=int, default=40, show_default=True)
@click.option("--learning-rate", type=float, default=1e-5, show_default=True)
@click.option("--dry", is_flag=True, help="Print the table instead of writing it.")
def main(steps: int, learning_rate: float, dry: bool) -> None:
    """Quantize both, measure, and write the table."""
    if not (BENCH_DATA / "speechocean762").is_dir():
        sys.exit(f"no speech at {BENCH_DATA / 'speechocean762'}; set COMPRESS_BENCH_DATA")
    bench = Bench.open(Bars())
    train = str(BENCH_DATA / "speechocean762" / "train")
    maker = Distill(
        teacher="campplus",
        qat=True,
        data=train,
        steps=steps,
        batch_size=8,
        crops=800,
        learning_rate=learning_rate,
    )
    with torch_threads(machine.cores()):
        taught = maker.run(bench.dense, bench.context)
    rows = []
    for name, network in {"ptq": bench.dense, "distill with qat, ptq": taught}.items():
        int8 = PTQ().run(Onnx().run(network, bench.context), bench.context)
        rows.append([name, *bench.cells(int8, name)])
        bench.bars.say(" | ".join(rows[-1]))
    told = "\n".join(f"- {note}" for note in taught.history[-1].notes)
    about = f"{bench.about()} {machine.describe()['cpu']}, {machine.cores()} threads. `{shown(maker)}`."
    text = f"## Learning for INT8\n\n{markdown(['INT8 by', *COLUMNS], rows)}\n\n{about}\n\n{told}"
    if dry:
        click.echo(text)
    else:
        write_section("qat", text)


if __name__ == "__main__":
    main()
