"""Time the Fbank front end against kaldi-native-fbank and torchaudio, side by side in one process.

    python benchmarks/fbank.py [--seconds 3] [--rounds 40]

One thread; the clock is the CPU time of the process, since machines are shared. The variants take turns in rotating
order, so that a change of clock frequency meets all of them alike; a ratio is the median over the rounds of
time / own time in the same round. Every variant starts from a numpy waveform and ends with a numpy matrix
(frames, 80), its mean over time removed. Exits with status 1 if the ratio to kaldi-native-fbank is under --floor.
"""

# ruff: noqa: E402

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy: waiting BLAS threads spin and count as CPU time

import argparse
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compress.features import SAMPLE_RATE, fbank_cmn

Array = NDArray[np.float32]
FrontEnd = Callable[[Array], Array]


def kaldi_native_fbank_frontends() -> dict[str, FrontEnd]:
    """Build the two usual ways to call kaldi-native-fbank: list in, as its own examples do, and numpy in."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80

    def extract(samples: object) -> Array:
        extractor = knf.OnlineFbank(options)
        extractor.accept_waveform(SAMPLE_RATE, samples)
        extractor.input_finished()
        frames = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
        return np.asarray(frames - frames.mean(axis=0), dtype=np.float32)

    return {
        "kaldi-native-fbank, list": lambda waveform: extract(waveform.tolist()),
        "kaldi-native-fbank, numpy": extract,
    }


def torchaudio_frontend() -> FrontEnd:
    """Build 3D-Speaker's recipe: torchaudio's Kaldi-compliance Fbank, one intra-op thread."""
    import torch
    from torchaudio.compliance import kaldi  # type: ignore[import-not-found,import-untyped,unused-ignore]

    torch.set_num_threads(1)

    def extract(waveform: Array) -> Array:
        features = kaldi.fbank(
            torch.from_numpy(waveform)[None], num_mel_bins=80, sample_frequency=SAMPLE_RATE, dither=0.0
        )
        return np.asarray((features - features.mean(dim=0)).numpy())

    return extract


def cpu_times_s(frontends: dict[str, FrontEnd], waveform: Array, rounds: int, calls: int) -> dict[str, list[float]]:
    """Time every front end once a round, in an order that rotates; CPU seconds for one call."""
    names = list(frontends)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            frontends[name](waveform)  # warm caches: not timed
            start = time.process_time()
            for _ in range(calls):
                frontends[name](waveform)
            times[name].append((time.process_time() - start) / calls)
    return times


def main() -> int:
    """Print a Markdown table of times, ratios and the largest difference of the features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the audio")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5, help="timed calls per front end and round")
    parser.add_argument("--floor", type=float, default=4.5, help="ratio to kaldi-native-fbank that is needed")
    options = parser.parse_args()

    frontends: dict[str, FrontEnd] = {"compress": fbank_cmn, **kaldi_native_fbank_frontends()}
    packages = ["numpy", "scipy", "kaldi-native-fbank"]
    if importlib.util.find_spec("torchaudio"):
        frontends["torchaudio"] = torchaudio_frontend()
        packages += ["torch", "torchaudio"]
    rng = np.random.default_rng(0)
    waveform = (0.1 * rng.standard_normal(int(options.seconds * SAMPLE_RATE))).astype(np.float32)

    times = cpu_times_s(frontends, waveform, options.rounds, options.calls)
    own, own_features = times["compress"], fbank_cmn(waveform)
    ratios = {name: statistics.median(np.divide(series, own)) for name, series in times.items()}
    print(f"Fbank with CMN, {options.seconds:g} s at {SAMPLE_RATE} Hz -> {own_features.shape}, 1 thread, CPU time")
    print(f"{platform.machine()}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages))
    print("\n| front end | ms, median | ms, best | time / compress | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    for name, series in times.items():
        difference = np.abs(frontends[name](waveform) - own_features).max()
        median_ms, best_ms = 1000 * statistics.median(series), 1000 * min(series)
        print(f"| {name} | {median_ms:.3f} | {best_ms:.3f} | {ratios[name]:.2f} | {difference:.1e} |")
    fastest_peer = min(ratio for name, ratio in ratios.items() if name.startswith("kaldi-native-fbank"))
    print(f"\n{fastest_peer:.2f} times as fast as kaldi-native-fbank's faster way; {options.floor:g} is needed.")
    return 0 if fastest_peer >= options.floor else 1


if __name__ == "__main__":
    sys.exit(main())
