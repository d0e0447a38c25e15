"""Fine-tuning: a network learns to tell the speakers of own data apart, and is kept only if that does not harm it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch

from compress.artifact import Artifact, Format
from compress.data import DataFolder, read_scp
from compress.errors import InputError, SettingError, UnmetBudgetError
from compress.passes.base import Cell, Context, Preview, spread
from compress.passes.learning import LearningPass
from compress.training.crops import cut_crops, numbered
from compress.training.distiller import Lesson, Schedule
from compress.training.finetuner import Change, Exam, Unfreezing, blocks_of, finetune, hold_back
from compress.training.objective import Objective
from compress.training.own_speech import OwnSpeech, read_exam
from compress.training.qat import fake_quantized, plain
from compress.training.teacher import answers_of
from compress.units import format_interval, format_percent

FEWEST_CROPS = 2  # of each speaker


@final
@dataclass(frozen=True)
class Finetune(LearningPass):
    """Teach the network the speakers of own data, part by part from the output down; a worse one is refused."""

    name: ClassVar[str] = "finetune"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.TORCH
    own_speakers: ClassVar[bool] = True

    data: str | None = None  # a data folder, or one folder per speaker; none: the calibration list
    utterances: int = 60  # of the calibration list, without data
    trials: str | None = None  # data folder or trial list to test on; none: some of the data are held back for it
    held_back: float = 0.2  # share of each speaker's utterances, without trials
    keep: str | None = None  # data folder or trial list of an old domain, on which the EER must not rise
    keep_points: float = 0.5  # by more than so many points
    crops: int = 1000  # pieces of utterances to learn from
    crop_s: float = 2.0  # seconds of audio in a crop
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-4  # of the last layer
    blocks: int = 4  # parts below the last layer that start to learn one after the other
    decay: float = 0.6  # of the learning rate from each part to the one below it
    warmup: float = 0.1  # share of the steps in which only the head and the last layer learn
    unfrozen: float = 0.5  # share of the steps after which everything learns
    hold: float = 0.0  # weight of 1 - cosine to the network's own embedding before
    margin: float = 0.2  # of AAM-softmax, in radians
    scale: float = 32.0  # of the cosines to class centers
    augment: bool = True  # filters, rooms and babble, where there is audio
    noise: str | None = None  # recordings to add to half of the crops, in the form of wav.scp
    qat: bool = False  # learn with weights and activations rounded as the pass ptq will round them
    device: str = "cpu"  # or cuda
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (("utterances", 4), ("crops", 16), ("steps", 1), ("batch_size", 4), ("blocks", 1)):
            if getattr(self, name) < least:
                raise SettingError(f"finetune.{name} must be at least {least}, got {getattr(self, name)}.")
        if self.seed < 0:
            raise SettingError(f"finetune.seed must not be negative, got {self.seed}.")
        for name, low, high in _BOUNDS:
            if not low < getattr(self, name) <= high:
                raise SettingError(
                    f"finetune.{name} must be more than {low:g} and at most {high:g}, got {getattr(self, name)}."
                )
        for name, high in (("keep_points", 100.0), ("hold", 1000.0), ("margin", math.pi / 2), ("warmup", 1.0)):
            if not 0 <= getattr(self, name) <= high:
                raise SettingError(f"finetune.{name} must be in 0..{high:.4g}, got {getattr(self, name)}.")
        if not self.warmup <= self.unfrozen <= 1:
            raise SettingError(
                f"finetune.unfrozen must be in warmup..1, here {self.warmup:g}..1, got {self.unfrozen}: the other parts"
                " start to learn after the warm-up."
            )
        if self.noise is not None and not (self.augment and self.data is not None):
            raise SettingError("finetune.noise is added to audio. Name a data folder with finetune.data, and augment.")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(f"finetune.device must be cpu or cuda, got '{self.device}'.")

    @property
    def objective(self) -> Objective:
        """What counts: telling speakers apart, and with ``hold`` the embedding before."""
        return Objective(alpha=1.0, embedding=self.hold, margin=self.margin, scale=self.scale)

    @property
    def reads(self) -> tuple[str, ...]:
        """The lists of all data; of the audio itself only the names."""
        found: list[Path] = []
        for where in (self.data, self.trials, self.keep):
            if where is not None:
                root = Path(where)
                folder, lists = (root.parent, [root]) if root.is_file() else (root, sorted(root.glob("trials*")))
                found += [folder / "wav.scp", folder / "utt2spk", *lists]
        found = [path for path in found if path.is_file()]
        return (*map(str, found), *([] if self.noise is None else [self.noise]))

    def preview(self, artifact: Artifact, context: Context) -> Preview:
        """The parts with the steps at which they start, and what is learned from and tested on."""
        self.check_input(artifact)
        own, exams = self.find_speech(artifact, context)
        blocks = blocks_of(
            artifact.module, torch.zeros(1, self.frames(artifact), artifact.front_end.num_mel_bins), self.blocks
        )
        rows: list[Mapping[str, Cell]] = [
            {
                "part": "last layer" if place == 0 else f"{place} below",
                "parameters": sum(parameter.numel() for parameter in group.parameters),
                "from step": group.start,
                "rate": f"{group.rate * self.learning_rate:.2g}",
            }
            for place, group in enumerate(self.unfreezing.groups(blocks, self.steps))
        ]
        return Preview(
            tuple(rows),
            (
                learned_from(own, own.choose(self.crops, np.random.default_rng(self.seed))),
                *(f"tested on {exam.about}: {len(exam.labels):,} trials" for exam in exams),
            ),
        )

    @property
    def unfreezing(self) -> Unfreezing:
        """What learns when."""
        return Unfreezing(self.blocks, self.decay, self.warmup, self.unfrozen)

    def frames(self, artifact: Artifact) -> int:
        """Frames of a crop.

        Raises:
            SettingError: If the network needs more.
        """
        frames = artifact.front_end.frames_of(self.crop_s)
        if frames < artifact.min_frames:
            raise SettingError(
                f"finetune.crop_s: {self.crop_s:g} s are {frames} frames; at least {artifact.min_frames} are needed."
            )
        return frames

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Hold utterances back, learn from the others, and compare the EER before and after.

        Raises:
            UnmetBudgetError: If the EER rose, with the network as it was.
        """
        self.check_input(artifact)
        frames, cmn = self.frames(artifact), artifact.front_end.cmn
        own, exams = self.find_speech(artifact, context)
        rng = np.random.default_rng(self.seed)
        chosen = own.choose(self.crops, rng)
        crops, order = cut_crops(own.sources(chosen), self.crops, frames, cmn, rng, context.progress)
        labels = numbered([own.speakers[chosen[number][0]] for number in order])
        start = fake_quantized(artifact.module, crops) if self.qat else artifact.module
        before = [exam.scores(start, cmn, context.progress) for exam in exams]
        answers = answers_of(artifact, crops, [], context.threads, context.progress)
        learned = finetune(
            start,
            Lesson(crops, answers, labels),
            self.objective,
            self.unfreezing,
            Schedule(self.steps, self.batch_size, self.learning_rate, self.seed),
            context.progress,
            self.device,
        )
        after = [exam.scores(learned.average, cmn, context.progress) for exam in exams]
        changes = [exam.compare(*scores) for exam, *scores in zip(exams, before, after, strict=True)]
        notes = [
            learned_from(own, chosen),
            f"{self.steps} steps of {self.batch_size} crops, {learned.step_s:.2f} s each",
            *map(told, changes),
        ]
        refusal = self.refusal(changes)
        if refusal:
            kept = artifact.with_model(
                artifact.module, self.step(*notes, f"refused, the network is as it was: {refusal}")
            )
            raise UnmetBudgetError(f"finetune: {refusal} {_ADVICE}", kept)
        return artifact.with_model(plain(learned.average), self.step(*notes))

    def refusal(self, changes: Sequence[Change]) -> str | None:
        """Why what was learned is not taken, if it is not."""
        if changes[0].worse:
            return f"{told(changes[0])}, more than chance."
        for change in changes[1:]:
            if 100 * (change.after - change.before) > self.keep_points:
                return f"{told(change)}; {self.keep_points:g} points more were allowed."
        return None

    def find_speech(self, artifact: Artifact, context: Context) -> tuple["OwnSpeech", list[Exam]]:
        """What to learn from, and the trials to test on: the own domain's, then the old one's.

        Raises:
            InputError: If there are too few speakers or utterances, audio cannot be used, or trials are learned from.
        """
        own = self._read(artifact, context)
        count = len(set(own.speakers))
        if count < 2:
            raise InputError(f"finetune: {own.where} has one speaker; two at least are needed, to tell apart.")
        if self.crops < FEWEST_CROPS * count:
            raise SettingError(f"finetune.crops must be at least {FEWEST_CROPS * count} for {count} speakers.")
        if self.trials is None:
            ours, held = hold_back(own.speakers, self.held_back, np.random.default_rng(self.seed))
            held = own.others_than(ours, held)
            names = [own.speakers[place] for place in held]
            about = f"{len(held)} held-back utterances of {len(set(names))} speakers"
            exams = [Exam.of_all_pairs(about, [own.load[place] for place in held], names)]
            own = own.part(ours)
        else:
            exams = [read_exam(self.trials, artifact, own.files)]
        if self.keep is not None:
            exams.append(read_exam(self.keep, artifact, own.files))
        return own, exams

    def _read(self, artifact: Artifact, context: Context) -> "OwnSpeech":
        """The data folder, or the calibration list."""
        if self.data is not None:
            recordings = [] if self.noise is None else [path for _, path in read_scp(self.noise)]
            folder = DataFolder.read(self.data)
            return OwnSpeech.of(folder, artifact, recordings, self.augment, self.seed)
        load = context.utterances(self.utterances, "finetune.utterances")
        speakers = spread(context.speakers, self.utterances) if context.speakers else [None]
        if None in speakers:
            raise InputError(
                "finetune: the calibration list does not name the speakers. Name a data folder, or one folder per"
                " speaker, with finetune.data (--data)."
            )
        files = spread(context.files, self.utterances) if context.files else []
        return OwnSpeech.listed("the calibration list", load, [str(name) for name in speakers], files)


