"""TensorRT: a folder that builds, checks and measures its engine on the target, and the engine where there is a GPU."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final, get_args

import numpy as np

from compress.artifact import Artifact, Deferral, Format
from compress.errors import MachineError, ModelError, SettingError
from compress.lint import Profile, Shapes, errors, lint
from compress.machine import probe_cuda
from compress.onnx_file import with_metadata
from compress.passes.base import Array, Context, Pass
from compress.tensorrt.bundle import BundleSettings, Precision, bundle

UTTERANCES = 8  # of the calibration list: they show the range of values for FP16, and the engine is compared on them
TYPICAL_FRAMES = 300  # 3 s
COMMAND = "python build_engine.py"
OPTIONS: tuple[str, ...] = ()  # of it, where it is run here
OLDEST = (8, 5)  # of the portable form; what it would refuse is told and stops nothing
READERS = {"portable": (8, 6), "typed": (11, 4)}  # TensorRT versions whose demands the forms are checked against


@final
@dataclass(frozen=True)
class TRT(Pass):
    """Build a TensorRT engine: INT8 where the graph has Q/DQ, FP16, or the better of both.

    Engines do not travel between GPUs. Where there is none, the step is deferred, and its folder builds, checks and
    measures the engine on the target.
    """

    name: ClassVar[str] = "trt"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.TENSORRT

    min_frames: int = 50  # shortest, typical and longest utterance of the optimization profile, in frames of 10 ms
    opt_frames: int | None = None  # none: the median of the calibration utterances
    max_frames: int = 3000
    opt_batch: int = 1
    max_batch: int = 1
    precision: Precision = "best"  # best: INT8 and FP16, and the faster that holds the budget
    min_cosine: float = 0.98  # budget: as near to FP32 the embeddings of an INT8 engine have to be

    def __post_init__(self) -> None:
        frames = self.min_frames, self.typical_frames, self.max_frames
        if not 3 <= frames[0] <= frames[1] <= frames[2]:
            raise SettingError(f"trt: 3 <= min_frames <= opt_frames <= max_frames must hold, got {frames}.")
        if self.max_batch < 1:
            raise SettingError(f"trt.max_batch must be at least 1, got {self.max_batch}.")
        if not 1 <= self.opt_batch <= self.max_batch:
            raise SettingError(f"trt.opt_batch must be in 1..{self.max_batch} (max_batch), got {self.opt_batch}.")
        if self.precision not in get_args(Precision):
            raise SettingError(
                f"trt.precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}."
            )
        if not 0 < self.min_cosine <= 1:
            raise SettingError(f"trt.min_cosine must be over 0 and at most 1, got {self.min_cosine}.")

    @property
    def typical_frames(self) -> int:
        """What the engine is tuned for where no data tell it."""
        return self.opt_frames or min(max(TYPICAL_FRAMES, self.min_frames), self.max_frames)

    @property
    def calibration_utterances(self) -> int:
        """Real features show the range of values, and the engine is compared on them."""
        return UTTERANCES

    def precision_after(self, precision: str) -> str:
        """INT8 where the graph has Q/DQ and it is not put aside, FP16 otherwise.

        Raises:
            ModelError: For another precision, or if INT8 is wanted of a float graph.
        """
        if precision not in ("fp32", "int8"):
            raise ModelError(f"trt takes an fp32 or int8 graph; this one is {precision}.")
        if precision == "fp32" and self.precision == "int8":
            raise ModelError("trt: precision=int8 wants a graph with Q/DQ; run ptq before trt, or set precision=fp16.")
        return "int8" if precision == "int8" and self.precision != "fp16" else "fp16"

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Make the bundle, and build the engine with it where that can be done here.

        Raises:
            ModelError: If the parser would refuse the graph, or the front end is in it.
            MachineError: If the engine could be built here but that failed.
        """
        import onnx

        self.check_input(artifact)
        if artifact.front_end.in_graph:
            raise ModelError(
                "trt: the front end is in the graph, and in FP16 it is wrong: powers of the spectrum leave the range."
                " Export without onnx.waveform."
            )
        features = self.features(artifact, context)
        settings = self.for_data([len(utterance) for utterance in features], known=bool(context.calibration))
        context.say("writing the graphs for TensorRT")
        about = {"task": artifact.task, "frame_shift_ms": artifact.front_end.frame_shift_ms}
        graph = onnx.load_from_string(with_metadata(artifact.onnx, "threshold", None))  # it is the ONNX graph's
        files = bundle(graph, features, settings, about)
        precision = self.precision_after(artifact.precision)
        notes = [*self.notes(artifact, settings, features, files), *self.check_graphs(artifact, files)]
        missing = missing_here()
        if missing is None:
            context.say("building the engine")
            files = build_here(files, context)
            row = json.loads(files["row.json"])
            notes += [f"built here: {row['precision']} on {row['device']}, {row['runtime']}"]
            return artifact.with_files(files, self.step(*notes), self.returns, row["precision"])
        deferral = Deferral(f"{missing}; no engine was built.", COMMAND)
        return artifact.with_files(files, self.step(*notes), self.returns, precision, deferral)

    def features(self, artifact: Artifact, context: Context) -> list[Array]:
        """Those of calibration utterances, or noise where there are none: (frames, num_mel_bins) each."""
        if context.calibration:
            return [load() for load in context.utterances(min(UTTERANCES, len(context.calibration)), "trt")]
        shape = self.typical_frames, artifact.front_end.num_mel_bins
        return [np.random.default_rng(0).standard_normal(shape, dtype=np.float32)]

    def for_data(self, lengths: Sequence[int], known: bool) -> BundleSettings:
        """The bundle's settings: as they were set, and the typical length from the data if that was left open."""
        typical = self.typical_frames
        if known and self.opt_frames is None:
            typical = min(max(int(np.median(lengths)), self.min_frames), self.max_frames)
        return BundleSettings(
            self.min_frames, typical, self.max_frames, self.opt_batch, self.max_batch, self.precision, self.min_cosine
        )

    def notes(
        self, artifact: Artifact, settings: BundleSettings, features: Sequence[Array], files: Mapping[str, bytes]
    ) -> list[str]:
        """What the step has to tell: precision, profile, what stays in FP32, data that do not fit."""
        both = artifact.precision == "int8" and self.precision == "best"
        what = {"int8": "INT8 with FP16 elsewhere", "fp16": "FP16"}[self.precision_after(artifact.precision)]
        frames = f"{settings.min_frames} to {settings.max_frames} frames, tuned for {settings.opt_frames}"
        batch = "one utterance at a time" if settings.max_batch == 1 else f"batches of up to {settings.max_batch}"
        notes = [
            f"{what}{', or FP16 if that is faster or INT8 less exact than allowed' if both else ''}",
            f"the engine takes {frames}, {batch}",
        ]
        graphs = json.loads(files["bundle.json"])["graphs"]
        kept = max(len(graph["float_nodes"]) for graph in graphs)
        if kept:
            notes.append(f"{kept} nodes stay in FP32: statistics, and what leaves the range of FP16")
        outside = [len(f) for f in features if not settings.min_frames <= len(f) <= settings.max_frames]
        if outside:
            notes.append(
                f"warning: {len(outside)} of {len(features)} calibration utterances have {min(outside)} to"
                f" {max(outside)} frames, which the engine refuses; change min_frames or max_frames"
            )
        return notes

    def check_graphs(self, artifact: Artifact, files: Mapping[str, bytes]) -> list[str]:
        """What the parsers think of the graphs: the warnings.

        Raises:
            ModelError: If a parser would refuse one.
        """
        import onnx

        found: dict[str, None] = {}
        for name, data in files.items():
            if not name.endswith(".onnx"):
                continue
            graph = onnx.load_from_string(data)
            onnx.checker.check_model(graph)
            profile = self.profile(graph.graph.input[0].name, artifact.front_end.num_mel_bins)
            form = name.removesuffix(".onnx").partition("-")[0]
            findings = lint(graph, profile, READERS[form])
            if errors(findings):
                refused = "\n".join(map(str, errors(findings)))
                raise ModelError(f"trt: TensorRT would not take {name}; see docs/commands/lint.md.\n{refused}")
            found |= dict.fromkeys(map(str, findings))
            if form == "portable":
                refused_by_oldest = errors(lint(graph, profile, OLDEST))
                words = f"warning: TensorRT {OLDEST[0]}.{OLDEST[1]} would not take {name}"
                found |= {f"{words}: {finding}": None for finding in refused_by_oldest}
        return list(found)

    def profile(self, input_name: str, num_mel_bins: int) -> Profile:
        """Sizes of the features (batch, frames, num_mel_bins) that the engine is to take."""
        sizes = (1, self.min_frames), (self.opt_batch, self.typical_frames), (self.max_batch, self.max_frames)
        return {input_name: Shapes(*((batch, frames, num_mel_bins) for batch, frames in sizes))}


def missing_here() -> str | None:
    """Why no engine can be built on this machine, or None."""
    missing = probe_cuda().missing
    if missing is None and importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed for this Python (compress doctor tells how)"
    return missing


def build_here(files: Mapping[str, bytes], context: Context) -> dict[str, bytes]:
    """Build with the bundle's own script; gives the bundle with what came of it.

    Raises:
        MachineError: If that fails, with what the script says.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(data)
        command = [sys.executable, "build_engine.py", *OPTIONS]
        error: list[str] = []
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None, "it was asked for"
            for line in process.stderr:
                if error or line.startswith("error: "):
                    error.append(line.removeprefix("error: "))
                else:
                    context.say(line.rstrip().partition("] ")[2] or line.rstrip())
        if process.returncode:
            told = "".join(error).rstrip() or f"build_engine.py ended with {process.returncode}"
            raise MachineError(f"trt: {told}")
        built = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "timing-"))]
        return {**files, **{path.name: path.read_bytes() for path in built}}
