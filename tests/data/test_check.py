"""The check of a data folder names everything that is wrong, with file, line and severity."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from compress.data.check import SHORTEST_MS, check_folder
from compress.errors import InputError
from compress.features import FRAME_LENGTH_MS

NUM_UTTERANCES = 12


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder: 12 utterances of about one second by 4 speakers."""
    rng = np.random.default_rng(0)
    names = [f"u{i:02d}" for i in range(NUM_UTTERANCES)]
    for i, name in enumerate(names):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(16000 + 160 * i), 16000)
    write_lines(tmp_path / "wav.scp", [f"{name} {name}.wav" for name in names])
    write_lines(tmp_path / "utt2spk", [f"{name} s{i % 4}" for i, name in enumerate(names)])
    write_lines(tmp_path / "utt2dur", [f"{name} {1 + i / 100:.4f}" for i, name in enumerate(names)])
    write_lines(tmp_path / "text", [f"{name} HELLO" for name in names])
    write_lines(tmp_path / "spk2gender", [f"s{i} {'mf'[i % 2]}" for i in range(4)])
    write_lines(tmp_path / "spk2age", [f"s{i} {20 + i}" for i in range(4)])
    write_lines(tmp_path / "trials", ["1 u00 u04", "0 u00 u01", "1 u01 u05", "0 u02 u03"])
    write_lines(tmp_path / "calib.scp", ["u00 u00.wav", "u05 u05.wav"])
    return tmp_path


def findings(folder: Path, decode_audio: bool = True) -> list[str]:
    return [str(finding) for finding in check_folder(folder, decode_audio).findings]


def test_a_sound_folder_has_no_finding(folder: Path) -> None:
    report = check_folder(folder)
    assert report.findings == []
    assert report.ok
    assert (report.num_utterances, report.num_speakers) == (12, 4)
    assert report.sample_rates == {16000: 12}
    assert report.trials == {"trials": (2, 2)}
    assert report.duration_s == pytest.approx(12.66)


def test_progress_counts_every_file(folder: Path) -> None:
    append(folder / "calib.scp", "extra u01.wav")
    seen: list[tuple[int, int]] = []
    check_folder(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 13) for i in range(1, 14)]


def test_every_broken_line_is_named_at_once(folder: Path) -> None:
    for line in ("alone", "u00 again.wav", "cmd cat x.wav |"):
        append(folder / "wav.scp", line)
    append(folder / "utt2dur", "u03 long")
    append(folder / "spk2gender", "s0 x")
    write_lines(folder / "spk2age", ["s0 young", "s1 20"])
    for line in ("tgt u00 u01", "1 u00", "1 u00 ghost"):
        append(folder / "trials", line)
    assert findings(folder) == [
        "wav.scp:13: error: 'alone' stands alone; a name, a space and a value are needed.",
        "wav.scp:14: error: 'u00' stands already on line 1.",
        "wav.scp:15: error: 'cat x.wav |' is a shell command, which is never executed. "
        "Convert the audio and list the file.",
        "utt2dur:13: error: 'u03' stands already on line 4.",
        "spk2gender:5: error: 's0' stands already on line 1.",
        "spk2age:1: error: 'young' is not a number of 0 or more.",
        "trials:5: error: label 'tgt' is not one of 1, 0, target, nontarget.",
        "trials:6: error: 2 fields; 'label enroll test' is needed.",
        "trials:7: error: utterance 'ghost' is not in wav.scp.",
    ]
    assert not check_folder(folder).ok


def test_every_unusable_file_is_named(folder: Path) -> None:
    (folder / "u00.wav").unlink()
    (folder / "u01.wav").write_bytes(b"")
    (folder / "u02.wav").write_text("not audio at all, however long it goes on")
    (folder / "u03.wav").write_bytes((folder / "u03.wav").read_bytes()[:9000])
    soundfile.write(folder / "u04.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "u05.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "u06.wav", np.empty(0), 16000)
    found = findings(folder)
    wanted = [
        "wav.scp:1: error: utterance 'u00': {}/u00.wav: no such audio file.",
        "wav.scp:2: error: utterance 'u01': {}/u01.wav is an empty file (0 bytes); audio was expected.",
        "wav.scp:3: error: utterance 'u02': {}/u02.wav cannot be decoded",
        "wav.scp:4: error: utterance 'u03': {}/u03.wav is truncated",
        "wav.scp:5: error: utterance 'u04': {}/u04.wav is digital silence throughout",
        "wav.scp:6: error: utterance 'u05': {}/u05.wav holds NaN or infinite samples.",
        "wav.scp:7: error: utterance 'u06': {}/u06.wav holds no samples.",
    ]
    assert len(found) == len(wanted)
    for text, start in zip(found, wanted, strict=True):
        assert text.startswith(start.format(folder))


def test_headers_alone_show_missing_and_truncated_files(folder: Path) -> None:
    (folder / "u00.wav").unlink()
    (folder / "u03.wav").write_bytes((folder / "u03.wav").read_bytes()[:9000])
    soundfile.write(folder / "u06.wav", np.empty(0), 16000)
    assert [text.split(":")[1] for text in findings(folder, decode_audio=False)] == ["1", "4", "7"]


