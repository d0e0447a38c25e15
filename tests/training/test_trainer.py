import json
import multiprocessing
import multiprocessing.process
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.errors import InputError, MachineError, ModelError
from compress.training.augment import Augmentation
from compress.training.recipe import Recipe
from compress.training.trainer import (
    Crops,
    State,
    build_optimizer,
    learning_rate,
    margin,
    num_speeds,
    out_of_memory,
    ramp,
    train,
)

RECIPE = Recipe(
    steps=6,
    final_steps=2,
    final_crop_s=0.6,
    crop_s=0.5,
    batch_size=4,
    warmup_steps=2,
    margin_steps=(1, 4),
    speeds_from_step=3,
    precision="fp32",
)


def crops(recipe: Recipe = RECIPE) -> Crops:
    rng = np.random.default_rng(0)
    utterances = [(3000 * rng.standard_normal(12000)).astype(np.int16) for _ in range(6)]
    return Crops(recipe, utterances, np.array([0, 0, 1, 1, 2, 2]), utterances[:1])


class Tiny(nn.Module):
    """Mean of pointwise layers: (batch, frames, 80) -> (batch, 16). Without norm, a crop's embedding is its own."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(80, 10), nn.Linear(10, 16)
        self.norm = nn.BatchNorm1d(10) if norm else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(torch.relu(self.wide(features)).mean(1)))
        return found


def state(recipe: Recipe = RECIPE, norm: bool = True) -> State:
    torch.manual_seed(0)
    return State(Tiny(norm), 16, 3 * len(recipe.speeds), recipe)


def weights(trained: State) -> dict[str, torch.Tensor]:
    return trained.average.state_dict() | {"center": trained.classifier.weight}


@given(step=st.integers(0, 5))
def test_a_batch_is_decided_by_its_step(step: int) -> None:
    (features, labels), (again, _) = crops()[step], crops()[step]
    assert torch.equal(features, again)
    assert features.shape == (4, 58 if step >= 4 else 48, 80)
    assert labels.max() < (9 if step >= RECIPE.speeds_from_step else 3)


def test_interrupted_and_resumed_gives_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    whole, first, second = state(), state(), state()
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    train(whole, RECIPE, crops(), tmp_path / "whole", lambda line: None)

    def interrupt(line: dict[str, float]) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(first, RECIPE, crops(), tmp_path / "broken", interrupt)
    second.load(tmp_path / "broken" / "checkpoint.pt")
    assert second.step == 4
    train(second, RECIPE, crops(), tmp_path / "broken", lambda line: None)
    assert second.step == RECIPE.steps
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


QUIET = Augmentation(p_filter=0, p_room=0, p_noise=0, p_babble=0)  # to be quick
KILLED = replace(RECIPE, steps=200, final_crop_s=0.1, crop_s=0.1, batch_size=2, speeds_from_step=40, augmentation=QUIET)


def started(folder: Path) -> multiprocessing.process.BaseProcess:
    """A training in a process of its own, that goes on with what is in the folder; of modules that it can import."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 80, 8), nn.BatchNorm1d(8), nn.Linear(8, 16))
    begun = State(model, 16, 9, KILLED)
    folder.mkdir(exist_ok=True)
    if (folder / "checkpoint.pt").exists():
        begun.load(folder / "checkpoint.pt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["compress.training.trainer", "torch._dynamo"])  # that an optimizer imports
    process = context.Process(target=train, args=(begun, KILLED, crops(KILLED), folder, dict, 7, 0))
    process.start()
    return process


def test_a_training_killed_at_random_steps_ends_with_the_state_of_a_whole_one(tmp_path: Path) -> None:
    whole = started(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    log, moments, kills = tmp_path / "killed" / "train.jsonl", random.Random(0), 0
    while kills < 3:
        before = len(log.read_text().splitlines()) if log.exists() else 0
        process, wanted = started(tmp_path / "killed"), before + moments.randrange(1, 50)
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < wanted):
            time.sleep(0.001)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break  # it was quicker
        kills += 1
    assert kills
    last = started(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert ours["step"] == KILLED.steps
    assert values(ours).keys() >= {("optimizer", "state", 0, "exp_avg"), ("average", "2.running_var"), ("step",)}
    assert values(ours) == values(theirs)


def values(part: object, name: tuple[object, ...] = ()) -> dict[tuple[object, ...], object]:
    """Every value of a checkpoint by its place, tensors as bytes."""
    if isinstance(part, dict):
        return {key: value for own in part for key, value in values(part[own], (*name, own)).items()}
    return {name: part.numpy().tobytes() if isinstance(part, torch.Tensor) else part}


def test_dev_trials_are_measured_with_each_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    measured, lines = [], []

    def measure(model: nn.Module) -> float:
        assert not model.training
        measured.append(model.last.weight.clone())
        return 0.25

    begun = state()
    train(begun, RECIPE, crops(), tmp_path, lines.append, checkpoint_every=4, workers=0, measure=measure)
    assert [line["step"] for line in lines if "dev_eer" in line] == [4, 6]
    assert torch.equal(measured[-1], begun.average.last.weight)
    logged = [json.loads(text) for text in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert logged == lines
    assert [line["margin"] for line in lines] == [margin(RECIPE, step) for step in range(6)]


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (folder / "train.jsonl").read_text().splitlines()]


def test_an_interrupt_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    """At each moment within the step: half a step's statistics and weights would be repeated on resume."""
    whole = state()
    (tmp_path / "whole").mkdir()
    train(whole, RECIPE, crops(), tmp_path / "whole", lambda line: None, workers=0)
    for number, name in enumerate(("wide", "norm", "last")):
        begun, folder, calls = state(), tmp_path / name, []
        folder.mkdir()

        def strike(*_: object, calls: list[int] = calls) -> None:
            calls.append(0)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)

        hook = begun.model.get_submodule(name).register_forward_hook(strike)
        with pytest.raises(KeyboardInterrupt):
            train(begun, RECIPE, crops(), folder, lambda line: None, workers=0)
        hook.remove()
        assert steps_logged(folder) == [1, 2, 3]
        second = state()
        second.load(folder / "checkpoint.pt")
        assert second.step == 3, number
        train(second, RECIPE, crops(), folder, lambda line: None, workers=0)
        assert steps_logged(folder) == [1, 2, 3, 4, 5, 6]
        assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


@torch.no_grad()
def test_given_weights_are_where_the_network_starts_and_classes_start_at_their_crops() -> None:
    donor = state().model.eval()
    for norm in donor.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            norm.running_mean.normal_()
    begun = state(replace(RECIPE, seed=7))
    begun.start_from({name: value.half() for name, value in donor.state_dict().items()}, crops())
    for name, value in donor.state_dict().items():
        assert torch.equal(begun.average.state_dict()[name], value.half().to(value.dtype)), name
    for label in range(9):
        clean = begun.average(crops().clean(label, 4))
        center = torch.nn.functional.normalize(clean).mean(0)
        torch.testing.assert_close(begun.classifier.weight[label], center)


@torch.no_grad()
def test_the_average_follows_weights_and_statistics() -> None:
    begun = state()
    before = {name: value.clone() for name, value in begun.average.state_dict().items()}
    for value in begun.model.state_dict().values():
        value += 1
    begun.step = 1000
    begun.update_average(0.9)
    for name, value in begun.average.state_dict().items():
        if name == "norm.num_batches_tracked":
            assert value == 1
        else:
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * begun.model.state_dict()[name])
    begun.step = 0
    begun.update_average(0.9)  # quick at the start: a decay of 1 / 10
    torch.testing.assert_close(begun.average.last.bias, begun.model.last.bias - 0.9 * 0.1)


