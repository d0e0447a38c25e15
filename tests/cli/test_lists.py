"""``passes``, ``models`` and ``doctor``."""

from collections.abc import Callable

from compress.models import ARCHITECTURES
from compress.passes import passes


def test_passes_lists_every_setting_with_its_default(cli: Callable) -> None:
    code, out, _ = cli("passes")
    assert code == 0
    for name, kind in passes().items():
        assert f"{name}  ({kind.accepts.value} -> {kind.returns.value})\n" in out
    for line in ("prune.scope = uniform", "ptq.utterances = 40", "ptq.reduce_range = None", "trt.max_batch = 1"):
        assert f"    {line}\n" in out


def test_models_says_which_have_weights(cli: Callable) -> None:
    code, out, _ = cli("models")
    assert code == 0
    for name, network in ARCHITECTURES.items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert network.task in line
        assert ("embedded trained weights" in line) == (network.weights is not None)


def test_doctor_tells_of_the_machine(cli: Callable) -> None:
    code, out, _ = cli("doctor")
    assert code == 0
    lines = {line[:18].strip(): line[18:] for line in out.splitlines()}
    assert {"compress", "cpu", "int8 on this cpu", "torch", "onnxruntime", "nvidia driver", "gpus", "trtexec"} <= set(
        lines
    )
    assert all(lines.values())
    assert lines["torch"][0].isdigit()
