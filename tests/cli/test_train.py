"""``compress train``: what it writes, its exit codes, and what it says of wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.artifact import Artifact
from compress.training.recipe import read_recipe

RECIPE = """\
arguments: {embedding_size: 16, growth_rate: 8, bn_size: 2, init_channels: 16}
steps: 3
final_steps: 1
batch_size: 2
crop_s: 0.3
final_crop_s: 0.3
warmup_steps: 1
precision: fp32
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def arguments(recipe: Path, own_speech: Path, tmp_path: Path) -> list[str]:
    """A training that takes a second."""
    options = ["--data", own_speech, "--out", tmp_path / "out", "--threads", "1"]
    return [str(argument) for argument in ["train", recipe, *options]]


@pytest.fixture
def trained(cli: Callable, arguments: list[str], tmp_path: Path) -> Path:
    """The folder of a finished training."""
    assert cli(*arguments).code == 0
    return tmp_path / "out"


def test_training_writes_an_artifact_its_recipe_and_a_log(
    cli: Callable, arguments: list[str], recipe: Path, tmp_path: Path
) -> None:
    code, out, err = cli(*arguments)
    folder = tmp_path / "out"
    assert code == 0
    artifact = Artifact.load(folder / "model")
    assert (artifact.arch, artifact.embedding_size) == ("campplus", 16)
    assert f"{folder / 'model'}: {artifact.params:,} parameters" in out
    assert "step 3 of 3: loss" in err
    assert read_recipe(folder / "recipe.yaml") == read_recipe(recipe)
    steps = [json.loads(line)["step"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_training_starts_from_given_weights(
    cli: Callable, arguments: list[str], trained: Path, tmp_path: Path
) -> None:
    arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
    code, _, err = cli(*arguments, "--init", str(trained / "model"))
    assert code == 0
    assert f"starting from the weights of {trained / 'model'}" in err
    assert Artifact.load(tmp_path / "second" / "model").params == Artifact.load(trained / "model").params


def test_initial_weights_of_another_network_are_refused(cli: Callable, arguments: list[str], tmp_path: Path) -> None:
    code, out, err = cli(*arguments, "--init", "campplus")
    assert (code, out) == (2, "")
    assert "error: the artifact of --init" in err
    assert not (tmp_path / "out").exists()


def test_a_training_is_gone_on_with_only_by_resume(
    cli: Callable, arguments: list[str], trained: Path, unchanged: Callable
) -> None:
    before = unchanged()
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert f"error: {trained} holds a training already. Go on with it by --resume" in err
    assert unchanged() == before
    weights = (trained / "model" / "model.safetensors").read_bytes()
    code, out, err = cli(*arguments, "--resume")
    assert code == 0
    assert "going on after step 3" in err
    assert (trained / "model" / "model.safetensors").read_bytes() == weights


def test_another_recipe_or_other_data_are_not_gone_on_with(
    cli: Callable, arguments: list[str], recipe: Path, own_speech: Path, trained: Path, unchanged: Callable
) -> None:
    recipe.write_text(RECIPE.replace("steps: 3", "steps: 4", 1) + "margin: 0.3\n")
    before = unchanged()
    code, _, err = cli(*arguments, "--resume")
    assert code == 2
    assert "checkpoint.pt cannot be gone on with: the recipe has another steps, margin." in err
    assert unchanged() == before

    recipe.write_text(RECIPE)
    listed = (own_speech / "wav.scp").read_text().splitlines(keepends=True)
    (own_speech / "wav.scp").write_text("".join(listed[1:]))
    assert "the data have other utterances, speakers or noise recordings" in cli(*arguments, "--resume").err
    (own_speech / "wav.scp").write_text("".join(listed[3:]))
    assert "it has 18 classes (speakers times speeds), now there are 15" in cli(*arguments, "--resume").err
    assert (trained / "checkpoint.pt").read_bytes() == before[str(trained / "checkpoint.pt")]


def test_a_damaged_or_foreign_checkpoint_is_named(cli: Callable, arguments: list[str], trained: Path) -> None:
    checkpoint = trained / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for data in (b"", whole[:-5000], b"hello" * 99):
        checkpoint.write_bytes(data)
        code, _, err = cli(*arguments, "--resume")
        assert code == 2
        assert f"error: {checkpoint} is damaged: it is not a whole checkpoint." in err
    torch.save({"step": 3}, checkpoint)
    code, _, err = cli(*arguments, "--resume")
    assert code == 2
    assert f"error: {checkpoint} does not tell its recipe and data" in err


def test_a_folder_of_something_else_is_refused(
    cli: Callable, arguments: list[str], tmp_path: Path, unchanged: Callable
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = unchanged()
    for resume in ([], ["--resume"]):
        code, _, err = cli(*arguments, *resume)
        assert code == 2
        assert "out is not empty and not a training. Choose another --out folder." in err
    assert unchanged() == before


RECIPES = {
    "unknown key": ("stepz: 3\n", "Did you mean 'steps'?"),
    "unknown network": ("model: camplus\n", "unknown model 'camplus'. Did you mean 'campplus'?"),
    "unknown argument": ("arguments: {width: 3}\n", "campplus cannot be built from arguments {'width': 3}: "),
    "argument of text": ("arguments: {growth_rate: wide}\n", "cannot be built from arguments {'growth_rate': 'wide'}"),
    "no mapping": ("- 1\n", "must hold a mapping (keys such as model, steps), not list."),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_wrong_recipe_is_named_before_the_data_are_read(
    cli: Callable, arguments: list[str], recipe: Path, unchanged: Callable, kind: str
) -> None:
    text, message = RECIPES[kind]
    recipe.write_text(text)
    arguments[arguments.index("--data") + 1] = "no/such"
    before = unchanged()
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert unchanged() == before


def test_one_speaker_is_too_few(cli: Callable, arguments: list[str], own_speech: Path, unchanged: Callable) -> None:
    names = [line.split()[0] for line in (own_speech / "utt2spk").read_text().splitlines()]
    (own_speech / "utt2spk").write_text("".join(f"{name} anna\n" for name in names))
    before = unchanged()
    code, _, err = cli(*arguments)
    assert code == 2
    assert "has 1 speaker; training needs two or more in utt2spk." in err
    assert unchanged() == before
