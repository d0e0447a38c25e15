import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError
from compress.training.shards import Recordings, Sample, read_shard, shard_name, write_index, write_shard

PCM = np.ndarray


def recordings(lengths: list[int], seed: int = 0) -> list[tuple[str, str, PCM]]:
    rng = np.random.default_rng(seed)
    return [
        (f"utt.{i}/a", f"speaker {i % 3}", rng.integers(-(2**15), 2**15, length).astype(np.int16))
        for i, length in enumerate(lengths)
    ]


def write(folder: Path, shards: list[list[tuple[str, str, PCM]]]) -> None:
    speakers = sorted({speaker for shard in shards for _, speaker, _ in shard})
    entries = [write_shard(folder / shard_name("speech", i), shard, i) for i, shard in enumerate(shards)]
    write_index(folder / "speech.npy", entries, speakers)


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar file as other programs do."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def audio(samples: PCM, suffix: str, rate: int = 16000) -> bytes:
    packed = io.BytesIO()
    soundfile.write(packed, samples, rate, format=suffix.upper())
    return packed.getvalue()


@given(lengths=st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_recording_is_found_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = [recordings(some, seed) for seed, some in enumerate(lengths)]
    write(folder, shards)
    found, wanted = Recordings(folder, "speech"), [one for shard in shards for one in shard]
    assert len(found) == len(wanted)
    for i in reversed(range(len(wanted))):
        assert np.array_equal(found[i], wanted[i][2])
    assert [f"speaker {number}" for number in found.speakers] == [speaker for _, speaker, _ in wanted]


def test_a_shard_has_the_layout_that_others_read(tmp_path: Path) -> None:
    """As webdataset groups: files in turn that share what is before the first dot of their name."""
    (entry, _) = write_shard(tmp_path / "a.tar", recordings([400, 500]), 7)
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
        samples, rate = soundfile.read(tar.extractfile("000007-000000.wav"), dtype="int16")
        told = json.load(tar.extractfile("000007-000000.json"))
    assert names == ["000007-000000.wav", "000007-000000.json", "000007-000001.wav", "000007-000001.json"]
    assert told == {"utterance": "utt.0/a", "speaker": "speaker 0", "duration_s": 0.025}
    assert rate == 16000
    assert np.array_equal(samples, recordings([400])[0][2])
    assert np.frombuffer((tmp_path / "a.tar").read_bytes()[entry.offset :][:800], "<i2").tolist() == samples.tolist()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    wanted = recordings([400, 500])
    write_shard(tmp_path / "a.tar", wanted, 0)
    for sample, (utterance, speaker, samples) in zip(read_shard(tmp_path / "a.tar"), wanted, strict=True):
        assert (sample.utterance, sample.speaker) == (utterance, speaker)
        assert np.array_equal(np.round(sample.read() * 32768), samples)


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    """Compressed audio at another rate, speakers in ``.json`` or ``.cls``, folders in names, files in any order."""
    tone = (8000 * np.sin(np.arange(8000) / 5)).astype(np.int16)
    path = pack(
        tmp_path / "a.tar",
        {
            "train/one.flac": audio(tone, "flac", 8000),
            "train/one.json": b'{"speaker": 7, "text": "hello"}',
            "train/two.cls": b"anna\n",
            "train/two.wav": audio(tone, "wav"),
        },
    )
    found = []
    for sample in read_shard(path):
        found.append((sample.utterance, sample.speaker, len(sample.read())))
    assert found == [("train/one", "7", 16000), ("train/two", "anna", 8000)]


SAMPLES = {
    "no audio": ({"a.json": b'{"speaker": "x"}'}, "sample 'a' has no audio, only json"),
    "no speaker": ({"a.wav": b""}, "sample 'a' has no speaker: a .json with the key \"speaker\" or a .cls"),
    "empty speaker": ({"a.wav": b"", "a.json": b'{"text": "x"}'}, "sample 'a' has no speaker"),
    "broken json": ({"a.wav": b"", "a.json": b"{"}, "sample 'a': its json or cls cannot be read"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_that_cannot_be_understood_is_named(tmp_path: Path, kind: str) -> None:
    files, message = SAMPLES[kind]
    path = pack(tmp_path / "a.tar", files)
    with pytest.raises(InputError) as caught:
        list(read_shard(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_damaged_audio_is_named_by_its_place_in_the_shard(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"one.wav": b"RIFF", "one.cls": b"x"})
    (sample,) = read_shard(path)
    assert isinstance(sample, Sample)
    with pytest.raises(InputError, match=r"a\.tar: one\.wav cannot be decoded"):
        sample.read()


def test_what_is_no_tar_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"a\.tar is no whole tar file"):
        list(read_shard(tmp_path / "a.tar"))


def test_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    write(tmp_path, [recordings([4000, 5000])])
    found = Recordings(tmp_path, "speech")
    assert np.array_equal(found[1], found[:2][1])
    packed = pickle.dumps(found)
    assert len(packed) < 2000  # no samples
    assert np.array_equal(pickle.loads(packed)[1], found[1])


def test_missing_and_cut_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [recordings([4000, 5000])])
    shard = tmp_path / shard_name("speech", 0)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:9000])
    with pytest.raises(InputError, match=r"speech-000000\.tar is missing or shorter than its index says.*--stage 1"):
        Recordings(tmp_path, "speech")
    shard.unlink()
    with pytest.raises(InputError, match="is missing or shorter"):
        Recordings(tmp_path, "speech")
    (tmp_path / "speech.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"speech\.npy is missing or damaged"):
        Recordings(tmp_path, "speech")
    np.save(tmp_path / "speech.npy", np.zeros(3))
    with pytest.raises(InputError, match="is not an index of this version"):
        Recordings(tmp_path, "speech")
