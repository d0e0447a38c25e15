"""Teaching a student: a short training on what a teacher said of a fixed set of crops."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.progress import Progress
from compress.training import distillation
from compress.training.loss import AAMSoftmax
from compress.training.memory import out_of_memory_told
from compress.training.objective import Comparison, Objective, class_centers
from compress.training.taps import Tap
from compress.training.teacher import Answers, answer

WARMUP = 0.05  # of all steps
LAST_RATE = 0.01  # of the learning rate
CLIP = 5.0  # norm of the gradient
AVERAGE_DECAY = 0.99  # of the moving average of the weights
TOLD_EVERY = 50  # steps
CENTER_CROPS = 4  # of each speaker, from which the student's classes start


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is learned."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a hundredth."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, eq=False)
class Lesson:
    """Crops with what the teacher said of them.

    Attributes:
        crops: (crops, frames, num_mel_bins).
        answers: Of the teacher.
        speakers: Numbers from 0, (crops,), where terms need them.
    """

    crops: Tensor
    answers: Answers
    speakers: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of the training.

    Attributes:
        model: The nearest to the teacher on held-out crops: ``given``, ``trained`` or ``averaged`` weights.
        chosen: Which of them it is.
        distances: How far each of them is.
        cosines: Mean cosine of each to the teacher's embeddings, where they have one size.
        losses: Mean of each term, not weighted, over the last steps.
        step_s: Median seconds of a step.
    """

    model: nn.Module
    chosen: str
    distances: Mapping[str, float]
    cosines: Mapping[str, float]
    losses: Mapping[str, float]
    step_s: float


class Learner:
    """A student with what it needs only while it learns: adapters and a classifier.

    The student stays in eval mode: its batch norms use the running statistics and do not renew them. So a crop's
    embedding depends on that crop alone, as the teacher's does and as in use. Statistics of a batch would move the
    embeddings by more than the student is away from its teacher: a batch of 16 crops, of few speakers, has another
    mean than all speech. Scales and offsets of batch norm are learned.

    Args:
        model: Changed in place.
        objective: What counts.
        taps: Layers to compare.
        lesson: The crops to learn from.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, taps: Sequence[Tap], lesson: Lesson, device: str = "cpu"
    ) -> None:
        self.model, self.objective, self.taps, self.lesson, self.device = model, objective, taps, lesson, device
        self.layers = [(tap.student, tap.student_axis) for tap in taps]
        with torch.no_grad():
            ours = answer(model, lesson.crops[:2].to(device), self.layers)
        centers = None
        if objective.needs_speakers:
            assert lesson.speakers is not None, "the pass refuses labels' terms without speakers"
            centers = class_centers(lesson.answers.embeddings, lesson.speakers)
        self.heads = nn.ModuleDict()
        self.heads["comparison"] = self.comparison = Comparison(objective, ours, lesson.answers, centers)
        self.classifier: AAMSoftmax | None = None
        if centers is not None and lesson.speakers is not None:
            self.classifier = AAMSoftmax(ours.embeddings.shape[1], len(centers), objective.margin, objective.scale)
            self.classifier.weight.data = self.starting_classes(lesson.speakers)
            self.heads["classifier"] = self.classifier
        self.heads.to(device)

    def starting_classes(self, speakers: Tensor) -> Tensor:
        """The student's own mean embedding of some crops of each speaker, (speakers, embedding_size)."""
        chosen = torch.cat([torch.nonzero(speakers == s)[:CENTER_CROPS, 0] for s in range(int(speakers.max()) + 1)])
        given = embeddings_of(self.model, self.lesson.crops[chosen], self.device)
        return class_centers(given, speakers[chosen])

    def losses(self, places: Tensor) -> dict[str, Tensor]:
        """Every term that counts, of the crops at ``places``, not weighted."""
        given = answer(self.model, self.lesson.crops[places].to(self.device), self.layers)
        found: dict[str, Tensor] = {}
        if self.objective.alpha and self.classifier is not None and self.lesson.speakers is not None:
            found["CE"] = self.classifier(given.embeddings, self.lesson.speakers[places].to(self.device))[0]
        found |= self.comparison(given, self.lesson.answers.of(places).to(self.device), self.classifier)
        return found


@torch.no_grad()
def embeddings_of(model: nn.Module, crops: Tensor, device: str = "cpu", batch_size: int = 16) -> Tensor:
    """(crops, frames, num_mel_bins) -> (crops, embedding_size)."""
    return torch.cat([model(batch.to(device)).cpu() for batch in torch.split(crops, batch_size)])


def distance_to(answers: Answers, embeddings: Tensor, objective: Objective) -> float:
    """How far a student is from its teacher: the terms that need nothing learned beside the student.

    Those are 1 - cosine, where it counts and the embeddings have one size, and the relations. Without either, the
    matrix of cosines alone.
    """
    same_size = embeddings.shape[1] == answers.embeddings.shape[1]
    terms = []
    if objective.embedding and same_size:
        terms.append(objective.embedding * distillation.embedding_loss(embeddings, answers.embeddings))
    if objective.delta:
        batches = zip(
            torch.split(embeddings, 16), torch.split(answers.embeddings, 16), strict=True
        )  # of triplets there are n^3
        found = [objective.relation(ours, theirs) for ours, theirs in batches if len(ours) > 2]
        terms.append(objective.delta * torch.stack(found).mean())
    if not terms:
        terms.append(distillation.cosine_matrix_loss(embeddings, answers.embeddings))
    return float(torch.stack(terms).sum())


