"""Recordings in tar files that need not fit in memory.

The layout is WebDataset's: the files of a sample follow each other and share the name before the first dot,
``000000-000012.wav`` (mono, 16 kHz, 16 bits, not compressed) and ``000000-000012.json`` (its utterance and speaker).
An index tells where the samples of each recording lie, so that any of them is read by its number from the mapped file,
and nothing is decoded.
"""

import io
import json
import tarfile
import tempfile
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from compress.audio import AUDIO_SUFFIXES, Array, read_audio
from compress.errors import InputError
from compress.features import SAMPLE_RATE
from compress.files import replaced_file, sha256_of
from compress.training.augment import PCM

ROW = np.dtype([("shard", "<i4"), ("speaker", "<i4"), ("offset", "<i8"), ("samples", "<i8")])


class Entry(NamedTuple):
    """A recording in a shard: whose it is, where its samples begin, how many there are, and their hash."""

    utterance: str
    speaker: str
    offset: int  # in bytes
    samples: int
    sha256: str


class Sample(NamedTuple):
    """An utterance that can be read; ``read`` raises an InputError if its audio cannot be used."""

    utterance: str
    speaker: str
    read: Callable[[], Array]


def shard_name(kind: str, number: int) -> str:
    """The file of a shard of speech or noise."""
    return f"{kind}-{number:06d}.tar"


def write_shard(path: Path, recordings: Iterable[tuple[str, str, PCM]], shard: int) -> list[Entry]:
    """Write a shard, whole or not at all.

    Args:
        path: The tar file.
        recordings: Utterance, speaker and samples of each.
        shard: Its number; a sample is named by that and its own number, since utterances' names may hold dots.

    Raises:
        MachineError: If the disk is full.
    """
    told: list[tuple[str, str, int, str]] = []
    with replaced_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (utterance, speaker, samples) in enumerate(recordings):
                described = {"utterance": utterance, "speaker": speaker, "duration_s": len(samples) / SAMPLE_RATE}
                for suffix, data in (("wav", wav_of(samples)), ("json", json.dumps(described).encode())):
                    member = tarfile.TarInfo(f"{shard:06d}-{number:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                told.append((utterance, speaker, len(samples), sha256_of(samples.tobytes())))
        with tarfile.open(temporary) as tar:  # as anybody reads it
            ends = [member.offset_data + member.size for member in tar if member.name.endswith(".wav")]
    return [
        Entry(utterance, speaker, end - 2 * samples, samples, digest)
        for (utterance, speaker, samples, digest), end in zip(told, ends, strict=True)
    ]


def wav_of(samples: PCM) -> bytes:
    """Give the bytes of a WAV file; the samples are its last."""
    packed = io.BytesIO()
    with wave.open(packed, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return packed.getvalue()


def read_shard(path: Path) -> Iterator[Sample]:
    """Read a shard that anybody wrote: audio of any format with a ``.json`` that names its speaker, or a ``.cls``.

    The audio of a sample can be read until the next one is taken.

    Raises:
        InputError: If it is no tar file, or a sample has no speaker.
    """
    try:
        with tarfile.open(path) as tar:
            found: dict[str, bytes] = {}
            key = ""
            for member in tar:
                if not member.isfile():
                    continue
                name, _, suffix = Path(member.name).name.partition(".")
                own = str(Path(member.name).parent / name)
                if own != key and found:
                    yield sample_of(path, key, found)
                    found = {}
                key = own
                file = tar.extractfile(member)
                found[suffix.lower()] = file.read() if file else b""
            if found:
                yield sample_of(path, key, found)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} is no whole tar file ({error}). Copy or write it again.") from error


def sample_of(path: Path, key: str, files: dict[str, bytes]) -> Sample:
    """Understand the files of a sample: suffix -> content.

    Raises:
        InputError: If it has no audio or no speaker.
    """
    suffix = next((suffix for suffix in files if f".{suffix}" in AUDIO_SUFFIXES), None)
    if suffix is None:
        raise InputError(f"{path}: sample '{key}' has no audio, only {', '.join(files)}.")
    try:
        told: Any = json.loads(files.get("json", b"{}"))
        speaker = told.get("speaker") if isinstance(told, dict) else None
        speaker = speaker if speaker is not None else files.get("cls", b"").decode().strip()
    except ValueError as error:
        raise InputError(f"{path}: sample '{key}': its json or cls cannot be read ({error}).") from error
    if not str(speaker):
        raise InputError(
            f"{path}: sample '{key}' has no speaker: a .json with the key \"speaker\" or a .cls is needed."
        )
    utterance = str(told.get("utterance", key)) if isinstance(told, dict) else key
    data = files[suffix]

    def read() -> Array:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"audio.{suffix}"
            file.write_bytes(data)
            try:
                return read_audio(file, SAMPLE_RATE)
            except InputError as error:
                raise InputError(str(error).replace(str(file), f"{path}: {key}.{suffix}")) from error

    return Sample(utterance, str(speaker), read)


def write_index(path: Path, shards: Sequence[Sequence[Entry]], speakers: Sequence[str]) -> None:
    """Write where each recording lies, in the order of the shards, with the number of its speaker."""
    numbers = {speaker: number for number, speaker in enumerate(speakers)}
    count = sum(map(len, shards))
    with replaced_file(path) as temporary:
        rows = open_memmap(temporary, "w+", ROW, (count,))
        rows[:] = [
            (shard, numbers[entry.speaker], entry.offset, entry.samples)
            for shard, entries in enumerate(shards)
            for entry in entries
        ]
        rows.flush()


class Recordings(Sequence[PCM]):
    """The recordings of a folder of shards by number, 16-bit samples (samples,); the files are mapped, not read.

    Args:
        folder: With the shards and the index.
        kind: ``speech`` or ``noise``.

    Raises:
        InputError: If the index or a shard is missing, or shorter than the index says.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.maps: dict[int, NDArray[np.uint8]] = {}
        self.rows = open_index(folder / f"{kind}.npy")
        for shard in np.unique(self.rows["shard"]):
            mine = self.rows[self.rows["shard"] == shard]
            path = folder / shard_name(kind, shard)
            needed = int((mine["offset"] + 2 * mine["samples"]).max())
            if not path.is_file() or path.stat().st_size < needed:
                raise InputError(
                    f"{path} is missing or shorter than its index says. Prepare the data again: --stage 1."
                )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> PCM: ...
    @overload
    def __getitem__(self, number: slice) -> list[PCM]: ...
    def __getitem__(self, number: int | slice) -> PCM | list[PCM]:
        """Map a recording, or several."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self.rows[number]
        shard, start = int(row["shard"]), int(row["offset"])
        if shard not in self.maps:
            self.maps[shard] = np.asarray(np.memmap(self.folder / shard_name(self.kind, shard), np.uint8, "r"))
        samples: PCM = self.maps[shard][start : start + 2 * int(row["samples"])].view("<i2")
        return samples

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: it maps the files itself."""
        return self.__dict__ | {"maps": {}, "rows": np.array(self.rows)}

    @property
    def speakers(self) -> NDArray[np.int64]:
        """The number of each recording's speaker."""
        return self.rows["speaker"].astype(np.int64)


def open_index(path: Path) -> NDArray[Any]:
    """Map an index.

    Raises:
        InputError: If it is missing or damaged.
    """
    try:
        rows: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is missing or damaged ({error}). Prepare the data again: --stage 1.") from error
    if rows.dtype != ROW:
        raise InputError(f"{path} is not an index of this version. Prepare the data again: --stage 1.")
    return rows
