"""The training loop: warm-up and cosine schedule, growing margin, weight averaging, checkpoints, resume."""

import copy
import io
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress.errors import InputError, MachineError, ModelError
from compress.features import NUM_MEL_BINS, fbank_cmn, num_frames
from compress.files import append_line, replaced_file
from compress.models.checkpoint import BROKEN_PICKLE, load_into
from compress.training.augment import (
    PCM,
    Array,
    changed,
    draw_changes,
    draw_crop,
    draw_feature_changes,
    random_crop,
)
from compress.training.loss import AAMSoftmax
from compress.training.memory import out_of_memory_told
from compress.training.parallel import ALONE, Processes
from compress.training.recipe import Recipe, to_plain, to_yaml
from compress.training.teacher import Answers
from compress.training.tutor import Tutor

PARTS = ("model", "average", "classifier", "heads", "optimizer")


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Batches by step number: the same recipe, data and step give the same batch, so a resumed run repeats nothing."""

    def __init__(
        self, recipe: Recipe, utterances: Sequence[PCM], speakers: NDArray[np.int64], noises: Sequence[PCM]
    ) -> None:
        self.recipe, self.utterances, self.speakers, self.noises = recipe, utterances, speakers, noises
        self.num_speakers = int(speakers.max()) + 1
        self.members = [np.flatnonzero(speakers == s) for s in range(self.num_speakers)]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
        """The part of a batch that one of some processes computes; what is random is drawn for the whole."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, step))
        length = int(16000 * (recipe.final_crop_s if recipe.is_final(step) else recipe.crop_s))
        speeds = num_speeds(recipe, step)
        draws, labels = [], []
        for _ in range(recipe.batch_size):
            speaker, speed = int(rng.integers(self.num_speakers)), int(rng.integers(speeds))
            crop = self.draw(int(rng.choice(self.members[speaker])), speed, length, rng)
            draws.append((crop, draw_feature_changes(num_frames(length), NUM_MEL_BINS, recipe.augmentation, rng)))
            labels.append(speed * self.num_speakers + speaker)
        size = recipe.batch_size // (count * recipe.accumulation)  # dealt out in turn: each has some of each part
        mine = [place for place in range(recipe.batch_size) if place // size % count == rank]
        features = [changed(crop(), changes) for crop, changes in (draws[place] for place in mine)]
        return torch.from_numpy(np.stack(features)), torch.tensor([labels[place] for place in mine])

    def draw(self, number: int, speed: int, length: int, rng: np.random.Generator) -> Callable[[], Array]:
        """Draw a disturbed crop of ``length`` samples of an utterance at a speed.

        Its features (frames, num_mel_bins) are computed when what is returned is called.
        """
        crop = draw_crop(self.utterances[number], length, self.recipe.speeds[speed], rng)
        changes = draw_changes(length, self.recipe.augmentation, self.noises, self.utterances, rng)
        return lambda: fbank_cmn(changed(crop(), changes))

    def clean(self, label: int, count: int) -> Tensor:
        """Features (count, frames, num_mel_bins) of undisturbed crops of one class."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, label))
        speed, speaker = divmod(label, self.num_speakers)
        length = int(16000 * recipe.crop_s)
        utterances = [self.utterances[i] for i in rng.choice(self.members[speaker], count)]
        crops = [random_crop(utterance, length, recipe.speeds[speed], rng) for utterance in utterances]
        return torch.from_numpy(np.stack([fbank_cmn(crop) for crop in crops]))


class Shares(Dataset[tuple[Tensor, Tensor]]):
    """The share of one of some processes in each batch."""

    def __init__(self, crops: Crops, processes: Processes) -> None:
        self.crops, self.rank, self.count = crops, processes.rank, processes.count

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.crops.share(step, self.rank, self.count)


class Losses(nn.Module):
    """Network, classifier and heads of a distillation as one module, whose gradients are averaged over processes.

    Args:
        model: The network.
        classifier: Of speakers.
        tutor: With the heads, where there is a teacher.
        recipe: Which terms count, and the arithmetic.
        device: ``cpu`` or ``cuda``.
        processes: That train together.
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: AAMSoftmax,
        tutor: Tutor | None,
        recipe: Recipe,
        device: str,
        processes: Processes,
    ) -> None:
        super().__init__()
        self.model = model
        self.classifier = classifier.requires_grad_(recipe.objective.needs_speakers)
        self.heads = tutor.comparison if tutor else nn.Module()
        self.tutor, self.recipe, self.device, self.processes = tutor, recipe, device, processes

    def forward(
        self, features: Tensor, labels: Tensor, step: int, classes: int | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every term that counts, not weighted, and the share classified right, where classes are learned."""
        recipe, tutor = self.recipe, self.tutor
        terms: dict[str, Tensor] = {}
        accuracy = None
        with torch.autocast(self.device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            wanted = tutor.answers(features) if tutor else None
            given = (
                tutor.heard(self.model, features)
                if tutor
                else Answers(self.model(features).to(self.classifier.weight.dtype), [])
            )
        if recipe.objective.needs_speakers:
            # at the start the classes without crops push them away like all others, until speeds begin
            among = classes if recipe.is_final(step) and not recipe.final_speeds else None
            with torch.set_grad_enabled(recipe.objective.alpha > 0):
                classification, accuracy = self.classifier(given.embeddings, labels, among)
            if recipe.objective.alpha:
                terms["CE"] = classification
        if tutor and wanted:
            terms |= tutor.comparison(given, wanted, self.classifier, classes, self.processes)
        return terms, accuracy


class State:
    """Network, averaged network, classifier, heads of a distillation and optimizer: what a checkpoint holds.

    Args:
        model: Fresh, or trained before.
        embedding_size: Of the network.
        num_classes: Speakers times speeds.
        recipe: Of the training; a checkpoint of another one is refused.
        device: ``cpu`` or ``cuda``.
        data: Fingerprint of the training data; a checkpoint of others is refused.
        tutor: The teacher, where the recipe names one; a checkpoint of another is refused.
        processes: That train together; a checkpoint may be gone on with by more or fewer.

    Raises:
        SettingError: If a batch cannot be shared out among the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding_size: int,
        num_classes: int,
        recipe: Recipe,
        device: str = "cpu",
        data: str = "",
        tutor: Tutor | None = None,
        processes: Processes = ALONE,
    ) -> None:
        processes.check(recipe.batch_size, recipe.accumulation)
        self.step, self.device, self.tutor, self.processes = 0, device, tutor, processes
        teacher = tutor.sha256 if tutor else None
        self.origin = {"recipe": to_yaml(recipe), "classes": num_classes, "data": data, "teacher": teacher}
        self.average = copy.deepcopy(model).to(device).eval()
        self.model = processes.common(model.to(device).train())
        self.classifier = AAMSoftmax(embedding_size, num_classes, sub_centers=recipe.sub_centers).to(device)
        self.heads = tutor.comparison if tutor else nn.Module()
        self.losses = processes.wrapped(Losses(self.model, self.classifier, tutor, recipe, device, processes))
        parameters = [*self.model.parameters(), *self.classifier.parameters(), *self.heads.parameters()]
        self.optimizer = build_optimizer(parameters, recipe)

    def save(self, path: Path) -> None:
        """Write everything needed to go on, whole or not at all; of several processes only the first writes.

        Raises:
            MachineError: If the disk is full.
        """
        if not self.processes.writes:
            return
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        packed = io.BytesIO()  # torch.save to a full disk does not tell that it is full
        torch.save({"step": self.step, "origin": self.origin, **parts}, packed)
        with replaced_file(path) as temporary:
            temporary.write_bytes(packed.getbuffer())

    def load(self, path: Path) -> None:
        """Read a checkpoint written by :meth:`save`.

        Raises:
            InputError: If it is damaged, or of another recipe or other data.
        """
        try:
            # to the CPU first: on a GPU, AdamW would wait in each step for its count of steps
            found = torch.load(path, map_location="cpu", weights_only=True)
        except BROKEN_PICKLE as error:
            raise damaged(path) from error
        origin = found.get("origin") if isinstance(found, dict) else None
        if not isinstance(origin, dict):
            raise InputError(
                f"{path} does not tell its recipe and data: `compress train` of this version did not write it."
                " Choose another --out folder."
            )
        differences = compare_origins(origin, self.origin)
        if differences:
            raise InputError(
                f"{path} cannot be gone on with: {'; '.join(differences)}."
                " Go back to its recipe and data, or choose another --out folder."
            )
        try:
            for name in PARTS:
                getattr(self, name).load_state_dict(found.get(name, {}) if name == "heads" else found[name])
            self.step = int(found["step"])
        except BROKEN_PICKLE as error:
            raise damaged(path) from error

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the averaged weights and batch-norm statistics towards the present ones."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True))
        moved = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        means, values = ([pair[side] for pair in moved] for side in (0, 1))
        torch._foreach_lerp_(means, values, 1 - decay)  # at once: a GPU would wait for hundreds of launches
        for count, value in pairs:
            if not count.is_floating_point():
                count.copy_(value)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor], crops: "Crops", per_class: int = 4) -> None:
        """Start from trained weights; each center of the classifier starts at the mean embedding of some clean crops.

        Raises:
            ModelError: If the weights are not of this network.
            MachineError: If memory is too small.
        """
        load_into(self.model, {name: value.float() for name, value in weights.items()}, "the artifact of --init")
        self.average.load_state_dict(self.model.state_dict())
        count, length = per_class * self.classifier.sub_centers, crops.recipe.crop_s
        with out_of_memory_told(f"out of memory with {count} crops of {length:g} s at a time. Lower crop_s."):
            for label, centers in enumerate(self.classifier.centers()):
                embeddings = F.normalize(self.average(crops.clean(label, count).to(self.device)))
                centers.copy_(embeddings.view(len(centers), per_class, -1).mean(1))

    @torch.no_grad()
    def spread_classes(self, num_speakers: int) -> None:
        """Start the classes of the further speeds at the center of the same speaker."""
        first, *further = torch.split(self.classifier.centers(), num_speakers)
        for centers in further:
            centers.copy_(first)


