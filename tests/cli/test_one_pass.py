"""One pass as a command: MODEL in, artifact folder out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact import Artifact
from compress.models import ARCHITECTURES
from compress.passes import PTQ, Prune


def test_prune_writes_an_artifact_folder(cli: Callable, small_checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = cli(
        "prune",
        small_checkpoint,
        "--arch",
        "campplus",
        "--ratio",
        "0.3",
        "--scope",
        "uniform",
        "--bn-utterances",
        "4",
        "--out",
        tmp_path / "p",
    )
    assert code == 0
    artifact = Artifact.load(tmp_path / "p")
    dense = Artifact.open(small_checkpoint, "campplus")
    assert artifact.params == pytest.approx(0.7 * dense.params, rel=0.02)
    assert artifact.history[0].settings == Prune(ratio=0.3, scope="uniform", bn_utterances=4).settings
    assert "removed 3" in out
    assert out.splitlines()[-1] == f"{tmp_path / 'p'}: {artifact.params:,} parameters, {artifact.size_bytes:,} bytes"


def test_ptq_takes_a_calibration_list(cli: Callable, tiny_graph: Path, speech_folder: Path) -> None:
    calib = speech_folder / "calib.scp"
    code, out, err = cli("ptq", tiny_graph, "--utterances", "8", "--reduce-range", "true", "--calib", calib)
    assert code == 0
    assert f"calibration: 8 utterances of {calib}\n" in err
    assert "warning: calibrate" not in err
    assert out.splitlines()[-1].startswith("tiny-ptq: 6,216 parameters, ")
    artifact = Artifact.load(Path("tiny-ptq"))
    assert artifact.precision == "int8"
    assert artifact.history[0].settings == PTQ(8, reduce_range=True).settings
    code, _, err = cli("ptq", tiny_graph, "--utterances", "99", "--calib", calib, "--out", "other")
    assert code == 2
    assert "ptq asks for 99 calibration utterances, the list has 18." in err


def test_trt_writes_a_bundle_and_says_how_to_build(cli: Callable, tiny_graph: Path, speech_folder: Path) -> None:
    calib = speech_folder / "calib.scp"
    code, out, err = cli("trt", tiny_graph, "--max-batch", "4", "--out", "engine", "--calib", calib)
    assert code == 0
    assert "calibration: 8 utterances of" in err
    assert "the engine takes 50 to 3000 frames, tuned for 98, batches of up to 4" in out
    assert "deferred: " in out
    assert "in engine on the target run:\n    python build_engine.py" in out
    assert Artifact.load(Path("engine")).deferred is not None


def test_a_dry_run_writes_nothing(cli: Callable, tiny_graph: Path, unchanged: Callable) -> None:
    before = unchanged()
    code, out, err = cli("ptq", tiny_graph, "--dry-run")
    assert code == 0
    assert err.endswith(
        "calibration: 40 utterances of the embedded synthetic voices\n"
        "warning: calibrate your own model on your own speech, with --calib FILE.\n"
        "calibrating on 40 utterances\n"
        "quantizing\n"
    )
    assert out.startswith(f"{PTQ()}\n{tiny_graph}: 6,216 parameters, onnx\n")
    assert "3 of 3 weighted operators in INT8" in out
    assert re.search(r"^MatMulInteger|^QLinear|^QGemm|^DynamicQuantize", out, re.M)
    assert out.endswith("\nwould write tiny-ptq\n")
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


def test_a_budget_that_is_not_met_exits_with_1_and_keeps_the_nearest(cli: Callable, tiny_graph: Path) -> None:
    code, out, err = cli("ptq", tiny_graph, "--utterances", "4", "--min-cosine", "1", "--out", "near")
    assert (code, out) == (1, "")
    assert re.search(
        r"error: ptq: the budget cannot be met: cosine 0\.\d+ \(asked: 1\) with the \d most sensitive of 3 layers in"
        r" float\. Relax it, calibrate on more or other audio, or train with quantization\.\n",
        err,
    )
    assert "near: the nearest, for a look" in err
    assert Artifact.load(Path("near")).precision == "int8"


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


@pytest.fixture(scope="session")
def small_dense(small_campplus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CAM++ as an artifact folder."""
    folder = tmp_path_factory.mktemp("dense") / "small"
    small_campplus.save(folder)
    return folder


