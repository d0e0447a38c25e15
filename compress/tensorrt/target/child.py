"""Everything native is done in a child process, so that a crash there is an error message here.

The child reads its request as JSON on standard input and writes its answer to a file. What it prints, and what TensorRT
prints, is its log: the last lines of it are told if it crashes.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Mapping

from . import cuda, engine, plan, versions
from . import measure as measure_

STEP = "step: "  # begins a line of the log that is also told to the user
STILL_S = 20.0  # so often a long step says that it goes on
LAST_LINES = 8
ERRORS = (cuda.CudaError, versions.TensorRTError, plan.PlanError)  # sentences for the user


class StepError(Exception):
    """A step that failed, as a sentence."""


def call(
    step: str,
    request: Mapping[str, Any],
    doing: str,
    say: Callable[[str], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do a step in a child process.

    Args:
        step: One of ``STEPS``.
        request: What it takes, as JSON can hold it.
        doing: What it is, for messages: "building the FP16 engine".
        say: Takes lines about how far it is.
        log: Takes every line that it prints.

    Raises:
        StepError: If it fails, or crashes.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    crashed = False
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, step, str(answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        try:
            feed(process, json.dumps(request).encode())
            for line in lines_of(process, lambda seconds: say(f"still {doing} ({seconds:.0f} s)")):
                log(line)
                crashed = crashed or line.startswith("Fatal Python error")  # the stack of Python follows: for the log
                if line.startswith(STEP):
                    say(line[len(STEP) :])
                elif line.strip() and not crashed:
                    last.append(line)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    if "error" in found:
        raise StepError(found["error"])
    if status != 0 or "answer" not in found:
        told = "\n  ".join(["The last lines of its log:", *last]) if last else "It printed nothing."
        raise StepError(f"{doing}: {ending(status)}. {told}")
    answered: dict[str, Any] = found["answer"]
    return answered


def environment() -> dict[str, str]:
    """Of a child: it finds this package where this process has it, and CUDA loads kernels when they are needed."""
    root = str(Path(__file__).resolve().parents[len((__package__ or "").split("."))])
    there = os.environ.get("PYTHONPATH")
    added = {
        "PYTHONPATH": os.pathsep.join([root, there] if there else [root]),
        "CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "LAZY"),
        "PYTHONFAULTHANDLER": "1",
    }
    return {**os.environ, **added}


def feed(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Write the request; a child that has ended already shows by its status."""
    assert process.stdin is not None, "it was asked for"
    try:
        process.stdin.write(data)
        process.stdin.close()
    except BrokenPipeError:
        pass


def lines_of(process: subprocess.Popen[bytes], still: Callable[[float], None]) -> Any:
    """Lines that a process prints, until it closes its output; between them ``still`` is told the seconds."""
    assert process.stdout is not None, "it was asked for"
    start, waited, rest = time.monotonic(), 0.0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(STILL_S):
                waited = time.monotonic() - start
                still(waited)
                continue
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                break
            *whole, rest = (rest + block).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