def build_optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(
        parameters, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov
    )


def damaged(path: Path) -> InputError:
    """Build the error for a checkpoint that cannot be read."""
    return InputError(f"{path} is damaged: it is not a whole checkpoint. Remove it to train from the start.")


def compare_origins(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Say in what the recipe and data of a checkpoint differ from those given now."""
    found = []
    if stored.get("recipe") != own["recipe"]:
        before, now = yaml.safe_load(str(stored.get("recipe"))), yaml.safe_load(own["recipe"])
        before = to_plain(Recipe()) | (before if isinstance(before, dict) else {})
        # a key that an older version did not have is as it was; accumulation does not change what a batch is
        keys = [key for key in now if before[key] != now[key] and key != "accumulation"]
        if keys:
            found.append(f"the recipe has another {', '.join(keys)}")
    if stored.get("teacher") != own["teacher"]:
        found.append("the teacher is another file")
    if stored.get("classes") != own["classes"]:
        found.append(f"it has {stored.get('classes')} classes (speakers times speeds), now there are {own['classes']}")
    elif stored.get("data") != own["data"]:
        found.append("the data have other utterances, speakers or noise recordings")
    return found


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to the final learning rate."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    low = recipe.final_learning_rate
    return low + (recipe.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress))


def num_speeds(recipe: Recipe, step: int) -> int:
    """How many of the speeds the crops of a step may have."""
    if step < recipe.speeds_from_step or (recipe.is_final(step) and not recipe.final_speeds):
        return 1
    return len(recipe.speeds)


def margin(recipe: Recipe, step: int) -> float:
    """Of AAM-softmax at a step: grows, and is larger in the last steps where the recipe says so."""
    if recipe.final_margin and recipe.is_final(step):
        return recipe.final_margin
    return recipe.margin * ramp(recipe, step)


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
    workers: int = 1,
    until: int | None = None,
    measure: Callable[[nn.Module], float] | None = None,
) -> None:
    """Train from ``state.step`` to the end, or ``until`` a step; checkpoints and ``train.jsonl`` go to ``folder``.

    With each checkpoint, ``measure`` is given the averaged network, and what it finds is logged as ``dev_eer``.

    An interrupt waits for the end of the running step, of all processes, and a killed step is repeated on resume.
    Batches are made by ``workers`` processes beside this one, or without any by this one; how many does not change what
    is learned.

    Raises:
        ModelError: If the training diverges. The last checkpoint written before stays.
        MachineError: If the disk is full, or memory too small.
    """
    end = recipe.steps if until is None else until
    checkpoint = folder / "checkpoint.pt"
    try:
        with interrupts_put_off() as caught:
            for features, labels in batches(crops, range(state.step, end), workers, state.processes):
                started = time.monotonic()
                if 0 < state.step == recipe.speeds_from_step:
                    state.spread_classes(crops.num_speakers)
                # where there is one speed, the classes of the others have no crops
                classes = crops.num_speakers if num_speeds(recipe, state.step) == 1 else None
                with out_of_memory_told(out_of_memory(recipe, state)):
                    told = train_step(state, recipe, features, labels, classes)
                    state.step += 1
                    state.update_average(recipe.average_decay)
                line = {"step": state.step, **told, "step_s": time.monotonic() - started}
                due = state.step % checkpoint_every == 0
                if state.processes.writes:
                    if measure and (due or state.step == end):
                        line["dev_eer"] = measure(state.average)
                    append_line(folder / "train.jsonl", json.dumps(line))
                report(line)
                if due:
                    state.save(checkpoint)
                if state.processes.one_has(bool(caught)):  # all stop after the same step
                    raise KeyboardInterrupt
    except KeyboardInterrupt:  # between two steps; after anything else, a step may be half done
        state.save(checkpoint)
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            f"a process that makes batches was killed after step {state.step}, as a machine does when its memory is"
            f" full. Go on with --resume and fewer --workers than {workers}."
        ) from error
    state.save(checkpoint)


def batches(
    crops: Crops, steps: range, workers: int, processes: Processes = ALONE
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The batches of some steps, made ahead by ``workers`` processes; of several that train, the share of this one."""
    ahead = 4 if workers else None
    own = Shares(crops, processes)
    return DataLoader(own, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=ahead)


@contextmanager
def interrupts_put_off() -> Iterator[list[int]]:
    """Note interrupts in a list until the block ends; a thread beside the main one is not interrupted anyway.

    Raises:
        KeyboardInterrupt: At the end, if there was one.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def out_of_memory(recipe: Recipe, state: State) -> str:
    """Say of a batch that memory is too small for it, with the values that make half of it."""
    step, share = state.step, recipe.batch_size // state.processes.count
    length = recipe.final_crop_s if recipe.is_final(step) else recipe.crop_s
    told = f"out of memory at step {step + 1}, with {share // recipe.accumulation} crops of {length:g} s at a time. "
    most = recipe.batch_size // (3 if recipe.objective.delta else 2)  # as a recipe may have
    more = [parts for parts in range(2 * recipe.accumulation, most + 1) if share % parts == 0]
    if not more:
        return told + "Lower crop_s and final_crop_s, or take a smaller network."
    return (
        f"{told}Set accumulation: {more[0]} in the recipe, the same batch in parts of {share // more[0]}, and go on"
        f" with --resume; or train anew with batch_size: {recipe.batch_size // 2}."
    )


def train_step(
    state: State, recipe: Recipe, features: Tensor, labels: Tensor, classes: int | None = None
) -> dict[str, float]:
    """One update on features (batch, frames, num_mel_bins) and class labels (batch,).

    Args:
        state: Changed in place.
        recipe: Of the training; its ``accumulation`` says in how many parts the batch is computed.
        features: The teacher hears the same.
        labels: From 0.
        classes: Soft labels are over the first so many; none: all.

    Returns:
        The loss, each of its terms, the share of crops classified right, where classes are learned, and margin and
        learning rate of the step.

    Raises:
        ModelError: If the loss or its gradient is NaN or infinite; the weights are left as they were.
    """
    state.classifier.margin, rate = margin(recipe, state.step), learning_rate(recipe, state.step)
    state.classifier.scale = recipe.scale[0] + (recipe.scale[1] - recipe.scale[0]) * ramp(recipe, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    count = recipe.accumulation
    parts = enumerate(zip(features.chunk(count), labels.chunk(count), strict=True), 1)
    told = [accumulate(state, recipe, *part, classes, last=number == count) for number, part in parts]
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), 5.0)
    means = torch.stack([torch.stack([*each.values(), norm]) for each in told]).mean(0)
    *values, norm_found = state.processes.mean(means).tolist()  # at once: each would wait for the GPU
    found = dict(zip(told[0], values, strict=True))
    if not (math.isfinite(found["loss"]) and math.isfinite(norm_found)):
        raise ModelError(
            f"the training diverged at step {state.step + 1}: loss {found['loss']:g}, norm of its gradient"
            f" {norm_found:g}. Lower learning_rate or raise warmup_steps, and train again in another --out folder."
        )
    state.optimizer.step()
    return found | {"margin": state.classifier.margin, "learning_rate": rate}


def accumulate(
    state: State, recipe: Recipe, features: Tensor, labels: Tensor, classes: int | None, last: bool
) -> dict[str, Tensor]:
    """Add the gradient of a part of a batch; returns the loss, each of its terms and the share classified right.

    With the ``last`` part, gradients are averaged over the processes.
    """
    with nullcontext() if last else state.processes.alone(state.losses):
        terms, accuracy = state.losses(features.to(state.device), labels.to(state.device), state.step, classes)
        loss = recipe.objective.total(terms, state.step / max(1, recipe.steps - 1))
        torch.autograd.backward(loss / recipe.accumulation)
    told = {"loss": loss, **terms} | ({} if accuracy is None else {"accuracy": accuracy})
    return {name: value.detach() for name, value in told.items()}
