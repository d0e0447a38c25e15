"""What runs in the process that ``memory.peak_rss_of`` starts.

Standard library only, and run by its path without importing the package: whatever is loaded here is counted.
"""

import pickle
import sys
import traceback
from pathlib import Path


def run_call(folder: Path) -> None:
    """Make the call pickled in a folder and leave there what came of it: (result, peak RSS in bytes, error, trace)."""
    try:
        target, args, kwargs = pickle.loads((folder / "call").read_bytes())
        result = target(*args, **kwargs)
        answer = pickle.dumps((result, peak_rss(), None, ""))
    except Exception as error:
        answer = pickle.dumps((None, 0, _picklable(error), traceback.format_exc()))
    (folder / "answer").write_bytes(answer)


def peak_rss() -> int:
    """Read the peak resident set size of this process, in bytes; 0 where the system does not tell.

    On Linux from ``VmHWM`` and not from ``getrusage``: there ``ru_maxrss`` outlives ``exec``, so a small child of a
    large process would report its parent's size (Linux, fs/exec.c, ``exec_mmap``: ``setmax_mm_hiwater_rss``).
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    elif sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the BSDs KiB
    return 0


def _picklable(error: Exception) -> Exception:
    """Return the error itself, or one of the same words where it does not survive pickling."""
    try:
        survives = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        survives = False
    return error if survives else RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    run_call(Path(sys.argv[1]))
