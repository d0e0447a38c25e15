from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compress.errors import InputError, MachineError
from compress.features import mean_normalize
from compress.progress import Silent
from compress.training import stored
from compress.training.augment import Augmentation
from compress.training.corpus import Corpus
from compress.training.prepare import list_speech, prepare
from compress.training.recipe import Recipe
from compress.training.stored import StoredCrops, store_features
from compress.training.trainer import Crops

QUIET = Augmentation(p_filter=0, p_room=0, p_noise=0, p_babble=0)
RECIPE = Recipe(
    steps=4,
    final_steps=1,
    batch_size=4,
    crop_s=0.5,
    final_crop_s=2.0,  # longer than any utterance
    speeds=(1.0, 1.25),
    speeds_from_step=0,
    features="stored",
    copies=2,
    augmentation=QUIET,
)


@pytest.fixture(scope="module")
def corpus(speech_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.training.prepare.PER_SHARD", 7)  # three shards
        prepare(list_speech(str(speech_folder)), [], folder, 0.0, 1, Silent())
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def features(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    store_features(RECIPE, corpus, folder, 1, Silent())
    return folder


def test_batches_have_the_shape_and_classes_of_live_ones(corpus: Corpus, features: Path) -> None:
    crops, live = (
        StoredCrops(RECIPE, corpus, features),
        Crops(RECIPE, corpus.utterances, corpus.speakers, []),
    )
    for step in (0, 3):
        (found, labels), (wanted, _) = crops[step], live[step]
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert labels.max() < 12
        assert found.mean(1).abs().max() < 1e-4
        assert np.array_equal(found, crops[step][0])


def test_without_disturbance_a_stored_crop_is_a_piece_of_the_utterances_features(
    corpus: Corpus, features: Path
) -> None:
    """The level is drawn, which the mean takes away; half precision is what is left."""
    crops = StoredCrops(RECIPE, corpus, features)
    for number in (0, 8, 17):
        length = len(corpus.utterances[number])
        live = Crops(RECIPE, corpus.utterances, corpus.speakers, [])
        found, wanted = (each.draw(number, 0, length, np.random.default_rng(0))() for each in (crops, live))
        loud = wanted > mean_normalize(wanted).min() + 6  # the floor of digital silence does not move with the level
        assert np.abs(found - wanted)[loud].mean() < 0.05


def test_copies_differ_and_files_that_are_there_are_kept(corpus: Corpus, tmp_path: Path) -> None:
    recipe = Recipe(features="stored", copies=2, speeds=(1.0,))
    names = store_features(recipe, corpus, tmp_path, 1, Silent())
    one, other = (np.load(tmp_path / name) for name in names[:2])
    assert one.shape == other.shape
    assert np.abs(one.astype(float) - other).max() > 0.1
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / names[1]).unlink()
    assert store_features(recipe, corpus, tmp_path, 2, Silent()) == names
    assert np.array_equal(np.load(tmp_path / names[1]), other)  # drawn again as before
    again = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert [name for name in names if times[name] != again[name]] == [names[1]]


def test_files_of_another_corpus_or_cut_ones_are_refused(corpus: Corpus, features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is missing or damaged.*--stage 2"):
        StoredCrops(RECIPE, corpus, tmp_path)
    for path in features.glob("*.npy"):
        np.save(tmp_path / path.name, np.zeros((3, 80), np.float16))
    with pytest.raises(InputError, match=r"holds 3 frames, and \d+ are needed.*--stage 2"):
        StoredCrops(RECIPE, corpus, tmp_path)


def test_too_little_space_is_told_before_the_work(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"2 copies at 2 speeds take .* GB, and .* has 0\.0 GB left"):
        store_features(RECIPE, corpus, tmp_path, 1, Silent())
    assert list(tmp_path.iterdir()) == []
