"""Make embedded weights of a trained artifact: half precision, with threshold and golden outputs.

    python recipes/package_weights.py runs/train-campplus/model compress/models/weights/campplus

The threshold is fitted on the embedded data. The model card (README.md) beside the weights is written by hand.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import click

from compress.artifact import Artifact, Threshold
from compress.cli.display import Bars
from compress.data import DataFolder, embedded_data
from compress.errors import InputError
from compress.evaluation.speakers import Verification, measure
from compress.files import replaced_folder
from compress.runners import golden_outputs, open_runner

CARD = "README.md"


@click.command()
@click.argument("trained", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(trained: Path, out: Path) -> None:
    """Package the artifact TRAINED as embedded weights in OUT."""
    if out.exists() and not (out / "artifact.json").is_file():
        raise InputError(f"{out} exists and is not an artifact folder. Choose another one.")
    artifact = Artifact.load(trained)
    rounded = {
        name: v.half().float() if v.is_floating_point() else v for name, v in artifact.module.state_dict().items()
    }
    artifact.module.load_state_dict(rounded)
    runner = open_runner(artifact, threads=1)
    data = Verification.read(DataFolder.read(embedded_data()))
    figures = measure(data, data.embed(runner, Bars(), "embedding the embedded data"))
    front_end, speech = artifact.front_end, data.folder
    examples = [front_end(speech.waveform(name, front_end.sample_rate)) for name in data.trials.utterances[:2]]
    packaged = replace(
        artifact,
        golden=golden_outputs(runner, [examples[0], examples[1][:88]]),
        threshold=Threshold(figures.threshold, figures.eer, "trials", "embedded"),
        metrics={name: value for name, value in asdict(figures).items() if value is not None},
    )
    with replaced_folder(out) as folder:
        if (out / CARD).is_file():
            shutil.copyfile(out / CARD, folder / CARD)
        replace(packaged, model=artifact.module.half()).write(folder)
    click.echo(f"{out}: EER {figures.eer:.2%} on the embedded data, threshold {figures.threshold:.4f}")


if __name__ == "__main__":
    main()
