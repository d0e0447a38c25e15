"""Making a data folder from a corpus as it was downloaded.

The audio stays where it is: ``wav.scp`` points to it. Everything drawn comes from one seed, so that the same corpus
gives the same lists anywhere.
"""

import itertools
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from compress.audio import probe
from compress.data.folder import check_new, list_speakers, read_entries, read_scp_entries, write_folder
from compress.errors import InputError, unknown_name

SEED = 20261120
MAX_TARGETS = 20_000
MAX_NONTARGETS = 40_000
CALIBRATION_UTTERANCES = 200
ADULT_AGE = 18
MIN_SPEAKERS = 10  # then dev and test have two each

Files = dict[str, Iterable[str]]  # relative file name -> lines
Progress = Callable[[int, int], None]
Corpus = Callable[[Path, Path, Progress | None], Files]
Cell = TypeVar("Cell")


def prepare(corpus: str, source: Path | str, out: Path | str, progress: Progress | None = None) -> Path:
    """Make a data folder from a corpus on disk.

    Args:
        corpus: A name of ``CORPORA``.
        source: The corpus as it was downloaded and unpacked.
        out: The new data folder; it must not exist yet, or be empty.
        progress: Called with the number of audio files done and of all.

    Returns:
        ``out``.

    Raises:
        SettingError: If ``corpus`` is unknown.
        InputError: If ``source`` is not such a corpus, or ``out`` holds something already. Nothing is written then.
    """
    if corpus not in CORPORA:
        raise unknown_name("corpus", corpus, CORPORA)
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; the unpacked corpus '{corpus}' was expected there.")
    check_new(out)
    write_folder(out, CORPORA[corpus](source.resolve(), out.resolve(), progress))
    return out


def prepare_folder(source: Path, out: Path, progress: Progress | None = None) -> Files:
    """List a folder of speakers: one folder per speaker, audio files anywhere below it.

    An utterance is named ``speaker-path-below-it``, with ``-`` for separators and ``_`` for blanks. There is one list
    ``trials`` and a ``calib.scp``.

    Raises:
        InputError: If there are not two speakers, one of them with two utterances; if a name is not unique or a file
            not readable.
    """
    audio, speakers = list_speakers(source)
    groups = group_by_speaker(speakers)
    if len(groups) < 2 or max(len(members) for members in groups.values()) < 2:
        raise InputError(
            f"{source} gives {len(groups)} speakers and {len(audio)} utterances; at least two speakers, one of them "
            "with two utterances, are needed. The layout is one folder per speaker with audio files below it."
        )
    durations_s = _durations_s(audio, progress)
    rng = random.Random(SEED)
    cells = _speaker_pairs(sorted(groups), MAX_NONTARGETS, rng)
    files = _tables(audio, speakers, durations_s, out)
    files["trials"] = draw_trials(groups, cells, rng)
    files["calib.scp"] = _scp({name: audio[name] for name in draw_calibration(durations_s, speakers, rng)}, out)
    return files


def prepare_speechocean762(source: Path, out: Path, progress: Progress | None = None) -> Files:
    """List speechocean762 as OpenSLR SLR101 has it: ``WAVE/`` and Kaldi files in ``train/`` and ``test/``.

    Its two halves share no rule that suits verification, so they are pooled and the speakers split anew, see
    :func:`split_speakers`: ``dev``, ``test`` (a fifth each) and ``train``. ``dev`` and ``test`` have ``trials_full``
    (non-targets over all pairs of speakers) and ``trials_hard`` (only pairs of the same gender and age group);
    ``train`` has a ``calib.scp``.

    Raises:
        InputError: If files or entries of the corpus are missing.
    """
    audio: dict[str, Path] = {}
    tables: dict[str, dict[str, str]] = {name: {} for name in ("utt2spk", "text", "spk2gender", "spk2age")}
    for half in (source / "train", source / "test"):
        for entry, _ in read_scp_entries(_required(half / "wav.scp")):
            audio[entry.name] = source / entry.value  # its paths start from the corpus, not from the half
        for name, table in tables.items():
            table.update({entry.name: entry.value for entry in read_entries(_required(half / name))})
    speakers = {name: _look_up(tables, "utt2spk", name, source) for name in audio}
    text = {name: _look_up(tables, "text", name, source) for name in audio}
    gender = {speaker: _look_up(tables, "spk2gender", speaker, source) for speaker in set(speakers.values())}
    age = {speaker: _look_up(tables, "spk2age", speaker, source) for speaker in gender}
    group = {speaker: "adult" if _years(age, speaker) >= ADULT_AGE else "child" for speaker in age}
    stratum = {speaker: f"{gender[speaker]}_{group[speaker]}" for speaker in age}
    durations_s = _durations_s(audio, progress)

    if len(stratum) < MIN_SPEAKERS:
        raise InputError(
            f"{source} has {len(stratum)} speakers; a split needs at least {MIN_SPEAKERS} (there are 250)."
        )

    files: Files = {}
    rng = random.Random(SEED)
    for part, members in split_speakers(stratum).items():
        inside = {name: speaker for name, speaker in speakers.items() if speaker in members}
        tables_of_part = _tables({name: audio[name] for name in inside}, inside, durations_s, out / part)
        tables_of_part["text"] = [f"{name} {text[name]}" for name in inside]
        tables_of_part["spk2gender"] = [f"{speaker} {gender[speaker]}" for speaker in sorted(members)]
        tables_of_part["spk2age"] = [f"{speaker} {age[speaker]}" for speaker in sorted(members)]
        if part == "train":
            chosen = draw_calibration({name: durations_s[name] for name in inside}, inside, rng)
            tables_of_part["calib.scp"] = _scp({name: audio[name] for name in chosen}, out / part)
        else:
            groups = group_by_speaker(inside)
            cells = list(itertools.combinations(sorted(groups), 2))
            alike = [(one, other) for one, other in cells if stratum[one] == stratum[other]]
            tables_of_part["trials_full"] = draw_trials(groups, cells, rng)
            if alike:  # a part of the corpus may lack them
                tables_of_part["trials_hard"] = draw_trials(groups, alike, rng)
        files.update({f"{part}/{name}": lines for name, lines in tables_of_part.items()})
    return files


