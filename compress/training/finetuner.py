"""Fine-tuning: parts of a network start to learn one after the other, and trials tell what came of it."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import InputError
from compress.features import mean_normalize
from compress.progress import Progress
from compress.training.distiller import Group, Learned, Learner, Lesson, Schedule, learn
from compress.training.objective import Objective
from compress.verification import cosine_scores, eer, eer_difference_interval, eer_interval

Array = NDArray[np.float32]
Interval: TypeAlias = tuple[float, float]

HEAD_RATE = 5.0  # times the learning rate: the head alone starts anew
MOST_HELD_BACK = 400  # utterances: 80 thousand trials
FEWEST_FOR_TWO = 5  # utterances of a speaker, of whom two are held back then, which make a target trial
FEWEST_SPEAKERS = 5  # of whom a whole one is held back
WHOLE_SPEAKERS = 0.1


@dataclass(frozen=True)
class Unfreezing:
    """When the parts of a network start to learn, and how fast.

    Attributes:
        blocks: How many parts there are below the last layer.
        decay: Of the learning rate from each part to the one below it.
        warmup: Share of the steps in which only the head and the last layer learn.
        unfrozen: Share of the steps after which everything learns.
    """

    blocks: int
    decay: float
    warmup: float
    unfrozen: float

    def groups(self, blocks: Sequence[Sequence[nn.Parameter]], steps: int) -> list[Group]:
        """What learns when; ``blocks`` are those of :func:`blocks_of`."""
        below = len(blocks) - 1
        found = []
        for depth, parameters in enumerate(blocks):
            share = self.warmup + (self.unfrozen - self.warmup) * (depth - 1) / max(1, below - 1)
            found.append(Group(parameters, self.decay**depth, round(share * steps) if depth else 0))
        return found


def blocks_of(model: nn.Module, example: Tensor, count: int) -> list[list[nn.Parameter]]:
    """Cut a network into its last layer with weights and ``count`` parts below it, the nearest to the output first.

    The parts are cut in the order in which modules run, so this needs no knowledge of the network, and pruning does
    not matter. A module that never is called itself, because another uses its weights, goes with the module around it.

    Args:
        model: In eval mode.
        example: Features (batch, frames, num_mel_bins) to run it once.
        count: At most so many; a network of fewer modules has fewer.
    """
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[str, int] = {}
    for place, name in enumerate(called):
        first.setdefault(name, place)
    owners = [name for name, module in model.named_modules() if module._parameters]
    owners.sort(key=lambda name: first[next(around for around in _around(name) if around in first)])
    units = [list(model.get_submodule(name).parameters(recurse=False)) for name in owners]
    units = [unit for unit in units if unit]
    last = max(place for place, unit in enumerate(units) if any(parameter.ndim > 1 for parameter in unit))
    below = np.array_split(np.arange(last), min(count, last)) if last else []
    parts = [list(range(last, len(units))), *(part.tolist() for part in reversed(below))]
    return [list(itertools.chain.from_iterable(units[place] for place in part)) for part in parts]


def _around(name: str) -> list[str]:
    """A module's name and those of the modules around it, from the inside out; the last is the network's, empty."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)] + [""]


