"""Everything that has to be measured on an NVIDIA GPU, unattended, in at most 20 minutes.

    python benchmarks/gpu/run.py prepare KIT         on any machine with the package: writes the folder KIT
    python KIT/run.py [--out OUT] [--minutes 20]     on the machine with the GPU

There, Python 3.8 or later, numpy and TensorRT 8.5 to 11 are needed; PyTorch and ONNX Runtime are compared with where
they are (--torch-python names another Python that has them).
Every step is a process of its own, and its result is written to OUT/results.json at once. A step that fails or comes
too late is a row that says so, and not the end. A short table is printed last. Exit code 0 if every check holds, 1
otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence

HERE = Path(__file__).resolve().parent
MINUTES = 20.0
LONGEST_S = 420.0  # of one step
NETWORKS = ("campplus", "fsmn_vad")
PRECISIONS = ("fp16", "int8")
NEEDED_COSINE = {"fp16": 0.9999, "int8": 0.999}
SAME = 1e-3  # of the largest output: kernels may add up in another order from run to run
NEEDED_SPEEDUP = 2.0  # of FP16 with CUDA graph over PyTorch in FP16
WARMUP_S, SECONDS = 0.2, 3.0  # of each series of timings, of engines and of what they are compared with
CASE_SECONDS = 0.5  # of timing a small engine

Answer = Dict[str, Any]  # what a step gives, as JSON


# --- Steps: each in a process of its own --------------------------------------------------------------------------


def identify(request: Mapping[str, Any]) -> Answer:
    """Driver, GPU and TensorRT."""
    from target import child

    return child.call("identify", {"device": request["device"]}, "asking the driver and TensorRT")


def smoke(request: Mapping[str, Any]) -> Answer:
    """What TensorRT makes of its simplest calls, one after the other: with 8.6 each has been seen to crash."""
    from target import cuda, engine, versions

    driver = cuda.probe()
    with cuda.Context(request["device"]):
        trt = versions.import_tensorrt()
        log = engine.Log(trt)
        print("Runtime", flush=True)
        engine.started(trt, trt.Runtime, log, driver)
        print("Builder", flush=True)
        engine.started(trt, trt.Builder, log, driver)
    return {"tensorrt": trt.__version__}


def bundle(request: Mapping[str, Any]) -> Answer:
    """Build and check a network in a precision, as a user does: by the bundle's own script."""
    folder = Path(request["folder"])
    options = ["--precision", request["precision"], "--device", str(request["device"]), "--force", "--no-measure"]
    done = subprocess.run([sys.executable, str(folder / "build_engine.py"), *options], check=False)
    if done.returncode:
        log = Path(request["log"])
        _, told, said = log.read_text(errors="replace").rpartition("error: ")
        raise StepError(said.strip() if told else f"status {done.returncode}; see {log.name}")
    found = json.loads((folder / "build.json").read_text())
    for name in ("build.json", "row.json", "model.layers.json", "build.log"):
        if (folder / name).exists():
            shutil.copyfile(str(folder / name), request["keep"] + name)
    chosen = next(entry for entry in found["candidates"] if entry["precision"] == found["chosen"])
    return {
        "cosine": min(entry["cosine"] for entry in chosen["agreement"]["graph"]),
        "agreement": chosen["agreement"],
        "int8_layers": chosen["int8_layers"],
        "weighted_layers": chosen["weighted_layers"],
        "int8_told": chosen["int8_told"],
        "build_s": chosen["build_s"],
    }


def times(request: Mapping[str, Any]) -> Answer:
    """Latency, throughput, queries per second and energy of a built engine."""
    import numpy
    from target import child, cuda, engine, measure

    folder, seconds = Path(request["folder"]), request["seconds"]
    driver, device = child.need_device(request["device"])
    with numpy.load(str(folder / "references.npz"), allow_pickle=False) as arrays:
        features = max((arrays[name] for name in arrays.files if name.startswith("features_")), key=numpy.size)
    energy_s = 10.0 if seconds >= SECONDS else 0.0
    settings = measure.Settings(frames=request["frames"], seconds=seconds, energy_s=energy_s)
    with cuda.Context(request["device"]), engine.load(folder / "model.plan", device, driver) as loaded:
        found = measure.measure(loaded, features, settings, say=child.say)
    print(measure.report(found), flush=True)
    return found


