"""Two processes on this machine against one, by what ``torchrun`` leaves in the environment."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.errors import SettingError
from compress.models import ARCHITECTURES, architecture
from compress.training.objective import Comparison, Objective
from compress.training.parallel import ALONE, CommonBatchNorm, Processes
from compress.training.recipe import Recipe
from compress.training.teacher import Answers
from compress.training.trainer import Crops, State, train
from compress.training.tutor import Tutor

pytest.importorskip("accelerate")

RECIPE = Recipe(
    steps=8,
    final_steps=2,
    final_crop_s=0.4,
    crop_s=0.3,
    batch_size=8,
    warmup_steps=2,
    margin_steps=(1, 4),
    speeds=(1.0, 0.9),
    speeds_from_step=3,
    final_speeds=False,
    learning_rate=1e-2,
    precision="fp32",
)
RECIPES = {
    "adamw": RECIPE,
    "sgd in parts": replace(RECIPE, optimizer="sgd", accumulation=2),
    "relations": replace(
        RECIPE, teacher="given", objective=Objective(alpha=1.0, delta=5.0, relations=("cosine", "distance", "angle"))
    ),
}
GENTLE = replace(RECIPE, steps=4, final_steps=1, batch_size=4, learning_rate=1e-4)
SPEAKER_NETWORKS = [name for name, entry in ARCHITECTURES.items() if entry.task == "sv"]


class Network(nn.Module):
    """Batch norm over frames, mean, batch norm over crops: (batch, frames, 80) -> (batch, 6).

    Without biases that batch norm takes off: their gradient is rounding alone, and AdamW makes full steps of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.inner = nn.Conv1d(80, 12, 3, bias=False), nn.BatchNorm1d(12)
        self.last, self.outer = nn.Linear(12, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.outer(self.last(torch.relu(self.inner(self.wide(features.transpose(1, 2)))).mean(2)))
        return found


class Precise(nn.Module):
    """A network of float64 for features of float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.inner(features.double())
        return found


def crops_of(recipe: Recipe) -> Crops:
    rng = np.random.default_rng(0)
    utterances = [(3000 * rng.standard_normal(9000)).astype(np.int16) for _ in range(6)]
    return Crops(recipe, utterances, np.array([0, 0, 1, 1, 2, 2]), utterances[:1])


def tutor_of(recipe: Recipe) -> Tutor | None:
    if not recipe.teacher:
        return None
    probe = Answers(torch.zeros(2, 6), [])
    return Tutor(Network().eval().requires_grad_(False), (), Comparison(recipe.objective, probe, probe), "")


def trained(recipe: Recipe, folder: Path, processes: Processes, build: Callable[[], nn.Module] = Network) -> State:
    torch.manual_seed(0)
    state = State(build(), 6, 6, recipe, tutor=tutor_of(recipe), processes=processes)
    folder.mkdir(exist_ok=True, parents=True)
    train(state, recipe, crops_of(recipe), folder, lambda line: None, workers=0)
    return state


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks and classifiers are built in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained_precisely(name: str, arguments: dict[str, Any], folder: Path, processes: Processes) -> None:
    with in_float64():
        build = partial(architecture(name).build, feat_dim=80, embedding_size=6, **arguments)
        trained(GENTLE, folder, processes, lambda: Precise(build()))


def run_one_of_two(folder: Path) -> None:
    """What each of the processes does."""
    from compress.training.parallel import join_processes

    torch.set_num_threads(1)
    processes = join_processes("cpu")
    assert processes.count == 2
    for name, recipe in RECIPES.items():
        state = trained(recipe, folder / name, processes)
        torch.save(state.average.state_dict(), folder / name / f"average-{processes.rank}.pt")
    for name, arguments in json.loads((folder / "arguments.json").read_text()).items():
        trained_precisely(name, arguments, folder / name, processes)
    interrupted(folder / "interrupted", processes)
    torch.distributed.destroy_process_group()


def interrupted(folder: Path, processes: Processes) -> None:
    """Train as ``trained``, and interrupt the second process in its third step; each writes after which it stopped."""
    state = State(Network(), 6, 6, RECIPE, processes=processes)
    folder.mkdir(exist_ok=True)

    def strike(*_: object) -> None:
        if processes.rank == 1 and state.step == 2:
            signal.raise_signal(signal.SIGINT)

    state.model.register_forward_hook(strike)
    try:
        train(state, RECIPE, crops_of(RECIPE), folder, lambda line: None, workers=0)
    except KeyboardInterrupt:
        (folder / f"stopped-{processes.rank}").write_text(str(state.step))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, small_arguments: dict[str, dict[str, Any]]) -> Path:
    """The folder of trainings by two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "arguments.json").write_text(json.dumps({name: small_arguments[name] for name in SPEAKER_NETWORKS}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in "01":
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, __file__, str(folder)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_give_the_losses_and_weights_of_one(two: Path, tmp_path: Path, name: str) -> None:
    """With accumulation, batch norm takes the statistics of a part, of which each process has half."""
    recipe = RECIPES[name]
    one = trained(recipe, tmp_path, ALONE)
    mine, theirs = (read_log(folder / "train.jsonl") for folder in (tmp_path, two / name))
    assert len(mine) == len(theirs) == recipe.steps
    for key in mine[0].keys() - {"step_s"}:
        assert [line[key] for line in theirs] == pytest.approx([line[key] for line in mine], abs=1e-4)
    weights = [torch.load(two / name / f"average-{rank}.pt") for rank in (0, 1)]
    for key, value in one.average.state_dict().items():
        torch.testing.assert_close(weights[0][key], value, rtol=1e-3, atol=1e-4, msg=key)
        assert torch.equal(weights[0][key], weights[1][key]), key


@pytest.mark.parametrize("name", SPEAKER_NETWORKS)
def test_two_processes_give_the_losses_of_one_for_every_network(
    two: Path, tmp_path: Path, small_arguments: dict[str, dict[str, Any]], name: str
) -> None:
    """In float64: at the start of a training, rounding grows by up to a hundredfold from step to step."""
    trained_precisely(name, small_arguments[name], tmp_path, ALONE)
    mine, theirs = (read_log(folder / "train.jsonl") for folder in (tmp_path, two / name))
    assert len(mine) == len(theirs) == GENTLE.steps
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in mine], abs=1e-7)


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupt_of_one_stops_all_after_the_same_step(two: Path) -> None:
    assert [(two / "interrupted" / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    state = State(Network(), 6, 6, RECIPE)
    state.load(two / "interrupted" / "checkpoint.pt")
    assert state.step == 3
    assert [line["step"] for line in read_log(two / "interrupted" / "train.jsonl")] == [1, 2, 3]


def test_what_two_processes_left_is_gone_on_with_by_one(two: Path) -> None:
    torch.manual_seed(0)
    state = State(Network(), 6, 6, RECIPE)
    state.load(two / "adamw" / "checkpoint.pt")
    assert state.step == RECIPE.steps


def test_shares_are_parts_of_the_batch() -> None:
    recipe = replace(RECIPE, batch_size=6)
    rng = np.random.default_rng(0)
    utterances = [(3000 * rng.standard_normal(9000)).astype(np.int16) for _ in range(4)]
    crops = Crops(recipe, utterances, np.array([0, 0, 1, 1]), utterances[:1])
    for step in range(recipe.steps):
        features, labels = crops[step]
        for count in (2, 3):
            shares = [crops.share(step, rank, count) for rank in range(count)]
            assert torch.equal(torch.cat([part for part, _ in shares]), features)
            assert torch.equal(torch.cat([part for _, part in shares]), labels)
    parts = Crops(replace(recipe, batch_size=12, accumulation=2), utterances, np.array([0, 0, 1, 1]), utterances[:1])
    features, (first, second) = parts[0][0], (parts.share(0, rank, 2)[0] for rank in (0, 1))
    assert torch.equal(torch.cat([first[:3], second[:3], first[3:], second[3:]]), features)


def test_a_batch_that_cannot_be_shared_out_is_told() -> None:
    three = Processes()
    three.count = 3
    with pytest.raises(
        SettingError, match=r"a batch of 8 cannot be cut into equal parts for 3 processes.*multiple of 3"
    ):
        State(Network(), 6, 6, RECIPE, processes=three)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 2)])
