import builtins
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import MachineError
from compress.evaluation.measured_process import peak_rss
from compress.evaluation.memory import peak_rss_of

MB = 1_000_000

# Functions of the standard library stand for the measured work: a fresh process can import them in any test set-up.


def test_result_comes_back_with_the_peak_of_memory_already_freed() -> None:
    result, peak_bytes = peak_rss_of(builtins.eval, "len(b'x' * 200_000_000)")
    assert result == 200 * MB
    assert 200 * MB < peak_bytes < 300 * MB


def test_memory_of_this_process_is_not_counted() -> None:
    ballast = b"x" * (200 * MB)  # inherited by ru_maxrss of a child, which is why that is not read
    _, peak_bytes = peak_rss_of(len, "abc")
    assert peak_rss() > len(ballast)
    assert peak_bytes < 100 * MB


def test_keywords_are_handed_on() -> None:
    assert peak_rss_of(int, "ff", base=16)[0] == 255


def test_modules_are_found_where_this_process_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_measured_module.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_measured_module  # type: ignore[import-not-found]

    assert peak_rss_of(my_measured_module.double, 21)[0] == 42


def test_module_in_the_current_folder_does_not_shadow_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit(5)\n")
    root = str(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", [root, *(entry for entry in sys.path if entry)])
    monkeypatch.chdir(tmp_path)
    assert peak_rss_of(len, "abc")[0] == 3


def test_script_without_a_main_guard_can_measure(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from compress.evaluation.memory import peak_rss_of\nprint(peak_rss_of(len, 'abc')[0])\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_what_the_function_prints_stays_off_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    peak_rss_of(print, "from the child")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "from the child" in captured.err


def test_exception_comes_back_as_it_was_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        peak_rss_of(builtins.eval, "1 / 0")
    assert "run_call" in str(caught.value.__cause__)


def test_exception_that_does_not_pickle_keeps_its_words() -> None:
    code = "(_ for _ in ()).throw(type('Odd', (Exception,), {})('no such layer'))"
    with pytest.raises(RuntimeError, match="Odd: no such layer"):
        peak_rss_of(builtins.eval, code)


def test_result_that_does_not_pickle_is_told() -> None:
    with pytest.raises(Exception, match=r"(?i)pickle"):
        peak_rss_of(builtins.eval, "lambda: 1")


def test_crash_names_the_exit_code() -> None:
    with pytest.raises(MachineError, match=r"peak memory of (posix|nt)\._exit ended with exit code 3 and without"):
        peak_rss_of(os._exit, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_kill_names_the_signal_and_the_likely_cause() -> None:
    with pytest.raises(MachineError, match=r"exit code -9, by signal 9 \(Killed.*run out of memory"):
        peak_rss_of(signal.raise_signal, 9)


def test_function_of_the_main_script_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from compress.evaluation.memory import peak_rss_of\ndef f(): pass\npeak_rss_of(f)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert "__main__.f cannot be imported by a fresh process. Move it into a module." in done.stderr