def graph_equality(request: Mapping[str, Any]) -> Answer:
    """Outputs of an engine with and without a CUDA graph, on the same features."""
    import numpy
    from target import child, cuda, engine, measure

    folder = Path(request["folder"])
    driver, device = child.need_device(request["device"])
    with numpy.load(str(folder / "references.npz"), allow_pickle=False) as arrays:
        features = max((arrays[name] for name in arrays.files if name.startswith("features_")), key=numpy.size)
    with cuda.Context(request["device"]), engine.load(folder / "model.plan", device, driver) as loaded:
        plain = loaded.run(features)
        with measure.Lane(loaded, features, True, False) as lane:
            captured = [lane.run() for _ in range(3)]
        differences = [numpy.abs(found[name] - plain[name]).max() for found in captured for name in loaded.outputs]
        largest = max(numpy.abs(plain[name]).max() for name in loaded.outputs)
    return {"max_abs": float(max(differences)), "largest": float(largest)}


def case(request: Mapping[str, Any]) -> Answer:
    """Build a small graph as often as asked; check, inspect and time each engine."""
    entry, here = request["case"], request["here"]
    if entry["only_with_flags"] and here["typed"]:
        return {"not_asked": "this TensorRT takes precision from the graph alone"}
    import numpy
    from target import child, plan

    graph = entry["graphs"]["typed" if here["typed"] else "portable"]
    with numpy.load(str(HERE / entry["references"]), allow_pickle=False) as arrays:
        width = arrays["features_0"].shape[2]
    lengths = sorted(entry["lengths"])
    shapes = {"min": lengths[0], "opt": lengths[len(lengths) // 2], "max": lengths[-1]}
    profile = {"input": entry["input"], **{kind: [1, frames, width] for kind, frames in shapes.items()}}
    file = str(HERE / graph["file"])
    key = {
        **here["identity"],
        "graph_sha256": plan.sha256_of(Path(file)),
        "precision": "int8" if graph["quantized"] else "fp16",
        "profile": profile,
        "float_nodes": graph["float_nodes"],
    }
    asked = {"graph_file": file, "graph": graph, "profile": profile, "key": key, "workspace_mb": None, "cache": None}
    builds = []
    for number in range(entry["repeat"]):
        log: list[str] = []
        common = {"device": request["device"], "plan": str(Path(request["work"]) / f"{number}.plan")}
        try:
            builds.append(built_once({**asked, **common}, {**common, "frames": shapes["opt"]}, entry, log))
        except child.StepError as error:
            builds.append({"error": str(error), "log": log[-12:]})
    return {"asked_for_int8": graph["quantized_layers"], "of": graph["weighted_layers"], "builds": builds}


def built_once(asked: Mapping[str, Any], timed: Mapping[str, Any], entry: Mapping[str, Any], log: list[str]) -> Answer:
    """One engine of a small graph: built, checked, timed."""
    from target import child, plan

    path = Path(timed["plan"])
    built = child.call("build", asked, "building", print, log.append)
    expected = {"references": str(HERE / entry["references"]), "expected": {"graph": entry["outputs"]}}
    found = child.call("check", {**timed, **expected}, "checking", print, log.append)
    return {
        "build_s": built["build_s"],
        "flags": built["network_flags"] + built["builder_flags"],
        "sha256": plan.sha256_of(path),
        "int8_layers": found["int8_layers"],
        "weighted_layers": found["weighted_layers"],
        "layers": found["layers"],
        "agreement": found["agreement"]["graph"],
        "compute_ms": child.call("measure", {**timed, "seconds": CASE_SECONDS}, "timing", print)["compute_ms"],
    }


def pytorch(request: Mapping[str, Any]) -> Answer:
    """PyTorch eager on the GPU: from features in host memory to the embedding in host memory, batch 1."""
    sys.path.insert(0, str(HERE / "pytorch"))
    import numpy
    import torch

    for name in ("safetensors", "safetensors.torch"):  # for checkpoints; the weights here are numpy's
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)

    from compress.models import architecture

    if not torch.cuda.is_available():
        raise StepError("this PyTorch has no CUDA")
    with numpy.load(str(HERE / "pytorch" / "campplus.npz"), allow_pickle=False) as arrays:
        weights = {name: torch.from_numpy(arrays[name].astype("float32")) for name in arrays.files}
    network = architecture("campplus").build()
    network.load_state_dict({name: w.to(network.state_dict()[name].dtype) for name, w in weights.items()})
    kind = {"fp16": torch.float16, "fp32": torch.float32}[request["precision"]]
    network = network.eval().to("cuda", kind)
    with numpy.load(str(HERE / "pytorch" / "features.npz"), allow_pickle=False) as arrays:
        features, expected = torch.from_numpy(arrays["features"]), arrays["embedding"]

    def once() -> Any:
        return network(features.to("cuda", kind)).float().cpu().numpy()

    with torch.inference_mode():
        found = time_calls(once, request["seconds"])
        output = once()
    cosine = float((output * expected).sum() / numpy.linalg.norm(output) / numpy.linalg.norm(expected))
    return {**found, "cosine": cosine, "version": torch.__version__, "device": torch.cuda.get_device_name(0)}


def onnx_runtime(request: Mapping[str, Any]) -> Answer:
    """ONNX Runtime on this machine's CPU, one thread."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = HERE / "onnxruntime" / f"campplus-{request['precision']}.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with numpy.load(str(HERE / "pytorch" / "features.npz"), allow_pickle=False) as arrays:
        features = {session.get_inputs()[0].name: arrays["features"]}
    return {**time_calls(lambda: session.run(None, features), request["seconds"]), "version": onnxruntime.__version__}


def time_calls(once: Callable[[], object], seconds: float) -> Answer:
    """Milliseconds of calls that return when they are done."""
    from target.measure import repeat, summary

    samples = []

    def timed() -> None:
        start = time.perf_counter()
        once()
        samples.append((time.perf_counter() - start) * 1e3)

    repeat(once, WARMUP_S, 3, time.perf_counter)
    repeat(timed, seconds, 10, time.perf_counter)
    return {"end_to_end_ms": summary(samples)}


STEPS: Mapping[str, Callable[[Mapping[str, Any]], Answer]] = {
    function.__name__: function
    for function in (identify, smoke, bundle, times, graph_equality, case, pytorch, onnx_runtime)
}


class StepError(Exception):
    """What a step could not do, as a sentence."""


def do_step(name: str, answer: Path) -> int:
    """Of a process: do a step; the request comes on standard input."""
    try:
        found: Answer = {"answer": STEPS[name](json.load(sys.stdin))}
    except Exception as error:  # whatever it is, it becomes a row
        sentence = type(error).__name__ in ("StepError", "CudaError", "TensorRTError", "PlanError")
        found = {"error": str(error) if sentence else f"{type(error).__name__}: {error}"}
    answer.write_text(json.dumps(found))
    return 0 if "answer" in found else 1


# --- The run ------------------------------------------------------------------------------------------------------


class Run:
    """Steps in order, each with a limit, their results in one file."""

    def __init__(self, kit: Mapping[str, Any], out: Path, deadline: float, options: argparse.Namespace) -> None:
        self.kit, self.out, self.deadline, self.options = kit, out, deadline, options
        self.results: dict[str, Any] = {"started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "steps": {}}

    def step(self, title: str, name: str, request: Mapping[str, Any], python: str = sys.executable) -> Answer | None:
        """Do a step; gives its answer, or None. What came of it is written at once."""
        limit = min(LONGEST_S, self.deadline - time.monotonic())
        log = self.out / f"{title.replace(' ', '-').replace('/', '-')}.log"
        start = time.monotonic()
        if limit < 5:
            found: Answer = {"error": "not tried: the time was up"}
        else:
            request = {"device": self.options.device, "log": str(log), **request}
            found = in_process(python, name, request, log, limit)
        found["seconds"] = round(time.monotonic() - start, 1)
        self.results["steps"][title] = found
        self.save()
        what = shortened(found["error"], 160) if "error" in found else "done"
        print(f"[{self.options.minutes * 60 - (self.deadline - time.monotonic()):6.0f} s] {title}: {what}", flush=True)
        return found.get("answer")

    def save(self) -> None:
        """Write what there is so far, whole or not at all."""
        temporary = self.out / ".results.json.tmp"
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.out / "results.json")

    def everything(self) -> None:
        """The most wanted first: if time or luck runs out, the rest is what is missing."""
        here = self.step("identify", "identify", {})
        ready = here is not None and self.step("smoke", "smoke", {}) is not None
        if ready:
            self.network("campplus")
        for precision in ("fp16", "fp32"):
            request = {"precision": precision, "seconds": self.options.seconds}
            self.step(f"pytorch {precision}", "pytorch", request, self.options.torch_python)
        for precision in ("fp32", "int8"):
            request = {"precision": precision, "seconds": self.options.seconds}
            self.step(f"onnxruntime {precision}", "onnx_runtime", request, self.options.torch_python)
        if ready:
            self.network("fsmn_vad")
        for entry in self.kit["cases"] if ready else ():
            with tempfile.TemporaryDirectory(dir=str(self.out)) as work:
                title = f"case {entry['question']} {entry['name']}"
                self.step(title, "case", {"case": entry, "here": here, "work": work})

    def network(self, network: str) -> None:
        """Both precisions of a network, and whether a CUDA graph changes what comes out."""
        with tempfile.TemporaryDirectory(dir=str(self.out)) as folder:
            work = Path(folder) / network
            shutil.copytree(str(HERE / "bundles" / network), str(work))
            for precision in PRECISIONS:
                keep = str(self.out / f"{network}-{precision}-")
                request = {"folder": str(work), "precision": precision, "keep": keep}
                if self.step(f"{network} {precision}", "bundle", request) is not None:
                    title, of_plan = f"{network} {precision}", {"folder": str(work)}
                    self.step(f"{title} graph", "graph_equality", of_plan)
                    measured = {**of_plan, "seconds": self.options.seconds, "frames": self.kit["frames"]}
                    self.step(f"{title} times", "times", measured)


def in_process(python: str, name: str, request: Mapping[str, Any], log: Path, limit: float) -> Answer:
    """Do a step in a process of its own, which is ended with all its children when its time is up."""
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stream:
        answer = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [python, str(HERE / "run.py"), "step", name, str(answer)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(python),
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(request).encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"ended after {limit:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if answer.exists():
            return dict(json.loads(answer.read_text()))
    last = " ".join(log.read_text(errors="replace").split()[-30:])
    ending = f"crashed with signal {-process.returncode}" if process.returncode < 0 else "ended without an answer"
    return {"error": f"{ending}; {log.name} ends: {last}"}


def environment(python: str) -> dict[str, str]:
    """Of a step: it finds the files here. Another Python is not told where a relocated one keeps its own."""
    there = dict(os.environ)
    if python != sys.executable and "PYTHONHOME" in there:
        for name in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH"):
            there.pop(name, None)
    paths = [str(HERE), *filter(None, [there.get("PYTHONPATH")])]
    return {**there, "PYTHONPATH": os.pathsep.join(paths), "CUDA_MODULE_LOADING": "LAZY"}


# --- What it says -------------------------------------------------------------------------------------------------


def answer_of(results: Mapping[str, Any], title: str) -> Answer | None:
    """What a step gave, or None."""
    found = results["steps"].get(title, {}).get("answer")
    return dict(found) if found is not None else None


def problem_of(results: Mapping[str, Any], title: str) -> str:
    """Why a step gave nothing, in a line."""
    return shortened(error_of(results, title), 110)


def error_of(results: Mapping[str, Any], title: str) -> str:
    """Why a step gave nothing."""
    return str(results["steps"].get(title, {}).get("error", "not tried"))


def shortened(text: str, length: int) -> str:
    """A text in one line: its beginning and its end, which of a traceback says most."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length // 2 - 5]} ... {line[-length // 2 :]}"


def ways(measured: Mapping[str, Any]) -> dict[tuple[str, bool], Mapping[str, Any]]:
    """Latencies by how was waited and whether with a CUDA graph."""
    return {(entry["wait"], entry["graph"]): entry for entry in measured.get("latency", ()) if "missing" not in entry}


def no_times(results: Mapping[str, Any], title: str) -> str:
    """Why an engine has no latency: it was not built, not measured, or not in this way."""
    if answer_of(results, title) is None:
        return problem_of(results, title)
    found = answer_of(results, f"{title} times")
    missing = [entry["missing"] for entry in (found or {}).get("latency", ()) if "missing" in entry]
    return missing[0] if missing else problem_of(results, f"{title} times")


def classic(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any] | str, float | None]]:
    """CAM++, 3 s, batch 1, host to host: a name, percentiles or what is wrong, and utterances per second at best."""
    rows: list[tuple[str, Mapping[str, Any] | str, float | None]] = []
    for title, name in (
        ("pytorch fp32", "PyTorch FP32, GPU"),
        ("pytorch fp16", "PyTorch FP16, GPU"),
        ("onnxruntime fp32", "ONNX Runtime FP32, CPU"),
        ("onnxruntime int8", "ONNX Runtime INT8, CPU"),
    ):
        found = answer_of(results, title)
        rows.append((name, found["end_to_end_ms"] if found else problem_of(results, title), None))
    for precision in PRECISIONS:
        found = answer_of(results, f"campplus {precision} times") or {}
        most = [float(one["utterances_per_s"]) for one in found.get("throughput", ()) if "missing" not in one]
        for graph in (False, True):
            name = f"TensorRT {precision.upper()}{' + CUDA graph' if graph else ''}"
            entry = ways(found).get(("spinning", graph))
            if entry is None:
                rows.append((name, no_times(results, f"campplus {precision}"), None))
            else:
                rows.append((name, entry["end_to_end_ms"], max(most) if graph and most else None))
    return rows