def hold_back(speakers: Sequence[str], share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Part utterances in those to learn from and those to test on: some of each speaker's, and whole speakers.

    Where that would be more than ``MOST_HELD_BACK``, speakers are drawn of whom nothing is held back, and of a whole
    one's utterances only as many are tested on as of the others; the rest are neither learned from nor tested on.

    Returns:
        Places of either kind, in order.
    """
    groups: dict[str, list[int]] = {}
    for place, speaker in enumerate(speakers):
        groups.setdefault(speaker, []).append(place)
    several = [name for name in sorted(groups) if len(groups[name]) > 1]
    drawn: list[str] = rng.permutation(several).tolist()
    wanted = max(1, round(WHOLE_SPEAKERS * len(groups))) if len(several) >= FEWEST_SPEAKERS else 0
    whole, partial = drawn[:wanted], drawn[wanted:]
    tested = {name: len(groups[name]) for name in whole}
    tested |= {name: _some(len(groups[name]), share) for name in partial}
    if sum(tested.values()) > MOST_HELD_BACK:
        some = _thinned(partial, tested, round((1 - WHOLE_SPEAKERS if whole else 1) * MOST_HELD_BACK))
        tested = some | _thinned(whole, tested, MOST_HELD_BACK - sum(some.values()))
        whole = [name for name in whole if name in tested]
    held: list[int] = []
    for name, count in sorted(tested.items()):
        held += groups[name] if count == len(groups[name]) else rng.permutation(groups[name])[:count].tolist()
    untouched = {place for name in whole for place in groups[name]}
    return sorted(set(range(len(speakers))) - set(held) - untouched), sorted(held)


def _some(count: int, share: float) -> int:
    """How many of a speaker's utterances are held back, where others of them are learned from."""
    return min(count - 1, max(2 if count >= FEWEST_FOR_TWO else count // 3, round(share * count)))


def _thinned(names: Sequence[str], tested: Mapping[str, int], most: int) -> dict[str, int]:
    """Take at most ``most`` utterances of the first speakers that have two or more, which make a target trial."""
    chosen = [name for name in names if tested[name] > 1][: most // 2]
    each = most // max(1, len(chosen))
    return {name: min(each, tested[name]) for name in chosen}


@dataclass(frozen=True, eq=False)
class Exam:
    """Trials of utterances that are not learned from.

    Attributes:
        about: What they are, in words.
        load: Each gives the features (frames, num_mel_bins) of an utterance.
        labels: (trials,), true for a target trial.
        enroll: (trials,) places of utterances.
        test: (trials,) places of utterances.
        speakers: Of each utterance.
    """

    about: str
    load: Sequence[Callable[[], Array]]
    labels: NDArray[np.bool_]
    enroll: NDArray[np.intp]
    test: NDArray[np.intp]
    speakers: NDArray[np.str_]

    @classmethod
    def of_all_pairs(cls, about: str, load: Sequence[Callable[[], Array]], speakers: Sequence[str]) -> "Exam":
        """Every utterance against every other.

        Raises:
            InputError: If there are no target or no non-target trials among them.
        """
        names = np.array(speakers, dtype=np.str_)
        enroll, test = np.triu_indices(len(load), 1)
        labels = names[enroll] == names[test]
        if not labels.any() or labels.all():
            raise InputError(
                f"finetune: {about} make {int(labels.sum())} trials of one speaker and {int((~labels).sum())} of two;"
                " both kinds are needed to see what fine-tuning does. Give more utterances of each speaker, or trials"
                " with finetune.trials."
            )
        return cls(about, load, labels, enroll, test, names)

    def scores(self, model: nn.Module, cmn: bool, progress: Progress) -> NDArray[np.float64]:
        """Cosine scores of the trials, (trials,)."""
        rows = []
        for load in progress.track(self.load, f"testing on {self.about}"):
            features = load()
            whole = torch.from_numpy(mean_normalize(features) if cmn else features)[None]
            with torch.inference_mode():
                rows.append(model(whole)[0].double().numpy())
        return cosine_scores(np.stack(rows), self.enroll, self.test).astype(np.float64)

    def compare(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> "Change":
        """What became of the EER."""
        who = self.speakers[self.enroll], self.speakers[self.test]
        try:
            difference = eer_difference_interval(self.labels, before, after, *who)
            bounds = eer_interval(self.labels, before, *who), eer_interval(self.labels, after, *who)
        except InputError:  # too few speakers to draw from
            difference, bounds = None, None
        rates = eer(self.labels, before)[0], eer(self.labels, after)[0]
        return Change(self.about, len(self.labels), *rates, difference, bounds)


@dataclass(frozen=True)
class Change:
    """EER before and after, as fractions.

    Attributes:
        about: What was tested on.
        trials: How many.
        before: EER.
        after: EER.
        difference_ci95: Of ``after - before``, paired; none where there are too few speakers.
        bounds: 95 % of each EER, likewise.
    """

    about: str
    trials: int
    before: float
    after: float
    difference_ci95: Interval | None
    bounds: tuple[Interval, Interval] | None

    @property
    def worse(self) -> bool:
        """Whether the EER rose, and by more than could be chance."""
        return self.after > self.before and (self.difference_ci95 is None or self.difference_ci95[0] > 0)


def finetune(
    given: nn.Module,
    lesson: Lesson,
    objective: Objective,
    unfreezing: Unfreezing,
    schedule: Schedule,
    progress: Progress,
    device: str = "cpu",
) -> Learned:
    """Teach a copy of a network to tell speakers apart.

    Args:
        given: In eval mode; not changed.
        lesson: Crops with their speakers, and with the network's own embeddings for answers.
        objective: What counts.
        unfreezing: What learns when.
        schedule: How long and how fast.
        progress: Shows the steps, and tells the losses.
        device: ``cpu`` or ``cuda``.
    """
    model = copy.deepcopy(given)
    groups = unfreezing.groups(blocks_of(model, lesson.crops[:1], unfreezing.blocks), schedule.steps)
    with torch.random.fork_rng(devices=[]):
        learner = Learner(model.to(device), objective, [], lesson, device)
    head = Group([*learner.heads.parameters()], HEAD_RATE)
    learned = learn(learner, [head, *groups], schedule, progress, "fine-tuning")
    learned.average.cpu()
    return learned
