import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from compress.cli.display import Bars
from compress.cli.train import read_share
from compress.data import DataFolder
from compress.errors import InputError, MachineError
from compress.features import SAMPLE_RATE
from compress.progress import Silent
from compress.training import prepare as prepare_module
from compress.training.corpus import Corpus, to_pcm
from compress.training.prepare import (
    Shard,
    check_leakage,
    check_unreadable,
    fingerprint,
    fingerprint_of_dev,
    in_processes,
    list_noise,
    list_speech,
    measured_on,
    prepare,
    share_of,
)
from compress.training.shards import Entry


@pytest.fixture
def made(own_speech: Path, tmp_path: Path) -> Callable[..., Path]:
    """Prepares the copy of the speech; returns the stage's folder."""

    def make(noise: Path | None = None, dev: Path | None = None, limit: float = 0.0, workers: int = 1) -> Path:
        folder = tmp_path / "1-data"
        folder.mkdir(exist_ok=True)
        prepare(list_speech(str(own_speech)), list_noise(noise), folder, limit, workers, Silent())
        if dev:
            check_leakage(folder, measured_on(DataFolder.read(dev), None), Silent())
        return folder

    return make


def set_speaker(folder: Path, utterance: str, speaker: str) -> None:
    table = folder / "utt2spk"
    lines = [line.split() for line in table.read_text().splitlines()]
    table.write_text("".join(f"{name} {speaker if name == utterance else old}\n" for name, old in lines))


def utterances_of(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "wav.scp").read_text().splitlines()]


def test_the_corpus_has_the_samples_speakers_and_noise_of_the_folder(made: Callable, own_speech: Path) -> None:
    folder = DataFolder.read(own_speech)
    corpus = Corpus.open(made(noise=own_speech / "calib.scp"))
    wanted = [to_pcm(folder.waveform(name, SAMPLE_RATE)) for name in folder.utterances]
    for found in (corpus.utterances, corpus.noises):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    names = sorted(set(folder.speakers.values()))
    assert [names[number] for number in corpus.speakers] == [folder.speaker(name) for name in folder.utterances]


