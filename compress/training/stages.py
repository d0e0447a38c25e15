"""The four stages of a training, each in its folder: data, features, base training, fine-tuning.

A stage first writes what it is made of (``inputs.json``) and at the end, once its outputs are checked, what it gave
(``done.json``). So a later start tells whether the stage is finished and still of the same recipe and data.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.artifact import Artifact, Format, FrontEnd
from compress.data import DataFolder
from compress.errors import InputError, ModelError, SettingError
from compress.files import is_temporary, read_json, remove_temporary, sha256_of, write_json, write_text
from compress.models import architecture
from compress.models.checkpoint import CHECKPOINT_SUFFIXES
from compress.progress import Progress
from compress.surgery import count_parameters
from compress.training.corpus import Corpus
from compress.training.parallel import ALONE, Processes
from compress.training.prepare import check_leakage, fingerprint, list_noise, list_speech, measured_on, prepare
from compress.training.recipe import Recipe, build_network, to_plain, to_yaml
from compress.training.stored import StoredCrops, store_features
from compress.training.trainer import Crops, State, train
from compress.training.tutor import Tutor, check_teacher, find_tutor
from compress.training.watch import DevTrials, Line

DATA, FEATURES, BASE, FINETUNE = STAGES = ("1-data", "2-features", "3-base", "4-finetune")
TITLES = ("data", "features", "base training", "fine-tuning")
RECIPE = "recipe.yaml"
MODEL, CURVES, BOARD = GIVEN = ("model", "curves.png", "tensorboard")  # beside the stages, of the command line
OF_FINETUNING = ("final_crop_s", "final_margin", "final_speeds")  # keys that nothing before the last stage depends on
OF_NO_STAGE = ("accumulation",)  # does not change what is learned

Watch = Callable[[], AbstractContextManager[Callable[[Line], None]]]


@dataclass(frozen=True)
class Plan:
    """What is trained on what, and where.

    Attributes:
        recipe: Of the training.
        data: Data folder, or folder of shards.
        out: Folder of the stages.
        noise: List of noise recordings.
        dev: Data folder that is measured on; must share nothing with ``data``.
        trials: Trial list of ``dev`` whose EER is watched; None is its only one, or ``trials``.
        init: Artifact, registered model or checkpoint whose weights are the start.
        max_unreadable: Share of the utterances that may be left out, 0..1.
        device: ``cpu`` or ``cuda``.
        workers: Processes that decode, compute features and make batches.
        first: The stage to start with, 1..4, on what the stages before it have left; None: at the beginning.
        resume: Whether to go on with what is there.
    """

    recipe: Recipe
    data: str
    out: Path
    noise: Path | None = None
    dev: str | None = None
    trials: str | None = None
    init: str | None = None
    max_unreadable: float = 0.0
    device: str = "cpu"
    workers: int = 1
    first: int | None = None
    resume: bool = False


class Stage:
    """A stage's folder.

    Args:
        out: Of the training.
        name: Of ``STAGES``.
        inputs: What the stage is made of; plain values.
        processes: That train together; the first writes.
    """

    def __init__(self, out: Path, name: str, inputs: Mapping[str, Any], processes: Processes) -> None:
        self.folder, self.name, self.inputs = out / name, name, dict(inputs)
        self.number = STAGES.index(name) + 1
        self.processes = processes
        self.title = f"stage {self.number} of {len(STAGES)}, {TITLES[self.number - 1]}"

    def enter(self, plan: Plan, progress: Progress) -> bool:
        """Say whether there is work to do; what is there already must be of the same inputs and whole.

        Raises:
            InputError: If it is not, or an earlier stage than the plan's first is not finished.
        """
        if self.number == plan.first and self.processes.writes:
            if self.name == DATA:
                forget_notes(self.folder)
            else:
                forget(plan.out, self.number)
        begun, done = (self.folder / name for name in ("inputs.json", "done.json"))
        if begun.is_file() and (done.is_file() or self.name != DATA):  # what was decoded is kept by file
            found = differences(read_json(begun), self.inputs)
            if found:
                raise InputError(
                    f"{self.folder} cannot be gone on with: {'; '.join(found)}. Start there anew with"
                    f" --stage {self.number}, go back to what it was made of, or choose another --out folder."
                )
        if done.is_file():
            self.check_outputs(read_json(done)["outputs"])
            progress.say(f"{self.title}: done before")
            return False
        if plan.first and self.number < plan.first:
            raise InputError(
                f"--stage {plan.first} needs what stage {self.number} gives, and {self.folder} is not finished."
                f" Start with --stage {self.number}, or go on with --resume."
            )
        if self.processes.writes:
            write_json(begun, self.inputs)
            if self.name != DATA or not (plan.out / RECIPE).is_file():  # data are of any recipe
                write_text(plan.out / RECIPE, to_yaml(plan.recipe))
        progress.say(self.title)
        return True

    def check_outputs(self, outputs: Mapping[str, int]) -> None:
        """Compare what the stage gave with what is there now: file -> size in bytes.

        Raises:
            InputError: Naming the first file that is missing or of another size.
        """
        for name, size in outputs.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                there = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise InputError(
                    f"{path} {there}; stage {self.number} left {size}. Start there anew with --stage {self.number}."
                )

    def finish(self, outputs: Sequence[str], figures: Mapping[str, Any]) -> None:
        """Mark as done; the outputs have been checked."""
        sizes = {name: (self.folder / name).stat().st_size for name in sorted(outputs)}
        write_json(self.folder / "done.json", {"inputs": self.inputs, "outputs": sizes, "figures": dict(figures)})


def run_stages(plan: Plan, progress: Progress, watch: Watch, processes: Processes = ALONE) -> State:
    """Run the stages that are not done; returns the state at the end of the last.

    Args:
        plan: What to do.
        progress: Told what is being done.
        watch: Opened while stages 3 and 4 learn; gives what is called with a line of figures after each step.
        processes: That train together. The first prepares data and features, the others use them.

    Raises:
        SettingError: For a recipe that cannot be trained.
        InputError: For data that cannot be used, or an ``out`` that holds something else.
        ModelError: If ``init`` is of another network, or the training diverges.
        MachineError: If the disk is full.
    """
    if processes.writes:
        check_out(plan)
    measure = dev_trials(plan) if processes.writes else None
    initial = initial_weights(plan)
    torch.manual_seed(plan.recipe.seed)
    model = build_network(plan.recipe)
    width = Artifact.from_module(model).embedding_size
    check_crops(plan.recipe)
    check_teacher(plan.recipe, model)
    processes.check(plan.recipe.batch_size, plan.recipe.accumulation)
    with processes.first_alone():
        corpus = prepare_data(plan, progress, processes)
        crops = prepare_features(plan, corpus, progress, processes)

    tutor = find_tutor(plan.recipe, model, crops, plan.device)
    if tutor:
        progress.say(f"learning from {plan.recipe.teacher}, {count_parameters(tutor.module):,} parameters")
    classes = crops.num_speakers * len(plan.recipe.speeds)
    state = State(model, width, classes, plan.recipe, plan.device, corpus.fingerprint, tutor, processes)
    train_base(plan, state, crops, initial, tutor, progress, watch, measure)
    finetune(plan, state, crops, progress, watch, measure)
    return state


def dev_trials(plan: Plan) -> DevTrials | None:
    """Read the trials whose EER is watched; None where there are no dev data, or no trials in them.

    Raises:
        InputError: If there are several lists and none is named, or the dev data cannot be used.
    """
    folder = DataFolder.read(plan.dev) if plan.dev else None
    if folder is None or not (plan.trials or folder.trial_lists()):
        return None
    return DevTrials(folder, plan.trials, architecture(plan.recipe.model).min_frames)


def check_crops(recipe: Recipe) -> None:
    """Refuse crops that are too short for the network.

    Raises:
        SettingError: Naming the key of the recipe.
    """
    least = architecture(recipe.model).min_frames
    for key, length in (("crop_s", recipe.crop_s), ("final_crop_s", recipe.final_crop_s)):
        frames = FrontEnd().frames_of(length)
        if frames < least:
            raise SettingError(f"recipe: {key}: {length:g} s are {frames} frames; {recipe.model} needs {least}.")


def prepare_data(plan: Plan, progress: Progress, processes: Processes) -> Corpus:
    """Stage 1: judge and decode all audio, into shards."""
    speech, noise = list_speech(plan.data), list_noise(plan.noise)
    inputs = {
        "speech": fingerprint(speech),
        "noise": fingerprint(noise),
        "max_unreadable": plan.max_unreadable,
    }
    stage = Stage(plan.out, DATA, inputs, processes)
    work = stage.enter(plan, progress)
    if work:
        figures = prepare(speech, noise, stage.folder, plan.max_unreadable, plan.workers, progress)
    corpus = Corpus.open(stage.folder)
    if plan.dev:
        check_leakage(stage.folder, measured_on(DataFolder.read(plan.dev), plan.trials), progress)
    if work:
        if plan.first == stage.number and processes.writes:
            forget(plan.out, stage.number + 1)  # not before: data that are refused must not cost a training
        stage.finish(made_by(stage), figures)
        progress.say(", ".join(f"{name} {value:,}" for name, value in figures.items()))
    return corpus


def prepare_features(plan: Plan, corpus: Corpus, progress: Progress, processes: Processes) -> Crops:
    """Stage 2: store the features of disturbed copies, or try out that batches can be made of the audio."""
    recipe = plan.recipe
    keys = ["features", *(("copies", "speeds", "augmentation", "seed") if recipe.features == "stored" else ())]
    inputs = {"data": corpus.fingerprint, "recipe": {key: to_plain(recipe)[key] for key in keys}}
    stage = Stage(plan.out, FEATURES, inputs, processes)
    work = stage.enter(plan, progress)
    if recipe.features == "stored":
        if work:
            store_features(recipe, corpus, stage.folder, plan.workers, progress)
        crops: Crops = StoredCrops(recipe, corpus, stage.folder)
    else:
        crops = Crops(recipe, corpus.utterances, corpus.speakers, corpus.noises)
    if work:
        stage.finish(made_by(stage), try_batches(crops, recipe, progress))
    return crops


def try_batches(crops: Crops, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Make the first and the last batch; returns their shapes.

    Raises:
        InputError: If one holds NaN or infinite values.
    """
    shapes = []
    for step in (0, recipe.steps - 1):
        started = time.monotonic()
        features, _ = crops[step]
        progress.say(
            f"a batch of {' x '.join(map(str, features.shape))} takes {time.monotonic() - started:.2f} s to make"
        )
        if not torch.isfinite(features).all():
            raise InputError(f"the features of step {step + 1} are not finite. Is the noise of --noise usable?")
        shapes.append(list(features.shape))
    return {"speakers": crops.num_speakers, "first_batch": shapes[0], "last_batch": shapes[1]}


