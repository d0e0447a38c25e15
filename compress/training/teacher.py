"""What a teacher says of a fixed set of crops: computed once and kept, because a teacher costs as much as a step."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from compress.artifact import Artifact, Format, versions
from compress.files import cache_folder, keep, read_kept
from compress.progress import Progress
from compress.runners import open_runner
from compress.training.memory import out_of_memory_told
from compress.training.taps import STRETCHES, Tap, stretched, tapped

BATCH = 16


@dataclass(frozen=True, eq=False)
class Answers:
    """What a teacher gave for crops.

    Attributes:
        embeddings: (crops, embedding_size).
        features: Of each tap, (crops, channels, stretches).
        kept: Whether they came from the cache folder.
    """

    embeddings: Tensor
    features: Sequence[Tensor]
    kept: bool = False

    def of(self, places: slice | Tensor) -> "Answers":
        """Those of some of the crops."""
        return Answers(self.embeddings[places], [feature[places] for feature in self.features], self.kept)

    def to(self, device: str) -> "Answers":
        """The same on a device."""
        return Answers(self.embeddings.to(device), [feature.to(device) for feature in self.features], self.kept)


def answer(model: nn.Module, crops: Tensor, layers: Sequence[tuple[str, int | None]]) -> Answers:
    """Run a network over crops (crops, frames, num_mel_bins); ``layers`` are names with their axis of time."""
    with tapped(model, [name for name, _ in layers]) as seen:
        embeddings = model(crops).float()
    return Answers(embeddings, [stretched(seen[name].float(), axis) for name, axis in layers])


def answers_of(teacher: Artifact, crops: Tensor, taps: Sequence[Tap], threads: int, progress: Progress) -> Answers:
    """Run the teacher over crops (crops, frames, num_mel_bins), or read what it gave for the same crops before.

    Kept is by the hashes of the teacher's file, of the crops themselves and of the versions that compute; so nothing
    that decides the answers can change unnoticed. See :func:`compress.files.cache_folder`.
    """
    about = [teacher.sha256, [tap.teacher for tap in taps], STRETCHES, versions(), list(crops.shape)]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(crops.numpy().data)
    folder = cache_folder("distill")
    path = None if folder is None else folder / f"{digest.hexdigest()}.answers"
    data = None if path is None else read_kept(path)
    if data is not None:
        found = safetensors.torch.load(data)
        return Answers(found["embeddings"], [found[f"features_{i}"] for i in range(len(taps))], kept=True)
    answers = ask(teacher, crops, taps, threads, progress)
    if path is not None:
        features = {f"features_{i}": feature for i, feature in enumerate(answers.features)}
        keep(path, safetensors.torch.save({"embeddings": answers.embeddings, **features}))
    return answers


def ask(teacher: Artifact, crops: Tensor, taps: Sequence[Tap], threads: int, progress: Progress) -> Answers:
    """Run the teacher over crops (crops, frames, num_mel_bins).

    Raises:
        MachineError: If memory is too small.
    """
    batches = progress.track(torch.split(crops, BATCH), "asking the teacher")
    if teacher.format != Format.TORCH:
        runner = open_runner(teacher, threads)
        return Answers(torch.cat([torch.from_numpy(runner.run(batch.numpy())) for batch in batches]), [])
    layers = [(tap.teacher, tap.teacher_axis) for tap in taps]
    too_large = f"out of memory while asking the teacher, with {BATCH} crops at a time. Lower crop_s."
    with torch.no_grad(), out_of_memory_told(too_large):
        parts = [answer(teacher.module, batch, layers) for batch in batches]
    features = [torch.cat([part.features[i] for part in parts]) for i in range(len(taps))]
    return Answers(torch.cat([part.embeddings for part in parts]), features)