def test_classes_of_another_speed_hear_other_crops() -> None:
    assert not torch.equal(crops().clean(0, 2), crops().clean(3, 2))
    assert torch.equal(crops().clean(5, 2), crops().clean(5, 2))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ModelError, match=r"the artifact of --init does not fit Tiny: missing"):
        state().start_from({"weight": torch.zeros(3)}, crops())


def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    begun = state()

    def poison(line: dict[str, float]) -> None:
        if line["step"] == 3:
            begun.model.last.weight.data.fill_(torch.inf)

    with pytest.raises(ModelError, match=r"diverged at step 4: loss nan.*Lower learning_rate"):
        train(begun, RECIPE, crops(), tmp_path, poison, checkpoint_every=2)
    good = state()
    good.load(tmp_path / "checkpoint.pt")
    assert good.step == 2
    assert all(torch.isfinite(value).all() for value in weights(good).values())
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 3


class Hungry(Tiny):
    """Asks for memory that no machine has, from its third batch on."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls > 2:
            if self.error is MemoryError:
                np.ones((1 << 25, 1 << 25))
            if self.error is RuntimeError:
                torch.ones(1 << 50)
            raise self.error("CUDA out of memory.")
        return super().forward(features)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_out_of_memory_says_what_to_set_and_leaves_the_last_checkpoint(
    tmp_path: Path, error: type[BaseException]
) -> None:
    begun = State(Hungry(error), 16, 9, RECIPE)
    told = (
        r"out of memory at step 3, with 4 crops of 0\.5 s at a time\. Set accumulation: 2 in the recipe, the same batch"
        r" in parts of 2, and go on with --resume; or train anew with batch_size: 2\."
    )
    with pytest.raises(MachineError, match=told):
        train(begun, RECIPE, crops(), tmp_path, lambda line: None, checkpoint_every=2, workers=0)
    good = state(replace(RECIPE, accumulation=2))
    good.load(tmp_path / "checkpoint.pt")
    assert good.step == 2
    train(good, replace(RECIPE, accumulation=2), crops(), tmp_path, lambda line: None, workers=0)
    assert good.step == RECIPE.steps


def test_out_of_memory_at_the_start_says_what_to_set() -> None:
    begun = state()
    begun.average = Hungry(MemoryError)
    begun.average.calls = 2
    with pytest.raises(MachineError, match=r"out of memory with 4 crops of 0\.5 s at a time\. Lower crop_s\."):
        begun.start_from(begun.model.state_dict(), crops())


def test_out_of_memory_with_two_crops_names_their_length() -> None:
    recipe = replace(RECIPE, accumulation=2)
    told = out_of_memory(recipe, state(recipe))
    assert "with 2 crops of 0.5 s at a time. Lower crop_s and final_crop_s" in told


def test_a_full_disk_is_told_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(MachineError, match=r"disk full while writing .*checkpoint\.pt"):
        State(nn.Linear(1000, 1000), 1000, 9, RECIPE).save(small_disk / "checkpoint.pt")
    assert list(small_disk.iterdir()) == []


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    state().save(path)
    with pytest.raises(InputError, match=r"the recipe has another batch_size, seed\."):
        state(replace(RECIPE, batch_size=8, seed=2)).load(path)
    other = state()
    other.origin["data"] = "other"
    with pytest.raises(InputError, match="the data have other utterances, speakers or noise recordings"):
        other.load(path)


def test_classes_of_further_speeds_start_at_their_speakers_center() -> None:
    begun = state()
    begun.spread_classes(3)
    assert torch.equal(begun.classifier.weight[3:6], begun.classifier.weight[:3])
    assert torch.equal(begun.classifier.weight[6:], begun.classifier.weight[:3])


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    recipe = Recipe(steps=100, final_steps=0, warmup_steps=10)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[9] == pytest.approx(recipe.learning_rate)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(recipe.final_learning_rate, rel=0.1)


def test_margin_grows_between_its_steps() -> None:
    assert [ramp(RECIPE, step) for step in (0, 1, 4, 5)] == [0.0, 0.0, 1.0, 1.0]
    assert margin(RECIPE, 5) == RECIPE.margin


def test_the_last_steps_may_have_a_larger_margin_and_one_speed() -> None:
    recipe = replace(RECIPE, margin_steps=(0, 1), final_margin=0.5, final_speeds=False)
    assert [margin(recipe, step) for step in range(6)] == [0.0, 0.2, 0.2, 0.2, 0.5, 0.5]
    assert [num_speeds(recipe, step) for step in range(6)] == [1, 1, 1, 3, 1, 1]
    drawn = [crops(replace(recipe, batch_size=16))[step][1].max() < 3 for step in range(6)]
    assert drawn == [True, True, True, False, True, True]
    begun = state(recipe)
    begun.step = 4
    features, labels = crops(recipe)[4]
    begun.classifier.weight.data[3:] = begun.model.eval()(features).detach()[0]  # as near as can be to a crop
    before, _ = begun.losses(features, labels, 4, 3)
    begun.classifier.weight.data[3:] *= -1
    assert begun.losses(features, labels, 4, 3)[0]["CE"] == before["CE"]


def trained_without_norm(recipe: Recipe, folder: Path) -> tuple[State, list[dict[str, float]]]:
    begun, lines = state(recipe, norm=False), []
    folder.mkdir()
    train(begun, recipe, crops(recipe), folder, lines.append, workers=0)
    return begun, lines


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_batch_in_parts_gives_the_update_of_the_whole(tmp_path: Path, optimizer: str) -> None:
    """Up to the rounding of float32 sums; AdamW divides by the gradient's size, so near 0 rounding shows more."""
    whole_recipe = replace(RECIPE, batch_size=6, optimizer=optimizer, learning_rate=1e-2)
    whole, lines = trained_without_norm(whole_recipe, tmp_path / "whole")
    for parts in (2, 3):
        recipe = replace(whole_recipe, accumulation=parts)
        for step in range(recipe.steps):
            assert all(torch.equal(a, b) for a, b in zip(crops(recipe)[step], crops(whole_recipe)[step], strict=True))
        found, told = trained_without_norm(recipe, tmp_path / f"{parts}")
        for name, value in weights(whole).items():
            torch.testing.assert_close(value, weights(found)[name], rtol=1e-4, atol=1e-5, msg=name)
        assert [line["loss"] for line in told] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
        assert [line["accuracy"] for line in told] == [line["accuracy"] for line in lines]


