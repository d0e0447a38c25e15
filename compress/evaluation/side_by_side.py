"""Latency of several models side by side, on the same speech."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from compress.data import DataFolder
from compress.evaluation.latency import Timing, speedup, time_interleaved
from compress.evaluation.speakers import typical_waveform
from compress.runners import Runner


@dataclass(frozen=True, eq=False)
class ModelTiming:
    """How long a model takes for one utterance.

    Attributes:
        model: From features to embedding; where the front end is in the graph, from samples.
        whole: From waveform samples to embedding.
        speedup: Of ``model``, over the first model timed beside it.
    """

    model: Timing
    whole: Timing
    speedup: float


def time_runners(
    runners: Sequence[Runner], data: DataFolder, utterances: Sequence[str], duration_s: float, budget_s: float
) -> list[ModelTiming]:
    """Time runners interleaved, batch 1, so that their ratios hold whatever else the machine does.

    Args:
        runners: At least one; the first is the reference of the speed-ups.
        data: Where real speech is taken from.
        utterances: Of ``data``; the first is used.
        duration_s: Seconds of audio.
        budget_s: Seconds for each runner.
    """
    calls: dict[str, Callable[[], object]] = {}
    for place, runner in enumerate(runners):
        front_end = runner.artifact.front_end
        waveform = typical_waveform(data, utterances, duration_s, front_end.sample_rate)
        calls[f"model {place}"] = partial(runner.run, front_end(waveform)[None])
        calls[f"whole {place}"] = partial(runner.embed, waveform, front_end.sample_rate)
    timings = time_interleaved(calls, budget_s=budget_s * len(runners))
    faster = speedup(timings, "model 0")
    return [
        ModelTiming(timings[f"model {place}"], timings[f"whole {place}"], faster[f"model {place}"])
        for place in range(len(runners))
    ]
