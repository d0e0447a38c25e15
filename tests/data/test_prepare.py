"""Data folders made from corpora: what is drawn, and what is refused."""

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import DataFolder
from compress.data.check import check_folder
from compress.data.prepare import draw_calibration, draw_trials, group_by_speaker, prepare, split_speakers
from compress.errors import InputError, SettingError

Cell = TypeVar("Cell")


def write_audio(path: Path, seed: int, duration_s: float = 0.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(8000 * duration_s))
    container = "WAV" if path.suffix.lower() == ".wav" else None
    soundfile.write(path, samples, 8000, format=container)


@pytest.fixture
def speakers_folder(tmp_path: Path) -> Path:
    """A corpus of one folder per speaker: blanks in names, nested folders, other files beside the audio."""
    source = tmp_path / "my corpus"
    for i, name in enumerate(("ann", "bob b", "cem")):
        for k in range(4):
            write_audio(
                source / name / ("one/two" if k % 2 else ".") / f"take {k}.{('wav', 'flac')[i % 2]}", 10 * i + k
            )
    (source / "ann" / "notes.txt").write_text("not audio")
    (source / "README").write_text("not audio either")
    (source / ".cache").mkdir()
    (source / "ann" / "._take 0.wav").write_bytes(b"a ghost of another system")
    return source


@pytest.fixture
def speechocean762(tmp_path: Path) -> Path:
    """A small corpus in the layout of speechocean762: 40 speakers, 3 utterances each, tabs between fields."""
    source = tmp_path / "speechocean762"
    tables: dict[str, list[str]] = {}
    for i in range(40):
        half, speaker = ("train", "test")[i % 2], f"{i * 7:04d}"
        tables.setdefault(f"{half}/spk2gender", []).append(f"{speaker}\t{'mf'[i // 2 % 2]}")
        tables.setdefault(f"{half}/spk2age", []).append(f"{speaker}\t{8 if i // 4 % 2 else 30}")
        for k in range(3):
            name = f"{speaker}{k:05d}"
            write_audio(source / "WAVE" / f"SPEAKER{speaker}" / f"{name}.WAV", 10 * i + k, 0.1 + 0.01 * k)
            tables.setdefault(f"{half}/wav.scp", []).append(f"{name}\tWAVE/SPEAKER{speaker}/{name}.WAV")
            tables.setdefault(f"{half}/utt2spk", []).append(f"{name}\t{speaker}")
            tables.setdefault(f"{half}/text", []).append(f"{name}\tHELLO WORLD")
    for path, lines in tables.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text("".join(f"{line}\n" for line in lines))
    return source


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_folder_corpus_becomes_a_sound_data_folder(speakers_folder: Path, tmp_path: Path) -> None:
    out = prepare("folder", speakers_folder, tmp_path / "out")
    assert sorted(read_all(out)) == ["calib.scp", "trials", "utt2dur", "utt2spk", "wav.scp"]
    report = check_folder(out)
    assert report.findings == []
    data = DataFolder.read(out)
    assert data.utterances[:2] == ("ann-one-two-take_1", "ann-one-two-take_3")
    assert Counter(data.speakers.values()) == {"ann": 4, "bob_b": 4, "cem": 4}
    assert data.path("ann-take_0").resolve() == speakers_folder / "ann" / "take 0.wav"
    assert set(data.utt2dur.values()) == {0.5}
    assert report.trials == {"trials": (3 * 6, 3 * 16)}
    assert len(data.calibration()) == 12


def test_wav_scp_stays_valid_when_corpus_and_folder_move_together(speakers_folder: Path, tmp_path: Path) -> None:
    prepare("folder", speakers_folder, tmp_path / "out")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    speakers_folder.rename(moved / speakers_folder.name)
    (tmp_path / "out").rename(moved / "out")
    assert check_folder(moved / "out").ok


