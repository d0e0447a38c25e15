"""``compress train``: what it writes, its exit codes, and what it says of wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact import Artifact
from compress.data import DataFolder
from compress.training import stages
from compress.training.recipe import build_network, read_recipe
from compress.training.stages import STAGES

RECIPE = """\
model: tdnn_blstm
arguments: {embedding_size: 16, channels: 32, hidden_size: 16, attention_channels: 8}
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


def checkpoint_of(path: Path) -> dict[str, Any]:
    """Read all that a checkpoint holds."""
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare two checkpoints bit by bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    else:
        assert one == other, where


def test_training_writes_four_stages_an_artifact_its_recipe_and_logs(
    cli: Callable, arguments: list[str], recipe: Path, tmp_path: Path
) -> None:
    code, out, err = cli(*arguments)
    folder = tmp_path / "out"
    assert code == 0
    artifact = Artifact.load(folder / "model")
    assert (artifact.arch, artifact.embedding_size) == ("tdnn_blstm", 16)
    assert f"{folder / 'model'}: {artifact.params:,} parameters" in out
    assert "step 3 of 3: loss" in err
    assert read_recipe(folder / "recipe.yaml") == read_recipe(recipe)
    steps = {
        stage: [json.loads(line)["step"] for line in (folder / stage / "train.jsonl").read_text().splitlines()]
        for stage in ("3-base", "4-finetune")
    }
    assert steps == {"3-base": [1, 2], "4-finetune": [3]}
    figures = [json.loads((folder / stage / "done.json").read_text())["figures"] for stage in STAGES]
    assert figures[0] == {"utterances": 18, "speakers": 6, "hours": 0.005, "unreadable": 0, "findings": 0}
    assert figures[1:] == [
        {"speakers": 6, "first_batch": [2, 28, 80], "last_batch": [2, 28, 80]},
        {"steps": 2},
        {"steps": 3},
    ]
    for number, title in enumerate(("data", "features", "base training", "fine-tuning"), 1):
        assert f"stage {number} of 4, {title}" in err


@pytest.mark.parametrize("final", [0, 3])
def test_either_training_stage_may_have_no_steps(
    cli: Callable, arguments: list[str], recipe: Path, tmp_path: Path, final: int
) -> None:
    recipe.write_text(RECIPE.replace("final_steps: 1", f"final_steps: {final}"))
    assert cli(*arguments).code == 0
    steps = [json.loads((tmp_path / "out" / stage / "done.json").read_text())["figures"] for stage in STAGES[2:]]
    assert steps == [{"steps": 3 - final}, {"steps": 3}]
    assert cli(*arguments, "--resume").err.count("done before") == 4


def test_a_training_starts_from_given_weights(
    cli: Callable, arguments: list[str], trained: Path, tmp_path: Path
) -> None:
    arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
    code, _, err = cli(*arguments, "--init", str(trained / "model"))
    assert code == 0
    assert f"starting from the weights of {trained / 'model'}" in err
    assert Artifact.load(tmp_path / "second" / "model").params == Artifact.load(trained / "model").params


def test_initial_weights_of_another_network_are_refused(
    cli: Callable, arguments: list[str], small_checkpoint: Path, tmp_path: Path
) -> None:
    code, out, err = cli(*arguments, "--init", "campplus")
    assert (code, out) == (2, "")
    assert "error: --init campplus does not fit tdnn_blstm of the recipe: " in err
    code, _, err = cli(*arguments, "--init", small_checkpoint)
    assert code == 2
    assert f"error: {small_checkpoint} does not fit tdnn_blstm: " in err
    assert not (tmp_path / "out").exists()


def test_initial_weights_that_are_no_network_of_pytorch_are_refused(
    cli: Callable, arguments: list[str], tiny_onnx: Artifact, tmp_path: Path
) -> None:
    tiny_onnx.save(tmp_path / "graph")
    code, _, err = cli(*arguments, "--init", tmp_path / "graph")
    assert code == 2
    assert f"error: --init {tmp_path / 'graph'} is of format onnx; weights of a PyTorch network are needed." in err


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
    assert err.count("done before") == 4
    assert "going on" not in err
    assert (trained / "model" / "model.safetensors").read_bytes() == weights


def test_a_threshold_that_was_fitted_since_is_kept(
    cli: Callable, arguments: list[str], trained: Path, speech_folder: Path
) -> None:
    assert cli("threshold", trained / "model", "--data", speech_folder, "--fpr", "0.2").code == 0
    fitted = (trained / "model" / "artifact.json").read_bytes()
    code, _, err = cli(*arguments, "--resume")
    assert code == 0
    assert f"{trained / 'model'}: made before" in err
    assert (trained / "model" / "artifact.json").read_bytes() == fitted
    size = (trained / "model" / "model.safetensors").stat().st_size
    code, out, err = cli(*arguments, "--resume", "--half")
    assert (code, "made before" in err) == (0, False)
    half = (trained / "model" / "model.safetensors").stat().st_size
    assert half < 0.6 * size
    assert f"{half:,} bytes" in out


