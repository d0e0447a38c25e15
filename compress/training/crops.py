"""Crops of features: a fixed set of pieces of utterances, all of one length."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.features import mean_normalize
from compress.progress import Progress

Array = NDArray[np.float32]


def hold_out(speakers: Sequence[str | None], wanted: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Part utterances in those to learn from and at least ``wanted`` to test on.

    Whole speakers are held out where all are known and that leaves three quarters of the utterances and two speakers,
    whom there must be to tell apart; else utterances are, but for one of each speaker.

    Returns:
        Places of either kind, in order.
    """
    groups: dict[str, list[int]] = {}
    known = None not in speakers
    for place, speaker in enumerate(speakers):
        groups.setdefault(str(speaker) if known else str(place), []).append(place)
    held = _taken(groups, wanted, rng)
    left = {speakers[place] for place in set(range(len(speakers))) - set(held)}
    if len(held) > len(speakers) // 4 or (known and len(left) < 2):
        others = [place for group in groups.values() for place in group[1:]]
        free = others if len(others) >= wanted else range(len(speakers))
        held = _taken({str(place): [place] for place in free}, wanted, rng)
    return sorted(set(range(len(speakers))) - set(held)), sorted(held)


def _taken(groups: dict[str, list[int]], wanted: int, rng: np.random.Generator) -> list[int]:
    found: list[int] = []
    for name in rng.permutation(sorted(groups)):
        if len(found) >= wanted:
            break
        found += groups[str(name)]
    return found


def cut_crops(
    utterances: Sequence[Callable[[], Array]],
    count: int,
    frames: int,
    cmn: bool,
    rng: np.random.Generator,
    progress: Progress,
) -> tuple[Tensor, list[int]]:
    """Cut ``count`` crops at random places; each utterance is read once and gives as many as any other, or one more.

    Fbank of a piece is a piece of the Fbank, so only the mean is taken anew: the crop is what the network would get
    of the cut waveform. A shorter utterance is repeated.

    Args:
        utterances: Each gives features (frames, num_mel_bins).
        count: How many crops.
        frames: Of a crop.
        cmn: Whether the network takes features minus their mean.
        rng: The only source of randomness.
        progress: Told how many utterances are read.

    Returns:
        (count, frames, num_mel_bins), and the place of each crop's utterance.
    """
    order = rng.permutation(len(utterances))[:count]
    shares = np.full(len(order), count // len(order)) + (np.arange(len(order)) < count % len(order))
    crops, places = [], []
    for place, share in progress.track(list(zip(order.tolist(), shares.tolist(), strict=True)), "reading speech"):
        features = utterances[place]()
        whole = np.resize(features, (max(frames, len(features)), features.shape[1]))
        for start in rng.integers(len(whole) - frames + 1, size=share):
            crop = whole[start : start + frames]
            crops.append(mean_normalize(crop) if cmn else crop)
            places.append(place)
    return torch.from_numpy(np.stack(crops)), places


def numbered(names: Sequence[str | None]) -> Tensor:
    """Number speakers from 0, in sorted order of name."""
    numbers = {name: number for number, name in enumerate(sorted(set(names), key=str))}
    return torch.tensor([numbers[name] for name in names])