CORPORA: dict[str, Corpus] = {"folder": prepare_folder, "speechocean762": prepare_speechocean762}


def split_speakers(stratum: Mapping[str, str], seed: int = SEED) -> dict[str, set[str]]:
    """Split speakers into ``dev`` and ``test``, a fifth each, and ``train``, every stratum in proportion.

    The strata are visited in sorted order; within each the speakers are sorted, then shuffled by one generator that
    runs through all of them. The first are ``dev``, the next ``test``, the rest ``train``. How many is rounded by
    largest remainder, ties by the name of the stratum.

    Args:
        stratum: Speaker -> stratum.
        seed: Of the generator.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for speaker in sorted(stratum):
        members[stratum[speaker]].append(speaker)
    wanted, total = round(len(stratum) / 5), len(stratum)
    quota = {name: len(speakers) * wanted // total for name, speakers in members.items()}
    by_remainder = sorted(members, key=lambda name: (-(len(members[name]) * wanted % total), name))
    for name in by_remainder[: wanted - sum(quota.values())]:
        quota[name] += 1
    parts: dict[str, set[str]] = {"dev": set(), "test": set(), "train": set()}
    rng = random.Random(seed)
    for name in sorted(members):
        speakers, count = members[name], quota[name]
        rng.shuffle(speakers)
        parts["dev"].update(speakers[:count])
        parts["test"].update(speakers[count : 2 * count])
        parts["train"].update(speakers[2 * count :])
    return parts


def draw_trials(groups: Mapping[str, Sequence[str]], cells: Sequence[tuple[str, str]], rng: random.Random) -> list[str]:
    """Draw the lines of a trial list, shuffled; no pair of utterances occurs twice.

    Args:
        groups: Speaker -> utterances. All pairs within a speaker are target trials, up to ``MAX_TARGETS`` spread
            evenly over the speakers.
        cells: The pairs of speakers that non-target trials may compare, up to ``MAX_NONTARGETS`` spread evenly.
        rng: The generator.
    """
    within = [(speaker, math.comb(len(groups[speaker]), 2)) for speaker in sorted(groups)]
    between = [(cell, len(groups[cell[0]]) * len(groups[cell[1]])) for cell in cells]
    lines = []
    for speaker, count, available in _spread(within, MAX_TARGETS, rng):
        for number in rng.sample(range(available), count):
            second = (1 + math.isqrt(1 + 8 * number)) // 2  # pairs in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
            first = number - math.comb(second, 2)
            lines.append(f"1 {groups[speaker][first]} {groups[speaker][second]}")
    for (one, other), count, available in _spread(between, MAX_NONTARGETS, rng):
        for number in rng.sample(range(available), count):
            first, second = divmod(number, len(groups[other]))
            lines.append(f"0 {groups[one][first]} {groups[other][second]}")
    rng.shuffle(lines)
    return lines


def draw_calibration(durations_s: Mapping[str, float], speakers: Mapping[str, str], rng: random.Random) -> list[str]:
    """Choose up to 200 utterances for calibration, sorted: speakers and thirds of the durations equally often.

    Every speaker gives one before any gives a second, and so on.
    """
    by_duration = sorted(durations_s, key=lambda name: (durations_s[name], name))
    third = {name: 3 * rank // len(by_duration) for rank, name in enumerate(by_duration)}
    left = group_by_speaker({name: speakers[name] for name in by_duration})
    chosen: list[str] = []
    taken = [0, 0, 0]
    while left and len(chosen) < CALIBRATION_UTTERANCES:
        order = sorted(left)
        rng.shuffle(order)
        for speaker in order[: CALIBRATION_UTTERANCES - len(chosen)]:
            rarest = min({third[name] for name in left[speaker]}, key=lambda part: (taken[part], part))
            name = rng.choice([name for name in left[speaker] if third[name] == rarest])
            left[speaker].remove(name)
            chosen.append(name)
            taken[rarest] += 1
        left = {speaker: names for speaker, names in left.items() if names}
    return sorted(chosen)


def group_by_speaker(speakers: Mapping[str, str]) -> dict[str, list[str]]:
    """Turn utterance -> speaker into speaker -> utterances, sorted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for utterance in sorted(speakers):
        groups[speakers[utterance]].append(utterance)
    return dict(groups)