def test_another_recipe_or_other_data_are_not_gone_on_with(
    cli: Callable, arguments: list[str], recipe: Path, own_speech: Path, trained: Path, unchanged: Callable
) -> None:
    recipe.write_text(RECIPE.replace("steps: 3", "steps: 4", 1) + "margin: 0.3\n")
    before = unchanged()
    code, _, err = cli(*arguments, "--resume")
    assert code == 2
    assert "3-base cannot be gone on with: the recipe has another steps, margin. Start there anew with --stage 3" in err
    assert unchanged() == before

    recipe.write_text(RECIPE)
    listed = (own_speech / "wav.scp").read_text().splitlines(keepends=True)
    (own_speech / "wav.scp").write_text("".join(listed[1:]))
    code, _, err = cli(*arguments, "--resume")
    assert "1-data cannot be gone on with: the data have other files, utterances or speakers." in err
    assert (trained / "3-base" / "checkpoint.pt").read_bytes() == before[str(trained / "3-base" / "checkpoint.pt")]


def test_a_stage_starts_anew_on_what_is_before_it(
    cli: Callable, arguments: list[str], recipe: Path, trained: Path
) -> None:
    base = (trained / "3-base" / "checkpoint.pt").read_bytes()
    weights = (trained / "model" / "model.safetensors").read_bytes()
    recipe.write_text(RECIPE + "final_margin: 0.5\n")
    code, _, err = cli(*arguments, "--resume")
    assert code == 2
    assert "4-finetune cannot be gone on with: the recipe has another final_margin." in err
    code, _, err = cli(*arguments, "--stage", "4")
    assert (code, err.count("done before")) == (0, 3)
    assert (trained / "3-base" / "checkpoint.pt").read_bytes() == base
    assert (trained / "model" / "model.safetensors").read_bytes() != weights
    assert read_recipe(trained / "recipe.yaml").final_margin == 0.5

    recipe.write_text(RECIPE + "learning_rate: 0.002\n")
    code, _, err = cli(*arguments, "--stage", "4")
    assert code == 2
    assert "3-base cannot be gone on with: the recipe has another learning_rate. Start there anew with --stage 3" in err
    assert cli(*arguments, "--stage", "3").err.count("done before") == 2
    recipe.write_text(RECIPE)
    assert cli(*arguments, "--stage", "1").err.count("done before") == 0
    assert (trained / "model" / "model.safetensors").read_bytes() == weights