def ending(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"the process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = " (out of memory, most likely)" if name == "SIGKILL" else ""
    return f"the process crashed with {name}{why}"


def say(text: str) -> None:
    """In a child: tell the user how far it is."""
    print(f"{STEP}{text}", flush=True)


def identify(request: Mapping[str, Any]) -> dict[str, Any]:
    """Driver and GPUs, and then TensorRT, which is not touched where there is no GPU."""
    driver, device = need_device(request["device"])
    trt = versions.import_tensorrt()
    return {
        "driver": asdict(driver),
        "device": asdict(device),
        "identity": engine.identity(trt, device, driver),
        "typed": versions.wants_typed(trt),
    }


def need_device(index: int) -> tuple[cuda.Driver, cuda.Device]:
    """The driver and one of its GPUs.

    Raises:
        CudaError: If there is none.
    """
    driver = cuda.probe()
    if driver.missing:
        raise cuda.CudaError(
            f"{driver.missing}. An engine is built on the machine with the NVIDIA GPU that is to run it: copy this"
            " folder there and run python build_engine.py in it. A container is started with --gpus all for it, on a"
            " Jetson with --runtime nvidia."
        )
    if not 0 <= index < len(driver.devices):
        there = ", ".join(f"{device.index} ({device.name})" for device in driver.devices)
        raise cuda.CudaError(f"there is no GPU {index}; there is {there}. Give another --device.")
    return driver, driver.devices[index]


def build(request: Mapping[str, Any]) -> dict[str, Any]:
    """Build a plan and write it with its sidecar."""
    driver, _ = need_device(request["device"])
    trt = versions.import_tensorrt()
    with cuda.Context(request["device"], blocking=True):
        free, _ = cuda.memory_info()
        workspace = request["workspace_mb"] << 20 if request["workspace_mb"] else free // 2
        cache = Path(request["cache"]) if request["cache"] else None
        graph_file = Path(request["graph_file"])
        profile, graph = request["profile"], request["graph"]
        data, about = engine.build(trt, driver, graph_file, graph, profile, workspace, cache, say)
    plan.write_plan(Path(request["plan"]), data, request["key"], about)
    return {**about, "size_bytes": len(data)}


def check(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load a plan, save what the inspector tells, compare outputs with the recorded ones."""
    path = Path(request["plan"])
    driver, device = need_device(request["device"])
    with cuda.Context(request["device"]), engine.load(path, device, driver) as loaded:
        say("reading the engine's layers")
        inspected = loaded.inspect()
        plan.write_file(path.with_name(f"{path.stem}.layers.json"), inspected.encode())
        done, weighted = engine.int8_layers(inspected)
        say("comparing with the recorded outputs")
        found = engine.compare_with_references(loaded, Path(request["references"]), request["expected"])
        memory = loaded.device_memory_bytes
    return {
        "layers": len(engine.layers_of(inspected)),
        "int8_layers": done,
        "weighted_layers": weighted,
        "agreement": found,
        "device_memory_bytes": memory,
    }


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds that the GPU computes one utterance of the typical length: enough to choose between engines."""
    driver, device = need_device(request["device"])
    with cuda.Context(request["device"]), engine.load(Path(request["plan"]), device, driver) as loaded:
        return {"compute_ms": engine.compute_ms(loaded, request["frames"], request["seconds"])}


def figures(request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is measured of a plan, the fields of a row of the table, and a table to read."""
    import numpy

    driver, device = need_device(request["device"])
    with cuda.Context(request["device"]), engine.load(Path(request["plan"]), device, driver) as loaded:
        low, high = loaded.profile["min"][1], loaded.profile["max"][1]
        frames = min(max(measure_.Settings().frames, low), high)
        with numpy.load(request["references"], allow_pickle=False) as arrays:
            longest = max((arrays[name] for name in arrays.files if name.startswith("features_")), key=numpy.size)
        features = numpy.concatenate([longest] * -(-frames // longest.shape[1]), axis=1)[:, :frames]
        audio_s = (frames + 2) * request["frame_shift_ms"] / 1000  # a window is two and a half shifts
        measured = measure_.measure(loaded, features, measure_.Settings(frames=frames, audio_s=audio_s), say=say)
    return {"measured": measured, "row": measure_.row_figures(measured), "report": measure_.report(measured)}


STEPS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "identify": identify,
    "build": build,
    "check": check,
    "measure": measure,
    "figures": figures,
}


def main() -> int:
    """Of a child process: do the step and write the answer."""
    step, answer = sys.argv[1:3]
    try:
        found: dict[str, Any] = {"answer": STEPS[step](json.load(sys.stdin))}
    except ERRORS as error:
        found = {"error": str(error)}
    except OSError as error:
        on_disk = error.errno is not None  # that of a library which cannot be loaded has no number
        advice = " Free some space, or copy the folder to where it can be written." if on_disk else ""
        found = {"error": f"{step}: {error}.{advice}"}
    except MemoryError:
        found = {"error": f"{step}: out of memory. End other programs, or give a smaller --max-frames or --max-batch."}
    Path(answer).write_text(json.dumps(found))
    return 0 if "answer" in found else 1


if __name__ == "__main__":
    sys.exit(main())
