"""Pictures: the DET curve of known distributions is a line, and the files are written."""

import sys
from pathlib import Path

import numpy as np
import pytest

from compress.decision import Decision, LogOdds, Point
from compress.errors import MachineError
from compress.evaluation.pictures import NAMES, draw, normal_deviates, prepare
from compress.evaluation.thresholds import Fit, Stage, StageFigures

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("distance", "ratio"), [(2.0, 1.0), (1.5, 2.0)])
def test_the_det_of_normal_scores_is_a_line_of_known_slope(distance: float, ratio: float) -> None:
    labels = np.arange(200_000) % 2 == 0
    noise = np.random.default_rng(0).standard_normal(len(labels))
    fpr, fnr = normal_deviates(labels, np.where(labels, distance + ratio * noise, noise))
    inside = (np.abs(fpr) < 2) & (np.abs(fnr) < 2)
    # at threshold t, fpr has the deviate -t and fnr has (t - distance) / ratio
    np.testing.assert_allclose(fnr[inside], (-fpr[inside] - distance) / ratio, atol=0.05)


def test_rates_of_0_and_1_are_left_out() -> None:
    fpr, fnr = normal_deviates(np.array([True, True, False, False]), np.array([0.9, 0.2, 0.5, 0.1]))
    assert np.isfinite([fpr, fnr]).all()
    assert fpr == pytest.approx([0.0])


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    labels = np.arange(400) % 2 == 0
    scores = np.random.default_rng(0).standard_normal(400) + 2 * labels
    figures = StageFigures("cosine", 0.1, None, 0.5, 0.6, 0.5, None, 0.4, 0.9, 0.4, None)
    stage = Stage("cosine", scores, scores, {}, figures)
    points = (Point("eer", "", 1.0, 1.0, 0.15, 0.16), Point("none", "", 9.0, 9.0, 0.0, 1.0))
    decision = Decision(points, "eer", LogOdds(1.0, 0.0), None, "trials", "data", "torch")
    paths = draw(Fit(decision, labels, (stage,), ()), tmp_path / "new")
    assert [path.name for path in paths] == list(NAMES)
    assert all(path.read_bytes().startswith(SIGNATURE) for path in paths)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "taken").write_text("")
    with pytest.raises(MachineError, match=r"taken cannot be made for pictures \(File exists\)"):
        prepare(tmp_path / "taken")


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match="pictures need matplotlib: pip install"):
        prepare(tmp_path)
