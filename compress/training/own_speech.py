"""Speech of a user's own speakers: utterances to learn from, as they are and disturbed, and trials to test on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from compress.artifact import Artifact
from compress.audio import check_waveform, probe, resample
from compress.data import DataFolder, copies_among
from compress.errors import InputError
from compress.features import SAMPLE_RATE
from compress.training.augment import PCM, Array, Augmentation, augment
from compress.training.corpus import to_pcm
from compress.training.finetuner import Exam

BABBLE = 64  # utterances to draw babble from


@dataclass(frozen=True, eq=False)
class OwnSpeech:
    """Utterances with their speakers.

    Attributes:
        where: Where they were found, in words.
        load: Each gives the features (frames, num_mel_bins) of an utterance.
        disturbed: The same as heard through a filter, in a room or with babble of the voices given or noise; every
            turn another way.
        speakers: Of each utterance.
        files: Of each utterance, where there is audio.
        voices: Each gives the samples of an utterance, for babble; none where nothing is disturbed.
    """

    where: str
    load: Sequence[Callable[[], Array]]
    disturbed: Sequence[Callable[[int, Sequence[PCM]], Array]]
    speakers: Sequence[str]
    files: Sequence[Path] = ()
    voices: Sequence[Callable[[], PCM]] = ()

    @classmethod
    def listed(
        cls, where: str, load: Sequence[Callable[[], Array]], speakers: Sequence[str], files: Sequence[Path]
    ) -> "OwnSpeech":
        """Utterances of which only features are to be had; nothing disturbs them."""
        return cls(where, load, [partial(_as_it_is, one) for one in load], speakers, files)

    @classmethod
    def of(
        cls, folder: DataFolder, artifact: Artifact, noises: Sequence[Path], disturb: bool, seed: int
    ) -> "OwnSpeech":
        """The utterances of a data folder.

        Args:
            folder: With speakers.
            artifact: Whose features are computed.
            noises: Recordings to add.
            disturb: Whether utterances are disturbed at all.
            seed: Decides how.

        Raises:
            InputError: If an utterance has no speaker, or audio that cannot be used; the first is named.
        """
        speakers = [folder.speaker(name) for name in folder.utterances]
        check_audio(folder, folder.utterances, artifact)
        front_end = artifact.front_end
        load = [partial(features_of, folder, name, artifact) for name in folder.utterances]
        files = [folder.path(name).resolve() for name in folder.utterances]
        if not disturb:
            return cls(str(folder.root), load, [partial(_as_it_is, one) for one in load], speakers, files)
        rate = max(SAMPLE_RATE, front_end.sample_rate)  # filters and rooms are made for 16 kHz
        added = DataFolder(Path(), {str(path): path for path in noises})

        @lru_cache(maxsize=BABBLE)
        def pcm(source: DataFolder, name: str) -> PCM:
            return to_pcm(source.waveform(name, rate))

        def disturbed(place: int, turn: int, talkers: Sequence[PCM]) -> Array:
            rng = np.random.default_rng((seed, place, turn))
            recordings = _Lazy([partial(pcm, added, name) for name in added.utterances])
            waveform = folder.waveform(folder.utterances[place], rate)
            heard = augment(waveform, Augmentation(), recordings, talkers, rng)
            return front_end.features(resample(heard, rate, front_end.sample_rate))

        voices = [partial(pcm, folder, name) for name in folder.utterances]
        heard = [partial(disturbed, place) for place in range(len(folder))]
        return cls(str(folder.root), load, heard, speakers, files, voices)

    def __len__(self) -> int:
        return len(self.speakers)

    def others_than(self, places: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Those of the candidates whose audio is no copy of that at ``places``."""
        if not self.files:
            return list(candidates)
        copies = set(copies_among([self.files[place] for place in candidates], [self.files[place] for place in places]))
        return [place for place in candidates if self.files[place] not in copies]

    def choose(self, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Choose ``count`` utterances, each as often as any other or once more: places, and the turn of each."""
        turns, rest = divmod(count, len(self))
        whole = [(place, turn) for turn in range(turns) for place in range(len(self))]
        return whole + [(place, turns) for place in sorted(rng.permutation(len(self))[:rest].tolist())]

    def sources(self, chosen: Sequence[tuple[int, int]]) -> list[Callable[[], Array]]:
        """Features of what :meth:`choose` chose, disturbed; babble is made of these utterances and of no others."""
        talkers = _Lazy(self.voices[:: max(1, -(-len(self.voices) // BABBLE))])
        return [partial(self.disturbed[place], turn, talkers) for place, turn in chosen]

    def part(self, places: Sequence[int]) -> "OwnSpeech":
        """Some of the utterances."""
        return OwnSpeech(
            self.where,
            [self.load[place] for place in places],
            [self.disturbed[place] for place in places],
            [self.speakers[place] for place in places],
            [self.files[place] for place in places] if self.files else (),
            [self.voices[place] for place in places] if self.voices else (),
        )


class _Lazy(Sequence[PCM]):
    """Recordings that are read when they are asked for."""

    def __init__(self, read: Sequence[Callable[[], PCM]]) -> None:
        self.read = read

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, place: int) -> PCM:  # type: ignore[override]
        return self.read[place]()


def _as_it_is(load: Callable[[], Array], _: int, __: Sequence[PCM]) -> Array:
    return load()


def features_of(folder: DataFolder, utterance: str, artifact: Artifact) -> Array:
    """Features of an utterance, (frames, num_mel_bins).

    Raises:
        InputError: If its audio is damaged or silent; the file is named.
    """
    waveform = folder.waveform(utterance, artifact.front_end.sample_rate)
    check_waveform(waveform, str(folder.path(utterance)))
    return artifact.front_end.features(waveform)


def check_audio(folder: DataFolder, utterances: Sequence[str], artifact: Artifact, any_rate: bool = False) -> None:
    """Look at the headers of audio files, before anything is learned.

    Raises:
        InputError: If files are missing or damaged, too short for the network, or were recorded at a lower rate than
            it takes, unless ``any_rate`` will do. The first is named, and how many there are.
    """
    faults = [fault for name in utterances if (fault := _fault(folder.path(name), artifact, any_rate))]
    if faults:
        others = len(faults) - 1
        more = f" {others} further {'file' if others == 1 else 'files'} cannot be used, either." if others else ""
        raise InputError(f"{faults[0]}{more}")


def _fault(path: Path, artifact: Artifact, any_rate: bool) -> str | None:
    """Why an audio file cannot be used."""
    front_end = artifact.front_end
    try:
        info = probe(path)
        frames = front_end.num_frames(info.num_samples * front_end.sample_rate // info.sample_rate)
    except InputError as error:
        text = str(error)
        return text if str(path) in text else f"{path}: {text}"
    if info.sample_rate < front_end.sample_rate and not any_rate:
        return (
            f"{path}: {info.sample_rate} Hz. The network takes {front_end.sample_rate} Hz, and there is nothing above"
            f" {info.sample_rate // 2} Hz to learn from. If it will get such audio in use, resample the files to"
            f" {front_end.sample_rate} Hz first; else give recordings of {front_end.sample_rate} Hz or more."
        )
    if frames < artifact.min_frames:
        return f"{path}: {frames} frames are too short; at least {artifact.min_frames} are needed. Take it away."
    return None


def read_exam(where: str, artifact: Artifact, learned: Sequence[Path]) -> Exam:
    """Read trials to test on.

    Args:
        where: A data folder with a trial list, or a trial list in a data folder.
        artifact: Whose features are computed.
        learned: Audio files that are learned from.

    Raises:
        InputError: If there are none, audio cannot be used, or an utterance is learned from.
    """
    path = Path(where)
    folder = DataFolder.read(path.parent if path.is_file() else path)
    trials = folder.trials(path.name if path.is_file() else None)
    check_audio(folder, trials.utterances, artifact)
    shared = copies_among([folder.path(name) for name in trials.utterances], learned)
    if shared:
        raise InputError(
            f"{where}: {len(shared)} of its {len(trials.utterances)} utterances are learned from, one is {shared[0]};"
            " the EER would be too good. Take them out of the data or of the trials."
        )
    load = [partial(features_of, folder, name, artifact) for name in trials.utterances]
    speakers = np.array([folder.speaker(name) for name in trials.utterances], dtype=np.str_)
    about = f"{len(trials.utterances)} utterances of {where}"
    return Exam(about, load, trials.labels, trials.enroll, trials.test, speakers)
