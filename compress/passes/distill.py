"""Distillation: a compressed network learns to give what the network before compression gives."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, final, get_args

import numpy as np
import torch

from compress.artifact import FILE_NAMES, Artifact, Format, FrontEnd
from compress.data import DataFolder, read_scp
from compress.errors import InputError, ModelError, SettingError
from compress.front_end_graph import split_front_end
from compress.passes.base import Array, Context, Preview, spread
from compress.passes.learning import LearningPass
from compress.training.augment import at_snr, random_crop
from compress.training.corpus import to_pcm
from compress.training.crops import cut_crops, hold_out, numbered
from compress.training.distiller import Lesson, Outcome, Schedule, distill
from compress.training.objective import FeatureLoss, Objective, Relation
from compress.training.own_speech import check_audio
from compress.training.qat import count_rounded, fake_quantized, plain
from compress.training.taps import Tap, choose_taps
from compress.training.teacher import answers_of

Preset: TypeAlias = Literal["unlabeled", "published"]

PRESETS: Mapping[str, Mapping[str, float]] = {
    "unlabeled": {"embedding": 1.0, "delta": 1.0},
    "published": {"alpha": 1.0, "beta": 0.7, "gamma": 0.3},
}
TERMS = ("alpha", "beta", "gamma", "delta", "embedding")
CHOICES = {"preset": get_args(Preset), "feature_loss": get_args(FeatureLoss)}
FEWEST_UTTERANCES = 8
HELD_OUT = 0.1  # of the utterances, within these bounds
HELD_OUT_UTTERANCES = (2, 64)
HELD_OUT_CROPS = 128
P_NOISE = 0.5  # of the utterances, where there is noise
SNR_DB = (5.0, 25.0)


@final
@dataclass(frozen=True)
class Distill(LearningPass):
    """Teach the network to give what a teacher gives, by default the network the run started from."""

    name: ClassVar[str] = "distill"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.TORCH

    teacher: str | None = None  # a name, artifact folder, .onnx file or checkpoint; none: what the run started from
    teacher_arch: str | None = None  # network of a checkpoint
    data: str | None = None  # a data folder of speech; none: the calibration list
    utterances: int = 60  # of the calibration list, without data
    crops: int = 1000  # pieces of utterances that the teacher is asked about, once
    crop_s: float = 2.0  # seconds of audio in a crop
    steps: int = 250
    batch_size: int = 16
    learning_rate: float = 3e-4
    preset: Preset = "unlabeled"  # weights of the terms; those given below go before it
    alpha: float | None = None  # of the classification of speakers (CE)
    beta: float | None = None  # of the soft labels (KD)
    gamma: float | None = None  # of the features
    delta: float | None = None  # of the relations
    embedding: float | None = None  # of 1 - cosine to the teacher's embedding
    temperature: float = 4.0  # of the soft labels
    beta_decay: float = 0.0  # part of beta that is gone at the last step
    margin: float = 0.2  # of CE, in radians
    scale: float = 32.0  # of the cosines to class centers, for CE and KD
    layers: tuple[str, ...] = ()  # whose features are compared: names, or pairs student=teacher
    feature_loss: FeatureLoss = "mse"  # or cosine
    relations: tuple[Relation, ...] = ("cosine",)  # of cosine, distance, angle
    noise: str | None = None  # recordings to add to half of the utterances, in the form of wav.scp
    qat: bool = False  # learn with weights and activations rounded as the pass ptq will round them
    device: str = "cpu"  # that the student learns on, or cuda
    seed: int = 1

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingError(f"distill.{name} must be {' or '.join(known)}, got '{getattr(self, name)}'.")
        unknown = [name for name in self.relations if name not in get_args(Relation)]
        if unknown:
            raise SettingError(f"distill.relations must be of {', '.join(get_args(Relation))}, got '{unknown[0]}'.")
        for name, least in (("utterances", FEWEST_UTTERANCES), ("crops", 16), ("steps", 1), ("batch_size", 4)):
            if getattr(self, name) < least:
                raise SettingError(f"distill.{name} must be at least {least}, got {getattr(self, name)}.")
        if self.seed < 0:
            raise SettingError(f"distill.seed must not be negative, got {self.seed}.")
        for name, low, high in _BOUNDS:
            if not low < getattr(self, name) <= high:
                raise SettingError(
                    f"distill.{name} must be more than {low:g} and at most {high:g}, got {getattr(self, name)}."
                )
        if not 0 <= self.beta_decay < 1:
            raise SettingError(f"distill.beta_decay must be in 0..1, less than 1, got {self.beta_decay}.")
        if not 0 <= self.margin <= math.pi / 2:
            raise SettingError(f"distill.margin must be in 0..{math.pi / 2:.2f} radians, got {self.margin}.")
        for name in TERMS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise SettingError(f"distill.{name} must be 0 or more, got {value}.")
        if not self.objective.weights(0.0):
            raise SettingError(f"distill: all of {', '.join(TERMS)} are 0, so there is nothing to learn.")
        if self.objective.delta and not self.relations:
            raise SettingError("distill.delta weighs the relations, and distill.relations names none.")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(f"distill.device must be cpu or cuda, got '{self.device}'.")
        if self.noise is not None and self.data is None:
            raise SettingError(
                "distill.noise is added to waveforms, and the calibration list gives features. Name a data folder with"
                " distill.data."
            )

    @property
    def objective(self) -> Objective:
        """What counts: the preset, and before it the weights that were given."""
        given = {name: getattr(self, name) for name in TERMS if getattr(self, name) is not None}
        return Objective(
            **{**PRESETS[self.preset], **given},
            beta_decay=self.beta_decay,
            temperature=self.temperature,
            margin=self.margin,
            scale=self.scale,
            feature_loss=self.feature_loss,
            relations=self.relations,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """The teacher's file, and the lists of data and noise; of the audio itself only the names."""
        found = []
        if self.teacher is not None and Path(self.teacher).is_dir():
            found.append(str(Path(self.teacher) / "artifact.json"))
        elif self.teacher is not None and (Path(self.teacher).suffix or "/" in self.teacher):
            found.append(self.teacher)
        if self.data is not None:
            lists = [Path(self.data) / name for name in ("wav.scp", "utt2spk")]  # a folder per speaker has neither
            found += [str(path) for path in lists if path.is_file()]
        return (*found, *([] if self.noise is None else [self.noise]))

    def preview(self, artifact: Artifact, context: Context) -> Preview:
        """The teacher, the layers that would be compared, and the weights."""
        self.check_input(artifact)
        teacher = self.find_teacher(artifact, context)
        taps = self.find_taps(artifact, teacher)
        speech = self.find_speech(artifact, context)
        rows = tuple({"layer": tap.student, "of the teacher": tap.teacher} for tap in taps)
        return Preview(rows, (*self.about(teacher, taps), f"{len(speech.load)} utterances to learn from"))

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Cut crops, ask the teacher once, teach, and keep what is nearest to it on held-out speech."""
        self.check_input(artifact)
        teacher = self.find_teacher(artifact, context)
        taps = self.find_taps(artifact, teacher)
        speech = self.find_speech(artifact, context)
        frames = artifact.front_end.frames_of(self.crop_s)
        fewest = max(artifact.min_frames, teacher.min_frames)
        if frames < fewest:
            raise SettingError(f"distill.crop_s: {self.crop_s:g} s are {frames} frames; at least {fewest} are needed.")
        lesson, held_out, heard = self.lessons(speech, teacher, taps, frames, context)
        schedule = Schedule(self.steps, self.batch_size, self.learning_rate, self.seed)
        student, rounded = artifact.module, []
        if self.qat:
            student = fake_quantized(student, lesson.crops)
            rounded = [f"learned, and measured, with {count_rounded(student)} layers rounded as ptq rounds them"]
        outcome = distill(student, lesson, held_out, taps, self.objective, schedule, context.progress, self.device)
        notes = (*self.about(teacher, taps), heard, *rounded, *told(outcome, self))
        return artifact.with_model(plain(outcome.model), self.step(*notes))

    def find_teacher(self, artifact: Artifact, context: Context) -> Artifact:
        """Open the teacher and check that it fits.

        Raises:
            InputError: If none was named and there is none to be known.
            ModelError: If it takes other features, or is the student itself.
        """
        teacher = context.source if self.teacher is None else Artifact.open(self.teacher, self.teacher_arch)
        itself = teacher is not None and teacher.sha256 == artifact.sha256 and not self.qat
        if teacher is None or (self.teacher is None and itself):
            raise InputError(
                "distill: no teacher. Without a name it is the network that the run started from, and nothing was done"
                " to that yet. Name one with distill.teacher (--teacher): a network, an artifact folder or .onnx file."
            )
        if itself:
            raise ModelError(f"distill.teacher: {self.teacher} is the student itself; there is nothing to learn.")
        if teacher.deferred is not None or (self.objective.gamma and teacher.format != Format.TORCH):
            lacks = "is not built yet" if teacher.deferred else "gives only its embedding, and gamma compares layers"
            raise ModelError(
                f"distill.teacher: {self.teacher} {lacks}. Name a network of PyTorch, or set distill.gamma=0."
            )
        if teacher.front_end.in_graph and teacher.format == Format.ONNX:
            teacher = without_front_end(teacher)
        ours, theirs = features_of(artifact.front_end), features_of(teacher.front_end)
        if ours != theirs or teacher.front_end.in_graph:
            raise ModelError(
                f"distill.teacher takes {theirs}{' in its graph' if teacher.front_end.in_graph else ''}; the student"
                f" takes {ours}. A teacher of the same features is needed."
            )
        return teacher

    def find_taps(self, artifact: Artifact, teacher: Artifact) -> list[Tap]:
        """The layers that are compared; none without ``gamma``."""
        if not self.objective.gamma:
            return []
        return choose_taps(artifact.module, teacher.module, artifact.front_end.num_mel_bins, self.layers)

    def find_speech(self, artifact: Artifact, context: Context) -> "Speech":
        """What to learn from.

        Raises:
            InputError: If there are too few utterances, audio cannot be used, or terms need speakers not known.
        """
        if self.data is None:
            speech = self._listed(context)
            where = "the calibration list"
        else:
            speech = Speech.of(DataFolder.read(self.data), artifact, self.noise, self.seed)
            where = self.data
        if len(speech.load) < FEWEST_UTTERANCES:
            raise InputError(
                f"distill: {where} has {len(speech.load)} utterances; {FEWEST_UTTERANCES} at least are needed, some of"
                " which are only measured on. Give more speech with distill.data."
            )
        if self.objective.needs_speakers and (None in speech.speakers or len(set(speech.speakers)) < 2):
            given = " and ".join(name for name in ("alpha", "beta") if getattr(self.objective, name))
            raise InputError(
                f"distill: {given} tell speakers apart, and {where} does not name two or more, one for each utterance."
                " Give it an utt2spk, or set distill.alpha=0 and distill.beta=0: embedding and delta need no speakers."
            )
        return speech

    def _listed(self, context: Context) -> "Speech":
        """The utterances of the calibration list."""
        load = context.utterances(self.utterances, "distill.utterances")
        speakers = spread(context.speakers, self.utterances) if context.speakers else [None] * self.utterances
        return Speech(load, speakers)

    def lessons(
        self, speech: "Speech", teacher: Artifact, taps: Sequence[Tap], frames: int, context: Context
    ) -> tuple[Lesson, Lesson, str]:
        """The crops to learn from and those to measure on, with the teacher's answers; and what was heard, in words."""
        rng = np.random.default_rng(self.seed)
        fewest, most = HELD_OUT_UTTERANCES
        wanted = min(most, max(fewest, round(HELD_OUT * len(speech.load))))
        ours, held = hold_out(speech.speakers, wanted, rng)
        cmn = teacher.front_end.cmn
        cut = partial(cut_crops, frames=frames, cmn=cmn, rng=rng, progress=context.progress)
        learned, places = cut([speech.load[i] for i in ours], self.crops)
        measured, _ = cut([speech.load[i] for i in held], min(HELD_OUT_CROPS, self.crops))
        answers = answers_of(teacher, torch.cat([learned, measured]), taps, context.threads, context.progress)
        names = [speech.speakers[ours[place]] for place in places]
        labels = numbered(names) if self.objective.needs_speakers else None
        heard = (
            f"{len(learned):,} crops of {self.crop_s:g} s from {len(set(places)):,} utterances, {len(measured)} from"
            f" {len(held)} others to measure on; the teacher's answers were"
            f" {'read from the cache' if answers.kept else 'computed'}"
        )
        first, rest = slice(None, len(learned)), slice(len(learned), None)
        return Lesson(learned, answers.of(first), labels), Lesson(measured, answers.of(rest)), heard

    def about(self, teacher: Artifact, taps: Sequence[Tap]) -> list[str]:
        """What is learned from whom, in words."""
        who = self.teacher or "the network that the run started from"
        terms = " + ".join(f"{weight:g} {name}" for name, weight in self.objective.weights(0.0).items())
        notes = [f"teacher: {who}, {teacher.params:,} parameters; loss {terms}"]
        if taps:
            names = [t.student if t.student == t.teacher else f"{t.student}={t.teacher}" for t in taps]
            notes.append(f"features of {', '.join(names)}")
        return notes


