"""``eval``, ``bench``, ``compare``, ``check``, ``embed`` and ``verify``: what they print, and their exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.artifact import Artifact
from compress.runners import load


@pytest.fixture
def int8(tiny_run: Path) -> Path:
    return tiny_run / "01-ptq"


@pytest.fixture
def audio(speech_folder: Path) -> list[Path]:
    return sorted((speech_folder / "wav").iterdir())


def test_eval_prints_the_figures_of_the_table(cli: Callable, tiny_run: Path, int8: Path, speech_folder: Path) -> None:
    row = json.loads((tiny_run / "table.json").read_text())["rows"][1]
    code, out, _ = cli("eval", int8, "--data", speech_folder)
    assert code == 0
    assert f"EER        {100 * row['eer']:.2f} %  (95 %: " in out
    assert f"minDCF     {row['min_dcf']:.4f}" in out
    assert f"threshold  {row['threshold']:.4f}" in out
    assert "trials     153" in out
    code, out, _ = cli("eval", int8, "--data", speech_folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["eer"] == row["eer"]
    assert found["eer_ci95"] == row["eer_ci95"]


def test_eval_of_another_list(cli: Callable, tiny_graph: Path, own_speech: Path) -> None:
    (own_speech / "trials_short").write_text("".join((own_speech / "trials").read_text().splitlines(True)[:12]))
    code, out, _ = cli("eval", tiny_graph, "--data", own_speech, "--trials", "trials_short")
    assert code == 0
    assert "trials     12" in out
    assert "(95 %: " in out


def test_what_is_assumed_of_a_foreign_file_is_said_before_the_work(
    cli: Callable, foreign_graph: Path, tiny_run: Path
) -> None:
    code, _, err = cli("bench", foreign_graph, "--budget", "0", "--seconds", "1")
    assert code == 0
    assert err.startswith(f"warning: {foreign_graph}: the metadata of the ONNX file does not tell sample_rate")
    _, _, err = cli("bench", tiny_run / "01-ptq", "--budget", "0", "--seconds", "1")
    assert "warning" not in err


def test_eval_of_what_is_not_built_yet(cli: Callable, tiny_run: Path, speech_folder: Path) -> None:
    code, out, err = cli("eval", tiny_run / "02-trt", "--data", speech_folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: the artifact is not built yet: ")
    assert "python build_engine.py" in err


def test_bench_times_models_side_by_side(cli: Callable, tiny_graph: Path, int8: Path) -> None:
    code, out, err = cli("bench", tiny_graph, int8, "--budget", "0", "--seconds", "1")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith(f"{tiny_graph} (onnxruntime): model p50 ")
    assert first.endswith("1.00× over 20 rounds")
    assert second.startswith(f"{int8} (onnxruntime): ")
    assert "timing 2 models on 1 s of audio, 1 thread(s)" in err
    code, out, _ = cli("bench", tiny_graph, "--budget", "0", "--seconds", "1", "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert set(row["latency_ms"]) == {"mean", "p50", "p95", "p99"}
    assert row["runs"] == 20


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", "0", "0 is not in the range 1<=x<=1024"),
        ("--seconds", "0", "0.0 is not in the range 0.1<=x<=600"),
        ("--budget", "-1", "-1.0 is not in the range 0<=x<=3600"),
    ],
)
def test_bench_names_the_range(cli: Callable, tiny_graph: Path, option: str, value: str, message: str) -> None:
    code, out, err = cli("bench", tiny_graph, option, value)
    assert (code, out) == (2, "")
    assert message in err


def test_compare_joins_the_tables_of_runs(cli: Callable, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "other")
    content = json.loads((tmp_path / "other" / "table.json").read_text())
    content["run"], content["machine"]["cpu"] = "other", "some other CPU"
    (tmp_path / "other" / "table.json").write_text(json.dumps(content))
    code, out, _ = cli("compare", tiny_run, tmp_path / "other" / "table.json")
    assert code == 0
    for name in ("tiny: baseline", "tiny: ptq", "other: baseline", "other: ptq+trt"):
        assert name in out
    assert "latencies of different runs were not interleaved." in out
    assert "The runs are from different machines: " in out
    code, out, _ = cli("compare", tiny_run, "--json")
    assert [row["variant"] for row in json.loads(out)] == ["tiny: baseline", "tiny: ptq", "tiny: ptq+trt"]


def test_compare_refuses_what_is_no_table(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema": 99}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"schema": 1')
    for name, message in (
        ("x.json", "x.json is not the table of a run of this version (schema 1)."),
        ("list.json", "list.json is not the table of a run of this version (schema 1)."),
        ("half.json", "half.json is not valid JSON: "),
        ("none", "none: no such file."),
        ("here", "table.json: no such file."),
    ):
        code, out, err = cli("compare", tmp_path / name)
        assert (code, out) == (2, "")
        assert message in err


@pytest.mark.parametrize("step", ["00-baseline", "01-prune", "02-onnx", "03-ptq", "04-trt"])
def test_check_passes_on_every_step_of_a_run(cli: Callable, finished_run: Path, step: str) -> None:
    code, out, _ = cli("check", finished_run / step)
    assert code == 0
    assert "with the recorded SHA-256" in out
    if step == "04-trt":
        assert "golden outputs: none yet. " in out
        assert "    python build_engine.py" in out
    else:
        assert "golden outputs: cosine " in out


def test_check_names_what_was_altered(cli: Callable, int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "copy"))
    golden = dict(np.load(folder / "golden.npz"))
    np.savez(folder / "golden.npz", **golden | {"embedding_1": -golden["embedding_1"]})
    code, _, err = cli("check", folder)
    assert code == 2
    assert "embeddings here differ from the recorded ones (cosine -1.0000, needed 0.999)." in err
    (folder / "golden.npz").unlink()
    code, _, err = cli("check", folder)
    assert code == 2
    assert "has no golden outputs to verify. They are written by `compress run`." in err
    (folder / "model.onnx").write_bytes(b"x")
    code, _, err = cli("check", folder)
    assert code == 2
    assert "model.onnx was altered: its SHA-256 is not the one in artifact.json. Make the artifact again." in err
    code, _, err = cli("check", tmp_path / "none")
    assert code == 2
    assert "none is not an artifact folder: it has no artifact.json." in err


def test_embed_prints_a_line_for_each_file(cli: Callable, int8: Path, audio: list[Path]) -> None:
    code, out, _ = cli("embed", int8, *audio[:2])
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == [str(path) for path in audio[:2]]
    assert len(lines[0]["embedding"]) == 24


def test_embed_writes_arrays(cli: Callable, int8: Path, audio: list[Path], tmp_path: Path, speech_folder: Path) -> None:
    code, out, _ = cli("embed", int8, *audio[:2], "--out", tmp_path / "new" / "e.npz")
    assert code == 0
    assert out == f"{tmp_path / 'new' / 'e.npz'}: 2 embeddings of width 24\n"
    found = np.load(tmp_path / "new" / "e.npz")
    from compress.audio import read_audio

    np.testing.assert_array_equal(found[str(audio[0])], load(int8).embed(read_audio(audio[0], 16000), 16000))


def test_embed_writes_nothing_when_a_file_is_unusable(cli: Callable, int8: Path, audio: list[Path]) -> None:
    code, out, err = cli("embed", int8, audio[0], "none.wav", "--out", "e.npz")
    assert (code, out) == (2, "")
    assert "none.wav: no such audio file." in err
    assert not Path("e.npz").exists()


def test_verify_decides_by_the_threshold_of_the_artifact(cli: Callable, int8: Path, audio: list[Path]) -> None:
    threshold = Artifact.load(int8).threshold
    assert threshold is not None
    code, out, _ = cli("verify", int8, audio[0], audio[0])
    assert code == 0
    assert out == f"same speaker: cosine 1.0000, threshold {threshold.value:.4f} (fitted on data/trials)\n"
    code, out, _ = cli("verify", int8, audio[0], audio[0], "--threshold", "1.5")
    assert code == 0
    assert out == "different speakers: cosine 1.0000, threshold 1.5000 (given)\n"


def test_verify_needs_a_threshold(cli: Callable, tiny_graph: Path, audio: list[Path]) -> None:
    code, out, err = cli("verify", tiny_graph, audio[0], audio[1])
    assert (code, out) == (2, "")
    assert "has no threshold; give one with --threshold, or take an artifact of `compress run`." in err
