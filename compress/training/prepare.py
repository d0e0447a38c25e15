"""The first stage of a training: every recording is decoded once, judged, and written to shards."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compress.audio import read_audio
from compress.data import DataFolder, Trials, read_scp
from compress.errors import InputError, MachineError
from compress.features import SAMPLE_RATE, num_frames
from compress.files import read_json, sha256_of, write_json, write_text
from compress.progress import Progress
from compress.training.augment import PCM
from compress.training.corpus import to_pcm
from compress.training.shards import Entry, Sample, read_shard, shard_name, write_index, write_shard

PER_SHARD = 500  # utterances of a data folder
ROUNDING = 1e-6  # of an utterance: a share such as 29% is not exact in binary
SHOWN = 3  # of many names in an error
LISTS = ("unreadable.txt", "findings.txt")  # what is wrong, for a person to read

T = TypeVar("T")
R = TypeVar("R")


class Listed(NamedTuple):
    """A line of a data folder."""

    utterance: str
    speaker: str
    path: Path


@dataclass(frozen=True)
class Files:
    """Some utterances of a data folder or noise list; they become a shard."""

    listed: tuple[Listed, ...]

    def read(self) -> Iterator[Sample]:
        """Give the utterances."""
        for utterance, speaker, path in self.listed:
            yield Sample(utterance, speaker, partial(read_audio, path, SAMPLE_RATE))

    def key(self) -> str:
        """Hash names, speakers, and the sizes and times of the files."""
        lines = [f"{utterance} {speaker} {stamp(path)}" for utterance, speaker, path in self.listed]
        return sha256_of("\n".join(lines).encode())


@dataclass(frozen=True)
class Tar:
    """A shard that somebody made; it becomes one of ours."""

    path: Path

    def read(self) -> Iterator[Sample]:
        """Give the utterances."""
        return read_shard(self.path)

    def key(self) -> str:
        """Hash the name, size and time of the file."""
        return sha256_of(stamp(self.path).encode())


class Shard(NamedTuple):
    """What became of some utterances: those in the shard, and why the others are not."""

    entries: list[Entry]
    unreadable: list[tuple[str, str, str]]  # utterance, speaker, reason


def stamp(path: Path) -> str:
    """Path, size and time of a file, which change when it does; a missing one has neither."""
    if not path.exists():
        return f"{path.resolve()} missing"
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def list_speech(data: str) -> list[Files] | list[Tar]:
    """List what is to be decoded: a data folder in parts, or the shards of a folder of ``.tar`` files.

    Raises:
        InputError: If the folder is neither, an utterance has no speaker, or a data folder has only one speaker.
    """
    root = Path(data)
    if root.is_dir() and not (root / "wav.scp").is_file():
        tars = sorted(root.glob("speech-*.tar")) or sorted(root.glob("*.tar"))  # of a first stage, without its noise
        if tars:
            return [Tar(path) for path in tars]
    folder = DataFolder.read(root)
    listed = [Listed(name, folder.speaker(name), path) for name, path in folder.paths.items()]
    speakers = {one.speaker for one in listed}
    if len(speakers) < 2:
        raise InputError(f"{root} has {len(speakers)} speaker; training needs two or more in utt2spk.")
    return in_parts(listed)


def list_noise(scp: Path | None) -> list[Files]:
    """List noise recordings, in the form of ``wav.scp``; None gives none."""
    return in_parts([Listed(name, "noise", path) for name, path in read_scp(scp)]) if scp else []


def in_parts(listed: Sequence[Listed]) -> list[Files]:
    """Cut a list into what becomes a shard each."""
    return [Files(tuple(listed[start : start + PER_SHARD])) for start in range(0, len(listed), PER_SHARD)]


def fingerprint(parts: Iterable[Files | Tar]) -> str:
    """Hash what a corpus is made of, without reading the audio."""
    return sha256_of("\n".join(part.key() for part in parts).encode())


def measured_on(dev: DataFolder, trials: str | None) -> DataFolder:
    """The utterances of a folder that its trial lists name, or ``trials`` that may lie elsewhere; all, without any."""
    lists = [*dev.trial_lists(), *([] if trials is None else [dev.find_trials(trials)])]
    named = {name for path in lists for name in Trials.read(path, dev.paths).utterances}
    return dev.subset(name for name in dev.utterances if name in named or not named)


def fingerprint_of_dev(dev: DataFolder) -> str:
    """Hash what training data are compared with: utterances, speakers and files."""
    return sha256_of(
        "\n".join(f"{name} {dev.speakers.get(name)} {stamp(path)}" for name, path in dev.paths.items()).encode()
    )


def prepare(
    speech: Sequence[Files | Tar],
    noise: Sequence[Files],
    folder: Path,
    max_unreadable: float,
    workers: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write shards and indices of speech and noise to ``folder``, and what is wrong with the data.

    Parts whose shard is there already, of the same files, are not decoded again. What is wrong is written to
    ``unreadable.txt`` (left out) and ``findings.txt`` (used all the same).

    Args:
        speech: Of :func:`list_speech`.
        noise: Of :func:`list_noise`.
        folder: Of the stage.
        max_unreadable: Share of the utterances that may be left out, 0..1.
        workers: Processes that decode.
        progress: Told how many parts are done.

    Returns:
        How many utterances, speakers and hours there are, and how many were left out.

    Raises:
        InputError: If more files are unreadable, an utterance or its audio is there under two speakers, or fewer than
            two speakers are left.
        MachineError: If the disk is full, or memory.
    """
    for name in LISTS:
        (folder / name).unlink(missing_ok=True)
    shards = write_shards("speech", speech, folder, workers, progress)
    write_shards_of_noise(noise, folder, workers, progress)
    check_unreadable(shards, folder, max_unreadable)
    entries = [entry for shard in shards for entry in shard.entries]
    check_names(entries)
    check_one_speaker_each(entries)
    speakers = sorted({entry.speaker for entry in entries})
    if len(speakers) < 2:
        raise InputError(f"{len(speakers)} speaker is left with usable audio; training needs two or more.")
    found = findings(shards)
    if found:
        write_text(folder / "findings.txt", "".join(f"{line}\n" for line in found))
        progress.say(f"{len(found)} findings in {folder / 'findings.txt'}, the first: {found[0]}")
    write_lists("speech", shards, speakers, folder)
    return {
        "utterances": len(entries),
        "speakers": len(speakers),
        "hours": round(sum(entry.samples for entry in entries) / SAMPLE_RATE / 3600, 3),
        "unreadable": sum(len(shard.unreadable) for shard in shards),
        "findings": len(found),
    }