_BOUNDS = (
    ("crop_s", 0.0, 60.0),
    ("learning_rate", 0.0, 1.0),
    ("temperature", 0.0, 1000.0),
    ("scale", 0.0, 1000.0),
)


def told(outcome: Outcome, maker: Distill) -> list[str]:
    """What came of it, in words."""
    before, after = outcome.distances["given"], outcome.distances[outcome.chosen]
    notes = [f"{maker.steps} steps of {maker.batch_size} crops, {outcome.step_s:.2f} s each"]
    digits = 6 if maker.qat else 4  # what rounding costs is little
    held = f"distance to the teacher on held-out crops {before:.{digits}f}"
    best = min(value for name, value in outcome.distances.items() if name != "given")
    if outcome.chosen == "given":
        notes.append(f"{held} became {best:.{digits}f} at best, so the network was left as it was")
    else:
        which = "averaged over the last steps" if outcome.chosen == "averaged" else "of the last step"
        notes.append(f"{held} to {after:.{digits}f}, with the weights {which}")
    if outcome.cosines:
        notes.append(
            f"cosine to the teacher's embedding, held-out: {outcome.cosines['given']:.{digits}f} to"
            f" {outcome.cosines[outcome.chosen]:.{digits}f}"
        )
    return notes


@dataclass(frozen=True, eq=False)
class Speech:
    """Utterances to learn from.

    Attributes:
        load: Each gives features (frames, num_mel_bins).
        speakers: Of each, None where it is not known.
    """

    load: Sequence[Callable[[], Array]]
    speakers: Sequence[str | None]

    @classmethod
    def of(cls, folder: DataFolder, artifact: Artifact, noise: str | None, seed: int) -> "Speech":
        """Those of a data folder; with noise recordings, some of which are added to half of the utterances.

        Raises:
            InputError: If an audio file is missing, damaged or too short; it is named.
        """
        front_end = artifact.front_end
        recordings = [] if noise is None else [path for _, path in read_scp(noise)]
        noises = DataFolder(Path(noise or ""), {str(path): path for path in recordings})
        noises.check_files()
        check_audio(folder, folder.utterances, artifact, any_rate=True)

        def load(place: int) -> Array:
            waveform = folder.waveform(folder.utterances[place], front_end.sample_rate)
            rng = np.random.default_rng((seed, place))
            if len(noises) and rng.random() < P_NOISE:
                recording = noises.utterances[int(rng.integers(len(noises)))]
                added = to_pcm(noises.waveform(recording, front_end.sample_rate))
                waveform = at_snr(waveform, random_crop(added, len(waveform), 1.0, rng), rng.uniform(*SNR_DB))
            return front_end.features(waveform)

        speakers = [folder.speakers.get(name) for name in folder.utterances]
        return cls([partial(load, place) for place in range(len(folder))], speakers)


def features_of(front_end: FrontEnd) -> str:
    """What a network takes, in words by which two can be compared."""
    mean = "minus their mean" if front_end.cmn else "with their mean"
    return f"{front_end.num_mel_bins} mel bins at {front_end.sample_rate} Hz {mean}"


def without_front_end(artifact: Artifact) -> Artifact:
    """The same graph, fed with features instead of the waveform."""
    import onnx

    _, network = split_front_end(onnx.load_from_string(artifact.onnx))
    files = {**artifact.files, FILE_NAMES[Format.ONNX]: network.SerializeToString()}
    return replace(artifact, files=files, front_end=replace(artifact.front_end, in_graph=False))
