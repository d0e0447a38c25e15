"""Builds the engine of a bundle on the machine that is to run it, checks and measures it."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from . import child, devices, plan

BUNDLE, BUILT, ROW, LOG = "bundle.json", "build.json", "row.json", "build.log"
PRECISIONS = ("fp16", "int8", "best")
NEEDED_COSINE = {"fp16": 0.9999, "int8": 0.999}  # of an engine to its own graph in ONNX Runtime: only rounding differs
NEEDED_SHARE = 0.8  # of the INT8 layers that the graph asks for; fusion changes how many layers there are
ROUNDS = 2  # in which the engines are timed in turns
SECONDS = 1.0  # of timing an engine in a round

EPILOG = """\
Writes model.plan with its sidecar model.plan.json, model.layers.json (every layer with its precision), build.json (what
was done and found), row.json (for compress compare) and build.log. A plan that still fits the GPU, TensorRT, driver and
graph is kept. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""

Say = Callable[[str], None]


class BuildError(Exception):
    """What the user is told; the exit code is 1."""


def parser(bundle: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Options; their defaults are the bundle's settings."""
    settings = bundle["settings"]
    made = argparse.ArgumentParser(
        prog="build_engine.py",
        usage="python build_engine.py [options]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        told = f"{text} (default {default})" if default is not None else text
        made.add_argument(name, type=kind, default=default, metavar=name.rsplit("-", 1)[-1].upper(), help=told)

    made.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=settings["precision"],
        help=f"best: both, and the faster that holds --min-cosine (default {settings['precision']})",
    )
    for name, text in (
        ("min_frames", "shortest utterance"),
        ("opt_frames", "the length that the engine is tuned for"),
        ("max_frames", "longest utterance"),
        ("opt_batch", "the batch that the engine is tuned for"),
        ("max_batch", "largest batch"),
    ):
        add(f"--{name.replace('_', '-')}", int, settings[name], text)
    made.add_argument(
        "--form", choices=("portable", "typed"), help="the graph to build (default: typed from TensorRT 10.12 on)"
    )
    add("--min-cosine", float, settings["min_cosine"], "INT8 must be as near to FP32 as this")
    add("--needed-cosine", float, None, "to the same graph in ONNX Runtime (default: 0.9999 for FP16, 0.999 for INT8)")
    add("--device", int, 0, "index of the GPU")
    add("--workspace-mb", int, None, "memory to try kernels in (default: half of what is free)")
    made.add_argument("--no-timing-cache", action="store_true", help="time every kernel anew, and keep nothing")
    made.add_argument("--allow-float", action="store_true", help="keep an INT8 engine that runs in FP16 in part")
    made.add_argument("--no-measure", action="store_true", help="build and check only")
    made.add_argument("--trtexec", action="store_true", help="time the engine with trtexec, too, if it is there")
    made.add_argument("--force", action="store_true", help="build even if the plan that is there fits")
    made.add_argument("--verbose", action="store_true", help="show TensorRT's warnings")
    return made


def main(folder: Path, arguments: Sequence[str]) -> int:
    """Build, check and measure in a bundle's folder; gives the exit code."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        bundle = read_bundle(folder)
        options = parser(bundle).parse_args(arguments)
        check_options(options)
        need_numpy()
        return Builder(folder, bundle, options, say).run()
    except (BuildError, child.StepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {folder} cannot be written: {error}. Free some space, or copy it elsewhere.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class UsageError(Exception):
    """A wrong option; the exit code is 2."""


def read_bundle(folder: Path) -> dict[str, Any]:
    """What the bundle is made of; its files are those that were written.

    Raises:
        BuildError: If it is not whole.
    """
    try:
        bundle: dict[str, Any] = json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"{folder / BUNDLE} cannot be read ({error}). Copy the whole folder of the step trt."
        ) from None
    for name, digest in bundle["sha256"].items():
        path = folder / name
        if not path.is_file() or plan.sha256_of(path) != digest:
            what = "was altered" if path.is_file() else "is missing"
            raise BuildError(f"{path} {what}. Copy the whole folder of the step trt again.")
    return bundle


def check_options(options: argparse.Namespace) -> None:
    """Refuse a profile that cannot be.

    Raises:
        UsageError: Naming the range and the options.
    """
    frames = options.min_frames, options.opt_frames, options.max_frames
    if not 1 <= frames[0] <= frames[1] <= frames[2]:
        raise UsageError(f"1 <= --min-frames <= --opt-frames <= --max-frames must hold, got {frames}.")
    if not 1 <= options.opt_batch <= options.max_batch:
        raise UsageError(
            f"--opt-batch must be in 1..{options.max_batch} (--max-batch), got {options.opt_batch}."
            if options.max_batch >= 1
            else f"--max-batch must be at least 1, got {options.max_batch}."
        )


def need_numpy() -> None:
    """Refuse a Python without numpy.

    Raises:
        BuildError: Telling how to get it.
    """
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise BuildError(f"numpy is needed ({error}): {sys.executable} -m pip install numpy") from None


class Builder:
    """What ``main`` does, with what every part of it needs."""

    def __init__(self, folder: Path, bundle: Mapping[str, Any], options: argparse.Namespace, say: Say) -> None:
        self.folder, self.bundle, self.options, self.say = folder, bundle, options, say
        self.plan = folder / plan.PLAN
        self.profile = profile_of(bundle, options)
        self.here: dict[str, Any] = {}

    def step(self, name: str, request: Mapping[str, Any], doing: str) -> dict[str, Any]:
        """Do something native in a child process; its log goes to build.log."""

        def keep(line: str) -> None:
            with (self.folder / LOG).open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
            if self.options.verbose and not line.startswith(child.STEP):
                print(line, file=sys.stderr)

        return child.call(name, {**request, "device": self.options.device}, doing, self.say, keep)

    def run(self) -> int:
        """Everything, in order."""
        self.say("asking the driver and TensorRT")
        self.here = self.step("identify", {}, "asking the driver and TensorRT")
        told = self.here["identity"]
        self.say(f"{told['gpu']}, driver {told['driver']}, TensorRT {told['tensorrt']}")
        wanted = self.candidates()
        with plan.lock(self.plan, lambda: self.say("another process builds this plan; waiting for it")):
            why = self.why_build(wanted)
            if why is None and self.not_measured():
                self.say(f"{self.plan.name} fits, but was not measured as it is asked now")
                self.measure()
                return 0
            if why is None:
                self.say(f"{self.plan.name} fits; nothing to do. --force builds it anyway")
                return 0
            self.say(f"building {' and '.join(entry['precision'] for entry in wanted)}: {why}")
            return self.build(wanted)

    def why_build(self, wanted: Sequence[Mapping[str, Any]]) -> str | None:
        """Why something has to be done, or None where the plan that is there is what would come out."""
        if self.options.force:
            return "--force"
        reasons = [plan.why_build(self.plan, entry["key"]) for entry in wanted]
        if None not in reasons:
            return reasons[0]
        record = plan.read_sidecar(self.plan)
        if self.read(BUILT) is None or (self.read(ROW) or {}).get("sha256") != record.get("sha256"):
            return "it was not finished"
        before = record.get("wanted")
        if self.options.precision == "best" and before != "best":
            return f"the one that is there was built with --precision {before}, the other was not tried"
        return None

    def read(self, name: str) -> dict[str, Any] | None:
        """A file that :meth:`record` wrote, or None where there is none."""
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def not_measured(self) -> bool:
        """Whether something is asked that was not measured of the plan that is there."""
        built = self.read(BUILT) or {}
        wanted = {"measured": not self.options.no_measure, "trtexec": self.options.trtexec}
        return any(asked and not built.get(name) for name, asked in wanted.items())

    def candidates(self) -> list[dict[str, Any]]:
        """The graphs to build, by precision, each with the key of its plan.

        Raises:
            BuildError: If the bundle has no graph of the precision that is wanted.
        """
        typed = self.here["typed"] if self.options.form is None else self.options.form == "typed"
        graphs = [graph for graph in self.bundle["graphs"] if graph["typed"] == typed]
        wanted = ("int8", "fp16") if self.options.precision == "best" else (self.options.precision,)
        found = [graph for precision in wanted for graph in graphs if graph["precision"] == precision]
        if not found:
            there = ", ".join(sorted({graph["precision"] for graph in graphs}))
            raise BuildError(
                f"the bundle has no {self.options.precision} graph, only {there}. Run ptq before trt for int8, or give"
                f" --precision {there.split(', ')[0]}."
            )
        return [{**graph, "graph": graph, "key": self.key(graph)} for graph in found]

    def key(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """What a plan of a graph belongs to."""
        return {
            **self.here["identity"],
            "graph_sha256": self.bundle["sha256"][graph["file"]],
            "precision": graph["precision"],
            "profile": self.profile,
            "float_nodes": graph["float_nodes"],
        }

    def build(self, wanted: list[dict[str, Any]]) -> int:
        """Build the candidates, check and time them, and keep one."""
        (self.folder / LOG).write_text("")
        done: list[dict[str, Any]] = []
        try:
            for entry in wanted:
                done.append(self.candidate(entry, stop=len(wanted) == 1))
            self.time([entry for entry in done if not entry["problem"]])
            chosen, reason = choose(done, self.options.min_cosine)
            if chosen is None:
                raise BuildError(reason)
            for name in (ROW, BUILT):  # a killed process leaves no figures of the old plan beside the new one
                if (self.folder / name).exists():
                    (self.folder / name).unlink()
            self.keep(chosen)
        finally:
            for entry in wanted:
                for path in (self.work_plan(entry), plan.sidecar_of(self.work_plan(entry)), self.layers(entry)):
                    if path.exists():
                        path.unlink()
        self.say(reason)
        self.record(done, chosen, reason)
        self.measure()
        print(table(done, chosen))
        return 0

    def work_plan(self, entry: Mapping[str, Any]) -> Path:
        """Where a candidate is built."""
        return self.folder / f".{entry['precision']}.plan"

    def layers(self, entry: Mapping[str, Any]) -> Path:
        """Where what the inspector tells of a candidate is written."""
        return self.folder / f".{entry['precision']}.layers.json"

    def candidate(self, entry: Mapping[str, Any], stop: bool) -> dict[str, Any]:
        """Build and check one; what is wrong with it is in ``problem``, or ends everything if ``stop``."""
        precision = entry["precision"]
        cache = self.folder / plan.cache_name(self.here["identity"])
        request = {
            "graph_file": str(self.folder / entry["file"]),
            "graph": entry["graph"],
            "profile": self.profile,
            "plan": str(self.work_plan(entry)),
            "key": entry["key"],
            "workspace_mb": self.options.workspace_mb,
            "cache": None if self.options.no_timing_cache else str(cache),
        }
        result: dict[str, Any] = {"precision": precision, "file": entry["file"], "key": entry["key"], "problem": None}
        try:
            result.update(self.step("build", request, f"building the {precision} engine"))
            for note in result["notes"]:
                self.say(f"{precision}: {note}")
            expected = {"graph": entry["outputs"], **({"fp32": entry["reference"]} if entry["reference"] else {})}
            request = {
                "plan": request["plan"],
                "references": str(self.folder / self.bundle["references"]),
                "expected": expected,
            }
            result.update(self.step("check", request, f"checking the {precision} engine"))
            result["int8_told"] = int8_told(result, entry["graph"])
            if entry["quantized"] and not result["int8_told"]:
                note = (
                    f"whether INT8 is used is not told: the inspector names {result['weighted_layers']} of"
                    f" {entry['weighted_layers']} layers with weights"
                )
                result["notes"].append(note)
                self.say(f"{precision}: {note}")
            result["problem"] = problem_of(result, entry["graph"], self.options.allow_float, self.options.needed_cosine)
        except child.StepError as error:
            if stop:
                raise
            result["problem"] = str(error)
        if result["problem"]:
            if stop:
                raise BuildError(f"{precision}: {result['problem']}")
            self.say(f"{precision}: {result['problem']}")
        return result

    def time(self, entries: list[dict[str, Any]]) -> None:
        """Time the candidates in turns, so that what else goes on does not favour one."""
        if self.options.no_measure and len(entries) < 2:
            return
        for _ in range(ROUNDS if len(entries) > 1 else 1):
            for entry in entries:
                request = {"plan": str(self.work_plan(entry)), "frames": self.options.opt_frames, "seconds": SECONDS}
                found = self.step("measure", request, f"timing the {entry['precision']} engine")
                entry["compute_ms"] = min(found["compute_ms"], entry.get("compute_ms", found["compute_ms"]))
                self.say(f"{entry['precision']}: {found['compute_ms']:.3f} ms for {self.options.opt_frames} frames")

    def keep(self, chosen: Mapping[str, Any]) -> None:
        """Make a candidate the plan."""
        work = self.work_plan(chosen)
        data, record = plan.read_plan(work)
        about = {name: value for name, value in record.items() if name not in ("schema", "written_by", "sha256", "key")}
        outputs = next(list(graph["outputs"]) for graph in self.bundle["graphs"] if graph["file"] == chosen["file"])
        about = {**about, "wanted": self.options.precision, "outputs": outputs}
        plan.write_plan(self.plan, data, record["key"], about)
        plan.write_file(self.folder / "model.layers.json", self.layers(chosen).read_bytes())

    def measure(self) -> None:
        """Measure the plan that is there, as it is asked; the figures go into build.json and row.json."""
        built, row = self.read(BUILT) or {}, self.read(ROW) or {}
        if not self.options.no_measure:
            figures = self.figures()
            print(figures["report"])
            built["measured"] = figures["measured"]
            row.update(figures["row"])
        if self.options.trtexec:
            built["trtexec"] = self.trtexec()
        self.write(built, row)

    def write(self, built: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Write build.json and row.json."""
        for name, record in ((BUILT, built), (ROW, row)):
            plan.write_file(self.folder / name, (json.dumps(record, indent=2) + "\n").encode())

    def figures(self) -> dict[str, Any]:
        """Latency, throughput, energy and so on: all of it, the fields of a row of the table, and a table to read."""
        request = {
            "plan": str(self.plan),
            "references": str(self.folder / self.bundle["references"]),
            "frame_shift_ms": self.bundle["about"].get("frame_shift_ms", 10.0),
        }
        return self.step("figures", request, f"measuring {self.plan.name}")

    def trtexec(self) -> dict[str, Any] | None:
        """The same engine timed by NVIDIA's program, where there is one."""
        program = devices.find_tensorrt().trtexec
        if program is None:
            self.say("trtexec is not there; it comes with JetPack and with TensorRT's Debian and tar packages")
            return None
        command = trtexec_command(program, self.plan, self.profile, self.here["identity"]["tensorrt"])
        self.say("timing with trtexec")
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        found = trtexec_times(done.stdout.decode(errors="replace"))
        if done.returncode or not found:
            self.say(f"trtexec gives no times (status {done.returncode})")
            return None
        self.say(f"trtexec: median {found['median']:.3f} ms of GPU compute")
        return {"command": command, "gpu_compute_ms": found}

    def record(self, done: list[dict[str, Any]], chosen: Mapping[str, Any], reason: str) -> None:
        """Write down what was built, before it is measured."""
        built = {
            "schema": plan.SCHEMA,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": sys.version.split()[0],
            "driver": self.here["driver"],
            "device": self.here["device"],
            "chosen": chosen["precision"],
            "reason": reason,
            "min_cosine": self.options.min_cosine,
            "candidates": [{name: value for name, value in entry.items() if name != "key"} for entry in done],
            "key": chosen["key"],
            "measured": None,
            "trtexec": None,
        }
        row = {
            "schema": plan.SCHEMA,
            "pass": "trt",
            "status": "ok",
            "format": "tensorrt",
            "runtime": f"tensorrt {self.here['identity']['tensorrt']}",
            "precision": chosen["precision"],
            "device": self.here["identity"]["gpu"],
            "size_bytes": self.plan.stat().st_size,
            "build_s": chosen["build_s"],
            "cosine_min": worst(chosen, "fp32" if "fp32" in chosen["agreement"] else "graph"),
            "compute_ms": chosen.get("compute_ms"),
            "sha256": plan.sha256_of(self.plan),
            "graph_sha256": chosen["key"]["graph_sha256"],  # tells compare of which run's step it is
        }
        self.write(built, row)


def profile_of(bundle: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Shapes (batch, frames, ...) of the input that the engine is to take."""
    rest = list(bundle["input"]["shape"][2:])
    sizes = {
        "min": (1, options.min_frames),
        "opt": (options.opt_batch, options.opt_frames),
        "max": (options.max_batch, options.max_frames),
    }
    fixed = bundle["input"]["shape"][0]  # None, or the only batch that the graph takes
    return {
        "input": bundle["input"]["name"],
        **{kind: [fixed or batch, frames, *rest] for kind, (batch, frames) in sizes.items()},
    }


def worst(entry: Mapping[str, Any], against: str) -> float:
    """Lowest cosine of an engine over utterances and outputs."""
    return min(float(found["cosine"]) for found in entry["agreement"][against])


def int8_told(entry: Mapping[str, Any], graph: Mapping[str, Any]) -> bool:
    """Whether the inspector names enough layers with weights to judge by: Myelin takes over some, and is silent."""
    return 2 * int(entry["weighted_layers"]) >= int(graph["weighted_layers"])


def problem_of(
    entry: Mapping[str, Any], graph: Mapping[str, Any], allow_float: bool, needed: float | None = None
) -> str | None:
    """What is wrong with an engine that was built and run, or None.

    Args:
        needed: Cosine to its own graph; None is that of ``NEEDED_COSINE``.
    """
    broken = [found for found in entry["agreement"]["graph"] if found["not_finite"]]
    if broken:
        return (
            f"{broken[0]['output']} has {broken[0]['not_finite']} values that are NaN or infinite at"
            f" {broken[0]['frames']} frames: FP16 overflows. More nodes have to stay in FP32; give trt more calibration"
            " utterances, so that it sees the range of values."
        )
    needed = NEEDED_COSINE[entry["precision"]] if needed is None else needed
    cosine = worst(entry, "graph")
    if cosine < needed:
        return (
            f"outputs differ from ONNX Runtime on the same graph: cosine {cosine:.6f}, needed {needed}. build.log and"
            " .layers.json tell what TensorRT made of it. If that is near enough for you, --needed-cosine accepts it."
        )
    asked = graph["quantized_layers"] / max(graph["weighted_layers"], 1)
    if asked and entry["weighted_layers"] and int8_told(entry, graph):
        share = entry["int8_layers"] / entry["weighted_layers"]
        if share < NEEDED_SHARE * asked and not allow_float:
            return (
                f"silent fallback: {entry['int8_layers']} of {entry['weighted_layers']} layers with weights run in"
                f" INT8, the graph asks for {graph['quantized_layers']} of {graph['weighted_layers']}. --allow-float"
                " keeps it."
            )
    return None


def choose(entries: Sequence[dict[str, Any]], min_cosine: float) -> tuple[dict[str, Any] | None, str]:
    """The faster of the engines that are right and hold the budget, and why.

    An INT8 engine holds the budget if its outputs are as near to those of FP32 as ``min_cosine``.
    """
    good = [entry for entry in entries if not entry["problem"]]
    reasons = [f"{entry['precision']} is out: {entry['problem']}" for entry in entries if entry["problem"]]
    for entry in list(good):
        if "fp32" in entry["agreement"] and worst(entry, "fp32") < min_cosine:
            found = worst(entry, "fp32")
            reasons.append(f"{entry['precision']} is out: cosine to FP32 {found:.5f}, the budget is {min_cosine}")
            good.remove(entry)
    if not good:
        return None, f"no engine is good enough. {'; '.join(reasons)}."
    chosen = min(good, key=lambda entry: float(entry.get("compute_ms", 0.0)))
    for entry in good:
        if entry is not chosen:
            slower = entry["compute_ms"] / chosen["compute_ms"]
            reasons.append(f"{entry['precision']} takes {slower:.2f} times as long")
    return chosen, "; ".join([f"kept {chosen['precision']}", *reasons])


def trtexec_command(program: str, path: Path, profile: Mapping[str, Any], tensorrt: str) -> list[str]:
    """Time computing alone, waiting in a loop, with a CUDA graph: what 11 does by itself is asked of earlier ones."""
    shape = "x".join(map(str, [profile["min"][0], *profile["opt"][1:]]))
    options = [f"--loadEngine={path}", f"--shapes={profile['input']}:{shape}"]
    if int(tensorrt.split(".")[0]) < 11:
        options += ["--noDataTransfers", "--useSpinWait", "--useCudaGraph"]
    return [program, *options]


def trtexec_times(printed: str) -> dict[str, float]:
    """Milliseconds by name (min, max, mean, median, percentile(90%)...) of trtexec's line on GPU computing."""
    line = re.search(r"GPU Compute Time: (min = .*)", printed)
    pairs = re.findall(r"([\w()%]+) = ([\d.]+) ms", line.group(1)) if line else []
    return {name: float(value) for name, value in pairs}


def table(entries: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """What was built, in a line each."""
    lines = [f"{'engine':<10}{'compute':>12}{'cosine':>12}{'to FP32':>12}{'INT8 layers':>14}{'build':>10}"]
    for entry in entries:
        if "agreement" not in entry:
            lines.append(f"{entry['precision']:<10}failed: {str(entry['problem']).splitlines()[0]}")
            continue
        ms = f"{entry['compute_ms']:.3f} ms" if "compute_ms" in entry else "-"
        near = f"{worst(entry, 'fp32'):.5f}" if "fp32" in entry["agreement"] else "-"
        layers = f"{entry['int8_layers']} of {entry['weighted_layers']}" if entry["int8_told"] else "not told"
        mark = "  <- model.plan" if entry is chosen else ""
        cells = f"{ms:>12}{worst(entry, 'graph'):>12.5f}{near:>12}{layers:>14}{entry['build_s']:>8.0f} s{mark}"
        lines.append(f"{entry['precision']:<10}{cells}")
    return "\n".join(lines)
