"""A data folder: plain text files that name audio, speakers and trials, one entry a line; or one folder per speaker.

Every reader takes a ``complain`` function for broken lines. By default the first one raises an InputError with file
and line; ``compress data check`` collects them all instead.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from compress.audio import AUDIO_SUFFIXES, Array, read_audio
from compress.errors import InputError
from compress.files import replaced_folder, sha256_of

LABELS = {"1": True, "0": False, "target": True, "nontarget": False}

Complain = Callable[[Path, int | None, str], None]


def refuse(file: Path, line: int | None, text: str) -> NoReturn:
    """Raise the InputError of a broken line: ``file:line: text``."""
    raise InputError(f"{file}:{line}: {text}" if line is not None else f"{file}: {text}")


@dataclass(frozen=True, eq=False)
class Trials:
    """Pairs of utterances to compare: trial ``i`` is ``labels[i]``, ``enroll[i]``, ``test[i]``."""

    utterances: tuple[str, ...]  # every utterance of the list once, sorted
    labels: NDArray[np.bool_]  # (trials,), true for a target trial
    enroll: NDArray[np.intp]  # (trials,) positions in ``utterances``
    test: NDArray[np.intp]

    @classmethod
    def read(cls, path: Path | str, known: Collection[str] | None = None) -> "Trials":
        """Read a list of lines ``label enroll test`` with the labels 1, 0, target or nontarget.

        Args:
            path: The list.
            known: The utterances that have audio; None allows all.

        Raises:
            InputError: On a missing or empty file, a broken line, an utterance outside ``known``, or if all trials
                are of one kind.
        """
        path = Path(path)
        trials = parse_trials(path, known)
        check_kinds(path, trials)
        return trials

    def __len__(self) -> int:
        return len(self.labels)


def parse_trials(path: Path, known: Collection[str] | None = None, complain: Complain = refuse) -> Trials:
    """Read a trial list as :meth:`Trials.read` does, leaving out the lines that ``complain`` lets pass."""
    index: dict[str, int] = {}  # utterance -> order of appearance
    labels, enroll, test = [np.empty(0, dtype=np.bool_)], [np.empty(0, dtype=np.intp)], [np.empty(0, dtype=np.intp)]
    first_line = 1
    for block in _blocks_of_lines(_read_text(path, complain)):
        count, fields = block.count("\n"), block.split()
        if not (_has_three_fields_a_line(block, count, fields) and _are_trials(fields, known)):
            rows = [line.split() for line in block.split("\n")]
            good = [row for number, row in enumerate(rows, first_line) if _is_trial(path, number, row, known, complain)]
            fields = [name for row in good for name in row]
        first_line += count
        labels.append(np.array([LABELS[label] for label in fields[0::3]], dtype=np.bool_))
        for column, names in ((enroll, fields[1::3]), (test, fields[2::3])):
            index.update(zip(dict.fromkeys(names).keys() - index.keys(), range(len(index), 1 << 62), strict=False))
            column.append(np.fromiter(map(index.__getitem__, names), dtype=np.intp, count=len(names)))
    utterances = sorted(index)
    rank = np.empty(len(index), dtype=np.intp)
    rank[[index[name] for name in utterances]] = np.arange(len(index))
    return Trials(tuple(utterances), np.concatenate(labels), rank[np.concatenate(enroll)], rank[np.concatenate(test)])


def check_kinds(path: Path, trials: Trials, complain: Complain = refuse) -> None:
    """Complain of a list that is empty, or has only target or only non-target trials."""
    if len(trials) == 0:
        complain(path, None, "holds no trials; lines 'label enroll test' are needed.")
    elif not trials.labels.any():
        complain(path, None, "holds no target trials (label 1); an error rate needs both kinds.")
    elif trials.labels.all():
        complain(path, None, "holds no non-target trials (label 0); an error rate needs both kinds.")


def _blocks_of_lines(text: str, size: int = 1 << 21) -> Iterator[str]:
    """Cut text into blocks of whole lines, so that the fields of a million lines never exist at once."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end] if text[end - 1] == "\n" else text[start:end] + "\n"
        start = end


def _has_three_fields_a_line(block: str, count: int, fields: list[str]) -> bool:
    """Tell without a loop over the lines whether each has three fields and single spaces; the loop is slow."""
    if not block.isascii() or len(fields) != 3 * count:
        return False
    characters = np.frombuffer(block.encode("ascii"), dtype=np.uint8)
    ends = np.flatnonzero(characters < 32)  # line ends, and whatever else splits fields
    spaces = np.cumsum(characters == 32)[ends]
    return len(ends) == count and bool((np.diff(spaces, prepend=0) == 2).all())