def test_sgd_makes_the_step_of_nesterov() -> None:
    """v = 0.9 v + g; w -= rate (g + 0.9 v): Sutskever et al., ICML 2013, as PyTorch writes it."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([weight], replace(RECIPE, optimizer="sgd", learning_rate=0.1, weight_decay=0.0))
    expected, velocity = 1.0, 0.0
    for gradient in (1.0, -2.0, 0.5):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (gradient + 0.9 * velocity)
        assert weight.item() == pytest.approx(expected)


def test_sub_centers_of_a_class_start_at_crops_of_their_own() -> None:
    recipe = replace(RECIPE, sub_centers=2)
    begun = state(recipe)
    begun.start_from(state().model.state_dict(), crops())
    centers = begun.classifier.centers()
    assert centers.shape == (9, 2, 16)
    assert not torch.allclose(centers[:, 0], centers[:, 1])
    begun.spread_classes(3)
    for further in (centers[3:6], centers[6:]):
        assert torch.equal(further, centers[:3])


def test_a_training_that_is_gone_on_with_may_be_cut_into_other_parts(tmp_path: Path) -> None:
    state().save(tmp_path / "checkpoint.pt")
    state(replace(RECIPE, accumulation=2)).load(tmp_path / "checkpoint.pt")


class Deadly(Crops):
    """The process that makes the third batch is killed, as by a machine whose memory is full."""

    def share(self, step: int, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().share(step, rank, count)


def train_deadly(folder: Path) -> None:
    given = crops()
    deadly = Deadly(RECIPE, given.utterances, given.speakers, given.noises)
    train(state(), RECIPE, deadly, folder, lambda line: None)


def test_a_killed_process_that_makes_batches_is_told(tmp_path: Path) -> None:
    """In a process of its own: the handler of signals that a DataLoader sets would disturb the tests after it."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert re.search(r"MachineError: a process that makes batches was killed after step [0-2], as a", done.stderr)
    assert done.stderr.strip().endswith("Go on with --resume and fewer --workers than 1.")


if __name__ == "__main__":
    train_deadly(Path(sys.argv[1]))
