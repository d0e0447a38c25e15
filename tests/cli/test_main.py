"""The command as a whole: help, names, exit codes, tracebacks."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.cli.main import COMMANDS
from compress.models import ARCHITECTURES
from compress.passes import passes


def test_help_names_every_command(cli: Callable) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for name in [*COMMANDS, *passes()]:
        assert name in out


@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name != "train"), *passes()])
def test_every_command_has_a_help_page(cli: Callable, name: str) -> None:
    code, out, _ = cli(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: compress {name} ")


def test_the_version_is_told(cli: Callable) -> None:
    assert cli("--version") == (0, f"compress, version {compress.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "error: unknown command 'rum'. Did you mean 'run'?\n"),
        (["zzz"], "error: unknown command 'zzz'. Known: bench, check, compare, "),
        (["prun", "campplus"], "error: unknown command 'prun'. Did you mean 'prune'?\n"),
        (["run", "--pases", "prune"], "No such option '--pases'. Did you mean '--passes', '--set'?"),
        (["prune", "campplus", "--raito", "0.3"], "No such option '--raito'. Did you mean '--macs-ratio', '--ratio'?"),
        (["run", "--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["bench"], "Missing argument 'MODELS...'"),
        (["data", "chek"], "No such command 'chek'. Did you mean 'check'?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(cli: Callable, arguments: list[str], message: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err.replace("(Did you mean one of: ", "Did you mean ").replace("?)", "?")


@pytest.mark.parametrize(
    "arguments",
    [["run", "fsmn_vad", "--passes", "prune", "--dry-run"], ["prune", "fsmn_vad"], ["eval", "fsmn_vad"]],
    ids=lambda arguments: arguments[0],
)
def test_a_network_for_another_task_is_refused_in_one_line(cli: Callable, arguments: list[str]) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: fsmn_vad is a network for vad; ")
    assert err.count("\n") == 1


def test_without_a_command_the_help_is_shown(cli: Callable) -> None:
    code, out, err = cli()
    assert code == 2
    assert "Usage: compress" in out + err


@pytest.mark.parametrize("arguments", [["--debug", "run", "nope"], ["run", "nope", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(cli: Callable, arguments: list[str]) -> None:
    code, _, err = cli(*arguments, "--passes", "trt")
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert "error: unknown model 'nope'. Known: campplus, " in err.splitlines()[-1]


def test_without_debug_there_is_no_traceback(cli: Callable) -> None:
    code, out, err = cli("run", "nope", "--passes", "trt")
    assert (code, out) == (2, "")
    assert err == f"error: unknown model 'nope'. Known: {', '.join(sorted(ARCHITECTURES))}.\n"


def test_the_module_equals_the_command() -> None:
    command = Path(sys.executable).parent / "compress"
    if not command.is_file():
        pytest.skip("compress is not installed beside this Python")
    for arguments in (["--version"], ["--help"], ["rum"]):
        answers = [
            subprocess.run([*start, *arguments], capture_output=True, text=True, check=False)
            for start in ([str(command)], [sys.executable, "-m", "compress"])
        ]
        assert len({(answer.returncode, answer.stdout, answer.stderr) for answer in answers}) == 1


def test_a_reader_that_stops_early_is_no_error() -> None:
    if shutil.which("head") is None:
        pytest.skip("head is not there")
    shell = f'"{sys.executable}" -m compress passes | head -n 1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout == "prune  (torch -> torch)\n"
    assert done.stderr == ""


def test_help_does_not_import_pytorch() -> None:
    code = (
        "import sys; from compress.cli.main import exit_code; exit_code(['--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
