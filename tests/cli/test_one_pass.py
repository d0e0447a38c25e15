"""One pass as a command: MODEL in, artifact folder out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact import Artifact
from compress.passes import PTQ, Prune


def test_prune_writes_an_artifact_folder(cli: Callable, small_checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = cli(
        "prune",
        small_checkpoint,
        "--arch",
        "campplus",
        "--ratio",
        "0.3",
        "--bn-utterances",
        "4",
        "--out",
        tmp_path / "p",
    )
    assert code == 0
    artifact = Artifact.load(tmp_path / "p")
    dense = Artifact.open(small_checkpoint, "campplus")
    assert artifact.params == pytest.approx(0.7 * dense.params, rel=0.02)
    assert artifact.history[0].settings == Prune(ratio=0.3, bn_utterances=4).settings
    assert "removed 3" in out
    assert out.splitlines()[-1] == f"{tmp_path / 'p'}: {artifact.params:,} parameters, {artifact.size_bytes:,} bytes"


def test_ptq_takes_a_calibration_list(cli: Callable, tiny_graph: Path, speech_folder: Path) -> None:
    calib = speech_folder / "calib.scp"
    code, out, err = cli("ptq", tiny_graph, "--utterances", "8", "--reduce-range", "true", "--calib", calib)
    assert code == 0
    assert f"calibration: 8 utterances of {calib}\n" in err
    assert "warning" not in err
    assert out.splitlines()[-1].startswith("tiny-ptq: 6,216 parameters, ")
    artifact = Artifact.load(Path("tiny-ptq"))
    assert artifact.precision == "int8"
    assert artifact.history[0].settings == PTQ(8, True).settings
    code, _, err = cli("ptq", tiny_graph, "--utterances", "99", "--calib", calib, "--out", "other")
    assert code == 2
    assert "lists 18 utterances; 99 were asked for." in err


def test_trt_writes_the_graph_and_says_how_to_build(cli: Callable, tiny_graph: Path) -> None:
    code, out, err = cli("trt", tiny_graph, "--max-batch", "4", "--out", "engine")
    assert code == 0
    assert "calibration" not in err
    assert "deferred: " in out
    assert "in engine on the target run:\n    trtexec --onnx=model.onnx" in out
    assert "--maxShapes=feats:4x3000x80" in out
    assert Artifact.load(Path("engine")).deferred is not None


def test_a_dry_run_writes_nothing(cli: Callable, tiny_graph: Path, unchanged: Callable) -> None:
    before = unchanged()
    code, out, err = cli("ptq", tiny_graph, "--dry-run")
    assert code == 0
    assert err == (
        "calibration: 40 utterances of the embedded synthetic voices\n"
        "warning: calibrate your own model on your own speech, with --calib FILE.\n"
    )
    assert out == f"PTQ(utterances=40, reduce_range=None)\n{tiny_graph}: 6,216 parameters, onnx\nwould write tiny-ptq\n"
    assert unchanged() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ptq", "{graph}", "--utterances", "0"], "ptq.utterances must be at least 1, got 0."),
        (["ptq", "{graph}", "--utterances", "x"], "ptq.utterances must be int, got 'x'."),
        (["ptq", "{graph}", "--calib", "none.scp"], "none.scp: no such file."),
        (["prune", "{graph}"], "prune takes torch artifacts; this one is onnx."),
        (["prune", "camplus"], "unknown model 'camplus'. Did you mean 'campplus'?"),
        (
            ["trt", "{graph}", "--min-frames", "9", "--opt-frames", "3"],
            "trt: 3 <= min_frames <= opt_frames <= max_frames",
        ),
        (["ptq", "{graph}", "--out", "{full}"], "is not empty. Name a new folder, or remove this one."),
        (["ptq", "{graph}", "--out", "{graph}"], "is a file; the name of a new folder is needed."),
    ],
)
def test_what_is_wrong_is_named(
    cli: Callable, tiny_graph: Path, tiny_run: Path, unchanged: Callable, arguments: list[str], message: str
) -> None:
    before = unchanged()
    code, out, err = cli(*(argument.format(graph=tiny_graph, full=tiny_run) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert unchanged() == before


def test_an_empty_folder_is_taken(cli: Callable, tiny_graph: Path) -> None:
    Path("empty").mkdir()
    assert cli("trt", tiny_graph, "--out", "empty").code == 0
    assert Artifact.load(Path("empty")).deferred is not None


def test_a_deferred_artifact_is_not_passed_on(cli: Callable, tiny_run: Path) -> None:
    code, _, err = cli("ptq", tiny_run / "02-trt")
    assert code == 2
    assert "ptq takes onnx artifacts; this one is deferred." in err


def test_an_int8_graph_is_not_quantized_again(cli: Callable, tiny_run: Path, unchanged: Callable) -> None:
    before = unchanged()
    code, _, err = cli("ptq", tiny_run / "01-ptq", "--dry-run")
    assert (code, err) == (2, "error: ptq takes an fp32 graph; this one is int8 already.\n")
    assert unchanged() == before


def test_the_embedded_model_is_calibrated_on_the_embedded_voices_without_a_warning(cli: Callable) -> None:
    code, _, err = cli("prune", "campplus", "--dry-run")
    assert (code, err) == (0, "calibration: 60 utterances of the embedded synthetic voices\n")