_BOUNDS = (
    ("held_back", 0.0, 0.5),
    ("crop_s", 0.0, 60.0),
    ("learning_rate", 0.0, 1.0),
    ("decay", 0.0, 1.0),
    ("scale", 0.0, 1000.0),
)
_ADVICE = "The network was left as it was. Lower finetune.learning_rate or steps, raise hold, or give more speech."


def told(change: Change) -> str:
    """What became of the EER, in words."""
    before, after = change.bounds or (None, None)
    text = f"EER on {change.about}, {change.trials:,} trials: {format_percent(change.before)}"
    text += f" ({format_interval(before)}) to {format_percent(change.after)} ({format_interval(after)})"
    if change.difference_ci95 is None:
        return f"{text}; too few speakers for an interval"
    low, high = (100 * bound for bound in change.difference_ci95)
    return f"{text}, {100 * (change.after - change.before):+.2f} points ({low:+.2f} to {high:+.2f})"


def learned_from(own: OwnSpeech, chosen: Sequence[tuple[int, int]]) -> str:
    """What is learned from, in words; a speaker's other utterances may be held back or not be chosen."""
    places = {place for place, _ in chosen}
    counts = Counter(own.speakers[place] for place in places)
    alone = sum(count == 1 for count in counts.values())
    text = f"learned from {len(places):,} utterances of {len(counts):,} speakers in {own.where}"
    return f"{text}; {alone} of them with only one" if alone else text