def test_many_parts_and_processes_give_the_same_corpus(
    made: Callable, own_speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Corpus.open(made()).fingerprint
    monkeypatch.setattr(prepare_module, "PER_SHARD", 4)
    folder = made(workers=2)
    several = Corpus.open(folder)
    assert len(list(folder.glob("*.tar"))) == 5
    assert several.fingerprint == one
    monkeypatch.setattr(prepare_module, "PER_SHARD", 9)
    assert Corpus.open(made()).fingerprint == one
    assert len(list(folder.glob("*.tar"))) == 2  # of the earlier five nothing is left


def test_a_corpus_of_shards_gives_the_speech_that_it_was_made_of_without_the_noise(
    made: Callable, own_speech: Path, tmp_path: Path
) -> None:
    folder, second = made(noise=own_speech / "calib.scp"), tmp_path / "second"
    second.mkdir()
    prepare(list_speech(str(folder)), [], second, 0.0, 1, Silent())
    assert (second / "speech.txt").read_bytes() == (folder / "speech.txt").read_bytes()
    assert len(Corpus.open(second).noises) == 0


def test_only_what_has_changed_is_decoded_again(
    made: Callable, own_speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PER_SHARD", 6)
    folder = made()
    before = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    samples, rate = soundfile.read(own_speech / "wav" / f"{utterances_of(own_speech)[8]}.wav")
    soundfile.write(own_speech / "wav" / f"{utterances_of(own_speech)[8]}.wav", 0.5 * samples, rate)
    made()
    after = {path.name: path.stat().st_ino for path in folder.glob("*.tar")}
    assert [name for name in sorted(before) if before[name] != after[name]] == ["speech-000001.tar"]


def test_a_fingerprint_follows_names_speakers_and_files(own_speech: Path) -> None:
    found = {fingerprint(list_speech(str(own_speech)))}
    set_speaker(own_speech, utterances_of(own_speech)[0], "somebody")
    found.add(fingerprint(list_speech(str(own_speech))))
    file = own_speech / "wav" / f"{utterances_of(own_speech)[0]}.wav"
    file.write_bytes(file.read_bytes() + b"\0")
    found.add(fingerprint(list_speech(str(own_speech))))
    assert len(found) == 3


def test_lonely_utterances_empty_classes_and_repeated_audio_are_listed(made: Callable, own_speech: Path) -> None:
    names = utterances_of(own_speech)
    set_speaker(own_speech, names[0], "lonely")
    set_speaker(own_speech, names[1], "mute")
    (own_speech / "wav" / f"{names[1]}.wav").write_bytes(b"")
    repeated = own_speech / "wav" / f"{names[4]}.wav"
    repeated.write_bytes((own_speech / "wav" / f"{names[3]}.wav").read_bytes())
    folder = made(limit=0.06)
    assert (folder / "findings.txt").read_text().splitlines() == [
        "speaker mute has no usable utterance and is no class.",
        "speaker lonely has one utterance only.",
        "speaker " + DataFolder.read(own_speech).speaker(names[2]) + " has one utterance only.",
        f"{names[4]} has the same audio as {names[3]}.",
    ]
    corpus = Corpus.open(folder)
    assert sorted(set(corpus.speakers.tolist())) == list(range(7))  # of six, two more and one less


def test_the_same_audio_under_two_speakers_is_refused(made: Callable, own_speech: Path) -> None:
    names = utterances_of(own_speech)
    (own_speech / "wav" / f"{names[4]}.wav").write_bytes((own_speech / "wav" / f"{names[0]}.wav").read_bytes())
    folder = DataFolder.read(own_speech)
    pair = f"{names[4]} of {folder.speaker(names[4])} and {names[0]} of {folder.speaker(names[0])}"
    with pytest.raises(InputError, match=f"the same audio is there under two speakers, 1 times: {pair}"):
        made()


def dev_folder(path: Path, own_speech: Path, count: int, speaker: str) -> Path:
    """A dev folder of the first utterances of the training data, all of one speaker."""
    (path / "wav").mkdir(parents=True)
    names = utterances_of(own_speech)[:count]
    for i, name in enumerate(names):
        (path / "wav" / f"{i}.wav").write_bytes((own_speech / "wav" / f"{name}.wav").read_bytes())
    (path / "wav.scp").write_text("".join(f"dev{i} wav/{i}.wav\n" for i in range(count)))
    (path / "utt2spk").write_text("".join(f"dev{i} {speaker}\n" for i in range(count)))
    return path


def test_audio_that_is_measured_on_under_other_names_is_found(made: Callable, own_speech: Path, tmp_path: Path) -> None:
    dev = dev_folder(tmp_path / "dev", own_speech, 2, "other")
    with pytest.raises(InputError, match=r"label leakage: .* share 2 recordings \(.* is dev0, .* is dev1\)"):
        made(dev=dev)
    assert (tmp_path / "1-data" / "leaked.txt").read_text().splitlines()[0] == (
        f"audio {utterances_of(own_speech)[0]} is dev0"
    )


def test_speakers_that_are_measured_on_are_found_by_name(made: Callable, own_speech: Path, tmp_path: Path) -> None:
    known = DataFolder.read(own_speech).speaker(utterances_of(own_speech)[-1])
    dev = dev_folder(tmp_path / "dev", own_speech, 1, known)
    samples, rate = soundfile.read(dev / "wav" / "0.wav")
    soundfile.write(dev / "wav" / "0.wav", 0.9 * samples, rate)
    with pytest.raises(InputError, match=rf"share 1 speaker \({known}\)\..* Rename them if other people are meant"):
        made(dev=dev)


def test_dev_data_of_others_pass_and_only_what_trials_name_counts(
    made: Callable, own_speech: Path, tmp_path: Path
) -> None:
    dev = dev_folder(tmp_path / "dev", own_speech, 3, "other")
    for i in (1, 2):
        samples, rate = soundfile.read(dev / "wav" / f"{i}.wav")
        soundfile.write(dev / "wav" / f"{i}.wav", 0.9 * samples, rate)
    (dev / "trials").write_text("1 dev1 dev2\n0 dev2 dev1\n")  # dev0, the same audio, is in no trial
    made(dev=dev)
    compared = (tmp_path / "1-data" / "compared.txt").read_text()
    (dev / "trials").write_text("1 dev1 dev2\n0 dev2 dev0\n")
    with pytest.raises(InputError, match=r"share 1 recording \(.* is dev0\)"):
        made(dev=dev)
    assert (tmp_path / "1-data" / "leaked.txt").is_file()
    (dev / "trials").write_text("1 dev1 dev2\n0 dev2 dev1\n")
    made(dev=dev)  # passed before
    assert (tmp_path / "1-data" / "compared.txt").read_text() == compared
    assert not (tmp_path / "1-data" / "leaked.txt").exists()


def test_dev_data_without_speakers_are_told(
    own_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = dev_folder(tmp_path / "dev", own_speech, 1, "other")
    check_leakage(tmp_path, DataFolder.read(dev), Bars())
    assert "utt2spk" not in capsys.readouterr().err
    (dev / "utt2spk").unlink()
    check_leakage(tmp_path, DataFolder.read(dev), Bars())
    assert "dev has no utt2spk: whether it shares speakers with" in " ".join(capsys.readouterr().err.split())


def test_a_fingerprint_of_dev_data_follows_names_speakers_files_and_trials(own_speech: Path, tmp_path: Path) -> None:
    dev = dev_folder(tmp_path / "dev", own_speech, 3, "other")

    def fingerprint(trials: str | None = None) -> str:
        return fingerprint_of_dev(measured_on(DataFolder.read(dev), trials))

    found = [fingerprint()]
    set_speaker(dev, "dev1", "another")
    found.append(fingerprint())
    (dev / "trials").write_text("1 dev0 dev1\n0 dev1 dev0\n")
    found.append(fingerprint())
    (tmp_path / "elsewhere").write_text("1 dev0 dev2\n0 dev2 dev0\n")
    assert fingerprint(str(tmp_path / "elsewhere")) == found[1]  # all three
    (dev / "wav" / "0.wav").write_bytes((dev / "wav" / "1.wav").read_bytes() + b"more")
    found.append(fingerprint())
    assert len(set(found)) == 4
    assert fingerprint() == found[-1]


@given(total=st.integers(1, 10**7), data=st.data())
def test_the_share_that_is_advised_is_enough_and_hardly_more(total: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(1, total))
    share = read_share(share_of(bad, total))
    assert bad / total <= share + 1e-12
    assert share <= 1.1 * bad / total + 1e-12


@pytest.mark.parametrize(("bad", "total", "advised"), [(1, 300, "0.34%"), (29, 100, "29%"), (2, 2, "100%")])
def test_the_share_that_is_advised_is_taken(tmp_path: Path, bad: int, total: int, advised: str) -> None:
    entry = Entry("a-1", "a", 0, 16000, "")
    shard = Shard([entry] * (total - bad), [("b-1", "b", "b-1 is silent.")] * bad)
    with pytest.raises(InputError, match=rf"{bad} of {total} utterances .* with --max-unreadable {advised}\.$"):
        check_unreadable([shard], tmp_path, 0.9 * bad / total)
    check_unreadable([shard], tmp_path, read_share(advised))


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told() -> None:
    with pytest.raises(MachineError, match=r"prepares data was killed.* fewer --workers than 2;"):
        list(in_processes(killed, [0, 1], 2))


def test_noise_must_be_readable(made: Callable, tmp_path: Path) -> None:
    (tmp_path / "noise.scp").write_text("rain absent.wav\n")
    with pytest.raises(InputError, match=r"1 noise recordings cannot be used: .*absent\.wav: no such audio file"):
        made(noise=tmp_path / "noise.scp")


def test_noise_of_an_earlier_try_is_not_used(made: Callable, own_speech: Path) -> None:
    assert len(Corpus.open(made(noise=own_speech / "calib.scp")).noises) == 18
    assert len(Corpus.open(made()).noises) == 0


def test_too_few_speakers_are_left(made: Callable, own_speech: Path) -> None:
    names = utterances_of(own_speech)
    for name in names[1:]:
        set_speaker(own_speech, name, "mute")
        (own_speech / "wav" / f"{name}.wav").write_bytes(b"")
    with pytest.raises(InputError, match="1 speaker is left with usable audio; training needs two or more"):
        made(limit=1.0)
