"""Which utterances to calibrate on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError


def level_db(waveform: NDArray[np.floating[Any]]) -> float:
    """Level of a waveform (samples,) in [-1, 1): its root mean square in decibels, 0 at full scale."""
    return 20 * math.log10(max(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), 1e-10))


def choose_utterances(durations: Sequence[float], levels: Sequence[float], wanted: int, seed: int) -> list[int]:
    """Choose utterances of all durations, and at each duration of all levels.

    About the square root of ``wanted`` strata of equally many utterances by duration; within each by level, and then
    systematic sampling, every n-th from a random start. Each utterance is as likely to be chosen as any other, and
    the order of the list does not matter.

    Args:
        durations: Of each utterance; their unit does not matter.
        levels: Of each utterance, for example :func:`level_db`.
        wanted: How many to choose.
        seed: Decides the start.

    Returns:
        Different positions in the list, in its order.

    Raises:
        InputError: If there are fewer than wanted, or none are wanted.
    """
    total = len(durations)
    if len(levels) != total:
        raise ValueError(f"{total} durations and {len(levels)} levels; there must be as many.")
    if not 1 <= wanted <= total:
        raise InputError(f"{wanted} calibration utterances were asked for; 1 to {total} can be chosen from the list.")
    strata = np.array_split(np.lexsort((levels, durations)), math.isqrt(wanted))
    level = np.asarray(levels)
    # Every other stratum from the loudest down, so that neighbours in the sequence are alike across a border too.
    ordered = [
        stratum[np.argsort(level[stratum], kind="stable")][:: -1 if i % 2 else 1] for i, stratum in enumerate(strata)
    ]
    places = ((np.arange(wanted) + np.random.default_rng(seed).random()) * total / wanted).astype(int)
    return sorted(np.concatenate(ordered)[places].tolist())
