"""Training audio as the first stage left it: 16-bit samples in shards, read where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError
from compress.files import sha256_of
from compress.training.augment import PCM
from compress.training.shards import Recordings


@dataclass(frozen=True)
class Corpus:
    """Speech of known speakers, and noise.

    Attributes:
        utterances: Samples (samples,) at 16 kHz, by number.
        speakers: The number of each utterance's speaker, from 0 in sorted order of name.
        noises: Samples of noise recordings; may be empty.
        fingerprint: Hash of names, speakers and all samples.
    """

    utterances: Recordings
    speakers: NDArray[np.int64]
    noises: Sequence[PCM]
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open what :func:`compress.training.prepare.prepare` wrote.

        Raises:
            InputError: If something of it is missing or damaged.
        """
        lists = [path for path in (folder / "speech.txt", folder / "noise.txt") if path.is_file()]
        if not lists:
            raise InputError(f"{folder / 'speech.txt'} is missing. Prepare the data again: --stage 1.")
        utterances = Recordings(folder, "speech")
        noises: Sequence[PCM] = Recordings(folder, "noise") if len(lists) > 1 else []
        digest = sha256_of("".join(map(sha256_of, lists)).encode())
        return cls(utterances, utterances.speakers, noises, digest)


def to_pcm(waveform: NDArray[np.float32]) -> PCM:
    """Round samples in [-1, 1) to 16 bits."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)