def write_shards_of_noise(parts: Sequence[Files], folder: Path, workers: int, progress: Progress) -> None:
    """Write noise as speech is written; all of it must be readable.

    Raises:
        InputError: Naming what is not.
    """
    if not parts:
        for path in folder.glob("noise*"):  # of an earlier try
            path.unlink()
        return
    shards = write_shards("noise", parts, folder, workers, progress)
    bad = [reason for shard in shards for _, _, reason in shard.unreadable]
    if bad:
        raise InputError(
            f"{len(bad)} noise recordings cannot be used: {' '.join(bad[:SHOWN])} Remove them from --noise."
        )
    write_lists("noise", shards, ["noise"], folder)


def write_lists(kind: str, shards: Sequence[Shard], speakers: Sequence[str], folder: Path) -> None:
    """Write the index, and for a person lines of utterance, speaker and hash of its samples."""
    lines = [f"{entry.utterance} {entry.speaker} {entry.sha256}\n" for shard in shards for entry in shard.entries]
    write_text(folder / f"{kind}.txt", "".join(lines))
    write_index(folder / f"{kind}.npy", [shard.entries for shard in shards], speakers)


def write_shards(
    kind: str, parts: Sequence[Files | Tar], folder: Path, workers: int, progress: Progress
) -> list[Shard]:
    """Decode all parts, those that are not there already, in several processes."""
    tasks = [(part, folder / shard_name(kind, number), number) for number, part in enumerate(parts)]
    done = in_processes(write_part, tasks, workers)
    shards = list(progress.track(done, f"decoding {kind}", len(tasks)))
    for path in folder.glob(f"{kind}-*"):  # of a longer list, at an earlier try
        if int(path.stem.split("-")[1]) >= len(parts):
            path.unlink()
    return shards