def _spread(cells: Iterable[tuple[Cell, int]], total: int, rng: random.Random) -> list[tuple[Cell, int, int]]:
    """Spread ``total`` draws over cells of limited size as evenly as they allow: (cell, draws, size)."""
    shuffled = list(cells)
    rng.shuffle(shuffled)  # which of equal cells gets one more is chance
    shuffled.sort(key=lambda cell: cell[1])
    spread = []
    for done, (cell, available) in enumerate(shuffled):
        count = min(available, total // (len(shuffled) - done))  # what small cells cannot give falls to larger ones
        spread.append((cell, count, available))
        total -= count
    return spread


def _speaker_pairs(speakers: Sequence[str], limit: int, rng: random.Random) -> list[tuple[str, str]]:
    """All pairs of speakers, or ``limit`` random ones where there are more."""
    if math.comb(len(speakers), 2) <= limit:
        return list(itertools.combinations(speakers, 2))
    pairs: set[tuple[str, str]] = set()
    while len(pairs) < limit:
        one, other = sorted(rng.sample(range(len(speakers)), 2))
        pairs.add((speakers[one], speakers[other]))
    return sorted(pairs)


def _durations_s(audio: Mapping[str, Path], progress: Progress | None) -> dict[str, float]:
    durations_s: dict[str, float] = {}
    unreadable: list[str] = []
    for done, (utterance, path) in enumerate(audio.items(), 1):
        try:
            durations_s[utterance] = probe(path).duration_s
        except InputError as error:
            unreadable.append(str(error))
        if progress:
            progress(done, len(audio))
    if unreadable:
        shown = " ".join(unreadable[:3])
        raise InputError(f"{len(unreadable)} of {len(audio)} audio files cannot be used: {shown} Mend or remove them.")
    return durations_s


def _tables(
    audio: Mapping[str, Path], speakers: Mapping[str, str], durations_s: Mapping[str, float], out: Path
) -> Files:
    return {
        "wav.scp": _scp(audio, out),
        "utt2spk": [f"{name} {speakers[name]}" for name in audio],
        "utt2dur": [f"{name} {durations_s[name]:.4f}" for name in audio],
    }


def _scp(audio: Mapping[str, Path], folder: Path) -> list[str]:
    return [f"{name} {_relative(path, folder)}" for name, path in audio.items()]


def _relative(path: Path, folder: Path) -> str:
    """The path as seen from a folder; absolute where they lie on different drives."""
    try:
        relative = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        relative = path.as_posix()
    if "\n" in relative or not relative.isprintable():
        raise InputError(f"{relative!r} has a line end or another unprintable character in its name. Rename it.")
    return relative


def _required(path: Path) -> Path:
    if not path.is_file():
        raise InputError(
            f"{path} is missing. The source is speechocean762 as OpenSLR SLR101 has it, with WAVE, train and test."
        )
    return path


def _look_up(tables: Mapping[str, Mapping[str, str]], table: str, name: str, source: Path) -> str:
    if name not in tables[table]:
        raise InputError(f"{source}: '{name}' is in neither train/{table} nor test/{table}. Download the corpus again.")
    return tables[table][name]


def _years(age: Mapping[str, str], speaker: str) -> int:
    if not age[speaker].isdecimal():
        raise InputError(f"spk2age: speaker '{speaker}' has the age '{age[speaker]}'; whole years are needed.")
    return int(age[speaker])
