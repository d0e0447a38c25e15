"""What a person sees of a training: a bar, lines, the EER on a few dev trials, TensorBoard, and curves at the end."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from compress.data import DataFolder, Trials
from compress.errors import InputError, MachineError
from compress.features import SAMPLE_RATE, fbank_cmn, num_frames
from compress.files import replaced_file
from compress.training.memory import out_of_memory_told
from compress.verification import cosine_scores, eer

LINE_EVERY = 50  # steps
MOST_UTTERANCES = 100  # of the dev trials
LONGEST_S = 8.0  # of each
TOO_LARGE = (
    "out of memory while the EER on dev data was measured. Set accumulation in the recipe, so that training leaves more"
    " of it, or give --dev without a trial list."
)
NO_TERMS = ("step", "accuracy", "margin", "learning_rate", "step_s", "dev_eer")  # of a line; the rest are losses

Line = Mapping[str, float]


class Advance(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int, description: str) -> None:
        """Tell how much is done of how much, and what is said beside the bar."""
        ...


class DevTrials:
    """The trials among a few utterances of a data folder, to see the EER fall while a network is trained.

    The utterances are those of target and non-target trials drawn in turn, the same ones each time.

    Args:
        folder: With a trial list and its audio.
        trials: Which list; None is the only one, or ``trials``.
        min_frames: That the network needs.

    Raises:
        InputError: If there is no such trial list, or audio cannot be used.
    """

    def __init__(self, folder: DataFolder, trials: str | None = None, min_frames: int = 1) -> None:
        listed = folder.trials(trials)
        chosen = choose_utterances(listed)
        places = {place: number for number, place in enumerate(chosen)}
        inside = np.isin(listed.enroll, chosen) & np.isin(listed.test, chosen)
        self.labels = listed.labels[inside]
        self.enroll = np.array([places[place] for place in listed.enroll[inside].tolist()])
        self.test = np.array([places[place] for place in listed.test[inside].tolist()])
        self.features = [features_of(folder, listed.utterances[place], min_frames) for place in chosen]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The EER of a network in eval mode, a fraction.

        Raises:
            MachineError: If memory is too small.
        """
        device = next(model.parameters()).device
        with out_of_memory_told(TOO_LARGE):
            embeddings = torch.cat([model(features[None].to(device)).float().cpu() for features in self.features])
        scores = cosine_scores(embeddings.double().numpy(), self.enroll, self.test)
        return eer(self.labels, scores)[0]


def choose_utterances(trials: Trials) -> list[int]:
    """Choose places of up to ``MOST_UTTERANCES`` utterances, with target and non-target trials among them."""
    rng = np.random.default_rng(0)
    kinds = [rng.permutation(np.flatnonzero(trials.labels == kind)) for kind in (True, False)]
    found: dict[int, None] = {}
    for number in range(max(map(len, kinds))):
        for kind in kinds:
            pair = [int(side[kind[number]]) for side in (trials.enroll, trials.test)] if number < len(kind) else []
            if len(found.keys() | set(pair)) > MOST_UTTERANCES:
                return list(found)
            found |= dict.fromkeys(pair)
    return list(found)


def features_of(folder: DataFolder, utterance: str, min_frames: int) -> Tensor:
    """Features (frames, num_mel_bins) of the beginning of an utterance.

    Raises:
        InputError: If it has fewer than ``min_frames``, or its audio cannot be used.
    """
    waveform, path = folder.waveform(utterance, SAMPLE_RATE), folder.path(utterance)
    try:
        frames = num_frames(len(waveform))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if frames < min_frames:
        raise InputError(f"{path}: {frames} frames are too short; the network needs {min_frames}.")
    return torch.from_numpy(fbank_cmn(waveform[: int(LONGEST_S * SAMPLE_RATE)]))