def batches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Places of the crops of each step: a new order of all of them in each round, cut into batches of one size."""
    rng = np.random.default_rng(seed)
    size = min(batch_size, count)
    a_round = count // size
    rounds = [rng.permutation(count)[: a_round * size].reshape(a_round, size) for _ in range(-(-steps // a_round))]
    return list(torch.from_numpy(np.concatenate(rounds)[:steps]))


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that learn at one rate.

    Attributes:
        parameters: Of the student, or of what is learned beside it.
        rate: Multiplies the schedule's.
        start: The first step at which they learn; until then they stay as they are.
    """

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0
    start: int = 0


@dataclass(frozen=True, eq=False)
class Learned:
    """What some steps of learning gave.

    Attributes:
        model: With the weights of the last step.
        average: With their moving average.
        losses: Mean of each term, not weighted, over the last steps.
        step_s: Median seconds of a step.
    """

    model: nn.Module
    average: nn.Module
    losses: Mapping[str, float]
    step_s: float


def learn(learner: Learner, groups: Sequence[Group], schedule: Schedule, progress: Progress, doing: str) -> Learned:
    """Take the steps of a schedule.

    Args:
        learner: What learns; its network is changed in place.
        groups: All that learns.
        schedule: How long and how fast.
        progress: Shows the steps, and tells the losses.
        doing: What this is, for the progress display.

    Raises:
        ModelError: If a loss or its gradient is NaN or infinite.
        MachineError: If memory is too small.
    """
    student = learner.model
    average = copy.deepcopy(student)
    parameters = [parameter for group in groups for parameter in group.parameters]
    listed = [{"params": list(group.parameters)} for group in groups]
    optimizer = torch.optim.AdamW(listed, schedule.learning_rate, weight_decay=0.0)
    told: list[dict[str, float]] = []
    seconds = []
    plan = batches(len(learner.lesson.crops), schedule.batch_size, schedule.steps, schedule.seed)
    too_large = f"out of memory while {doing}, with {len(plan[0])} crops at a time. Lower batch_size or crop_s."
    for step, places in enumerate(progress.track(plan, doing)):
        started = time.monotonic()
        for options, group in zip(optimizer.param_groups, groups, strict=True):
            options["lr"] = group.rate * schedule.rate(step)
            for parameter in group.parameters:
                parameter.requires_grad_(step >= group.start)
        with out_of_memory_told(too_large):
            found = learner.losses(places)
            loss = learner.objective.total(found, step / max(1, schedule.steps - 1))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise ModelError(
                f"{doing} diverged at step {step + 1}: loss {loss.item():g}, norm of its gradient {norm.item():g}."
                " Lower the learning rate."
            )
        optimizer.step()
        follow(average, student, min(AVERAGE_DECAY, (1 + step) / (10 + step)))
        seconds.append(time.monotonic() - started)
        told.append({"loss": loss.item()} | {name: term.item() for name, term in found.items()})
        if (step + 1) % TOLD_EVERY == 0 or step + 1 == len(plan):
            recent = means(told[-TOLD_EVERY:])
            terms = ", ".join(f"{name} {value:.3g}" for name, value in recent.items())
            progress.say(f"step {step + 1} of {len(plan)}: {terms}; {np.median(seconds):.2f} s a step")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return Learned(student, average, means(told[-TOLD_EVERY:]), float(np.median(seconds)))


def distill(
    given: nn.Module,
    lesson: Lesson,
    held_out: Lesson,
    taps: Sequence[Tap],
    objective: Objective,
    schedule: Schedule,
    progress: Progress,
    device: str = "cpu",
) -> Outcome:
    """Teach a copy of a network; of it, its moving average and the network as it was given, the nearest is kept.

    Args:
        given: The student, in eval mode; not changed.
        lesson: What it learns from.
        held_out: What is measured on.
        taps: Layers to compare.
        objective: What counts.
        schedule: How long and how fast.
        progress: Shows the steps, and tells the losses.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: If a loss or its gradient is NaN or infinite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)  # adapters start at random
        learner = Learner(copy.deepcopy(given).to(device), objective, taps, lesson, device)
    everything = Group([*learner.model.parameters(), *learner.heads.parameters()])
    learned = learn(learner, [everything], schedule, progress, "distilling")
    candidates = {"given": given, "trained": learned.model, "averaged": learned.average}
    embeddings = {name: embeddings_of(model.cpu(), held_out.crops) for name, model in candidates.items()}
    distances = {name: distance_to(held_out.answers, found, objective) for name, found in embeddings.items()}
    wanted = held_out.answers.embeddings
    cosines = {
        name: 1 - float(distillation.embedding_loss(found, wanted))
        for name, found in embeddings.items()
        if found.shape == wanted.shape
    }
    chosen = min(distances, key=distances.__getitem__)
    return Outcome(candidates[chosen], chosen, distances, cosines, learned.losses, learned.step_s)


def means(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each value over lines that have the same."""
    return {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]}


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards the present ones."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
