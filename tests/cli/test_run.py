"""``compress run``: what it prints, its exit codes, and what it says of wrong input."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import soundfile
import torch
from onnx import numpy_helper

from compress import machine, table
from compress.artifact import Artifact
from compress.passes import passes as registered

ROOT_READS_EVERYTHING = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture
def arguments(tiny_graph: Path, speech_folder: Path, tmp_path: Path) -> list[str]:
    """A run that takes a second."""
    out = tmp_path / "run"
    options = ["--data", speech_folder, "--passes", "ptq,trt", "--set", "ptq.utterances=8", "--timing-s", "0"]
    return [str(argument) for argument in ["run", tiny_graph, "--out", out, *options]]


def test_the_table_is_printed_and_progress_is_not_mixed_into_it(
    cli: Callable, arguments: list[str], tmp_path: Path
) -> None:
    code, out, err = cli(*arguments)
    assert code == 0
    lines = out.splitlines()
    assert all(name in lines[0] for name in table.COLUMNS)
    assert [line.split()[0] for line in lines[1:4]] == ["baseline", "ptq", "ptq+trt"]
    assert "ptq is " in out  # the summary in a sentence
    assert "ptq+trt deferred: " in out
    assert "In 02-trt on the target run:\n    python build_engine.py" in out
    assert lines[-1] == f"{tmp_path / 'run'}: table.json, table.csv, table.md, report.html"
    assert "01-ptq: ptq(utterances=8)" in err
    assert "baseline: onnxruntime: 18 done" in err
    assert "\n\n" not in err
    assert (tmp_path / "run" / "table.json").is_file()


def test_json_is_alone_on_standard_output(cli: Callable, arguments: list[str], tmp_path: Path) -> None:
    code, out, _ = cli(*arguments, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "table.json").read_text())


def test_a_deferred_step_fails_only_under_strict(cli: Callable, arguments: list[str], tiny_run: Path) -> None:
    folder = Path(arguments[arguments.index("--out") + 1])
    shutil.copytree(tiny_run, folder)
    assert cli(*arguments, "--resume").code == 0
    assert cli(*arguments, "--resume", "--strict").code == 1


def unsigned(path: Path, out: Path) -> Path:
    """Store the INT8 weights of a graph as U8, of the same values: ONNX Runtime runs it, TensorRT takes no such."""
    graph = onnx.load(path)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        weight = stored.get(node.input[0])
        if node.op_type == "DequantizeLinear" and weight is not None and weight.data_type == onnx.TensorProto.INT8:
            shifted = (numpy_helper.to_array(weight).astype(np.int16) + 128).astype(np.uint8)
            weight.CopyFrom(numpy_helper.from_array(shifted, weight.name))
            zeros = np.full(tuple(stored[node.input[1]].dims), 128, np.uint8)
            graph.graph.initializer.append(numpy_helper.from_array(zeros, f"{weight.name}_zero_point"))
            node.input[:] = [weight.name, node.input[1], f"{weight.name}_zero_point"]
    onnx.save(graph, str(out))
    return out


def test_a_failed_step_exits_with_1_and_says_why(
    cli: Callable, tiny_run: Path, speech_folder: Path, tmp_path: Path
) -> None:
    model = unsigned(tiny_run / "01-ptq" / "model.onnx", tmp_path / "unsigned.onnx")
    code, out, _ = cli("run", model, "--data", speech_folder, "--passes", "trt", "--timing-s", 0)
    assert code == 1
    assert "\ntrt failed: trt: " in out
    assert "is stored as U8; TensorRT takes S8 weights. Quantize with ptq.\n" in out


def test_an_int8_graph_is_not_quantized_again(
    cli: Callable, arguments: list[str], tiny_run: Path, unchanged: Callable
) -> None:
    before = unchanged()
    twice = [argument.replace("ptq,trt", "ptq,ptq") for argument in arguments]
    for given in ([arguments[0], tiny_run / "01-ptq", *arguments[2:]], twice):
        code, out, err = cli(*given)
        assert (code, out, err) == (2, "", "error: ptq takes an fp32 graph; this one is int8 already.\n")
    assert unchanged() == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    cli: Callable, arguments: list[str], unchanged: Callable, tmp_path: Path
) -> None:
    before = unchanged()
    code, out, err = cli(*arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert "6,216 parameters" in out
    assert "18 utterances, 153 trials" in out
    assert f"out          {tmp_path / 'run'}\n" in out
    assert "00-baseline  as it is\n" in out
    assert "01-ptq       ptq(utterances=8)\n" in out
    assert unchanged() == before


def test_the_default_folder_is_made_here_and_named_rightly(cli: Callable, arguments: list[str]) -> None:
    place = arguments.index("--out")
    del arguments[place : place + 2]
    code, out, _ = cli(*arguments, "--passes", "trt", "--set", "trt.max_batch=2")
    assert code == 2  # ptq is not in the list any more
    assignment = arguments.index("--set")
    del arguments[assignment : assignment + 2]
    code, out, _ = cli(*arguments, "--passes", "trt")
    assert code == 0
    assert out.splitlines()[-1].startswith("runs/tiny-trt: table.json")
    assert Path("runs/tiny-trt/table.json").is_file()


def test_run_yaml_repeats_the_run(
    cli: Callable, tiny_run: Path, tmp_path: Path, lasting: Callable[[Path], dict[str, Any]]
) -> None:
    code, _, _ = cli("run", "--config", tiny_run / "run.yaml", "--out", tmp_path / "again")
    assert code == 0
    assert lasting(tmp_path / "again") == lasting(tiny_run)


def test_resume_takes_over_and_says_so(cli: Callable, arguments: list[str], tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    code, _, err = cli(*arguments, "--resume")
    assert code == 0
    assert err.count("unchanged, taken from the earlier run") == 3


def write(samples: int, value: float) -> Callable[[Path], object]:
    return lambda path: soundfile.write(path, np.full(samples, value, np.float32), 16000, subtype="FLOAT")


AUDIO = {
    "missing": (Path.unlink, r"{path}: no such audio file \(1 of the trial list's 18 are missing\)"),
    "empty": (lambda path: path.write_bytes(b""), r"{path} is an empty file \(0 bytes\); audio was expected\."),
    "not audio": (lambda path: path.write_bytes(b"hello" * 99), r"{path} cannot be decoded .* Readable are WAV, FLAC"),
    "truncated": (lambda path: os.truncate(path, 9000), r"{path} is truncated: its last \d+ bytes are missing\."),
    "zero-length": (write(0, 0.1), r"{path}: waveform has 0 samples; one Fbank frame needs 400\."),
    "too short": (write(399, 0.1), r"{path}: waveform has 399 samples; one Fbank frame needs 400\."),
    "NaN": (write(16000, np.nan), r"{path} holds NaN or infinite samples\."),
    "silent": (write(16000, 0), r"{path} is digital silence throughout"),
}


@pytest.mark.parametrize("passes", ["ptq", "trt"])  # the file is in the calibration list too, or only in the trials
@pytest.mark.parametrize("kind", AUDIO)
def test_unusable_audio_is_named(
    cli: Callable, own_speech: Path, tiny_graph: Path, unchanged: Callable, kind: str, passes: str, tmp_path: Path
) -> None:
    damage, message = AUDIO[kind]
    path = sorted((own_speech / "wav").iterdir())[0]
    damage(path)
    before = unchanged()
    options = ["--set", "ptq.utterances=18"] if passes == "ptq" else []
    code, out, err = cli(
        "run", tiny_graph, "--data", own_speech, "--passes", passes, *options, "--out", tmp_path / "run" / "deep"
    )
    assert (code, out) == (2, "")
    assert re.search("error: " + message.format(path=re.escape(str(path))), err)
    assert "Traceback" not in err
    assert unchanged() == before


def slow_down(calib: Path) -> None:
    """Write an audio file of the list anew as if recorded at 8 kHz."""
    path = calib.parent / calib.read_text().split()[1]
    samples, _ = soundfile.read(path)
    soundfile.write(path, samples[::2], 8000)


def test_a_budget_that_is_not_met_exits_with_1_and_keeps_the_nearest(
    cli: Callable, arguments: list[str], tmp_path: Path
) -> None:
    code, out, _ = cli(*arguments, "--passes", "ptq", "--set", "ptq.min_cosine=1")
    assert code == 1
    assert re.search(r"ptq: the budget cannot be met: cosine 0\.\d+ \(asked: 1\) with the \d most sensitive", out)
    assert Artifact.load(tmp_path / "run" / "01-ptq").precision == "int8"


CALIBRATION = {
    "too short": (
        lambda calib: calib.write_text("".join(calib.read_text().splitlines(True)[:3])),
        r"ptq asks for 8 calibration utterances, the list has 3\. Give a longer --calib list, or ask for fewer\.",
    ),
    "empty": (lambda calib: calib.write_text(""), r"list\.scp: ?lists no audio; lines 'utterance path' are needed\."),
    "wrong sample rate": (
        slow_down,
        r"\.wav: 8000 Hz\. The network takes 16000 Hz, and there is nothing above 4000 Hz to calibrate on\. Give a list"
        r" of recordings at 16000 Hz or more; if .*, resample the files to 16000 Hz first\.",
    ),
}


@pytest.mark.parametrize("command", ["run", "ptq"])
@pytest.mark.parametrize("kind", CALIBRATION)
def test_a_calibration_list_that_is_of_no_use_is_named(
    cli: Callable, own_speech: Path, tiny_graph: Path, unchanged: Callable, kind: str, command: str
) -> None:
    damage, message = CALIBRATION[kind]
    calib = own_speech / "list.scp"
    calib.write_text("".join((own_speech / "calib.scp").read_text().splitlines(True)[:8]))
    damage(calib)
    before = unchanged()
    run = ["run", tiny_graph, "--data", own_speech, "--passes", "ptq", "--set", "ptq.utterances=8", "--calib", calib]
    ptq = ["ptq", tiny_graph, "--utterances", "8", "--calib", calib]
    code, out, err = cli(*(run if command == "run" else ptq))
    assert (code, out) == (2, "")
    assert re.search("error: .*" + message, err)
    assert "Traceback" not in err
    assert unchanged() == before


TRIALS = {
    "unknown utterance": ("1 {a} nobody\n0 {a} {b}\n", r"trials_x:1: utterance 'nobody' is not in wav\.scp"),
    "no targets": ("0 {a} {b}\n", r"trials_x: holds no target trials \(label 1\); an error rate needs both kinds\."),
    "no non-targets": ("1 {a} {b}\n", r"trials_x: holds no non-target trials \(label 0\)"),
    "empty": ("", r"trials_x: holds no trials; lines 'label enroll test' are needed\."),
    "two fields": ("1 {a} {b}\n0 {a}\n", r"trials_x:2: 2 fields; 'label enroll test' is needed\."),
    "label": ("1 {a} {b}\ntgt {a} {b}\n", r"trials_x:2: label 'tgt' is not one of 1, 0, target, nontarget\."),
    "label last": ("{a} {b} 1\n", r"trials_x:1: label .* The label comes first: 'label enroll test'\."),
}


@pytest.mark.parametrize("kind", TRIALS)
def test_a_broken_trial_list_is_named(
    cli: Callable, own_speech: Path, tiny_graph: Path, unchanged: Callable, kind: str
) -> None:
    text, message = TRIALS[kind]
    a, b = [line.split()[0] for line in (own_speech / "wav.scp").read_text().splitlines()[:2]]
    (own_speech / "trials_x").write_text(text.format(a=a, b=b))
    before = unchanged()
    code, out, err = cli("run", tiny_graph, "--data", own_speech, "--trials", "trials_x", "--passes", "trt")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert unchanged() == before


OPTIONS = {
    "unknown pass": (["--passes", "ptq,pruen"], r"error: unknown pass 'pruen'\. Did you mean 'prune'\?"),
    "unknown setting": (
        ["--set", "ptq.utterence=4"],
        r"unknown setting of ptq 'utterence'\. Did you mean 'utterances'\?",
    ),
    "setting of no pass": (["--set", "utterances=4"], r"--set utterances=4: the form is pass\.key=value"),
    "value out of range": (["--set", "ptq.utterances=0"], r"ptq\.utterances must be at least 1, got 0\."),
    "value of another type": (["--set", "ptq.utterances=ten"], r"ptq\.utterances must be int, got 'ten'\."),
    "too few utterances": (
        ["--set", "ptq.utterances=99"],
        r"ptq asks for 99 calibration utterances, the list has 18\.",
    ),
    "threads": (["--threads", "0"], r"threads must be in 1\.\.1024, got 0\."),
    "timing": (["--timing-s", "-1"], r"timing_s must be in 0\.\.3600 seconds, got -1\.0\."),
    "setting of a link": (
        ["--set", "onnx.opset=20"],
        r"onnx is not in --passes\. Left out, it is inserted with its defaults\. Add onnx to --passes to set it\.",
    ),
    "setting of an absent pass": (
        ["--set", "prune.ratio=0.2"],
        r"is not in --passes\. Add prune to --passes to set it",
    ),
    "missing data": (["--data", "no/such"], r"no/such: no such data folder\. It is a folder that holds a wav\.scp\."),
    "missing trials": (["--trials", "nope"], r"no trial list 'nope': "),
    "missing calibration": (["--calib", "nope.scp"], r"nope\.scp: no such file\."),
    "missing configuration": (["--config", "nope.yaml"], r"nope\.yaml: no such configuration file\."),
    "impossible order": (["--passes", "ptq,prune"], r"prune takes torch, but there is onnx before it"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_wrong_option_is_named(cli: Callable, arguments: list[str], unchanged: Callable, kind: str) -> None:
    options, message = OPTIONS[kind]
    before = unchanged()
    code, out, err = cli(*arguments, *options)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert unchanged() == before


@pytest.mark.parametrize("options", [[], ["--passes", ""], ["--passes", " , "]])
def test_without_passes_they_are_listed(cli: Callable, options: list[str]) -> None:
    assert cli("run", *options) == (2, "", f"error: no passes were given. Known: {', '.join(sorted(registered()))}.\n")


def altered(folder: Path, **front_end: Any) -> Path:
    record = json.loads((folder / "artifact.json").read_text())
    record["front_end"] |= front_end
    (folder / "artifact.json").write_text(json.dumps(record))
    return folder


def corrupted(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    return path.parent


def changed_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> list[object]:
    """A checkpoint that differs from another one."""
    state = safetensors.torch.load_file(checkpoint)
    change(state)
    safetensors.torch.save_file(state, "x.safetensors")
    return ["x.safetensors", "--arch", "campplus"]


class Intruder:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def pickled() -> list[object]:
    torch.save({"weight": torch.zeros(2), "intruder": Intruder()}, "x.pt")
    return ["x.pt", "--arch", "campplus"]


def changed_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> list[object]:
    """An ONNX file that differs from that of an artifact."""
    model = onnx.load(str(folder / "model.onnx"))
    change(model)
    Path("x.onnx").write_bytes(model.SerializeToString())
    return ["x.onnx"]


def lead_outside(model: onnx.ModelProto) -> None:
    """Say that the first weight lies in a file of the folder above."""
    tensor = model.graph.initializer[0]
    Path("../secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")


DENSE = "xvector.dense.linear.weight"

MODELS: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "unknown name": (lambda _, __: ["campluss"], r"unknown model 'campluss'\. Did you mean 'campplus'\?"),
    "missing path": (
        lambda _, __: ["./none"],
        r"\./none: no such model\. A checkpoint, artifact folder or \.onnx file",
    ),
    "missing ONNX file": (lambda _, __: ["none.onnx"], r"none\.onnx: no such ONNX file\."),
    "corrupt ONNX file": (lambda a, _: [shutil.copy(a / "artifact.json", "x.onnx")], r"x\.onnx is not a readable ONNX"),
    "checkpoint without arch": (
        lambda _, c: [c],
        r"is a checkpoint: say which network it belongs to with --arch NAME\.",
    ),
    "unknown arch": (lambda _, c: [c, "--arch", "camplus"], r"unknown model 'camplus'\. Did you mean 'campplus'\?"),
    "missing key": (
        lambda _, c: changed_weights(c, lambda state: state.pop("head.bn1.weight")),
        r"x\.safetensors does not fit CAMPPlus: missing head\.bn1\.weight\. Is --arch right\?",
    ),
    "extra key": (
        lambda _, c: changed_weights(c, lambda state: state.update(more=torch.zeros(2))),
        r"x\.safetensors does not fit CAMPPlus: extra more\. Is --arch right\?",
    ),
    "misshaped key": (
        lambda _, c: changed_weights(c, lambda state: state.update({"head.bn1.weight": torch.zeros(3)})),
        r"x\.safetensors: head\.bn1\.weight has shape \[3\], CAMPPlus needs \[\d+\]\.",
    ),
    "NaN weights": (
        lambda _, c: changed_weights(c, lambda state: state[DENSE].fill_(torch.nan)),
        r"x\.safetensors holds NaN or infinite weights in xvector\.dense\.linear\.weight\.",
    ),
    "pickled code": (lambda _, __: pickled(), r"x\.pt holds pickled Python objects beside tensors; they are refused"),
    "unsupported opset": (
        lambda a, _: changed_graph(a, lambda model: setattr(model.opset_import[0], "version", 11)),
        r"x\.onnx has opset 11; supported are 13 to \d+\. Export it again with opset 18\.",
    ),
    "external data outside": (
        lambda a, _: changed_graph(a, lead_outside),
        r"x\.onnx: .*lies outside the file's folder \(\.\./secret\); refused",
    ),
    "not an artifact": (lambda a, _: [a.parent], r"is not an artifact folder: it has no artifact\.json\."),
    "altered weights": (lambda a, _: [corrupted(a / "model.onnx")], r"model\.onnx was altered: its SHA-256 is not the"),
    "wrong sample rate": (
        lambda a, _: [altered(a, sample_rate=160)],
        r"sample_rate must be in 4000\.\.192000 Hz, got 160",
    ),
    "sample rate of text": (lambda a, _: [altered(a, sample_rate="16k")], r"error: .*artifact\.json"),
    "unknown front end": (lambda a, _: [altered(a, dither=1)], r"error: .*artifact\.json"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_wrong_model_is_named(
    cli: Callable,
    tiny_run: Path,
    small_checkpoint: Path,
    speech_folder: Path,
    unchanged: Callable,
    kind: str,
    tmp_path: Path,
) -> None:
    make, message = MODELS[kind]
    model = make(Path(shutil.copytree(tiny_run / "00-baseline", tmp_path / "models" / "x")), small_checkpoint)
    before = unchanged()
    code, out, err = cli("run", *model, "--data", speech_folder, "--passes", "trt")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "Traceback" not in err
    assert unchanged() == before


def test_the_folder_of_another_run_is_refused(
    cli: Callable, arguments: list[str], tiny_run: Path, tmp_path: Path, unchanged: Callable
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    before = unchanged()
    code, _, err = cli(*arguments)
    assert code == 2
    assert "holds a run already. Go on with it by --resume, or choose another --out folder." in err
    assert unchanged() == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_of_something_else_is_refused(
    cli: Callable, arguments: list[str], tmp_path: Path, unchanged: Callable, resume: list[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    before = unchanged()
    code, _, err = cli(*arguments, *resume)
    assert code == 2
    assert "is not empty and not a run. Choose another --out folder." in err
    assert unchanged() == before


def test_a_file_in_place_of_the_folder_is_refused(cli: Callable, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    code, _, err = cli(*arguments)
    assert code == 2
    assert "run cannot be made (File exists). Choose another --out folder." in err


@pytest.mark.skipif(ROOT_READS_EVERYTHING, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_refused(cli: Callable, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    code, _, err = cli(*arguments)
    assert code == 2
    assert "cannot be written (Permission denied). Choose another place." in err


def test_a_full_disk_is_told(cli: Callable, arguments: list[str], small_disk: Path) -> None:
    arguments[arguments.index("--out") + 1] = str(small_disk / "run")
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert f"error: disk full while writing {small_disk / 'run'}" in err
    assert "Traceback" not in err


def test_cuda_is_refused_without_a_gpu(cli: Callable, arguments: list[str], unchanged: Callable) -> None:
    if machine.probe_cuda().missing is None:
        pytest.skip("this machine has a GPU")
    before = unchanged()
    code, _, err = cli(*arguments, "--device", "cuda")
    assert code == 2
    assert re.fullmatch(r"error: device cuda: .*\. Use --device cpu\.\n", err)
    assert unchanged() == before


def test_a_checkpoint_runs_with_its_network_named(cli: Callable, small_checkpoint: Path, speech_folder: Path) -> None:
    code, out, _ = cli(
        "run", small_checkpoint, "--arch", "campplus", "--data", speech_folder, "--passes", "trt", "--dry-run"
    )
    assert code == 0
    parameters = Artifact.open(small_checkpoint, "campplus").params
    assert f"{parameters:,} parameters" in out
    assert "01-onnx      onnx()\n" in out
