"""Prune, export and quantize a network that the package has never heard of, and load the result again.

    python examples/03-foreign-module/prune_my_network.py [OUT]

The README beside this file says what it shows.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import compress
from compress import Artifact, FrontEnd
from compress.data import DataFolder, embedded_data
from compress.passes import PTQ, Context, Onnx, Prune
from compress.runners import open_runner


class TDNN(nn.Module):
    """Three convolutions over time, mean and deviation over the utterance, and a linear layer."""

    def __init__(self, width: int = 192, embedding_size: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, dilation in ((80, 1), (width, 2), (width, 3)):
            convolution = nn.Conv1d(inputs, width, 3, padding=dilation, dilation=dilation)
            layers += [convolution, nn.BatchNorm1d(width), nn.ReLU()]
        self.frames = nn.Sequential(*layers)
        self.embedding = nn.Linear(2 * width, embedding_size)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, frames, 80) -> (batch, embedding_size)."""
        x = self.frames(features.transpose(1, 2))
        statistics = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)
        y: Tensor = self.embedding(statistics)
        return y


def main(out: Path) -> None:
    """Run the three passes one after the other and say what became of the network."""
    torch.manual_seed(0)
    network = TDNN().eval()  # here: network.load_state_dict(torch.load("mine.pt", weights_only=True))
    front_end = FrontEnd(sample_rate=16000, num_mel_bins=80)
    artifact = Artifact.from_module(network, front_end, task="sv")

    data = DataFolder.read(embedded_data()).calibration()
    features = [front_end(data.waveform(utterance, front_end.sample_rate)) for utterance in data.utterances]
    context = Context(calibration=[lambda matrix=matrix: matrix for matrix in features], threads=1)

    pruned = Prune(ratio=0.3).run(artifact, context)
    exported = Onnx().run(pruned, context)
    quantized = PTQ(utterances=20).run(exported, context)
    for made in (pruned, exported, quantized):
        step = made.history[-1]
        print(f"{step.name}: {made.params:,} parameters, {made.size_bytes:,} bytes")
        for note in step.notes:
            print(f"    {note}")

    pruned.save(out / "pruned")
    exported.save(out / "onnx")
    quantized.save(out / "int8")

    # A torch artifact stores weights and widths, not code: loading it needs an instance of the class, of any width.
    again = open_runner(Artifact.load(out / "pruned", module=TDNN()))
    # An ONNX artifact needs nothing but the folder.
    deployed = compress.load(out / "int8", threads=1)

    waveform = data.waveform(data.utterances[0], front_end.sample_rate)
    before = open_runner(pruned).embed(waveform, front_end.sample_rate)
    for name, runner in (("pruned, reloaded", again), ("INT8, reloaded", deployed)):
        embedding = runner.embed(waveform, front_end.sample_rate)
        cosine = before @ embedding / (np.linalg.norm(before) * np.linalg.norm(embedding))
        print(f"{name}: cosine {cosine:.4f} to the pruned network")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/my-network"))
