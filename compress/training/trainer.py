"""The training loop: warm-up and cosine schedule, growing margin, weight averaging, checkpoints, resume."""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress.features import fbank_cmn
from compress.training.augment import PCM, augment, random_crop
from compress.training.loss import AAMSoftmax
from compress.training.recipe import Recipe


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Batches by step number: the same recipe, data and step give the same batch, so a resumed run repeats nothing."""

    def __init__(
        self, recipe: Recipe, utterances: Sequence[PCM], speakers: NDArray[np.int64], noises: Sequence[PCM]
    ) -> None:
        self.recipe, self.utterances, self.speakers, self.noises = recipe, utterances, speakers, noises
        self.num_speakers = int(speakers.max()) + 1
        self.members = [np.flatnonzero(speakers == s) for s in range(self.num_speakers)]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, step))
        last = step >= recipe.steps - recipe.final_steps
        length = int(16000 * (recipe.final_crop_s if last else recipe.crop_s))
        speeds = len(recipe.speeds) if step >= recipe.speeds_from_step else 1
        features, labels = [], []
        for _ in range(recipe.batch_size):
            speaker, speed = int(rng.integers(self.num_speakers)), int(rng.integers(speeds))
            utterance = self.utterances[rng.choice(self.members[speaker])]
            crop = random_crop(utterance, length, recipe.speeds[speed], rng)
            crop = augment(crop, recipe.augmentation, self.noises, self.utterances, rng)
            features.append(fbank_cmn(crop))
            labels.append(speed * self.num_speakers + speaker)
        return torch.from_numpy(np.stack(features)), torch.tensor(labels)


class State:
    """Network, averaged network, classifier and optimizer: what a checkpoint holds."""

    def __init__(
        self, model: nn.Module, embedding_size: int, num_classes: int, recipe: Recipe, device: str = "cpu"
    ) -> None:
        self.step, self.device = 0, device
        self.model = model.to(device).train()
        self.average = copy.deepcopy(model).eval()
        self.classifier = AAMSoftmax(embedding_size, num_classes).to(device)
        parameters = [*model.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)

    def save(self, path: Path) -> None:
        """Write everything needed to go on, through a temporary name."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "classifier", "optimizer")}
        partial = path.with_suffix(".partial")
        torch.save({"step": self.step, **parts}, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Read a checkpoint written by :meth:`save`."""
        parts = torch.load(path, map_location=self.device, weights_only=True)
        self.step = parts.pop("step")
        for name, part in parts.items():
            getattr(self, name).load_state_dict(part)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averaged weights and batch-norm statistics towards the present ones."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    @torch.no_grad()
    def spread_classes(self, num_speakers: int) -> None:
        """Start the classes of the further speeds at the center of the same speaker."""
        weight = self.classifier.weight
        for first in range(num_speakers, len(weight), num_speakers):
            weight[first : first + num_speakers] = weight[:num_speakers]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to the final learning rate."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    low = recipe.final_learning_rate
    return low + (recipe.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))


def ramp(recipe: Recipe, step: int) -> float:
    """How far margin and scale have grown at a step, 0..1."""
    start, end = recipe.margin_steps
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def train(
    state: State,
    recipe: Recipe,
    crops: Crops,
    folder: Path,
    report: Callable[[dict[str, float]], None],
    checkpoint_every: int = 200,
) -> None:
    """Train from ``state.step`` to the end; checkpoints and ``train.jsonl`` are written to ``folder``.

    A step that was interrupted half-way is repeated on resume.
    """
    steps = range(state.step, recipe.steps)
    loader = DataLoader(crops, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=4)
    checkpoint = folder / "checkpoint.pt"
    try:
        with (folder / "train.jsonl").open("a") as log:
            for features, labels in loader:
                started = time.monotonic()
                if state.step == recipe.speeds_from_step:
                    state.spread_classes(crops.num_speakers)
                loss, accuracy = train_step(state, recipe, features, labels)
                state.step += 1
                state.update_average(recipe.average_decay)
                line = {"step": state.step, "loss": loss, "accuracy": accuracy, "step_s": time.monotonic() - started}
                log.write(json.dumps(line) + "\n")
                log.flush()
                report(line)
                if state.step % checkpoint_every == 0:
                    state.save(checkpoint)
    finally:
        state.save(checkpoint)  # an interrupt loses the running step at most


def train_step(state: State, recipe: Recipe, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """One update on features (batch, frames, num_mel_bins) and class labels (batch,); returns loss and accuracy."""
    grown = ramp(recipe, state.step)
    state.classifier.margin = recipe.margin * grown
    state.classifier.scale = recipe.scale[0] + (recipe.scale[1] - recipe.scale[0]) * grown
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    features, labels = features.to(state.device), labels.to(state.device)
    with torch.autocast(state.device, torch.bfloat16, enabled=recipe.precision == "bf16"):
        embedding = state.model(features)
    loss, accuracy = state.classifier(embedding.float(), labels)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), 5.0)
    state.optimizer.step()
    return loss.item(), accuracy.item()
