"""Peak memory of a function, measured in a process of its own."""

import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from compress.errors import MachineError
from compress.evaluation import measured_process

P = ParamSpec("P")
R = TypeVar("R")

# The process first takes over this one's module path, so that nothing in the current folder shadows a library.
START = "import sys; script, sys.path[:] = sys.argv[1], sys.argv[3:]; import runpy; " + (
    "sys.argv[:] = sys.argv[1:3]; runpy.run_path(script, run_name='__main__')"
)


def peak_rss_of(target: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, int]:
    """Call a function in a fresh Python process and measure the most memory that process ever held.

    The figure includes the interpreter and all that importing the function's module imports, but nothing else that
    this process has loaded. (``multiprocessing`` would first import the main script, and count what that imports.)
    What the function prints goes to standard error.

    Args:
        target: A function that pickles by its name, from an importable module (not ``__main__``).
        *args: Picklable, as is the result.
        **kwargs: Picklable.

    Returns:
        What the function returned, and the peak resident set size in bytes, taken before the result is pickled.

    Raises:
        MachineError: If the process ends without an answer (names its exit code or signal), or this system tells no
            process its peak memory.
        Exception: Whatever the function raised, with the process's traceback as its cause.
    """
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
    if name.startswith("__main__."):
        raise ValueError(f"{name} cannot be imported by a fresh process. Move it into a module.")
    with tempfile.TemporaryDirectory(prefix="compress-memory-") as folder:
        (Path(folder) / "call").write_bytes(pickle.dumps((target, args, kwargs)))
        command = [sys.executable, "-c", START, measured_process.__file__, folder, *sys.path]
        exit_code = subprocess.run(command, stdout=2, check=False).returncode
        answer = Path(folder) / "answer"
        if exit_code != 0 or not answer.exists():
            raise MachineError(f"the process that measured the peak memory of {name} {_ending(exit_code)}")
        result, peak_bytes, error, trace = pickle.loads(answer.read_bytes())
    if error is not None:
        raise error from RuntimeError(f"in the process that measured peak memory:\n{trace}")
    if not peak_bytes:
        raise MachineError("this system does not tell a process its peak memory. Measure it on Linux or macOS.")
    return result, peak_bytes


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and without an answer. Its last words are above."
    hint = " The system had probably run out of memory; free some." if exit_code == -9 else ""
    return f"ended with exit code {exit_code}, by signal {-exit_code} ({signal.strsignal(-exit_code)}).{hint}"