def train_base(
    plan: Plan,
    state: State,
    crops: Crops,
    initial: Mapping[str, Tensor] | None,
    tutor: Tutor | None,
    progress: Progress,
    watch: Watch,
    measure: DevTrials | None,
) -> None:
    """Stage 3: all steps but the last ones."""
    recipe = base_recipe(plan.recipe)
    inputs = {
        "data": state.origin["data"],
        "recipe": keys_of(recipe, (*OF_FINETUNING, *OF_NO_STAGE)),
        "teacher": tutor.sha256 if tutor else None,
        "init": weights_hash(initial) if initial else None,
    }
    stage = Stage(plan.out, BASE, inputs, state.processes)
    state.origin["recipe"] = to_yaml(recipe)
    with state.processes.first_alone():
        work = stage.enter(plan, progress)
    reached = load_checkpoint(state, stage)
    if work and reached:
        progress.say(f"going on after step {state.step}")
    elif work and initial:
        state.start_from(initial, crops)
        progress.say(f"starting from the weights of {plan.init}")
    end = plan.recipe.steps - plan.recipe.final_steps
    if work:
        with watch() as report:
            train(state, plan.recipe, crops, stage.folder, report, workers=plan.workers, until=end, measure=measure)
    check_trained(state, stage, end)
    with state.processes.first_alone():
        if work and state.processes.writes:
            stage.finish(["checkpoint.pt"], {"steps": state.step})