def test_common_batch_norm_of_one_process_is_batch_norm(shape: tuple[int, ...]) -> None:
    norm = nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4)
    nn.init.normal_(norm.weight)
    common = CommonBatchNorm(type(norm)(4), ALONE)
    common.load_state_dict(norm.state_dict())
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2
    gradients = []
    for module in (norm, common):
        own = x.clone().requires_grad_()
        (module(own) * torch.arange(x.numel()).view(shape)).sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(common(x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(common.state_dict()[name], value, msg=name)
    torch.testing.assert_close(common.eval()(x), norm.eval()(x))


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(speech_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "{model: ecapa_tdnn, arguments: {embedding_size: 16, channels: [32, 32, 32, 32, 96]}, steps: 6, final_steps: 2,"
        " batch_size: 4, crop_s: 0.3, final_crop_s: 0.4, final_margin: 0.3, warmup_steps: 2, margin_steps: [1, 4],"
        " speeds_from_step: 3, optimizer: sgd, learning_rate: 0.001, precision: fp32}"
    )
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        command = [*start, "-m", "compress", "train", str(tmp_path / "recipe.yaml"), "--data", str(speech_folder)]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name), "--threads", "1"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Measure it with") == 1
    for stage, count in (("3-base", 4), ("4-finetune", 2)):
        one, two = (read_log(tmp_path / name / stage / "train.jsonl") for name in ("one", "two"))
        assert [line["step"] for line in two] == [line["step"] for line in one]
        assert len(two) == count
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-3)
    assert Artifact.load(tmp_path / "two" / "model").params == Artifact.load(tmp_path / "one" / "model").params


if __name__ == "__main__":
    run_one_of_two(Path(sys.argv[1]))
