from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.artifact import Artifact, FrontEnd
from compress.data import DataFolder
from compress.training.own_speech import OwnSpeech


def test_babble_is_made_of_what_is_learned_from_alone(
    campplus: Artifact, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    whole = DataFolder.waveform

    def watched(folder: DataFolder, utterance: str, sample_rate: int) -> NDArray:
        read.add(utterance)
        return whole(folder, utterance, sample_rate)

    monkeypatch.setattr(DataFolder, "waveform", watched)
    folder = DataFolder.read(speech_folder)
    own = OwnSpeech.of(folder, campplus, [], True, 1)
    part = own.part(range(4))
    for source in part.sources([(0, turn) for turn in range(40)]):
        source()
    assert {folder.utterances[0]} < read <= set(folder.utterances[:4])


def test_speech_is_disturbed_alike_at_any_rate_of_the_network(campplus: Artifact, speech_folder: Path) -> None:
    """Filters, rooms and babble are those of 16 kHz, and what they give is resampled."""
    folder = DataFolder.read(speech_folder)
    low = replace(campplus, front_end=FrontEnd(sample_rate=8000, num_mel_bins=40))
    for turn in range(3):
        wide, narrow = (
            OwnSpeech.of(folder, artifact, [], True, 1).sources([(0, turn)])[0]() for artifact in (campplus, low)
        )
        levels = [features.std(1) for features in (wide[:, :50], narrow)]  # over bins of the same 4 kHz, mean taken off
        frames = min(map(len, levels))
        assert np.corrcoef(levels[0][:frames], levels[1][:frames])[0, 1] > 0.8