def checks(results: Mapping[str, Any]) -> list[tuple[str, bool | None, str]]:
    """What has to hold: a name, whether it does (None: could not be measured), and the figures."""
    found: list[tuple[str, bool | None, str]] = []
    for network in NETWORKS:
        for precision in PRECISIONS:
            title = f"{network} {precision}"
            engine = answer_of(results, title)
            if engine is None:
                found.append((f"{title} builds and agrees", None, problem_of(results, title)))
                continue
            good = engine["cosine"] >= NEEDED_COSINE[precision]
            figures = f"cosine {engine['cosine']:.6f}, needed {NEEDED_COSINE[precision]}; {engine['build_s']:.0f} s"
            found.append((f"{title} agrees with ONNX Runtime", good, figures))
            if precision == "int8":
                share = f"{engine['int8_layers']} of {engine['weighted_layers']} layers with weights"
                told = engine["int8_told"]
                runs = engine["int8_layers"] > 0 if told else None
                found.append((f"{title} runs in INT8", runs, share if told else f"not told: {share}"))
            graph = answer_of(results, f"{title} graph")
            told = f"largest difference {graph['max_abs']:.1e}" if graph else problem_of(results, f"{title} graph")
            same = graph["max_abs"] <= SAME * graph["largest"] if graph else None
            found.append((f"{title} with CUDA graph is the same", same, told))
    rows = {name: latency for name, latency, _ in classic(results)}
    eager, engine_ms = rows["PyTorch FP16, GPU"], rows["TensorRT FP16 + CUDA graph"]
    if isinstance(eager, str) or isinstance(engine_ms, str):
        found.append(("TensorRT FP16 against PyTorch FP16", None, eager if isinstance(eager, str) else str(engine_ms)))
    else:
        ratio = eager["p50"] / engine_ms["p50"]
        told = f"{ratio:.2f} times as fast, needed {NEEDED_SPEEDUP:g}"
        found.append(("TensorRT FP16 against PyTorch FP16", ratio >= NEEDED_SPEEDUP, told))
    return found


