"""Checking a data folder: every broken line and every unusable audio file, not only the first.

What counts as an outlier, all of it a warning: a sample rate other than the most common one; a duration under 0.5 s;
a duration whose logarithm lies more than three interquartile ranges outside the quartiles (Tukey's far-out values, on
a logarithmic scale because durations are skewed; folders of fewer than 8 utterances have none).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from compress.audio import check_waveform, decode, mix_down, probe
from compress.data.folder import (
    Complain,
    Entry,
    Trials,
    check_kinds,
    parse_trials,
    read_entries,
    read_number,
    read_scp_entries,
)
from compress.errors import InputError

SHORT_S = 0.5
SHORTEST_MS = 25.0  # one Fbank frame
MIN_LOG_RANGE = 0.1  # 10 %: utterances cut to one length are no outliers for a few samples more
GENDERS = ("m", "f")

Severity = Literal["error", "warning"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: an error makes an entry unusable, a warning is for the owner to judge."""

    severity: Severity
    file: str  # name of the text file, relative to the folder
    line: int | None
    text: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        return f"{place}: {self.severity}: {self.text}"


@dataclass
class Report:
    """What a check found, and what the folder holds."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)
    num_utterances: int = 0
    num_speakers: int = 0
    duration_s: float = 0.0  # of the utterances whose audio is readable
    sample_rates: dict[int, int] = field(default_factory=dict)  # hertz -> utterances, most common first
    trials: dict[str, tuple[int, int]] = field(default_factory=dict)  # list -> target and non-target trials

    @property
    def errors(self) -> list[Finding]:
        """The findings that make an entry unusable."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are for the owner to judge."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def add(self, severity: Severity, file: str, line: int | None, text: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(severity, file, line, text))

    def complain(self, file: Path, line: int | None, text: str) -> None:
        """Note an error, in the way the readers of :mod:`compress.data.folder` report one."""
        self.add("error", file.name, line, text)


