from pathlib import Path

import pytest
from numpy.typing import NDArray

from compress.artifact import Artifact
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
