"""Data folders and trial lists: what is written is read, and every broken line is named by file and line."""

import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import DataFolder, Trials, embedded_data, read_scp, write_folder
from compress.errors import InputError

words = st.text(string.ascii_letters + string.digits + "_-./äß語", min_size=1, max_size=12)
file_names = st.text(string.ascii_letters + "_- ü語", min_size=1, max_size=12).map(lambda name: f"a{name}.wav")


def data_folder(folder: Path, **files: str) -> Path:
    """Write text files; ``wav_scp`` stands for ``wav.scp``."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_scp", ".scp")).write_text(content, encoding="utf-8")
    return folder


@given(audio=st.dictionaries(words, file_names, min_size=1, max_size=20), data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_written_folder_reads_back(
    tmp_path_factory: pytest.TempPathFactory, audio: dict[str, str], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("folder") / "new"
    speakers = {name: data.draw(words) for name in audio}
    durations_s = {name: data.draw(st.integers(1, 10**6)) / 1000 for name in audio}
    ages = {speaker: data.draw(st.integers(5, 99)) for speaker in set(speakers.values())}
    write_folder(
        root,
        {
            "wav.scp": [f"{name} {path}" for name, path in audio.items()],
            "utt2spk": [f"{name} {speaker}" for name, speaker in speakers.items()],
            "text": [f"{name} SOME WORDS" for name in audio],
            "utt2dur": [f"{name} {duration_s}" for name, duration_s in durations_s.items()],
            "spk2gender": [f"{speaker} f" for speaker in ages],
            "spk2age": [f"{speaker} {age}" for speaker, age in ages.items()],
        },
    )
    folder = DataFolder.read(root)
    assert folder.utterances == tuple(audio)
    assert len(folder) == len(audio)
    assert {name: folder.path(name) for name in audio} == {name: root / path for name, path in audio.items()}
    assert {name: folder.speaker(name) for name in audio} == speakers
    assert folder.utt2dur == durations_s
    assert folder.spk2age == ages
    assert folder.spk2gender == dict.fromkeys(ages, "f")
    assert folder.text == dict.fromkeys(audio, "SOME WORDS")


trial_lines = st.lists(st.tuples(st.booleans(), words, words), min_size=1, max_size=60)


@given(lines=trial_lines, spelled=st.booleans(), gap=st.sampled_from((" ", "  ", "\t")), end=st.sampled_from("\n\r"))
@settings(deadline=None, max_examples=100)
def test_trials_keep_labels_and_pairs(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[bool, str, str]], spelled: bool, gap: str, end: str
) -> None:
    lines = [(True, "a", "b"), (False, "b", "c"), *lines]
    label = {True: "target", False: "nontarget"} if spelled else {True: "1", False: "0"}
    path = tmp_path_factory.mktemp("trials") / "trials"
    line_end = "\r\n" if end == "\r" else "\n"
    path.write_bytes("".join(f"{label[t]}{gap}{a}{gap}{b}{line_end}" for t, a, b in lines).encode())
    trials = Trials.read(path)
    names = trials.utterances
    assert len(trials) == len(lines)
    assert list(names) == sorted({name for _, one, other in lines for name in (one, other)})
    assert [
        (bool(t), names[a], names[b]) for t, a, b in zip(trials.labels, trials.enroll, trials.test, strict=True)
    ] == lines


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_one_broken_line_is_found_wherever_it_is(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    lines = [f"{rng.randint(0, 1)} u{rng.randint(0, 9)} u{rng.randint(0, 9)}" for _ in range(200)]
    position = rng.randrange(200)
    lines[position] = rng.choice(["1 u1", "1 u1 u2 u3", "2 u1 u2", "u1 u2 1", "1 u1 stranger", "tgt", "1 u1 u2"])
    path = tmp_path_factory.mktemp("trials") / "trials"
    path.write_text("\n".join(lines))
    known = {f"u{i}" for i in range(10)}
    if lines[position] == "1 u1 u2":
        assert len(Trials.read(path, known)) == 200
    else:
        with pytest.raises(InputError, match=rf"trials:{position + 1}: "):
            Trials.read(path, known)


def test_fields_that_slip_from_line_to_line_are_found(tmp_path: Path) -> None:
    path = tmp_path / "trials"
    path.write_text("1 a\n0 1 b c\n")  # six fields in two lines, labels where they belong
    with pytest.raises(InputError, match="trials:1: 2 fields; 'label enroll test' is needed"):
        Trials.read(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("1 a b\n0 a c\ntgt a b\n", r"trials\.txt:3: label 'tgt' is not one of 1, 0, target, nontarget\.$"),
        ("a b target\n", r"trials\.txt:1: label 'a' is not one of .* The label comes first: 'label enroll test'\."),
        ("1 a b\n\n0 a\n", r"trials\.txt:3: 2 fields; 'label enroll test' is needed\."),
        ("1 a b\n0 a z\n", r"trials\.txt:2: utterance 'z' is not in wav\.scp\."),
        ("", r"trials\.txt: holds no trials; lines 'label enroll test' are needed\."),
        ("\n\n", r"trials\.txt: holds no trials"),
        (
            "0 a b\nnontarget a c\n",
            r"trials\.txt: holds no target trials \(label 1\); an error rate needs both kinds\.",
        ),
        ("1 a b\ntarget a c\n", r"trials\.txt: holds no non-target trials \(label 0\)"),
    ],
)
def test_a_broken_trial_list_says_where_and_why(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "trials.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=text):
        Trials.read(path, {"a", "b", "c"})


def test_a_trial_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trials"
    path.write_bytes("1 a b\n0 a m\u00fcller\n".encode("latin-1"))
    with pytest.raises(InputError, match="trials:2: is not UTF-8 text"):
        Trials.read(path)


def test_a_missing_trial_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: no such file\."):
        Trials.read(tmp_path / "gone")


@pytest.mark.slow
def test_a_million_trials_take_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"spk{i:04d}-utt{i % 20:03d}" for i in range(20_000)]
    pairs = rng.integers(0, len(names), (1_000_000, 2)).tolist()
    path = tmp_path / "trials"
    path.write_text("".join(f"{i % 10 == 0:d} {names[a]} {names[b]}\n" for i, (a, b) in enumerate(pairs)))
    start = time.process_time()
    trials = Trials.read(path, set(names))
    assert time.process_time() - start < 5  # about one on a quiet machine
    assert trials.labels.sum() == 100_000
    order = np.array(trials.utterances)
    assert order[trials.enroll[-3:]].tolist() == [names[a] for a, _ in pairs[-3:]]


def test_trial_lists_are_found_by_name_and_path(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\nb b.wav\n", trials_full="1 a b\n0 b a\n")
    assert len(DataFolder.read(folder).trials()) == 2
    data_folder(folder, trials_hard="1 a b\n0 b a\n0 b b\n")
    data = DataFolder.read(folder)
    assert len(data.trials("trials_hard")) == 3
    assert len(data.trials(folder / "trials_hard")) == 3
    with pytest.raises(InputError, match=r"several trial lists: trials_full, trials_hard\. Choose one with --trials"):
        data.trials()
    with pytest.raises(InputError, match=r"no trial list 'trials_o': .* has trials_full, trials_hard, and"):
        data.trials("trials_o")
    data_folder(folder, trials="1 a b\n0 a b\n0 b b\n0 a a\n")
    assert len(data.trials()) == 4


def test_a_folder_without_trials_says_so(tmp_path: Path) -> None:
    data = DataFolder.read(data_folder(tmp_path / "data", wav_scp="a a.wav\n"))
    with pytest.raises(
        InputError, match=r"has no trial list \('trials' or 'trials_\*'\)\. Name one with --trials FILE"
    ):
        data.trials()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"wav_scp": "a a.wav\nb\n"}, r"wav\.scp:2: 'b' stands alone; a name, a space and a value are needed\."),
        ({"wav_scp": "a a.wav\nb b.wav\na c.wav\n"}, r"wav\.scp:3: 'a' stands already on line 1\."),
        ({"wav_scp": "a sox a.mp3 -t wav - |\n"}, r"wav\.scp:1: 'sox a\.mp3 -t wav - \|' is a shell command, which is"),
        ({"wav_scp": ""}, r"wav\.scp: lists no audio; lines 'utterance path' are needed\."),
        ({"wav_scp": "a a.wav\n", "utt2dur": "a long\n"}, r"utt2dur:1: 'long' is not a number of 0 or more\."),
        ({"wav_scp": "a a.wav\n", "utt2dur": "a nan\n"}, r"utt2dur:1: 'nan' is not a number of 0 or more\."),
        ({"wav_scp": "a a.wav\n", "spk2age": "s -3\n"}, r"spk2age:1: '-3' is not a number"),
        ({"wav_scp": "a a.wav\n", "utt2spk": "a\n"}, r"utt2spk:1: 'a' stands alone"),
        ({"utt2spk": "a s\n"}, r"has no wav\.scp \(lines 'utterance path'\), so it is not a data folder;"),
    ],
)
def test_a_broken_folder_says_where_and_why(tmp_path: Path, files: dict[str, str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        DataFolder.read(data_folder(tmp_path / "data", **files))


def test_a_folder_per_speaker_is_read_without_lists(tmp_path: Path) -> None:
    for name in ("anna/monday/01.flac", "anna/02.WAV", "ben van/1.ogg", "ben van/notes.txt", ".trash/a/1.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = DataFolder.read(tmp_path)
    assert data.speakers == {"anna-02": "anna", "anna-monday-01": "anna", "ben_van-1": "ben_van"}
    assert data.path("anna-monday-01") == tmp_path / "anna" / "monday" / "01.flac"
    (tmp_path / "utt2spk").write_text("anna-02 anna\n")  # so it is a data folder that lost its wav.scp
    with pytest.raises(InputError, match=r"has no wav\.scp"):
        DataFolder.read(tmp_path)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"a.wav"}, r"a\.wav lies beside the speakers' folders\. Move it into one, or away\."),
        ({"a/1.wav", "a/1.flac"}, r"1\.flac and .*1\.wav would both be utterance 'a-1'\. Rename one\."),
        ({"a/1.wav", "b c/notes.txt"}, r"b c holds no audio, so it is no speaker's folder\. Put audio into it"),
        ({"a/notes.txt"}, r"nor is it one of a folder per speaker with audio in it\."),
    ],
)
def test_a_folder_per_speaker_that_cannot_be_read(tmp_path: Path, files: set[str], text: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=text):
        DataFolder.read(tmp_path)


def test_a_shell_command_is_never_executed(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp=f"a touch {tmp_path / 'executed'} |\n")
    with pytest.raises(InputError, match="never executed"):
        DataFolder.read(folder)
    assert not (tmp_path / "executed").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: no such data folder\."):
        DataFolder.read(tmp_path / "gone")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\nb b.wav\n")
    data = DataFolder.read(folder)
    with pytest.raises(InputError, match=r"utterance 'z' is not in wav\.scp\."):
        data.path("z")
    with pytest.raises(InputError, match=r"has no utt2spk \(lines 'utterance speaker'\)"):
        data.speaker("a")
    data_folder(folder, utt2spk="a s\n")
    with pytest.raises(InputError, match=r"utt2spk: utterance 'b' has no speaker\. Add a line for it\."):
        DataFolder.read(folder).speaker("b")


def test_text_may_be_empty(tmp_path: Path) -> None:
    data = DataFolder.read(data_folder(tmp_path / "data", wav_scp="a a.wav\nb b.wav\n", text="a\nb HELLO YOU\n"))
    assert data.text == {"a": "", "b": "HELLO YOU"}


def test_paths_may_be_absolute_and_hold_blanks(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp=f"a my file.wav\nb {tmp_path}/b.wav\nc ../c.wav\n")
    assert read_scp(folder / "wav.scp") == [
        ("a", folder / "my file.wav"),
        ("b", tmp_path / "b.wav"),
        ("c", folder / ".." / "c.wav"),
    ]


def test_waveform_is_resampled(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\nb b.wav\n")
    soundfile.write(folder / "a.wav", np.full((800, 2), 0.25), 8000)
    data = DataFolder.read(folder)
    assert data.waveform("a", 16000).shape == (1600,)
    with pytest.raises(InputError, match=r"b\.wav: no such audio file\."):
        data.waveform("b", 16000)


def test_subset_keeps_the_order_asked_for(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\nb b.wav\nc c.wav\n", utt2spk="a s\nb t\nc s\n")
    part = DataFolder.read(folder).subset(["c", "a"])
    assert part.utterances == ("c", "a")
    assert part.speaker("c") == "s"
    with pytest.raises(InputError, match=r"utterance 'b' is not in wav\.scp"):
        part.path("b")


def test_calibration_lists_lie_relative_to_themselves(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\n")
    data = DataFolder.read(folder)
    with pytest.raises(InputError, match=r"has no calib\.scp\. Name a calibration list with --calib FILE\."):
        data.calibration()
    data_folder(folder, calib_scp="a a.wav\n")
    assert data.calibration().path("a") == folder / "a.wav"
    other = data_folder(tmp_path / "other", calib_scp="".join(f"u{i} wav/{i}.opus\n" for i in range(10)))
    calibration = data.calibration(other / "calib.scp")
    assert calibration.utterances == tuple(f"u{i}" for i in range(10))
    assert calibration.path("u3") == other / "wav" / "3.opus"
    assert calibration.speakers == {}


def test_speakers_of_a_calibration_list_lie_beside_it(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\n", utt2spk="a s\n", calib_scp="a a.wav\n")
    assert DataFolder.read(folder).calibration().speakers == {"a": "s"}
    other = data_folder(tmp_path / "other", calib_scp="a a.wav\nb b.wav\n", utt2spk="a t\nb t\n")
    assert DataFolder.read(folder).calibration(other / "calib.scp").speaker("b") == "t"


@given(length=st.integers(1, 60), data=st.data())
@settings(deadline=None, max_examples=30)
def test_calibration_utterances_are_spread_over_the_list(
    tmp_path_factory: pytest.TempPathFactory, length: int, data: st.DataObject
) -> None:
    content = "".join(f"u{i:02d} {i}.wav\n" for i in range(length))
    folder = data_folder(tmp_path_factory.mktemp("data"), wav_scp="a a.wav\n", calib_scp=content)
    count = data.draw(st.integers(1, length))
    positions = [int(name[1:]) for name in DataFolder.read(folder).calibration(count=count).utterances]
    assert len(positions) == count
    gaps = np.diff([*positions, length])
    assert gaps.max() - gaps.min() <= 1


def test_too_few_calibration_utterances_name_both_counts(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", wav_scp="a a.wav\n", calib_scp="a a.wav\n")
    with pytest.raises(InputError, match=r"calib\.scp lists 1 utterances; 50 were asked for\. Ask for fewer, or"):
        DataFolder.read(folder).calibration(count=50)


def test_writing_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", {"wav.scp": ["a a.wav"], "dev/trials": ["1 a b"]})
    assert (tmp_path / "out" / "dev" / "trials").read_bytes() == b"1 a b\n"
    with pytest.raises(InputError, match=r"out is not empty\. Name a new folder, or remove this one\."):
        write_folder(tmp_path / "out", {"wav.scp": ["b b.wav"]})
    assert (tmp_path / "out" / "wav.scp").read_text() == "a a.wav\n"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; the name of a new folder is needed"):
        write_folder(tmp_path / "file", {})


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def lines() -> Iterator[str]:
        yield "a a.wav"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_folder(tmp_path / "out", {"wav.scp": lines()})
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_data_has_trials_and_a_calibration_list() -> None:
    try:
        root = embedded_data()
    except InputError as error:
        pytest.skip(str(error))
    data = DataFolder.read(root)
    assert set(data.trials().utterances) <= set(data.utterances)
    assert len(data.calibration()) > 0


def test_real_folders_read(bench_data: Path) -> None:
    data = DataFolder.read(bench_data / "speechocean762" / "dev")
    assert len(data) == 1000
    assert len({data.speaker(name) for name in data.utterances}) == 50
    for name in ("trials_full", "trials_hard"):
        trials = data.trials(name)
        assert (len(trials), trials.labels.sum()) == (49500, 9500)
    calibration = data.calibration(bench_data / "speechocean762" / "train" / "calib.scp", count=3)
    assert calibration.waveform(calibration.utterances[0], 16000).ndim == 1