def of_builds(found: Mapping[str, Any]) -> str:
    """A case's figures in a few words."""
    if "not_asked" in found:
        return str(found["not_asked"])
    good = [build for build in found["builds"] if "error" not in build]
    if not good:
        return "refused: " + shortened(found["builds"][0]["error"], 200)
    first = good[0]
    lowest = min(entry["cosine"] for build in good for entry in build["agreement"])
    broken = sum(entry["not_finite"] for entry in first["agreement"])
    times = [build["compute_ms"] for build in good]
    words = [
        f"INT8 {first['int8_layers']} of {first['weighted_layers']} (asked {found['asked_for_int8']} of {found['of']})",
        f"{first['layers']} layers",
        f"{min(times):.3f}" + (f" to {max(times):.3f} ms" if len(times) > 1 else " ms"),
        f"cosine {lowest:.6f}" + (f", {broken} values not finite" if broken else ""),
    ]
    lengths = {entry["frames"]: entry["cosine"] for entry in first["agreement"]}
    if max(lengths) >= 1000:
        words.append("by frames " + ", ".join(f"{frames}: {cosine:.6f}" for frames, cosine in sorted(lengths.items())))
    if len(good) > 1:
        words.append(f"{len({build['sha256'] for build in good})} different plans of {len(good)}")
    return "; ".join(words)