def in_processes(make: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """Give the results in order, made by several processes, or with one by this.

    Raises:
        MachineError: If one of the processes is killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from map(make, tasks)
        return
    try:
        with ProcessPoolExecutor(min(workers, len(tasks))) as pool:
            yield from pool.map(make, tasks)
    except BrokenProcessPool as error:
        raise MachineError(
            "a process that prepares data was killed, as a machine does when its memory is full. Start again with"
            f" fewer --workers than {workers}; what is finished is kept."
        ) from error


def write_part(task: tuple[Files | Tar, Path, int]) -> Shard:
    """Decode a part and write its shard and, beside it, what is in there; an earlier one of the same files is kept."""
    part, path, number = task
    beside, key = path.with_suffix(".json"), part.key()
    if beside.is_file() and path.is_file():
        told = read_json(beside)
        if told["key"] == key and told["bytes"] == path.stat().st_size:
            return Shard([Entry(*entry) for entry in told["entries"]], [tuple(bad) for bad in told["unreadable"]])
    unreadable: list[tuple[str, str, str]] = []
    entries = write_shard(path, readable(part.read(), unreadable), number)
    told = {"key": key, "bytes": path.stat().st_size, "entries": entries, "unreadable": unreadable}
    write_json(beside, told)
    return Shard(entries, unreadable)


def readable(samples: Iterable[Sample], unreadable: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, PCM]]:
    """Decode utterances; note those that cannot be used."""
    for sample in samples:
        try:
            waveform = sample.read()
            num_frames(len(waveform))  # one at least
        except InputError as error:
            unreadable.append((sample.utterance, sample.speaker, str(error)))
        else:
            yield sample.utterance, sample.speaker, to_pcm(waveform)


def check_unreadable(shards: Sequence[Shard], folder: Path, limit: float) -> None:
    """List what cannot be used, and refuse more of it than the limit.

    Raises:
        InputError: With the first reasons, and where all are.
    """
    bad = [item for shard in shards for item in shard.unreadable]
    if not bad:
        return
    write_text(folder / "unreadable.txt", "".join(f"{utterance} {reason}\n" for utterance, _, reason in bad))
    total = len(bad) + sum(len(shard.entries) for shard in shards)
    if len(bad) - limit * total > ROUNDING:
        reasons = " ".join(reason for _, _, reason in bad[:SHOWN])
        raise InputError(
            f"{len(bad)} of {total} utterances cannot be used ({len(bad) / total:.2%}, allowed are {limit:.2%}):"
            f" {reasons} All are listed in {folder / 'unreadable.txt'}. Mend or remove them, or leave them out"
            f" with --max-unreadable {share_of(len(bad), total)}."
        )


def share_of(count: int, total: int) -> str:
    """Write a share, not 0, in percent with two digits or more, rounded up."""
    decimals = max(0, 1 - math.floor(math.log10(100 * count / total)))
    return f"{-(-count * 100 * 10**decimals // total) / 10**decimals:.{decimals}f}%"


def check_names(entries: Sequence[Entry]) -> None:
    """Refuse two utterances of one name, as shards can have.

    Raises:
        InputError: Naming them.
    """
    twice = [name for name, count in Counter(entry.utterance for entry in entries).items() if count > 1]
    if twice:
        raise InputError(f"{some(twice, 'utterance')} stand in the shards more than once. Rename or remove them.")


def check_one_speaker_each(entries: Sequence[Entry]) -> None:
    """Refuse the same samples under two speakers: one of the labels is wrong.

    Raises:
        InputError: Naming the utterances.
    """
    first: dict[str, Entry] = {}
    pairs = [
        f"{entry.utterance} of {entry.speaker} and {other.utterance} of {other.speaker}"
        for entry in entries
        if (other := first.setdefault(entry.sha256, entry)).speaker != entry.speaker
    ]
    if pairs:
        raise InputError(
            f"the same audio is there under two speakers, {len(pairs)} times: {'; '.join(pairs[:SHOWN])}."
            " Remove what is labelled wrong."
        )


def check_leakage(folder: Path, dev: DataFolder, progress: Progress) -> None:
    """Refuse training data that share speakers or audio with the data that are measured on.

    Audio is the same where all samples are. Data that passed are not compared again; ``compared.txt`` tells which.

    Args:
        folder: What :func:`prepare` wrote.
        dev: Of :func:`measured_on`.
        progress: Shows how far it is.

    Raises:
        InputError: Naming what is shared; all of it is in ``leaked.txt``.
    """
    told = [read_json(path)["entries"] for path in sorted(folder.glob("speech-*.json"))]
    entries = [Entry(*entry) for entries in told for entry in entries]
    compared = sha256_of(f"{entries} {fingerprint_of_dev(dev)}".encode())
    (folder / "leaked.txt").unlink(missing_ok=True)
    passed = folder / "compared.txt"
    if passed.is_file() and passed.read_text(encoding="utf-8") == compared:
        return
    if not dev.speakers:
        progress.say(f"{dev.root} has no utt2spk: whether it shares speakers with the training data is not known")
    known = {dev.speakers[name] for name in dev.utterances if name in dev.speakers}
    speakers = sorted(known & {entry.speaker for entry in entries})
    own = {entry.sha256: entry.utterance for entry in entries}
    audio = [
        f"{own[digest]} is {name}"
        for name in progress.track(dev.utterances, "comparing with dev data")
        if (digest := sha256_of(to_pcm(dev.waveform(name, SAMPLE_RATE)).tobytes())) in own
    ]
    if speakers or audio:
        lines = [f"speaker {speaker}\n" for speaker in speakers] + [f"audio {pair}\n" for pair in audio]
        write_text(folder / "leaked.txt", "".join(lines))
        shared = [some(speakers, "speaker")] * bool(speakers) + [some(audio, "recording")] * bool(audio)
        raise InputError(
            f"label leakage: training data and {dev.root} share {' and '.join(shared)}. An error rate measured there"
            f" would be too low. Remove them from one of the two; all are listed in {folder / 'leaked.txt'}."
            + (" Rename them if other people are meant." if speakers and not audio else "")
        )
    write_text(passed, compared)


def findings(shards: Sequence[Shard]) -> list[str]:
    """What is worth a look but can be trained on: lonely utterances, classes left empty, audio twice."""
    entries = [entry for shard in shards for entry in shard.entries]
    counts = Counter(entry.speaker for entry in entries)
    gone = {speaker for shard in shards for _, speaker, _ in shard.unreadable} - counts.keys()
    found = [f"speaker {s} has no usable utterance and is no class." for s in sorted(gone)]
    found += [f"speaker {s} has one utterance only." for s in sorted(counts) if counts[s] == 1]
    first: dict[str, str] = {}
    for entry in entries:
        other = first.setdefault(entry.sha256, entry.utterance)
        if other != entry.utterance:
            found.append(f"{entry.utterance} has the same audio as {other}.")
    return found


def some(names: Sequence[str], kind: str) -> str:
    """Count names and give the first of them."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{more})"