def finetune(
    plan: Plan, state: State, crops: Crops, progress: Progress, watch: Watch, measure: DevTrials | None
) -> None:
    """Stage 4: the last steps, on longer crops with a larger margin, at the end of the learning rate's schedule."""
    inputs = {
        "data": state.origin["data"],
        "recipe": keys_of(plan.recipe, OF_NO_STAGE),
        "base": sha256_of(plan.out / BASE / "checkpoint.pt"),
    }
    stage = Stage(plan.out, FINETUNE, inputs, state.processes)
    state.origin["recipe"] = to_yaml(plan.recipe)
    with state.processes.first_alone():
        work = stage.enter(plan, progress)
    if load_checkpoint(state, stage) and work:
        progress.say(f"going on after step {state.step}")
    if work:
        with watch() as report:
            train(state, plan.recipe, crops, stage.folder, report, workers=plan.workers, measure=measure)
    check_trained(state, stage, plan.recipe.steps)
    with state.processes.first_alone():
        if work and state.processes.writes:
            stage.finish(["checkpoint.pt"], {"steps": state.step})


def load_checkpoint(state: State, stage: Stage) -> bool:
    """Load what the stage has reached, if anything."""
    checkpoint = stage.folder / "checkpoint.pt"
    if not checkpoint.is_file():
        return False
    state.load(checkpoint)
    return True


