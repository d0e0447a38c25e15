"""Score a million trials and compute their EER: how long it takes, and how much memory.

    python benchmarks/million_trials.py [--trials 1000000]

The embeddings are random: 1000 speakers with 20 utterances each, 192 numbers an utterance, a fiftieth of the trials
targets. Everything runs in one fresh process whose peak memory is printed, embeddings and trial list included. The
bar is 3 s and 1 GB for the cosine scores and the EER together. CPU time stands beside wall time: where they differ,
the machine was busy with something else.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from compress.evaluation.memory import peak_rss_of
from compress.verification import cosine_scores, eer, eer_interval, min_dcf

SPEAKERS, UTTERANCES, EMBEDDING_SIZE = 1000, 20, 192
SPREAD = 1.65  # of utterances around their speaker, whose own spread is 1: an EER of a few percent


def measure(num_trials: int) -> dict[str, Any]:
    """Make random embeddings and trials and measure each step on them.

    Returns:
        Wall and CPU seconds under ``scores``, ``eer``, ``min_dcf`` and ``interval``; the results under ``results``.
    """
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((SPEAKERS, 1, EMBEDDING_SIZE), dtype=np.float32)
    noise = generator.standard_normal((SPEAKERS, UTTERANCES, EMBEDDING_SIZE), dtype=np.float32)
    embeddings = (centres + SPREAD * noise).reshape(-1, EMBEDDING_SIZE)
    enroll, test = generator.integers(len(embeddings), size=(2, num_trials))
    same = generator.random(num_trials) < 0.02
    test[same] = enroll[same] - enroll[same] % UTTERANCES + generator.integers(UTTERANCES, size=same.sum())
    labels = enroll // UTTERANCES == test // UTTERANCES

    seconds: dict[str, Any] = {}

    def timed(step: str, function: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        seconds[step] = np.array([time.perf_counter() - wall, time.process_time() - cpu])
        return result

    scores = timed("scores", cosine_scores, embeddings, enroll, test)
    rate, threshold = timed("eer", eer, labels, scores)
    cost = timed("min_dcf", min_dcf, labels, scores)
    low, high = timed("interval", eer_interval, labels, scores, enroll // UTTERANCES, test // UTTERANCES)
    results = {"eer": rate, "threshold": threshold, "min_dcf": cost, "eer_ci95": (low, high)}
    return {**seconds, "results": results}


def main() -> None:
    """Print the figures as a table."""
    # By its name as a module: a fresh process cannot import __main__.
    from million_trials import measure

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1_000_000)
    num_trials = parser.parse_args().trials
    figures, peak_bytes = peak_rss_of(measure, num_trials)
    results = figures["results"]
    low, high = results["eer_ci95"]
    print(f"{num_trials:,} trials, EER {results['eer']:.2%} ({low:.2%} to {high:.2%})", end="")
    print(f", minDCF {results['min_dcf']:.3f}\n")
    print("| step | wall | CPU |\n| --- | --- | --- |")
    for step, (wall, cpu) in {
        "cosine scores": figures["scores"],
        "EER and threshold": figures["eer"],
        "**both**": figures["scores"] + figures["eer"],
        "minDCF": figures["min_dcf"],
        "bootstrap interval over speakers": figures["interval"],
    }.items():
        print(f"| {step} | {wall:.2f} s | {cpu:.2f} s |")
    print(f"\nPeak RSS of all of it: {peak_bytes / 1e9:.2f} GB")
    print(f"{platform.platform()}, {os.cpu_count()} cores", end="")
    print(f", Python {platform.python_version()}, NumPy {np.__version__}")


if __name__ == "__main__":
    main()