def table(results: Mapping[str, Any], kit: Mapping[str, Any]) -> str:
    """The short table that is printed last."""
    here = answer_of(results, "identify")
    about = here["identity"] if here else {}
    lines = [
        f"{about['gpu']}, driver {about['driver']}, TensorRT {about['tensorrt']}, {results['started']}"
        if here
        else f"No engine was built: {error_of(results, 'identify').split('. ')[0]}.",
        "",
        f"{'CAM++, 3.0 s, batch 1':<32}{'p50 ms':>9}{'p99 ms':>9}{'QPS':>9}{'best/s':>9}",
    ]
    for name, latency, most in classic(results):
        if isinstance(latency, str):
            lines.append(f"{name:<32}  not measured: {latency}")
            continue
        best = f"{most:>9.0f}" if most is not None else f"{'-':>9}"
        lines.append(f"{name:<32}{latency['p50']:>9.3f}{latency['p99']:>9.3f}{1e3 / latency['mean']:>9.0f}{best}")
    lines += ["", "checks"]
    for name, good, told in checks(results):
        word = {True: "holds", False: "FAILS", None: "open"}[good]
        lines.append(f"{word:<6} {name:<42} {told}")
    lines += ["", "questions"]
    for number, text in enumerate(kit["questions"], start=1):
        lines.append(f"{number:>2}. {text}")
        lines += [f"      {name:<16} {told}" for name, told in told_of(number, results, kit)]
    return "\n".join(lines)