def reporter(steps: int, say: Callable[[str], None], advance: Advance) -> Callable[[Line], None]:
    """Give what is called with the figures of each step: it moves the bar, and prints a line now and then."""
    recent: deque[tuple[float, Line]] = deque(maxlen=LINE_EVERY + 1)
    dev: list[float] = []

    def report(line: Line) -> None:
        step = int(line["step"])
        recent.append((time.monotonic(), line))
        dev.extend([line["dev_eer"]] if "dev_eer" in line else [])
        shown = [f"loss {line['loss']:.2f}", f"margin {line['margin']:.2f}"]
        shown += [f"dev EER {dev[-1]:.1%}"] if dev else []
        advance(step, steps, f"training: {', '.join(shown)}")
        if step % LINE_EVERY == 0 or step == steps or "dev_eer" in line:
            say(f"step {step} of {steps}: {sentence(recent, steps)}")

    return report


def sentence(recent: Sequence[tuple[float, Line]], steps: int) -> str:
    """Means of losses and accuracy over the last steps, margin and EER now, seconds a step and the time left."""
    lines = [line for _, line in recent]
    last = lines[-1]
    mean = {name: float(np.mean([line[name] for line in lines])) for name in last if name != "dev_eer"}
    terms = [name for name in mean if name not in NO_TERMS]
    said = [f"{name} {mean[name]:.3f}" for name in (terms if len(terms) > 2 else ["loss"])]
    said += [f"accuracy {mean['accuracy']:.1%}"] if "accuracy" in mean else []
    said += [f"margin {last['margin']:.2f}"] + ([f"dev EER {last['dev_eer']:.2%}"] if "dev_eer" in last else [])
    said += [f"{mean['step_s']:.2f} s a step"]
    if len(recent) > 1 and last["step"] < steps:
        each = (recent[-1][0] - recent[0][0]) / (len(recent) - 1)  # waiting for batches included
        said += [f"{duration(each * (steps - last['step']))} left"]
    return ", ".join(said)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes = int(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds) % 60} s"


def summary_writer() -> Any:
    """The class that writes for TensorBoard.

    Raises:
        MachineError: If tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "--tensorboard needs tensorboard, and it is not installed. pip install speech-compress[tensorboard]"
        ) from None
    return SummaryWriter


@contextmanager
def tensorboard(folder: Path | None, report: Callable[[Line], None]) -> Iterator[Callable[[Line], None]]:
    """Write the figures of each step for TensorBoard before they are reported; without a folder, do not.

    Raises:
        MachineError: If tensorboard is not installed.
    """
    if folder is None:
        yield report
        return
    make = summary_writer()
    writers: list[Any] = []

    def write(line: Line) -> None:
        step = int(line["step"])
        if not writers:  # what a killed training wrote after its last checkpoint is hidden
            writers.append(make(str(folder), purge_step=step))
        for name, value in line.items():
            if name != "step":
                writers[0].add_scalar(name, value, step)
        report(line)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


def read_logs(paths: Sequence[Path]) -> list[dict[str, float]]:
    """Read the lines of ``train.jsonl`` files in order of step; of a step that was repeated, the last.

    A line that a killed process left half-written is passed over.
    """
    found: dict[float, dict[str, float]] = {}
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def plot_curves(logs: Sequence[Path], path: Path) -> str:
    """Draw losses, accuracy, margin, learning rate and dev EER over the steps; returns what there is to say of it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return "curves are drawn where matplotlib is installed: pip install speech-compress[plots]"
    lines = read_logs(logs)
    if not lines:
        return "there are no figures to draw curves of"
    names = sorted({name for line in lines for name in line} - {"loss", *NO_TERMS})
    losses = ["loss", *names] if len(names) > 1 else ["loss"]
    panels = [("loss", losses), ("accuracy", ["accuracy"]), ("dev EER", ["dev_eer"])]
    panels += [("margin", ["margin"]), ("learning rate", ["learning_rate"])]
    shown = [(title, keys) for title, keys in panels if any(key in line for line in lines for key in keys)]
    figure = Figure(figsize=(8, 2 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axis, (title, keys) in zip(axes, shown, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else "", linewidth=1)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if title in ("accuracy", "dev EER"):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(keys) > 1:
            axis.legend()
    axes[-1].set_xlabel("step")
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return f"curves: {path}"