@pytest.fixture(scope="session")
def small_ecapa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow ECAPA-TDNN as an artifact folder; its channels are traced in half a second."""
    arguments = {"channels": [16, 16, 16, 16, 24], "attention_channels": 8, "se_channels": 8}
    network = ARCHITECTURES["ecapa_tdnn"].build(**arguments).eval()
    folder = tmp_path_factory.mktemp("ecapa") / "small"
    Artifact.from_module(network, arch="ecapa_tdnn", arguments=arguments).save(folder)
    return folder


@pytest.mark.slow
def test_a_dry_run_of_prune_lists_the_groups(cli: Callable, unchanged: Callable) -> None:
    """Of the embedded network, with its sensitivities, on the embedded voices, which need no warning here."""
    before = unchanged()
    options = ["--ratio", "0.3", "--keep", "xvector.block1*", "--bn-utterances", "2", "--dry-run"]
    code, out, err = cli("prune", "campplus", *options)
    assert code == 0
    assert err.splitlines()[0] == "calibration: 8 utterances of the embedded synthetic voices"
    assert "tracing channels\nsensitivities of the embedded weights\n" in err
    assert "warning" not in err
    lines = out.splitlines()
    assert lines[2].split("  ")[0] == "group"
    assert "parameters each" in lines[2]
    row = next(line for line in lines if line.startswith("xvector.block1.tdnnd1.linear1 "))
    assert "keep names a layer of it" in row
    row = next(line for line in lines if line.startswith("xvector.dense.linear "))
    assert "it is an output of the network" in row
    assert any(re.match(r"removed (29|30)\.\d% of the parameters \(asked 30\.0%\): ", line) for line in lines)
    assert lines[-1] == "would write campplus-prune"
    assert unchanged() == before


def test_a_dry_run_of_prune_prints_json(cli: Callable, small_ecapa: Path) -> None:
    options = ["--ratio", "0.3", "--scope", "uniform", "--keep", "blocks.0", "--bn-utterances", "0", "--dry-run"]
    code, out, _ = cli("prune", small_ecapa, *options, "--json")
    found = json.loads(out)
    assert (code, found["settings"]["keep"]) == (0, ["blocks.0"])
    rows = {row["group"]: row for row in found["rows"]}
    first, last, wide = rows["blocks.0.conv.conv"], rows["fc.conv"], rows["mfa.conv.conv"]
    assert first["members"][:2] == ["blocks.0.conv.conv", "blocks.0.norm.norm"]
    assert first["planned"] == first["width"] == 16
    assert "keep names a layer of it" in first["stays because"]
    assert "it is an output of the network" in last["stays because"]
    assert wide["planned"] < wide["width"] == 24
    assert wide["MACs each"] > wide["parameters each"]


def test_a_pass_prints_json(cli: Callable, tiny_graph: Path) -> None:
    code, out, _ = cli("trt", tiny_graph, "--out", "engine", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["pass"], found["out"], found["params"]) == ("trt", "engine", 6216)
    assert found["deferred"]["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.5"], "prune.ratio must be in 0..1 (fraction of parameters to remove), got 1.5."),
        (
            ["--ratio", "0.4", "--params", "9"],
            "prune: one target is needed, got ratio and params. Leave all",
        ),
        (["--ratio", "0.99"], "prune.ratio 0.99 cannot be reached: with all "),
        (["--keep", "blokcs.*"], "keep: no layer matches 'blokcs.*'. Near it are blocks, blocks."),
        (["--channels", "none.json"], "none.json: no such file; prune was told to read it."),
        (["--channels", "foreign.json"], "foreign.json must map layers to channels"),
        (["--channels", "unknown.json"], "unknown layer 'blocks.0.conv.convx'. Did you mean 'blocks.0.conv.conv'"),
        (
            ["--scope", "sensitivity", "--sensitivity", "foreign.json"],
            "foreign.json is not a sensitivity table",
        ),
        (["--scope", "sensitivity", "--sensitivity", "corrupt.json"], "corrupt.json is not valid JSON"),
    ],
)
def test_what_is_wrong_with_pruning_is_named(
    cli: Callable, small_ecapa: Path, unchanged: Callable, options: list[str], message: str
) -> None:
    Path("foreign.json").write_text("[1, 2]")
    Path("corrupt.json").write_text('{"kind": ')
    Path("unknown.json").write_text('{"blocks.0.conv.convx": [1]}')
    before = unchanged()
    code, out, err = cli("prune", small_ecapa, "--scope", "uniform", "--bn-utterances", "0", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert unchanged() == before
