"""The second stage of a training: features of augmented copies of every utterance, computed once."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from compress.errors import InputError, MachineError
from compress.features import NUM_MEL_BINS, SAMPLE_RATE, fbank, mean_normalize, num_frames
from compress.files import replaced_file
from compress.progress import Progress
from compress.training.augment import augment, random_crop
from compress.training.corpus import Corpus
from compress.training.prepare import in_processes
from compress.training.recipe import Recipe
from compress.training.trainer import Crops

Task = tuple[int, int, int]  # shard, speed, copy


def file_name(task: Task) -> str:
    """The features of a shard at a speed, disturbed once: (frames of all utterances, num_mel_bins) float16."""
    shard, speed, copy = task
    return f"features-{shard:06d}-speed{speed}-copy{copy}.npy"


def frames_at(corpus: Corpus, speed: float) -> NDArray[np.int64]:
    """Frames of each utterance as heard at a speed, at least one."""
    samples = (corpus.utterances.rows["samples"] / speed).astype(np.int64)
    shortest = SAMPLE_RATE * 25 // 1000
    return np.array([num_frames(max(shortest, int(count))) for count in samples], np.int64)


def store_features(recipe: Recipe, corpus: Corpus, folder: Path, workers: int, progress: Progress) -> list[str]:
    """Write ``copies`` disturbed copies of every utterance at every speed as features; returns the files' names.

    Files that are there already are kept.

    Raises:
        MachineError: If the disk has too little space.
    """
    shards = np.unique(corpus.utterances.rows["shard"]).tolist()
    tasks = [(s, v, c) for s in shards for v in range(len(recipe.speeds)) for c in range(recipe.copies)]
    missing = [task for task in tasks if not (folder / file_name(task)).is_file()]
    frames = recipe.copies * sum(int(frames_at(corpus, speed).sum()) for speed in recipe.speeds)
    needed, free = 2 * NUM_MEL_BINS * frames * len(missing) // len(tasks), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"features of {recipe.copies} copies at {len(recipe.speeds)} speeds take {needed / 1e9:.1f} GB, and"
            f" {folder} has {free / 1e9:.1f} GB left. Store fewer copies, or have `features: live` in the recipe."
        )
    written = in_processes(partial(store_shard, recipe, corpus, folder), missing, workers)
    for _ in progress.track(written, "storing features", len(missing)):
        pass
    return [file_name(task) for task in tasks]


def store_shard(recipe: Recipe, corpus: Corpus, folder: Path, task: Task) -> None:
    """Write the features of a shard at a speed, disturbed; what is drawn depends on seed, utterance, speed and copy."""
    shard, speed, copy = task
    factor = recipe.speeds[speed]
    frames = frames_at(corpus, factor)
    mine = np.flatnonzero(corpus.utterances.rows["shard"] == shard)
    with replaced_file(folder / file_name(task)) as temporary:
        stored = open_memmap(temporary, "w+", np.float16, (int(frames[mine].sum()), NUM_MEL_BINS))
        start = 0
        for number in mine.tolist():
            rng = np.random.default_rng((recipe.seed, number, speed, copy))
            utterance = corpus.utterances[number]
            length = max(SAMPLE_RATE * 25 // 1000, int(len(utterance) / factor))
            heard = random_crop(utterance, length, factor, rng)
            heard = augment(heard, recipe.augmentation, corpus.noises, corpus.utterances, rng)
            end = start + int(frames[number])
            stored[start:end] = fbank(heard)
            start = end
        stored.flush()


class StoredCrops(Crops):
    """Batches by step number, cut out of stored features.

    Args:
        recipe: With ``features: stored``.
        corpus: Of the first stage.
        folder: With the files of :func:`store_features`.

    Raises:
        InputError: If a file is missing or of another size.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, folder: Path) -> None:
        super().__init__(recipe, corpus.utterances, corpus.speakers, corpus.noises)
        self.folder = folder
        self.shard = np.array(corpus.utterances.rows["shard"])
        self.frames = [frames_at(corpus, speed) for speed in recipe.speeds]
        self.starts = [starts_within(frames, self.shard) for frames in self.frames]
        self.maps: dict[Task, NDArray[np.float16]] = {}
        for shard in np.unique(self.shard).tolist():
            for speed, frames in enumerate(self.frames):
                wanted = (int(frames[self.shard == shard].sum()), NUM_MEL_BINS)
                for copy in range(recipe.copies):
                    check_shape(folder / file_name((shard, speed, copy)), wanted)

    def draw(self, number: int, speed: int, length: int, rng: np.random.Generator) -> Callable[[], NDArray[np.float32]]:
        """Draw features of as many frames as ``length`` samples have, of one of the copies of an utterance at a speed.

        Fbank of a piece is a piece of the Fbank, so only the mean is taken anew. A shorter utterance is repeated.
        """
        whole, frames = self.stored(number, speed, int(rng.integers(self.recipe.copies))), num_frames(length)
        start = int(rng.integers(max(0, len(whole) - frames) + 1))

        def cut() -> NDArray[np.float32]:
            piece = np.resize(whole[start : start + frames], (frames, NUM_MEL_BINS))
            return mean_normalize(piece.astype(np.float32))

        return cut

    def stored(self, number: int, speed: int, copy: int) -> NDArray[np.float16]:
        """Map the features of a copy of an utterance."""
        task = (int(self.shard[number]), speed, copy)
        if task not in self.maps:
            self.maps[task] = np.asarray(np.load(self.folder / file_name(task), mmap_mode="r"))
        start = int(self.starts[speed][number])
        return self.maps[task][start : start + int(self.frames[speed][number])]

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: it maps the files itself."""
        return self.__dict__ | {"maps": {}}


def starts_within(frames: NDArray[np.int64], shard: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each utterance begins in the file of its shard; utterances of a shard follow each other."""
    starts = np.cumsum(frames) - frames
    first = np.searchsorted(shard, shard)  # the first utterance of the same shard
    return starts - starts[first]


def check_shape(path: Path, wanted: tuple[int, int]) -> None:
    """Refuse a file that is not the one that is looked for.

    Raises:
        InputError: Naming it.
    """
    try:
        found: Sequence[int] = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is missing or damaged ({error}). Compute the features again: --stage 2.") from error
    if tuple(found) != wanted:
        raise InputError(
            f"{path} holds {found[0]} frames, and {wanted[0]} are needed. Compute the features again: --stage 2."
        )