def test_data_that_are_refused_cost_no_training(
    cli: Callable, arguments: list[str], own_speech: Path, trained: Path
) -> None:
    """With ``--stage 1`` what was trained stays until the new data are judged, and then it goes."""
    kept = [trained / "3-base" / "checkpoint.pt", trained / "4-finetune" / "checkpoint.pt", trained / "model"]
    first = sorted((own_speech / "wav").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(b"not audio")
    assert "1 of 18 utterances cannot be used" in cli(*arguments, "--stage", "1").err
    assert all(path.exists() for path in kept)
    assert "holds a training already. Go on with it by --resume" in cli(*arguments).err
    assert "1 of 18 utterances cannot be used" in cli(*arguments, "--resume").err
    first.write_bytes(whole)
    code, _, err = cli(*arguments, "--resume")
    assert (code, err.count("done before")) == (0, 3)

    first.write_bytes(b"not audio")
    assert cli(*arguments, "--stage", "1").code == 2
    (trained / "thesis.tex").touch()
    assert "is not empty and not a training" in cli(*arguments, "--stage", "1").err
    (trained / "thesis.tex").unlink()
    code, _, err = cli(*arguments, "--stage", "1", "--max-unreadable", "6%")
    assert (code, err.count("done before")) == (0, 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_artifact_of_another_training_does_not_stay(
    cli: Callable, arguments: list[str], recipe: Path, trained: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (trained / "curves.png").touch()
    recipe.write_text(RECIPE + "learning_rate: 0.002\n")
    monkeypatch.setattr(stages, "train", stop)
    assert cli(*arguments, "--stage", stage).code == 130
    assert read_recipe(trained / "recipe.yaml").learning_rate == 0.002
    assert not (trained / "model").exists()
    assert not (trained / "curves.png").exists()


def test_a_stage_needs_those_before_it(cli: Callable, arguments: list[str], trained: Path) -> None:
    (trained / "3-base" / "done.json").unlink()
    code, _, err = cli(*arguments, "--stage", "4")
    assert code == 2
    assert "--stage 4 needs what stage 3 gives, and" in err
    assert "3-base is not finished. Start with --stage 3, or go on with --resume." in err
    assert (trained / "4-finetune" / "done.json").is_file()
    for path in (trained / "1-data").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    code, _, err = cli(*arguments, "--stage", "3")
    assert code == 2
    assert "speech-000000.tar has" in err
    assert "Start there anew with --stage 1." in err
    arguments[arguments.index("--out") + 1] = "elsewhere"
    assert "--stage 3 needs what the stages before it give, and elsewhere has none" in cli(*arguments, "--stage", 3).err
    assert "Give only one of them." in cli(*arguments, "--stage", "3", "--resume").err


def test_a_killed_training_ends_with_the_bits_of_an_unbroken_one(
    cli: Callable, arguments: list[str], recipe: Path, tmp_path: Path
) -> None:
    """Interrupted in the third stage, and killed without warning in the last, each after some of 30 steps."""
    recipe.write_text(RECIPE.replace("steps: 3", "steps: 60", 1).replace("final_steps: 1", "final_steps: 30"))
    torch.manual_seed(7)
    settings = read_recipe(recipe)
    start = Artifact.from_module(build_network(settings), arch=settings.model, arguments=settings.arguments)
    start.save(tmp_path / "start")
    arguments += ["--init", str(tmp_path / "start")]
    assert cli(*arguments).code == 0
    whole = tmp_path / "out"
    arguments[arguments.index("--out") + 1] = str(tmp_path / "broken")
    for sent, stage, resume in ((signal.SIGINT, "3-base", []), (signal.SIGKILL, "4-finetune", ["--resume"])):
        command = [sys.executable, "-m", "compress", *arguments, *resume]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        log = tmp_path / "broken" / stage / "train.jsonl"
        while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 2):
            time.sleep(0.002)
        os.killpg(process.pid, sent)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), err
        told = f"the same command with --resume goes on in {tmp_path / 'broken'}"
        assert (told if sent == signal.SIGINT else "going on after step") in err
    assert cli(*arguments, "--resume").code == 0
    for stage in ("3-base", "4-finetune"):
        one, other = (checkpoint_of(folder / stage / "checkpoint.pt") for folder in (whole, tmp_path / "broken"))
        assert_same(one, other)
    assert [path for path in (tmp_path / "broken").rglob("*.tmp")] == []


def test_a_damaged_or_foreign_checkpoint_is_named(cli: Callable, arguments: list[str], trained: Path) -> None:
    checkpoint = trained / "4-finetune" / "checkpoint.pt"
    (trained / "4-finetune" / "done.json").unlink()
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


@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml"])
def test_a_folder_of_something_else_is_refused(
    cli: Callable, arguments: list[str], tmp_path: Path, unchanged: Callable, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    before = unchanged()
    for resume in ([], ["--resume"], ["--stage", "1"]):
        code, _, err = cli(*arguments, *resume)
        assert code == 2
        assert "out is not empty and not a training. Choose another --out folder." in err
    assert unchanged() == before


def test_unreadable_files_are_listed_and_left_out_only_under_a_stated_limit(
    cli: Callable, arguments: list[str], own_speech: Path, tmp_path: Path
) -> None:
    first = sorted((own_speech / "wav").iterdir())[0]
    first.write_bytes(b"not audio")
    code, _, err = cli(*arguments)
    listed = tmp_path / "out" / "1-data" / "unreadable.txt"
    assert code == 2
    assert "error: 1 of 18 utterances cannot be used (5.56%, allowed are 0.00%): " in err
    assert f"All are listed in {listed}. Mend or remove them, or leave them out with --max-unreadable 5.6%." in err
    assert listed.read_text().startswith(f"{first.stem} {first} cannot be decoded")
    code, _, err = cli(*arguments, "--max-unreadable", "5%")
    assert (code, "allowed are 5.00%" in err) == (2, True)
    assert cli(*arguments, "--max-unreadable", "6%").code == 0
    figures = json.loads((tmp_path / "out" / "1-data" / "done.json").read_text())["figures"]
    assert (figures["utterances"], figures["unreadable"]) == (17, 1)


@pytest.mark.parametrize("share", ["many", "-1", "101%", "2"])
def test_a_limit_that_is_no_share_is_refused(cli: Callable, arguments: list[str], share: str) -> None:
    code, _, err = cli(*arguments, "--max-unreadable", share)
    assert code == 2
    assert f"error: --max-unreadable must be a share such as 1% or 0.01, got '{share}'." in err


def test_data_that_leak_into_the_trials_are_refused(cli: Callable, arguments: list[str], own_speech: Path) -> None:
    code, _, err = cli(*arguments, "--dev", own_speech)
    assert code == 2
    assert f"error: label leakage: training data and {own_speech} share 6 speakers (" in err
    assert "and 18 recordings (" in err


def test_dev_data_that_come_later_are_compared_too_and_cost_nothing(
    cli: Callable, arguments: list[str], own_speech: Path, trained: Path
) -> None:
    code, _, err = cli(*arguments, "--resume", "--dev", own_speech)
    assert code == 2
    assert f"error: label leakage: training data and {own_speech} share 6 speakers (" in err
    assert cli(*arguments, "--resume").err.count("done before") == 4


def test_a_trial_list_elsewhere_is_compared_with_the_training_data_too(
    cli: Callable, arguments: list[str], own_speech: Path, tmp_path: Path
) -> None:
    """The folder's own list names two other utterances than the list given."""
    dev = tmp_path / "dev"
    shutil.copytree(own_speech, dev)
    whole = DataFolder.read(own_speech)
    last = whole.speaker(whole.utterances[-1])
    inside, outside = ([n for n in whole.utterances if (whole.speaker(n) == last) == kind] for kind in (False, True))
    (own_speech / "wav.scp").write_text("".join(f"{name} wav/{name}.wav\n" for name in inside))
    (dev / "trials").write_text(f"1 {outside[0]} {outside[1]}\n0 {outside[1]} {outside[0]}\n")
    (tmp_path / "hard").write_text(f"1 {inside[0]} {inside[1]}\n0 {inside[0]} {outside[1]}\n")
    code, _, err = cli(*arguments, "--dev", dev, "--trials", tmp_path / "hard")
    assert code == 2
    assert f"error: label leakage: training data and {dev} share " in err


RECIPES = {
    "short crops": ("{model: resnet34, crop_s: 0.1}", "recipe: crop_s: 0.1 s are 8 frames; resnet34 needs 9."),
    "unknown teacher": ("{teacher: camplus, objective: {beta: 1}}", "Did you mean 'campplus'"),
    "unknown layer": (
        "{teacher: campplus, objective: {gamma: 1}, layers: [nowhere]}",
        "the recipe's layers",
    ),
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


def test_the_eer_on_dev_data_is_watched(cli: Callable, arguments: list[str], own_speech: Path, tmp_path: Path) -> None:
    """The last two of the six speakers are dev data; they have two trial lists, of which one must be chosen."""
    tables = {name: (own_speech / name).read_text().splitlines(keepends=True) for name in ("wav.scp", "utt2spk")}
    dev = Path(shutil.copytree(own_speech, tmp_path / "dev"))
    for name, lines in tables.items():
        (own_speech / name).write_text("".join(lines[:12]))
        (dev / name).write_text("".join(lines[12:]))
    kept = {line.split()[0] for line in tables["wav.scp"][12:]}
    trials = [line for line in (dev / "trials").read_text().splitlines() if kept >= set(line.split()[1:])]
    (dev / "trials").rename(dev / "trials_all")
    for name in ("trials_all", "trials_hard"):
        (dev / name).write_text("\n".join(trials))
    code, _, err = cli(*arguments, "--dev", dev)
    assert (code, "has several trial lists: trials_all, trials_hard." in err) == (2, True)
    assert "--trials is a list of --dev, and there is none." in cli(*arguments, "--trials", "trials_hard").err
    code, out, err = cli(*arguments, "--dev", dev, "--trials", "trials_hard")
    assert code == 0, err
    assert "dev EER" in err
    assert f"compress eval {tmp_path / 'out' / 'model'} --data {dev} --trials trials_hard" in out
    last = json.loads((tmp_path / "out" / "4-finetune" / "train.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["dev_eer"] <= 1


def test_stored_features_of_shards_are_trained_on_and_computed_again_where_they_are_missing(
    cli: Callable, arguments: list[str], recipe: Path, trained: Path, tmp_path: Path
) -> None:
    recipe.write_text(RECIPE + "features: stored\ncopies: 2\nspeeds: [1.0, 0.9]\n")
    arguments[arguments.index("--data") + 1] = str(trained / "1-data")
    arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
    assert cli(*arguments).code == 0
    files = sorted((tmp_path / "second" / "2-features").glob("*.npy"))
    assert [path.name for path in files] == [
        f"features-000000-speed{speed}-copy{copy}.npy" for speed in (0, 1) for copy in (0, 1)
    ]
    whole = files[1].read_bytes()
    files[1].unlink()
    code, _, err = cli(*arguments, "--resume")
    assert code == 2
    assert f"{files[1]} is missing; stage 2 left {len(whole)}. Start there anew with --stage 2." in err
    (tmp_path / "second" / "2-features" / "done.json").unlink()  # as if it had been killed there
    code, _, err = cli(*arguments, "--resume")
    assert code == 0
    assert "storing features: 1 done" in err
    assert files[1].read_bytes() == whole
    assert err.count("done before") == 3