def check_trained(state: State, stage: Stage, end: int) -> None:
    """Refuse a stage that is not at its end, or gave weights that are not finite.

    Raises:
        InputError: If the checkpoint is of another step.
        ModelError: If weights are NaN or infinite.
    """
    if state.step != end:
        raise InputError(
            f"{stage.folder / 'checkpoint.pt'} is of step {state.step}, and the stage ends at {end}."
            f" Start there anew with --stage {stage.number}."
        )
    bad = [name for name, value in state.average.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ModelError(
            f"{stage.folder}: the averaged weights are not finite ({bad[0]}). Lower learning_rate, and start there"
            f" anew with --stage {stage.number}."
        )


def base_recipe(recipe: Recipe) -> Recipe:
    """A recipe without what only the last stage depends on."""
    without: dict[str, Any] = {name: getattr(Recipe(), name) for name in OF_FINETUNING}
    return replace(recipe, **without)


def keys_of(recipe: Recipe, but: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe as JSON has them, without some keys."""
    return {key: value for key, value in to_plain(recipe).items() if key not in but}


def initial_weights(plan: Plan) -> dict[str, Tensor] | None:
    """Read the weights to start from; None without ``init``.

    Raises:
        ModelError: If they are of another network than the recipe's.
    """
    if not plan.init:
        return None
    arch = plan.recipe.model if Path(plan.init).suffix in CHECKPOINT_SUFFIXES else None
    initial = Artifact.open(plan.init, arch)
    if initial.format != Format.TORCH:
        raise ModelError(f"--init {plan.init} is of format {initial.format}; weights of a PyTorch network are needed.")
    weights: dict[str, Tensor] = initial.module.state_dict()
    own = build_network(plan.recipe).state_dict()
    wrong = [name for name in own.keys() | weights.keys() if shape_of(own, name) != shape_of(weights, name)]
    wrong = sorted(name for name in wrong if not name.endswith("num_batches_tracked"))
    if wrong:
        raise ModelError(
            f"--init {plan.init} does not fit {plan.recipe.model} of the recipe: {len(wrong)} weights differ, such as"
            f" {wrong[0]}. Give the recipe that network's `model` and `arguments`, or start from other weights."
        )
    return weights


def shape_of(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    """The shape of a weight; None where there is none."""
    return weights[name].shape if name in weights else None


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Hash names and values."""
    parts = [name.encode() + np.ascontiguousarray(value.cpu().numpy()).tobytes() for name, value in weights.items()]
    return sha256_of(b"".join(parts))


def differences(stored: Any, own: Mapping[str, Any]) -> list[str]:
    """Say in what the inputs of a stage differ from those given now."""
    if not isinstance(stored, dict):
        return ["its inputs.json is damaged"]
    found = []
    if isinstance(stored.get("recipe"), dict):
        keys = [
            key for key, value in own["recipe"].items() if key in stored["recipe"] and stored["recipe"][key] != value
        ]
        found += [f"the recipe has another {', '.join(keys)}"] if keys else []
    for key, text in (
        ("speech", "the data have other files, utterances or speakers"),
        ("noise", "the noise recordings are others"),
        ("max_unreadable", "--max-unreadable is another"),
        ("data", "the data have other utterances, speakers or noise recordings"),
        ("teacher", "the teacher is another file"),
        ("init", "--init has other weights"),
        ("base", "the base training is another"),
    ):
        if stored.get(key) != own.get(key):
            found.append(text)
    return found


def made_by(stage: Stage) -> list[str]:
    """The files that a stage has written, apart from its own notes."""
    return [
        p.name for p in stage.folder.iterdir() if p.name not in ("inputs.json", "done.json") and not is_temporary(p)
    ]


def forget_notes(folder: Path) -> None:
    """Take a stage as not done, and leave what it gave: of decoded audio only what has changed is decoded again."""
    for note in ("inputs.json", "done.json"):
        (folder / note).unlink(missing_ok=True)


def forget(out: Path, first: int) -> None:
    """Remove what a stage and those after it gave, and what came of them: artifact and curves."""
    for name in (*STAGES[first - 1 :], MODEL):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    (out / CURVES).unlink(missing_ok=True)


def check_out(plan: Plan) -> None:
    """Refuse a folder that holds something else, or a training when neither ``resume`` nor ``first`` was asked for.

    What a killed process left half-written is removed.

    Raises:
        InputError: Naming what is there.
    """
    out = plan.out
    if plan.first and plan.resume:
        raise InputError("--stage starts a stage anew and --resume goes on with one. Give only one of them.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Choose another --out folder.")
    known = (out / RECIPE).is_file() and (out / DATA).is_dir()  # a training, perhaps of data that were refused since
    done = (out / DATA / "done.json").is_file()
    begun = done or (known and any((out / name).exists() for name in STAGES[1:]))
    if begun and not (plan.resume or plan.first):
        raise InputError(
            f"{out} holds a training already. Go on with it by --resume, start one of its stages anew by --stage, or"
            " choose another --out folder."
        )
    if plan.first and plan.first > 1 and not begun:
        raise InputError(f"--stage {plan.first} needs what the stages before it give, and {out} has none of them.")
    if not out.is_dir():
        return
    own = (RECIPE, *STAGES, *GIVEN) if known else (DATA,)
    if not done and [path for path in out.iterdir() if not is_temporary(path) and path.name not in own]:
        raise InputError(f"{out} is not empty and not a training. Choose another --out folder.")
    for folder in (out, *(out / name for name in STAGES)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if is_temporary(path):
                remove_temporary(path)