def check_folder(path: Path | str, decode_audio: bool = True, progress: Progress | None = None) -> Report:
    """Check all of a data folder.

    Args:
        path: The folder.
        decode_audio: False reads only headers, which is quick but sees no NaN, silence or damage further in.
        progress: Called with the number of audio files done and of all.

    Raises:
        InputError: If ``path`` is no folder. All else becomes a finding.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such data folder. It is a folder that holds a wav.scp.")
    report = Report(root)
    if not (root / "wav.scp").is_file():
        report.add("error", "wav.scp", None, "is missing; it lists the audio, lines 'utterance path'.")
        return report

    listed = read_scp_entries(root / "wav.scp", report.complain)
    entries = {entry.name: entry for entry, _ in listed}
    report.num_utterances = len(entries)
    _warn_shared_audio(report, listed)
    calibration = root / "calib.scp"
    further = []
    if calibration.is_file():
        known = {(entry.name, audio) for entry, audio in listed}
        further = [
            (entry, audio)
            for entry, audio in read_scp_entries(calibration, report.complain)
            if (entry.name, audio) not in known
        ]
    total = len(listed) + len(further)
    durations = _check_audio(report, "wav.scp", listed, decode_audio, _from(progress, 0, total))
    _check_audio(report, "calib.scp", further, decode_audio, _from(progress, len(listed), total))

    speakers = _check_speakers(report, entries)
    _check_tables(report, entries, speakers, durations)
    for trial_list in sorted([*root.glob("trials"), *root.glob("trials_*")]):
        _check_trials(report, trial_list, entries, speakers)
    return report


def _from(progress: Progress | None, done_before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(done_before + done, total) if progress else None


def _warn_shared_audio(report: Report, listed: list[tuple[Entry, Path]]) -> None:
    owner: dict[Path, str] = {}
    for entry, audio in listed:
        if audio in owner:
            report.add("warning", "wav.scp", entry.line, f"'{entry.name}' has the same audio as '{owner[audio]}'.")
        owner.setdefault(audio, entry.name)


def _check_audio(
    report: Report, file: str, listed: list[tuple[Entry, Path]], decode_audio: bool, progress: Callable[[int], None]
) -> dict[str, float]:
    """Check every audio file of a list; the durations in seconds of those that can be used."""
    rates: dict[str, int] = {}
    durations: dict[str, float] = {}
    for done, (entry, audio) in enumerate(listed, 1):
        try:
            rate, duration_s = _measure(audio, decode_audio)
        except InputError as error:
            report.add("error", file, entry.line, f"utterance '{entry.name}': {error}")
        else:
            rates[entry.name], durations[entry.name] = rate, duration_s
        progress(done)
    if not durations:
        return durations

    counts = Counter(rates.values())
    usual_rate = counts.most_common(1)[0][0]
    low_s, high_s = _usual_durations_s(list(durations.values()))
    for entry, _ in listed:
        if entry.name not in durations:
            continue
        name, rate, duration_s = entry.name, rates[entry.name], durations[entry.name]
        if rate != usual_rate:
            text = f"utterance '{name}' has {rate} Hz; {counts[usual_rate]} of {len(rates)} have {usual_rate} Hz."
            report.add("warning", file, entry.line, text)
        if 1000 * duration_s < SHORTEST_MS:
            text = f"utterance '{name}' lasts {1000 * duration_s:.1f} ms; one Fbank frame needs {SHORTEST_MS:g} ms."
            report.add("error", file, entry.line, text)
        elif duration_s < SHORT_S:
            text = f"utterance '{name}' lasts {duration_s:.2f} s, less than {SHORT_S:g} s: little to know a voice by."
            report.add("warning", file, entry.line, text)
        elif not low_s <= duration_s <= high_s:
            text = f"utterance '{name}' lasts {duration_s:.2f} s; usual here are {low_s:.2f} to {high_s:.2f} s."
            report.add("warning", file, entry.line, text)
    if file == "wav.scp":
        report.duration_s = sum(durations.values())
        report.sample_rates = dict(counts.most_common())
    return durations


def _measure(audio: Path, decode_audio: bool) -> tuple[int, float]:
    """Sample rate in hertz and duration in seconds of a usable file; else InputError."""
    if decode_audio:
        samples, rate = decode(audio)
        check_waveform(mix_down(samples), str(audio))
        return rate, len(samples) / rate
    info = probe(audio)
    if info.num_samples == 0:
        raise InputError(f"{audio} holds no samples.")
    return info.sample_rate, info.duration_s


def _usual_durations_s(durations_s: list[float]) -> tuple[float, float]:
    """Bounds outside which a duration is far out, in seconds."""
    if len(durations_s) < 8:
        return 0.0, float("inf")
    lower, upper = np.quantile(np.log(durations_s), [0.25, 0.75])
    reach = 3 * max(upper - lower, MIN_LOG_RANGE)
    return float(np.exp(lower - reach)), float(np.exp(upper + reach))


def _check_speakers(report: Report, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Check ``utt2spk``; the speakers of the utterances that are in ``wav.scp``."""
    path = report.folder / "utt2spk"
    if not path.is_file():
        report.add("warning", "utt2spk", None, "is missing: no intervals over speakers, no training.")
        return {}
    speakers: dict[str, str] = {}
    lines: dict[str, list[int]] = defaultdict(list)
    for entry in read_entries(path, report.complain):
        if len(entry.value.split()) != 1:
            report.complain(path, entry.line, f"'{entry.value}' is not one word; 'utterance speaker' is needed.")
        elif entry.name not in entries:
            report.add("warning", "utt2spk", entry.line, f"utterance '{entry.name}' is not in wav.scp.")
        else:
            speakers[entry.name] = entry.value
            lines[entry.value].append(entry.line)
    for name, entry in entries.items():
        if name not in speakers:
            report.add("error", "wav.scp", entry.line, f"utterance '{name}' has no speaker in utt2spk.")
    for speaker, at in lines.items():
        if len(at) == 1:
            report.add("warning", "utt2spk", at[0], f"speaker '{speaker}' has only one utterance: no target trial.")
    report.num_speakers = len(lines)
    return speakers


