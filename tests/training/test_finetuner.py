from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import InputError
from compress.models import ARCHITECTURES
from compress.progress import Silent
from compress.training.distiller import Lesson, Schedule
from compress.training.finetuner import Exam, Unfreezing, blocks_of, finetune, hold_back
from compress.training.objective import Objective
from compress.training.teacher import Answers

SPEAKERS = [name for name, entry in ARCHITECTURES.items() if entry.task == "sv"]


def lesson_of(model: nn.Module, crops: int = 24, speakers: int = 4, color: float = 1.0) -> Lesson:
    """Noise whose color is the speaker."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(crops) % speakers
    colors = torch.randn(speakers, 1, 16, generator=generator)
    features = torch.randn(crops, 60, 16, generator=generator) + color * colors[labels]
    with torch.no_grad():
        return Lesson(features, Answers(model(features), []), labels)


@pytest.mark.parametrize("name", SPEAKERS)
def test_every_network_is_cut_into_parts_that_hold_each_parameter_once(small_network, name: str) -> None:
    model = small_network(name)
    blocks = blocks_of(model, torch.zeros(1, 100, 16), 4)
    assert len(blocks) == 5
    found = Counter(id(parameter) for block in blocks for parameter in block)
    assert found == Counter(id(parameter) for parameter in model.parameters())
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    first, last = ({names[id(parameter)] for parameter in block} for block in (blocks[-1], blocks[0]))
    assert next(iter(names.values())) in first
    embedding = max(i for i, (_, p) in enumerate(model.named_parameters()) if p.ndim > 1)
    assert list(names.values())[embedding] in last


@torch.no_grad()
def told_apart(model: nn.Module, lesson: Lesson) -> float:
    """How much higher the mean cosine is of two crops of one speaker than that of two speakers."""
    embeddings = F.normalize(model(lesson.crops))
    assert lesson.speakers is not None
    same = lesson.speakers[:, None] == lesson.speakers
    cosines = embeddings @ embeddings.T
    return float(cosines[same].mean() - cosines[~same].mean())


@pytest.mark.parametrize("name", SPEAKERS)
def test_every_network_learns_to_tell_speakers_apart(small_network, name: str) -> None:
    model = small_network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    schedule, unfreezing = Schedule(20, 8, 3e-4, 1), Unfreezing(4, 0.7, 0.2, 0.6)
    lesson = lesson_of(model, color=0.3)
    learned = finetune(model, lesson, Objective(alpha=1.0), unfreezing, schedule, Silent())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the input was changed"
    after = learned.model.state_dict()
    for key, parameter in learned.model.named_parameters():
        assert parameter.requires_grad
        assert not torch.equal(parameter, before[key]), key
    for key in set(before) - {key for key, _ in model.named_parameters()}:
        assert torch.equal(before[key], after[key]), f"{key} is a statistic, and few data would spoil it"
    assert told_apart(learned.model, lesson) > told_apart(model, lesson)
    assert not any(module.training for module in learned.model.modules())


def test_parts_follow_the_order_in_which_modules_run_and_not_that_of_their_names() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end, self.middle, self.begin = nn.Linear(4, 3), nn.Linear(5, 4), nn.Linear(16, 5)
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)  # never calls its own out_proj
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.begin(x)
            y = self.attention(y, y, y)[0]
            return self.scale * self.end(self.middle(y)).mean(1)

    model = Reversed().eval()
    names = {id(parameter): name.split(".")[0] for name, parameter in model.named_parameters()}
    found = [{names[id(p)] for p in block} for block in blocks_of(model, torch.zeros(1, 20, 16), 9)]
    # The network's own parameters are the last to learn: it was called before all others.
    assert found == [{"end"}, {"middle"}, {"attention"}, {"attention"}, {"begin"}, {"scale"}]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_no_more_parts_than_asked_for_or_there_are(count: int, fresh_tiny: Callable[..., nn.Module]) -> None:
    blocks = blocks_of(fresh_tiny().eval(), torch.zeros(1, 60, 16), count)
    assert len(blocks) == 1 + min(count, 4)
    assert all(blocks)


def test_parts_start_from_the_output_down_and_ever_slower() -> None:
    blocks = [[nn.Parameter(torch.zeros(1))] for _ in range(5)]
    groups = Unfreezing(4, 0.5, 0.1, 0.7).groups(blocks, 100)
    assert [group.start for group in groups] == [0, 10, 30, 50, 70]
    assert [group.rate for group in groups] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert [g.start for g in Unfreezing(1, 0.5, 0.2, 0.7).groups(blocks[:2], 10)] == [0, 2]


def test_a_part_stays_as_it_was_until_it_starts(fresh_tiny: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = fresh_tiny().eval()
    run = [Objective(alpha=1.0), Unfreezing(4, 0.6, 0.5, 1.0), Schedule(4, 8, 1e-2, 1), Silent()]
    learned = finetune(model, lesson_of(model), *run)
    moved = {
        name
        for (name, value), after in zip(model.named_parameters(), learned.model.parameters(), strict=True)
        if not torch.equal(value, after)
    }
    starts = [group.start for group in run[1].groups(blocks_of(model, torch.zeros(1, 60, 16), 4), 4)]
    assert starts == [0, 2, 3, 3, 4]
    assert {name.split(".")[0] for name in moved} == {"embedding", "norm2", "second", "norm1"}


def test_holding_on_keeps_the_embedding_near(fresh_tiny: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = fresh_tiny().eval()
    lesson = lesson_of(model)
    cosines = []
    for hold in (0.0, 20.0):
        objective = Objective(alpha=1.0, embedding=hold)
        learned = finetune(model, lesson, objective, Unfreezing(4, 0.6, 0.1, 0.5), Schedule(10, 8, 5e-3, 1), Silent())
        with torch.no_grad():
            own = learned.model(lesson.crops)
        cosines.append(float(torch.cosine_similarity(own, lesson.answers.embeddings).mean()))
    assert cosines[1] > cosines[0] + 0.01


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12), seed=st.integers(0, 99), share=st.floats(0.05, 0.5)
)
@settings(max_examples=50, deadline=None)
def test_what_is_held_back_is_part_of_each_speaker_and_some_whole_ones(
    counts: list[int], seed: int, share: float
) -> None:
    speakers = [f"s{i}" for i, count in enumerate(counts) for _ in range(count)]
    learned, held = hold_back(speakers, share, np.random.default_rng(seed))
    assert sorted(learned + held) == list(range(len(speakers)))
    ours, theirs = (Counter(speakers[place] for place in places) for places in (learned, held))
    whole = [name for name in theirs if name not in ours]
    several = sum(count > 1 for count in counts)
    assert len(whole) == (max(1, round(0.1 * len(counts))) if several >= 5 else 0)
    for i, count in enumerate(counts):
        name = f"s{i}"
        if name in whole:
            assert count > 1
        elif count == 1:
            assert theirs[name] == 0
        elif count >= 5:
            assert theirs[name] == max(2, round(share * count))
        else:
            assert theirs[name] == min(count - 1, max(count // 3, round(share * count)))
    again = hold_back(speakers, share, np.random.default_rng(seed))
    assert again == (learned, held)


@pytest.mark.parametrize(("speakers", "each"), [(3000, 10), (150, 10), (100, 50), (2, 3000), (3000, 3), (5000, 2)])
def test_of_a_large_corpus_a_bounded_number_is_tested_on_and_of_each_speaker_two(speakers: int, each: int) -> None:
    names = [f"s{i // each}" for i in range(speakers * each)]
    learned, held = hold_back(names, 0.3, np.random.default_rng(0))
    assert 200 <= len(held) <= 400
    ours, theirs = (Counter(names[place] for place in places) for places in (learned, held))
    assert not set(learned) & set(held)
    assert min(theirs.values()) >= 2
    whole = [name for name in theirs if name not in ours]
    assert bool(whole) == (speakers > 2)
    assert len(learned) + len(held) == len(names) - sum(each - theirs[name] for name in whole)
    assert set(names) == set(ours) | set(whole)
    enroll, test = np.triu_indices(len(held), 1)
    speaker = np.array([names[place] for place in held])
    assert 100 <= (speaker[enroll] == speaker[test]).sum() < len(enroll)


def test_an_exam_is_all_pairs_and_tells_better_from_worse() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    rng = np.random.default_rng(0)
    speakers = [f"s{i // 4}" for i in range(40)]
    centers = {name: rng.standard_normal(8) for name in sorted(set(speakers))}
    features = [(centers[name] + rng.standard_normal((20, 8))).astype(np.float32) for name in speakers]
    exam = Exam.of_all_pairs("noise", [lambda f=f: f for f in features], speakers)
    assert len(exam.labels) == 40 * 39 // 2
    assert exam.labels.sum() == 10 * 6
    good = exam.scores(Mean(), False, Silent())
    bad = rng.standard_normal(len(good))
    rise, fall, same = exam.compare(good, bad), exam.compare(bad, good), exam.compare(good, good)
    assert [change.worse for change in (rise, fall, same)] == [True, False, False]
    assert rise.before == fall.after < 0.05
    assert same.difference_ci95 == (0, 0)
    low, high = rise.difference_ci95 or (0, 0)
    assert 0 < low < rise.after - rise.before < high
    assert all(low <= high for low, high in pairwise((0.0, *(rise.bounds or ((0, 0),))[0])))


def test_trials_of_one_kind_are_refused() -> None:
    load = [lambda: np.zeros((9, 4), np.float32)] * 3
    with pytest.raises(InputError, match=r"my list make 0 trials of one speaker and 3 of two; both kinds are needed"):
        Exam.of_all_pairs("my list", load, ["a", "b", "c"])
    with pytest.raises(InputError, match="3 trials of one speaker and 0 of two"):
        Exam.of_all_pairs("my list", load, ["a", "a", "a"])
