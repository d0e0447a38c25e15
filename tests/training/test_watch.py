import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data import DataFolder, Trials
from compress.training import watch
from compress.training.watch import (
    DevTrials,
    choose_utterances,
    duration,
    plot_curves,
    read_logs,
    reporter,
    tensorboard,
)
from compress.verification import cosine_scores, eer

LINE = {"loss": 2.0, "CE": 2.0, "accuracy": 0.5, "margin": 0.1, "learning_rate": 1e-3, "step_s": 0.25}


class Mean(nn.Module):
    """Mean of the features, projected: (batch, frames, 80) -> (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(80, 4)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.last(features.square().mean(1))
        return found


def test_the_eer_is_that_of_the_trials(speech_folder: Path) -> None:
    """All of them here, since the folder has fewer utterances than are taken."""
    folder = DataFolder.read(speech_folder)
    model = Mean().eval()
    found = DevTrials(folder)(model)
    trials = folder.trials()
    features = [watch.features_of(folder, name, 1) for name in trials.utterances]
    embeddings = torch.cat([model(feature[None]) for feature in features]).detach().double().numpy()
    scores = cosine_scores(embeddings, trials.enroll, trials.test)
    assert found == pytest.approx(eer(trials.labels, scores)[0])
    assert DevTrials(folder)(model) == found


def test_few_utterances_are_chosen_and_both_kinds_of_trials_are_among_them() -> None:
    rng = np.random.default_rng(0)
    enroll, test = rng.integers(0, 3000, (2, 20000))
    labels = np.arange(20000) % 100 == 0
    trials = Trials(tuple(map(str, range(3000))), labels, enroll, test)
    chosen = choose_utterances(trials)
    assert 95 <= len(chosen) == len(set(chosen)) <= 100
    inside = np.isin(enroll, chosen) & np.isin(test, chosen)
    assert labels[inside].sum() >= 20
    assert (~labels[inside]).sum() >= 20
    assert chosen == choose_utterances(trials)


def test_what_is_said_has_losses_margin_eer_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said, shown = [], []
    clock = iter(range(0, 10000, 2))  # two seconds a step, most of them waiting
    monkeypatch.setattr(watch.time, "monotonic", lambda: float(next(clock)))
    report = reporter(200, said.append, lambda done, total, text: shown.append((done, total, text)))
    for step in range(1, 201):
        report(LINE | {"step": step} | ({"dev_eer": 0.0825} if step % 100 == 0 else {}))
    assert [line.split(":")[0] for line in said] == [f"step {step} of 200" for step in (50, 100, 150, 200)]
    assert said[0].endswith("loss 2.000, accuracy 50.0%, margin 0.10, 0.25 s a step, 5 min 0 s left")
    assert "dev EER 8.25%" in said[1]
    assert "left" not in said[-1]
    assert shown[0] == (1, 200, "training: loss 2.00, margin 0.10")
    assert shown[-1] == (200, 200, "training: loss 2.00, margin 0.10, dev EER 8.2%")


def test_terms_are_said_where_there_are_several() -> None:
    said: list[str] = []
    report = reporter(1, said.append, lambda done, total, description: None)
    report(LINE | {"step": 1, "KD": 1.5})
    assert "loss 2.000, CE 2.000, KD 1.500, accuracy" in said[0]


def test_durations() -> None:
    assert [duration(s) for s in (5.9, 65, 3600, 3725)] == ["0 min 5 s", "1 min 5 s", "1 h 0 min", "1 h 2 min"]


def test_repeated_steps_count_once_and_half_a_line_not_at_all(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0))]
    log.write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert read_logs([log, tmp_path / "absent.jsonl"]) == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}]


def test_curves_are_a_picture_with_a_panel_for_each(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    log = tmp_path / "train.jsonl"
    log.write_text("\n".join(json.dumps(LINE | {"step": step, "KD": 1.0 / step}) for step in range(1, 9)) + "\n")
    heights = []
    for extra in ("", json.dumps(LINE | {"step": 9, "KD": 0.1, "dev_eer": 0.2})):
        log.write_text(log.read_text() + extra)
        assert plot_curves([log], tmp_path / "curves.png") == f"curves: {tmp_path / 'curves.png'}"
        data = (tmp_path / "curves.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        heights.append(int.from_bytes(data[20:24], "big"))
    assert figure
    assert heights == [4 * 240, 5 * 240]  # with the dev EER, one panel more


def test_no_matplotlib_and_no_figures_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "matplotlib.figure", None)
        assert "pip install speech-compress[plots]" in plot_curves([], tmp_path / "curves.png")
    pytest.importorskip("matplotlib")
    assert plot_curves([], tmp_path / "curves.png") == "there are no figures to draw curves of"
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reported: list[object] = []
    with tensorboard(tmp_path / "board", reported.append) as report:
        for step in (5, 6):
            report(LINE | {"step": step})
    assert len(reported) == 2
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(found.Tags()["scalars"]) == set(LINE)
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(5, 2.0), (6, 2.0)]
    with tensorboard(None, reported.append) as report:
        assert report == reported.append