def told_of(number: int, results: Mapping[str, Any], kit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a question: by case, or by network where the bundles answer it."""
    found = []
    for entry in kit["cases"]:
        if entry["question"] == number:
            title = f"case {number} {entry['name']}"
            answer = answer_of(results, title)
            found.append((entry["name"], of_builds(answer) if answer else problem_of(results, title)))
    if found:
        return found
    for title in (f"{network} {precision}" for network in NETWORKS for precision in PRECISIONS):
        both = ways(answer_of(results, f"{title} times") or {})
        without, with_graph = both.get(("spinning", False)), both.get(("spinning", True))
        if without is None or with_graph is None:
            found.append((title, no_times(results, title)))
            continue
        before, after = without["end_to_end_ms"]["p50"], with_graph["end_to_end_ms"]["p50"]
        found.append((title, f"{before:.3f} ms without, {after:.3f} ms with"))
    return found


# --- The command line ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Prepare, or run; gives the exit code."""
    if arguments[:1] == ["step"]:
        return do_step(arguments[1], Path(arguments[2]))
    if arguments[:1] == ["prepare"]:
        if len(arguments) != 2:
            print("usage: run.py prepare KIT", file=sys.stderr)
            return 2
        if Path(arguments[1]).exists():
            print(f"error: {arguments[1]} exists already. Choose another folder.", file=sys.stderr)
            return 2
        from prepare import prepare

        prepare(Path(arguments[1]))
        return 0
    made = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder of the results (default %(default)s)"
    )
    made.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default %(default)g)")
    made.add_argument("--device", type=int, default=0, help="index of the GPU (default %(default)s)")
    made.add_argument("--seconds", type=float, default=SECONDS, help="of each series of timings (default %(default)g)")
    made.add_argument(
        "--torch-python", default=sys.executable, help="Python with PyTorch and ONNX Runtime (default: this)"
    )
    options = made.parse_args(arguments)
    deadline = time.monotonic() + options.minutes * 60
    if not (HERE / "kit.json").is_file():
        print(
            f"error: {HERE} is not a prepared folder. First: python {Path(__file__).name} prepare KIT", file=sys.stderr
        )
        return 2
    kit = json.loads((HERE / "kit.json").read_text())
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(kit, options.out, deadline, options)
    run.everything()
    text = table(run.results, kit)
    (options.out / "table.txt").write_text(text + "\n")
    print("\n" + text)
    return 1 if any(good is not True for _, good, _ in checks(run.results)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