@pytest.mark.parametrize("corpus", ["folder", "speechocean762"])
def test_the_same_corpus_gives_the_same_files(corpus: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue("speakers_folder" if corpus == "folder" else corpus)
    one, other = (read_all(prepare(corpus, source, tmp_path / name)) for name in ("one", "two"))
    assert one == other


def test_speechocean762_is_split_by_speaker(speechocean762: Path, tmp_path: Path) -> None:
    out = prepare("speechocean762", speechocean762, tmp_path / "out")
    parts = {name: DataFolder.read(out / name) for name in ("train", "dev", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 72, "dev": 24, "test": 24}
    for one, other in itertools.combinations(parts.values(), 2):
        assert not set(one.speakers.values()) & set(other.speakers.values())
    for name, part in parts.items():
        assert check_folder(out / name).ok
        strata = Counter((part.spk2gender[s], part.spk2age[s] >= 18) for s in set(part.speakers.values()))
        assert set(strata.values()) == {6 if name == "train" else 2}
        assert set(part.text.values()) == {"HELLO WORLD"}
    assert sorted(path.name for path in (out / "train").iterdir() if "calib" in path.name or "trials" in path.name) == [
        "calib.scp"
    ]
    assert set(parts["train"].calibration().utterances) <= set(parts["train"].utterances)


def test_hard_trials_compare_the_same_gender_and_age_group(speechocean762: Path, tmp_path: Path) -> None:
    dev = DataFolder.read(prepare("speechocean762", speechocean762, tmp_path / "out") / "dev")
    full, hard = dev.trials("trials_full"), dev.trials("trials_hard")
    assert (len(full), full.labels.sum()) == (8 * 3 + 28 * 9, 8 * 3)
    assert (len(hard), hard.labels.sum()) == (8 * 3 + 4 * 9, 8 * 3)
    for one, other in zip(hard.enroll, hard.test, strict=True):
        speakers = [dev.speaker(hard.utterances[i]) for i in (one, other)]
        assert len({(dev.spk2gender[s], dev.spk2age[s]) for s in speakers}) == 1


def assert_evenly_spread(drawn: Counter[Cell], available: dict[Cell, int], limit: int) -> None:
    assert drawn.total() == min(limit, sum(available.values()))
    unfinished = [drawn[cell] for cell, count in available.items() if drawn[cell] < count]
    if unfinished:  # a cell with trials left has as many as any, but for rounding
        assert min(unfinished) >= max(drawn.values()) - 1


sizes = st.lists(st.integers(1, 12), min_size=2, max_size=12)


def speakers_of(utterances_each: list[int]) -> dict[str, str]:
    return {f"s{i:02d}-u{k:02d}": f"s{i:02d}" for i, count in enumerate(utterances_each) for k in range(count)}


@given(utterances_each=sizes, limit=st.integers(1, 400), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_trials_are_right_unique_and_evenly_spread(utterances_each: list[int], limit: int, seed: int) -> None:
    speakers = speakers_of(utterances_each)
    groups = group_by_speaker(speakers)
    cells = list(itertools.combinations(sorted(groups), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.data.prepare.MAX_TARGETS", limit)
        patch.setattr("compress.data.prepare.MAX_NONTARGETS", limit)
        trials = [line.split() for line in draw_trials(groups, cells, random.Random(seed))]
    assert len({frozenset((one, other)) for _, one, other in trials}) == len(trials)
    assert all((speakers[one] == speakers[other]) == (label == "1") for label, one, other in trials)
    targets = Counter(speakers[one] for label, one, _ in trials if label == "1")
    between = Counter((speakers[one], speakers[other]) for label, one, other in trials if label == "0")
    available_targets = {name: math.comb(len(group), 2) for name, group in groups.items()}
    available = {(one, other): len(groups[one]) * len(groups[other]) for one, other in cells}
    assert_evenly_spread(targets, available_targets, limit)
    assert_evenly_spread(between, available, limit)


@given(utterances_each=st.lists(st.integers(1, 12), min_size=1, max_size=40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_calibration_takes_every_speaker_before_a_second_of_any(utterances_each: list[int], seed: int) -> None:
    rng = random.Random(seed)
    speakers = speakers_of(utterances_each)
    durations_s = {name: rng.uniform(1, 10) for name in speakers}
    chosen = draw_calibration(durations_s, speakers, rng)
    assert len(set(chosen)) == len(chosen) == min(200, len(speakers))
    counts = Counter(speakers[name] for name in chosen)
    for speaker, available in Counter(speakers.values()).items():
        assert counts[speaker] == available or counts[speaker] >= max(counts.values()) - 1


def test_calibration_takes_each_third_of_the_durations_equally() -> None:
    speakers = speakers_of([20] * 150)
    durations_s = {name: 1 + i / 1000 for i, name in enumerate(random.Random(0).sample(sorted(speakers), 3000))}
    chosen = draw_calibration(durations_s, speakers, random.Random(1))
    thirds = Counter(int((durations_s[name] - 1) // 1.0) for name in chosen)
    assert sorted(thirds.values()) == [66, 67, 67]
    assert Counter(Counter(speakers[name] for name in chosen).values()) == {1: 100, 2: 50}


@given(strata=st.lists(st.sampled_from(("f_adult", "f_child", "m_adult", "m_child")), min_size=10, max_size=300))
@settings(deadline=None, max_examples=50)
def test_split_takes_a_fifth_of_every_stratum(strata: list[str]) -> None:
    stratum = {f"{i:04d}": name for i, name in enumerate(strata)}
    parts = split_speakers(stratum)
    assert sorted(speaker for part in parts.values() for speaker in part) == sorted(stratum)
    assert len(parts["dev"]) == len(parts["test"]) == round(len(strata) / 5)
    for name, size in Counter(strata).items():
        assert abs(sum(stratum[speaker] == name for speaker in parts["dev"]) - size / 5) < 1.2


def test_split_of_the_whole_corpus_has_the_known_sizes() -> None:
    counts = {"m_child": 69, "f_child": 53, "m_adult": 56, "f_adult": 72}
    names = [name for name, count in counts.items() for _ in range(count)]
    stratum = {f"{i:04d}": name for i, name in enumerate(names)}
    parts = {part: Counter(stratum[s] for s in speakers) for part, speakers in split_speakers(stratum).items()}
    assert parts["dev"] == {"m_child": 14, "f_child": 11, "m_adult": 11, "f_adult": 14}
    assert parts["train"] == {"m_child": 41, "f_child": 31, "m_adult": 34, "f_adult": 44}


def test_unknown_corpora_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"unknown corpus 'voxceleb'\. Known: folder, speechocean762\."):
        prepare("voxceleb", tmp_path, tmp_path / "out")
    with pytest.raises(SettingError, match=r"Did you mean 'speechocean762'\?"):
        prepare("speechocean", tmp_path, tmp_path / "out")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: no such folder; the unpacked corpus 'folder' was expected there\."):
        prepare("folder", tmp_path / "gone", tmp_path / "out")


def test_an_output_folder_that_holds_something_is_kept(speakers_folder: Path, tmp_path: Path) -> None:
    prepare("folder", speakers_folder, tmp_path / "out")
    before = read_all(tmp_path / "out")
    with pytest.raises(InputError, match=r"out is not empty\."):
        prepare("folder", speakers_folder, tmp_path / "out")
    assert read_all(tmp_path / "out") == before


def test_one_speaker_is_too_few(tmp_path: Path) -> None:
    write_audio(tmp_path / "src" / "ann" / "a.wav", 0)
    with pytest.raises(InputError, match=r"gives 1 speakers and 1 utterances; at least two speakers, one of them with"):
        prepare("folder", tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_audio_beside_the_speakers_is_refused(speakers_folder: Path, tmp_path: Path) -> None:
    write_audio(speakers_folder / "stray.wav", 0)
    with pytest.raises(InputError, match=r"stray\.wav lies beside the speakers' folders\."):
        prepare("folder", speakers_folder, tmp_path / "out")


def test_two_files_of_one_name_are_refused(speakers_folder: Path, tmp_path: Path) -> None:
    write_audio(speakers_folder / "ann" / "take_0.flac", 0)
    with pytest.raises(InputError, match=r"take 0\.wav and .*take_0\.flac would both be utterance 'ann-take_0'\."):
        prepare("folder", speakers_folder, tmp_path / "out")


def test_unreadable_audio_is_counted_and_named(speakers_folder: Path, tmp_path: Path) -> None:
    (speakers_folder / "ann" / "broken.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 13 audio files cannot be used: .*broken\.wav is an empty file"):
        prepare("folder", speakers_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_speechocean762_is_named(speechocean762: Path, tmp_path: Path) -> None:
    (speechocean762 / "test" / "spk2age").write_text("0007\told\n")
    with pytest.raises(InputError, match=r"is in neither train/spk2age nor test/spk2age\. Download the corpus again\."):
        prepare("speechocean762", speechocean762, tmp_path / "out")
    (speechocean762 / "test" / "spk2age").unlink()
    with pytest.raises(InputError, match=r"test.spk2age is missing\. The source is speechocean762 as OpenSLR SLR101"):
        prepare("speechocean762", speechocean762, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_age_that_is_no_number_is_named(speechocean762: Path, tmp_path: Path) -> None:
    path = speechocean762 / "test" / "spk2age"
    path.write_text(re.sub(r"0007\t\d+", "0007\told", path.read_text()))
    with pytest.raises(InputError, match=r"spk2age: speaker '0007' has the age 'old'; whole years are needed\."):
        prepare("speechocean762", speechocean762, tmp_path / "out")