def _are_trials(fields: list[str], known: Collection[str] | None) -> bool:
    names = {*fields[1::3], *fields[2::3]}
    return LABELS.keys() >= set(fields[0::3]) and (known is None or all(name in known for name in names))


def _is_trial(path: Path, number: int, row: list[str], known: Collection[str] | None, complain: Complain) -> bool:
    """Tell whether a line's fields are a trial; of all but a blank line, say why not."""
    if not row:
        return False
    if len(row) != 3:
        complain(path, number, f"{len(row)} fields; 'label enroll test' is needed.")
        return False
    if row[0] not in LABELS:
        hint = " The label comes first: 'label enroll test'." if row[2] in LABELS else ""
        complain(path, number, f"label '{row[0]}' is not one of {', '.join(LABELS)}.{hint}")
        return False
    missing = [] if known is None else [name for name in dict.fromkeys(row[1:]) if name not in known]
    for name in missing:
        complain(path, number, f"utterance '{name}' is not in wav.scp.")
    return not missing


@dataclass(frozen=True, eq=False)
class DataFolder:
    """Utterances with their audio files and what is known of them.

    The utterances keep the order of ``wav.scp``. Beside their speakers the optional tables ``text``, ``utt2dur``
    (seconds), ``spk2gender`` and ``spk2age`` are there, empty where the folder lacks the file; they may name more
    utterances and speakers than the folder has.
    """

    root: Path
    paths: Mapping[str, Path]
    speakers: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)
    utt2dur: Mapping[str, float] = field(default_factory=dict)
    spk2gender: Mapping[str, str] = field(default_factory=dict)
    spk2age: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | str) -> "DataFolder":
        """Read the text files of a folder; audio is touched only when asked for.

        A folder without ``wav.scp`` is read as one folder per speaker, see :func:`list_speakers`.

        Raises:
            InputError: If the folder is missing, holds neither ``wav.scp`` nor speakers' folders, or a line of any
                table is broken.
        """
        root = Path(path)
        if not root.is_dir():
            raise InputError(f"{root}: no such data folder. It is a folder that holds a wav.scp.")
        if not (root / "wav.scp").is_file():
            audio, speakers = ({}, {}) if (root / "utt2spk").exists() else list_speakers(root)
            if not audio:
                raise InputError(
                    f"{root} has no wav.scp (lines 'utterance path'), so it is not a data folder; nor is it one of a"
                    " folder per speaker with audio in it."
                )
            return cls(root, audio, speakers)
        return cls(
            root=root,
            paths=dict(read_scp(root / "wav.scp")),
            speakers=_optional_table(root / "utt2spk"),
            text=_optional_table(root / "text"),
            utt2dur=_optional_numbers(root / "utt2dur"),
            spk2gender=_optional_table(root / "spk2gender"),
            spk2age=_optional_numbers(root / "spk2age"),
        )

    @property
    def utterances(self) -> tuple[str, ...]:
        """The names of the utterances, in the order of ``wav.scp``."""
        return tuple(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, utterance: str) -> Path:
        """Return the audio file of an utterance.

        Raises:
            InputError: If the folder has no such utterance.
        """
        if utterance not in self.paths:
            raise InputError(f"{self.root}: utterance '{utterance}' is not in wav.scp.")
        return self.paths[utterance]

    def check_files(self) -> None:
        """Look whether all audio files are there; they are not opened.

        Raises:
            InputError: Naming the first that is missing.
        """
        for path in self.paths.values():
            if not path.is_file():
                raise InputError(f"{path}: no such audio file; {self.root} names it.")

    def shared_with(self, other: "DataFolder") -> list[Path]:
        """Those of its audio files that another folder holds as well, as they are or as copies.

        Raises:
            InputError: If an audio file is missing in one of the two.
        """
        self.check_files()
        other.check_files()
        return copies_among(self.paths.values(), other.paths.values())

    def speaker(self, utterance: str) -> str:
        """Return the speaker of an utterance.

        Raises:
            InputError: If the folder has no ``utt2spk``, or no line for this utterance in it.
        """
        if not self.speakers:
            raise InputError(f"{self.root} has no utt2spk (lines 'utterance speaker'); the speakers are needed here.")
        if utterance not in self.speakers:
            raise InputError(f"{self.root / 'utt2spk'}: utterance '{utterance}' has no speaker. Add a line for it.")
        return self.speakers[utterance]

    def waveform(self, utterance: str, sample_rate: int) -> Array:
        """Read the audio of an utterance: (samples,) float32, mono, at ``sample_rate`` hertz.

        Raises:
            InputError: If the file is missing or unusable, see :func:`compress.audio.read_audio`.
        """
        return read_audio(self.path(utterance), sample_rate)

    def trial_lists(self) -> list[Path]:
        """List the trial lists of the folder: ``trials`` and ``trials_*``, sorted."""
        return sorted([*self.root.glob("trials"), *self.root.glob("trials_*")])

    def find_trials(self, name: Path | str | None = None) -> Path:
        """Find a trial list by its name in the folder or its path; without a name, the folder's only or plain one.

        Raises:
            InputError: If there is none of that name, or several to choose from.
        """
        lists = self.trial_lists()
        names = ", ".join(path.name for path in lists) or "no trial list"
        if name is not None:
            for path in (self.root / name, Path(name)):
                if path.is_file():
                    return path
            raise InputError(f"no trial list '{name}': {self.root} has {names}, and it is not the path of a file.")
        if not lists:
            raise InputError(f"{self.root} has no trial list ('trials' or 'trials_*'). Name one with --trials FILE.")
        if lists[0].name == "trials" or len(lists) == 1:
            return lists[0]
        raise InputError(f"{self.root} has several trial lists: {names}. Choose one with --trials NAME.")

    def trials(self, name: Path | str | None = None) -> Trials:
        """Read a trial list of these utterances; :meth:`find_trials` tells which.

        Raises:
            InputError: As :meth:`find_trials` and :meth:`Trials.read`.
        """
        return Trials.read(self.find_trials(name), self.paths)

    def subset(self, utterances: Iterable[str]) -> "DataFolder":
        """Keep the utterances that are named, in the order given.

        Raises:
            InputError: If one is not in the folder.
        """
        paths = {utterance: self.path(utterance) for utterance in utterances}
        return DataFolder(self.root, paths, self.speakers, self.text, self.utt2dur, self.spk2gender, self.spk2age)

    def calibration(self, path: Path | str | None = None, count: int | None = None) -> "DataFolder":
        """Read a calibration list: the folder's ``calib.scp``, or another whose audio lies relative to itself.

        Args:
            path: A list in the form of ``wav.scp``; None is ``calib.scp`` of this folder. Speakers are read from an
                ``utt2spk`` beside it, if there is one.
            count: How many utterances to take, spread evenly over the list; None takes all.

        Raises:
            InputError: If the list is missing or broken, or has fewer than ``count`` utterances.
        """
        if path is None and not (self.root / "calib.scp").is_file():
            raise InputError(f"{self.root} has no calib.scp. Name a calibration list with --calib FILE.")
        scp = self.root / "calib.scp" if path is None else Path(path)
        entries = read_scp(scp)
        if count is not None and count > len(entries):
            raise InputError(
                f"{scp} lists {len(entries)} utterances; {count} were asked for. "
                "Ask for fewer, or give a longer list with --calib FILE."
            )
        if count is not None:
            entries = [entries[i * len(entries) // count] for i in range(count)]
        return DataFolder(scp.parent, dict(entries), _optional_table(scp.parent / "utt2spk"))


def copies_among(files: Iterable[Path], others: Iterable[Path]) -> list[Path]:
    """Those of ``files`` whose bytes one of ``others`` holds as well: the same file, or a copy of any name.

    Only files of the size of one of ``others`` are read.
    """
    of_size: dict[int, list[Path]] = {}
    for path in others:
        of_size.setdefault(path.stat().st_size, []).append(path)

    @cache
    def hashes(size: int) -> set[str]:
        return {sha256_of(path) for path in of_size.get(size, ())}

    return [path for path in files if path.stat().st_size in of_size and sha256_of(path) in hashes(path.stat().st_size)]


def list_speakers(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """List a folder that holds one folder per speaker, with audio files anywhere below it.

    An utterance is named ``speaker-path-below-it``, with ``-`` for separators and ``_`` for blanks. Hidden files and
    folders are passed over.

    Returns:
        The audio file of each utterance, in sorted order, and its speaker.

    Raises:
        InputError: If an audio file lies beside the speakers' folders, two would have the same name, or a speaker's
            folder holds none.
    """
    audio: dict[str, Path] = {}
    speakers: dict[str, str] = {}
    for file in _audio_files(root):
        folder, *below = file.relative_to(root).with_suffix("").parts
        if not below:
            raise InputError(f"{file} lies beside the speakers' folders. Move it into one, or away.")
        utterance, speaker = _one_word("-".join([folder, *below])), _one_word(folder)
        if utterance in audio:
            raise InputError(f"{audio[utterance]} and {file} would both be utterance '{utterance}'. Rename one.")
        audio[utterance], speakers[utterance] = file, speaker
    for path in sorted(root.iterdir()):
        if audio and path.is_dir() and not path.name.startswith(".") and _one_word(path.name) not in speakers.values():
            raise InputError(
                f"{path} holds no audio, so it is no speaker's folder. Put audio into it, or move it away."
            )
    return audio, speakers


class Entry(NamedTuple):
    """A line of a table: its number, the name that begins it, and the rest."""

    line: int
    name: str
    value: str


def read_entries(path: Path, complain: Complain = refuse) -> list[Entry]:
    """Read a table of lines ``name value``; the value runs to the end of the line. Blank lines are passed over.

    Raises:
        InputError: If the file is missing, or by ``complain`` on a line without value or with a name met before.
    """
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    may_be_empty = path.name == "text"  # an utterance in which nothing is said
    for number, line in enumerate(_read_text(path, complain).split("\n"), 1):
        fields = line.split(maxsplit=1)
        if not fields:
            continue
        name, value = fields[0], fields[1].rstrip() if len(fields) > 1 else ""
        if not value and not may_be_empty:
            complain(path, number, f"'{name}' stands alone; a name, a space and a value are needed.")
        elif name in seen:
            complain(path, number, f"'{name}' stands already on line {seen[name]}.")
        else:
            seen[name] = number
            entries.append(Entry(number, name, value))
    return entries


def read_scp(path: Path | str, complain: Complain = refuse) -> list[tuple[str, Path]]:
    """Read a list of lines ``utterance path``; relative paths start from the folder that holds the list.

    Raises:
        InputError: If the list is missing or empty, or by ``complain`` on a broken line or a shell command.
    """
    return [(entry.name, audio) for entry, audio in read_scp_entries(Path(path), complain)]


def read_scp_entries(path: Path, complain: Complain = refuse) -> list[tuple[Entry, Path]]:
    """Read a list as :func:`read_scp` does, with the lines."""
    found = []
    for entry in read_entries(path, complain):
        if entry.value.endswith("|"):
            text = "is a shell command, which is never executed. Convert the audio and list the file."
            complain(path, entry.line, f"'{entry.value}' {text}")
        else:
            found.append((entry, path.parent / entry.value))
    if not found:
        complain(path, None, "lists no audio; lines 'utterance path' are needed.")
    return found


def read_number(path: Path, entry: Entry, complain: Complain = refuse) -> float | None:
    """Read the value of an entry as a number that is not negative; None after a complaint."""
    try:
        number = float(entry.value)
    except ValueError:
        number = float("nan")
    if 0 <= number < float("inf"):
        return number
    complain(path, entry.line, f"'{entry.value}' is not a number of 0 or more.")
    return None


def embedded_data() -> Path:
    """Find the default data folder that comes with the package.

    Raises:
        InputError: If this installation lacks it.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "calib_data", package.parent / "calib_data"):  # in a wheel; in a source checkout
        if (folder / "wav.scp").is_file():
            return folder
    raise InputError("this installation lacks the embedded data (calib_data). Install it again, or give --data DIR.")


def write_folder(out: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Write text files into a new folder, all or none.

    Args:
        out: The folder; it must not exist yet, or be empty.
        files: Relative file name (``wav.scp``, ``dev/trials``) -> its lines, without line ends.

    Raises:
        InputError: If ``out`` is a file or holds something already.
        MachineError: If the disk is full or the place cannot be written.
    """
    check_new(out)
    with replaced_folder(out) as temporary:
        for name, lines in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with (temporary / name).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines)


def check_new(out: Path) -> None:
    """Refuse an output folder that exists and is not empty."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; the name of a new folder is needed.")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty. Name a new folder, or remove this one.")


def _read_text(path: Path, complain: Complain) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        complain(path, data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text. Convert the file to UTF-8.")
        return data.decode("utf-8-sig", errors="replace")


def _audio_files(folder: Path) -> Iterator[Path]:
    """Find the audio files below a folder, in order; hidden files and folders are passed over."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _audio_files(path)
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            yield path


def _one_word(name: str) -> str:
    return "_".join(name.split())


def _optional_table(path: Path) -> dict[str, str]:
    return {entry.name: entry.value for entry in read_entries(path)} if path.is_file() else {}


def _optional_numbers(path: Path) -> dict[str, float]:
    entries: Iterator[Entry] = iter(read_entries(path) if path.is_file() else ())
    return {entry.name: number for entry in entries if (number := read_number(path, entry)) is not None}
