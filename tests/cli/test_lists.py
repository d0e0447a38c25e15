"""``passes`` and ``models``."""

from collections.abc import Callable
from dataclasses import fields

from compress.models import ARCHITECTURES
from compress.passes import passes


def test_passes_lists_every_setting_with_its_default(cli: Callable) -> None:
    code, out, _ = cli("passes")
    assert code == 0
    for name, kind in passes().items():
        assert f"{name}  ({kind.accepts.value} -> {kind.returns.value})\n" in out
        for setting in fields(kind):
            assert f"    {name}.{setting.name} = {setting.default}\n" in out
    assert "    ptq.utterances = 40\n" in out


def test_models_says_which_have_weights(cli: Callable) -> None:
    code, out, _ = cli("models")
    assert code == 0
    for name, network in ARCHITECTURES.items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert network.task in line
        assert ("embedded trained weights" in line) == (network.weights is not None)