def test_outliers_are_warnings(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for name, duration_s, rate in (("u01", 0.3, 16000), ("u02", 6.0, 16000), ("u03", 1.0, 8000), ("u04", 0.02, 16000)):
        soundfile.write(folder / f"{name}.wav", 0.1 * rng.standard_normal(round(duration_s * rate)), rate)
    (folder / "utt2dur").unlink()
    assert findings(folder) == [
        "wav.scp:2: warning: utterance 'u01' lasts 0.30 s, less than 0.5 s: little to know a voice by.",
        "wav.scp:3: warning: utterance 'u02' lasts 6.00 s; usual here are 0.74 to 1.47 s.",
        "wav.scp:4: warning: utterance 'u03' has 8000 Hz; 11 of 12 have 16000 Hz.",
        "wav.scp:5: error: utterance 'u04' lasts 20.0 ms; one Fbank frame needs 25 ms.",
    ]


def test_speakers_are_checked(folder: Path) -> None:
    lines = (folder / "utt2spk").read_text().splitlines()
    write_lines(folder / "utt2spk", [*lines[:10], "u10 lonely", "ghost s0"])
    append(folder / "spk2gender", "s9 m")
    append(folder / "spk2gender", "lonely x")
    append(folder / "text", "ghost HELLO")
    assert findings(folder) == [
        "utt2spk:12: warning: utterance 'ghost' is not in wav.scp.",
        "wav.scp:12: error: utterance 'u11' has no speaker in utt2spk.",
        "utt2spk:11: warning: speaker 'lonely' has only one utterance: no target trial.",
        "text:13: warning: utterance 'ghost' is not in wav.scp.",
        "spk2gender:5: warning: speaker 's9' is not in utt2spk.",
        "spk2gender:6: error: 'x' is not one of m, f.",
    ]


def test_a_folder_without_speakers_is_warned_of(folder: Path) -> None:
    (folder / "utt2spk").unlink()
    report = check_folder(folder)
    assert [str(finding) for finding in report.warnings] == [
        "utt2spk: warning: is missing: no intervals over speakers, no training."
    ]
    assert report.ok


def test_durations_are_compared_with_the_audio(folder: Path) -> None:
    lines = (folder / "utt2dur").read_text().splitlines()
    write_lines(folder / "utt2dur", ["u00 2.5", *lines[1:]])
    assert findings(folder) == ["utt2dur:1: warning: says 2.5 s of utterance 'u00'; its audio lasts 1.00 s."]


def test_trials_are_compared_with_the_speakers(folder: Path) -> None:
    for line in ("0 u00 u08", "1 u00 u02", "0 u03 u02", "1 u07 u07"):
        append(folder / "trials", line)
    assert findings(folder) == [
        "trials:8: warning: compares utterance 'u07' with itself.",
        "trials:7: warning: repeats the trial 'u03' 'u02'.",
        "trials:5: error: label says non-target, but utt2spk gives one speaker for 'u00' 'u08'.",
        "trials:6: error: label says target, but utt2spk gives two speakers for 'u00' 'u02'.",
    ]


def test_every_trial_list_needs_both_kinds(folder: Path) -> None:
    write_lines(folder / "trials_same", ["1 u00 u04"])
    write_lines(folder / "trials_other", ["0 u00 u01"])
    write_lines(folder / "trials_empty", [])
    assert findings(folder) == [
        "trials_empty: error: holds no trials; lines 'label enroll test' are needed.",
        "trials_other: error: holds no target trials (label 1); an error rate needs both kinds.",
        "trials_same: error: holds no non-target trials (label 0); an error rate needs both kinds.",
    ]


def test_calibration_audio_outside_the_folder_is_checked(folder: Path) -> None:
    append(folder / "calib.scp", "other gone.wav")
    assert findings(folder) == [f"calib.scp:3: error: utterance 'other': {folder}/gone.wav: no such audio file."]


def test_two_utterances_of_one_file_are_warned_of(folder: Path) -> None:
    lines = (folder / "wav.scp").read_text().splitlines()
    write_lines(folder / "wav.scp", [*lines[:4], "u04 u00.wav", *lines[5:]])
    assert findings(folder) == ["wav.scp:5: warning: 'u04' has the same audio as 'u00'."]


def test_a_folder_without_wav_scp_is_a_finding_and_no_folder_an_error(tmp_path: Path) -> None:
    assert findings(tmp_path) == ["wav.scp: error: is missing; it lists the audio, lines 'utterance path'."]
    with pytest.raises(InputError, match=r"gone: no such data folder\."):
        check_folder(tmp_path / "gone")


def test_real_headers_have_no_error(bench_data: Path) -> None:
    report = check_folder(bench_data / "speechocean762" / "dev", decode_audio=False)
    assert report.ok
    assert report.sample_rates == {16000: 1000}
    assert report.trials == {"trials_full": (9500, 40000), "trials_hard": (9500, 40000)}


def test_the_shortest_utterance_gives_one_frame() -> None:
    assert SHORTEST_MS == FRAME_LENGTH_MS