def _check_tables(
    report: Report, entries: Mapping[str, Entry], speakers: Mapping[str, str], durations: Mapping[str, float]
) -> None:
    """Check the optional tables: their lines, the names in them, and durations against the audio."""
    known_speakers = set(speakers.values())
    for name in ("text", "utt2dur"):
        for entry in _read_known(report, name, entries, "utterance", "wav.scp"):
            if name == "utt2dur":
                _check_duration(report, entry, durations)
    if not known_speakers:
        return
    for entry in _read_known(report, "spk2gender", known_speakers, "speaker", "utt2spk"):
        if entry.value not in GENDERS:
            report.add("error", "spk2gender", entry.line, f"'{entry.value}' is not one of {', '.join(GENDERS)}.")
    for entry in _read_known(report, "spk2age", known_speakers, "speaker", "utt2spk"):
        read_number(report.folder / "spk2age", entry, report.complain)


def _read_known(
    report: Report, file: str, known: Mapping[str, object] | set[str], kind: str, where: str
) -> list[Entry]:
    """Read an optional table, warn of names that are not known, and keep the others."""
    path = report.folder / file
    entries = read_entries(path, report.complain) if path.is_file() else []
    for entry in entries:
        if entry.name not in known:
            report.add("warning", file, entry.line, f"{kind} '{entry.name}' is not in {where}.")
    return [entry for entry in entries if entry.name in known]


def _check_duration(report: Report, entry: Entry, durations: Mapping[str, float]) -> None:
    path = report.folder / "utt2dur"
    said_s = read_number(path, entry, report.complain)
    if said_s is not None and entry.name in durations:
        duration_s = durations[entry.name]
        if abs(said_s - duration_s) > max(0.1, 0.01 * duration_s):
            text = f"says {said_s:g} s of utterance '{entry.name}'; its audio lasts {duration_s:.2f} s."
            report.add("warning", "utt2dur", entry.line, text)


def _check_trials(report: Report, path: Path, entries: Mapping[str, Entry], speakers: Mapping[str, str]) -> None:
    """Check a trial list: its lines, its two kinds, repeated trials, labels against speakers."""
    complaints = len(report.findings)
    complain: Complain = report.complain
    trials = parse_trials(path, entries, complain)
    targets = int(trials.labels.sum())
    report.trials[path.name] = (targets, len(trials) - targets)
    check_kinds(path, trials, complain)
    if len(report.findings) > complaints:
        return  # lines were left out, so positions no longer tell line numbers

    lines = _line_numbers(path)
    low, high = np.minimum(trials.enroll, trials.test), np.maximum(trials.enroll, trials.test)
    for position in np.flatnonzero(low == high):
        name = trials.utterances[low[position]]
        report.add("warning", path.name, lines[position], f"compares utterance '{name}' with itself.")
    pairs = low * np.intp(len(trials.utterances)) + high
    repeated = np.ones(len(pairs), dtype=np.bool_)
    repeated[np.unique(pairs, return_index=True)[1]] = False
    for position in np.flatnonzero(repeated):
        report.add("warning", path.name, lines[position], f"repeats the trial {_pair(trials, position)}.")
    if speakers:
        of_utterance = np.array([speakers.get(name, "") for name in trials.utterances])
        same = of_utterance[trials.enroll] == of_utterance[trials.test]
        whole = (of_utterance[trials.enroll] != "") & (of_utterance[trials.test] != "")
        for position in np.flatnonzero(whole & (same != trials.labels)):
            said, known = ("target", "two speakers") if trials.labels[position] else ("non-target", "one speaker")
            text = f"label says {said}, but utt2spk gives {known} for {_pair(trials, position)}."
            report.add("error", path.name, lines[position], text)


def _pair(trials: Trials, position: np.intp) -> str:
    return f"'{trials.utterances[trials.enroll[position]]}' '{trials.utterances[trials.test[position]]}'"


def _line_numbers(path: Path) -> list[int]:
    """Number the lines of a list that are not blank."""
    text = path.read_text(encoding="utf-8")
    return [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
