"""Post-training quantization to INT8, calibrated on unlabeled audio."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final, get_args

import numpy as np

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.calibration import Method, Range, collect_ranges, maker_of
from compress.errors import InputError, ModelError, SettingError, UnmetBudgetError, unknown_name
from compress.front_end_graph import join_front_end, split_front_end
from compress.machine import has_vnni
from compress.onnx_file import open_session
from compress.passes.base import Array, Context, Pass, Preview
from compress.rewriting import conv1d_as_conv2d
from compress.units import format_percent
from compress.vectors import cosine

if TYPE_CHECKING:
    import onnx

    from compress.quantization import Channels, Operator, Plan

WEIGHTED = ("Conv", "Gemm", "MatMul", "LSTM")
CHECKED_UTTERANCES = 10  # on which embeddings are compared
SENSITIVITY_UTTERANCES = 4
LARGEST_FLOAT_SHARE = 0.5  # of the layers; a graph with more in float is none in INT8


@dataclass(frozen=True, eq=False)
class Candidate:
    """A quantized graph and how near it is.

    Attributes:
        cosine: Mean to the float embeddings.
        eer: None where it was not asked for.
    """

    artifact: Artifact
    planned: "Plan"
    cosine: float
    eer: float | None


@final
@dataclass(frozen=True)
class PTQ(Pass):
    """Static INT8 with explicit Q/DQ, and LSTMs with INT8 weights, for the runtime that ``target`` names."""

    name: ClassVar[str] = "ptq"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    utterances: int = 40  # calibration utterances, of all durations and levels of the list
    seed: int = 0  # of their choice
    target: str = "onnxruntime"
    method: str = "minmax"  # how ranges are chosen
    operators: tuple[str, ...] = WEIGHTED  # types that become INT8
    keep: tuple[str, ...] = ()  # operators, weights or types left in float, with * and ?
    min_cosine: float | None = None  # budget: least mean cosine to the float embeddings
    max_eer_rise: float | None = None  # budget: largest rise of the EER, as a fraction
    equalize: bool = True
    bias_correction: bool = True
    reduce_range: bool | None = None  # 7-bit weights; by default on a CPU without VNNI, where 8 bits saturate

    def __post_init__(self) -> None:
        from compress.quantization.planning import OPERATORS
        from compress.quantization.scheme import SCHEMES

        if self.utterances < 1:
            raise SettingError(f"ptq.utterances must be at least 1, got {self.utterances}.")
        if self.seed < 0:
            raise SettingError(f"ptq.seed must be at least 0, got {self.seed}.")
        if self.target not in SCHEMES:
            raise unknown_name("ptq.target", self.target, SCHEMES)
        if self.method not in get_args(Method):
            raise unknown_name("ptq.method", self.method, get_args(Method))
        for kind in self.operators:
            if kind not in OPERATORS:
                raise unknown_name("type in ptq.operators", kind, OPERATORS)
        if not self.operators:
            raise SettingError("ptq.operators is empty; nothing would be quantized.")
        if self.min_cosine is not None and not 0 < self.min_cosine <= 1:
            raise SettingError(f"ptq.min_cosine must be in (0, 1], got {self.min_cosine}.")
        if self.max_eer_rise is not None and not -1 < self.max_eer_rise < 1:
            raise SettingError(f"ptq.max_eer_rise is a fraction (0.001 is 0.1 points), got {self.max_eer_rise}.")

    @property
    def calibration_utterances(self) -> int:
        """How many calibration utterances the pass will ask for."""
        return self.utterances

    def calibration_places(self, context: Context) -> list[int]:
        """Places in the calibration list, chosen by duration and level."""
        return context.places_by_level(self.utterances, self.seed)

    def precision_after(self, precision: str) -> str:
        """INT8, from a float graph only.

        Raises:
            ModelError: If the graph is not fp32.
        """
        if precision != "fp32":
            raise ModelError(f"ptq takes an fp32 graph; this one is {precision} already.")
        return "int8"

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Calibrate, insert Q/DQ, and leave in float what the budget asks for.

        Raises:
            UnmetBudgetError: With the best artifact, if the budget does not hold with half of the layers in float.
        """
        return _Quantization(self, artifact, context).run()

    def preview(self, artifact: Artifact, context: Context) -> Preview:
        """Quantize without writing anything, and show which operators ran in which precision."""
        made = _Quantization(self, artifact, context)
        result = made.run()
        rows = tuple(
            {
                "operator": operator.name,
                "count": operator.count,
                "share of time": f"{operator.share:.1%}",
                "multiplies in": operator.precision,
            }
            for operator in made.operators_run(result)
        )
        return Preview(rows, result.history[-1].notes)


class _Quantization:
    """One run of the pass."""

    def __init__(self, settings: PTQ, artifact: Artifact, context: Context) -> None:
        import onnx

        from compress import quantization

        settings.check_input(artifact)
        if settings.max_eer_rise is not None and context.score is None:
            raise InputError("ptq.max_eer_rise needs trials to score. Use compress run with --data, or ptq.min_cosine.")
        self.settings, self.artifact, self.context = settings, artifact, context
        self.quantization = quantization
        self.scheme = next(scheme for target, scheme in quantization.SCHEMES.items() if target == settings.target)
        reduced = settings.reduce_range
        if reduced is None:
            reduced = settings.target != "tensorrt" and not has_vnni()
        self.bits = 7 if reduced else 8
        self.front, self.network = split_front_end(onnx.load_from_string(artifact.onnx))
        if settings.target == "onnxruntime":
            self.network = quantization.plain_transposes(self.network)
        elif settings.target == "tensorrt":  # its parser puts an operator between the DQ of a weight and a Conv1d
            self.network = conv1d_as_conv2d(self.network)
        self.plan = quantization.plan(self.network, self.scheme, settings.operators, settings.keep, "ptq.keep")
        if not (self.plan.layers or self.plan.recurrent):
            why = f" ({next(iter(self.plan.kept.values()))})" if self.plan.kept else ""
            raise ModelError(f"ptq: the graph has nothing to quantize of {', '.join(settings.operators)}{why}.")
        self.utterances: list[Array] = []
        self.float: onnx.ModelProto = self.network
        self.ranges: Mapping[str, Range] = {}
        self.channels: Mapping[str, Channels] = {}
        self.expected: list[Array] = []
        self.notes: list[str] = []

    def run(self) -> Artifact:
        """Calibrate, then quantize within the budget."""
        self.calibrate()
        candidate = self.within_budget()
        return self.finished(candidate)

    def calibrate(self) -> None:
        """Equalise channels, and find ranges and means."""
        settings, context = self.settings, self.context
        context.check_enough(settings.utterances, "ptq.utterances")
        places = settings.calibration_places(context)
        context.say(f"calibrating on {len(places)} utterances")
        self.utterances = [context.calibration[place]() for place in places]
        equalised = 0
        if settings.equalize or settings.bias_correction:
            self.channels = self.look_at_channels(self.network)
        if settings.equalize:
            self.float, equalised = self.quantization.equalize(self.network, self.plan, self.channels)
            if equalised and settings.bias_correction:
                self.channels = self.look_at_channels(self.float)
        found = collect_ranges(
            self.float,
            self.quantization.tensors(self.float, self.plan, self.scheme),
            self.utterances,
            next(method for method in get_args(Method) if method == settings.method),
            symmetric=self.scheme.symmetric,
            threads=context.threads,
        )
        self.ranges = found.ranges
        self.expected = self.embed(self.network)
        self.notes += [self.about_utterances(found.frames, places), self.about_ranges()]
        if equalised:
            self.notes.append(f"channels of {equalised} activations equalised")

    def about_utterances(self, frames: int, places: Sequence[int]) -> str:
        """On what was calibrated: how many, how long together and each, how loud."""
        shift_s = self.artifact.front_end.frame_shift_ms / 1000
        lengths = sorted(len(utterance) * shift_s for utterance in self.utterances)
        text = f"calibrated on {len(places)} utterances, {frames * shift_s:.0f} s"
        if self.context.measure is None:
            return f"{text}, of {lengths[0]:.1f} to {lengths[-1]:.1f} s, spread evenly over the list"
        levels = sorted(self.context.measure(place)[1] for place in places)
        return (
            f"{text}, of {lengths[0]:.1f} to {lengths[-1]:.1f} s and {levels[0]:.0f} to {levels[-1]:.0f} dB, chosen by"
            f" length and level from {len(self.context.calibration)} (seed {self.settings.seed})"
        )

    def about_ranges(self) -> str:
        """What of the values that were seen the ranges hold, in the worst of them."""
        if self.settings.method == "minmax" or not self.ranges:
            return f"ranges of {len(self.ranges)} tensors cover all that was seen; nothing is clipped"
        narrow = min(self.ranges, key=lambda name: self.ranges[name].covered)
        cut = max(self.ranges, key=lambda name: self.ranges[name].clipped)
        return (
            f"ranges of {len(self.ranges)} tensors by {self.settings.method} cover at least"
            f" {self.ranges[narrow].covered:.0%} of the way between the extremes ({maker_of(self.float, narrow)}) and"
            f" clip at most {self.ranges[cut].clipped:.2%} of the values ({maker_of(self.float, cut)})"
        )

    def look_at_channels(self, model: "onnx.ModelProto") -> "Mapping[str, Channels]":
        """Means and magnitudes of what the planned layers read."""
        return self.quantization.channels_of_inputs(model, self.plan, self.utterances, self.context.threads)

    def within_budget(self) -> Candidate:
        """Quantize everything, and if that is too much, as much as the budget allows.

        Raises:
            UnmetBudgetError: If it does not hold with half of the layers in float.
        """
        self.context.say("quantizing")
        best = self.candidate(self.plan)
        limit = self.eer_limit()
        if self.holds(best, limit):
            return best
        self.context.say(f"cosine {best.cosine:.4f}: measuring the sensitivity of {len(self.plan.layers)} layers")
        drops = self.quantization.sensitivity(
            self.float,
            self.plan,
            self.ranges,
            self.scheme,
            self.utterances[:SENSITIVITY_UTTERANCES],
            self.context.progress,
            self.bits,
            self.context.threads,
        )
        worst_first = sorted(drops, key=lambda layer: -drops[layer])
        most = int(len(worst_first) * LARGEST_FLOAT_SHARE)
        tried: dict[int, Candidate] = {}

        def with_float(number: int) -> Candidate:
            if number not in tried:
                why = {
                    layer: f"sensitive: alone it costs {drops[layer]:.1e} of the cosine"
                    for layer in worst_first[:number]
                }
                planned = self.plan
                for layer, reason in why.items():
                    planned = planned.without([layer], reason)
                tried[number] = self.candidate(planned)
                self.context.say(f"{number} layers in float: cosine {tried[number].cosine:.5f}")
            return tried[number]

        if not most or not self.holds(with_float(most), limit):
            nearest = max([best, *tried.values()], key=lambda found: found.cosine)
            raise UnmetBudgetError(self.shortfall(nearest, limit), self.finished(nearest))
        low, high = 0, most  # it does not hold with `low` in float, and does with `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(with_float(middle), limit) else (middle, high)
        return tried[high]

    def candidate(self, planned: "Plan") -> Candidate:
        """Quantize by a plan and measure what it costs."""
        quantization, model = self.quantization, self.float
        if self.settings.bias_correction:
            model = quantization.correct_biases(model, planned, self.channels, self.bits)
        network = quantization.quantize(model, planned, self.ranges, self.scheme, self.bits)
        network = quantization.slim(quantization.quantize_lstms(network, planned))
        found = self.embed(network)
        similarity = float(np.mean([cosine(a, b) for a, b in zip(found, self.expected, strict=True)]))
        whole = network if self.front is None else join_front_end(self.front, network)
        files = {FILE_NAMES[Format.ONNX]: whole.SerializeToString()}
        artifact = self.artifact.with_files(files, self.settings.step(), Format.ONNX, "int8")
        score = self.context.score if self.settings.max_eer_rise is not None else None
        return Candidate(artifact, planned, similarity, score(artifact) if score else None)

    def embed(self, network: "onnx.ModelProto") -> list[Array]:
        """Embeddings of some calibration utterances, (embedding_size,) each."""
        session = open_session(network.SerializeToString(), self.context.threads)
        name = session.get_inputs()[0].name
        return [session.run(None, {name: u[None]})[0][0] for u in self.utterances[:CHECKED_UTTERANCES]]

    def eer_limit(self) -> float | None:
        """The highest EER that the budget allows."""
        if self.settings.max_eer_rise is None:
            return None
        assert self.context.score is not None, "checked on construction"
        return self.context.score(self.artifact) + self.settings.max_eer_rise

    def holds(self, candidate: Candidate, limit: float | None) -> bool:
        """Whether a candidate is within the budget."""
        near = self.settings.min_cosine is None or candidate.cosine >= self.settings.min_cosine
        return near and (limit is None or candidate.eer is None or candidate.eer <= limit)

    def shortfall(self, nearest: Candidate, limit: float | None) -> str:
        """Say how close the best candidate came."""
        reached = []
        if self.settings.min_cosine is not None:
            reached.append(f"cosine {nearest.cosine:.5f} (asked: {self.settings.min_cosine:g})")
        if limit is not None and nearest.eer is not None:
            reached.append(f"EER {format_percent(nearest.eer)} (allowed: {format_percent(limit)})")
        kept = len(self.plan.layers) - len(nearest.planned.layers)
        return (
            f"ptq: the budget cannot be met: {' and '.join(reached)} with the {kept} most sensitive of"
            f" {len(self.plan.layers)} layers in float. Relax it, calibrate on more or other audio, or train with"
            " quantization."
        )

    def finished(self, candidate: Candidate) -> Artifact:
        """Write the notes of the chosen candidate."""
        planned, artifact = candidate.planned, candidate.artifact
        types = "S8" if self.scheme.symmetric else "U8"
        weighted = self.quantization.count_weighted(self.network)
        bits = ", 7 bits" if self.bits == 7 else ""
        notes = [
            *self.notes,
            f"{len(planned.layers)} of {weighted} weighted operators in INT8: {types} activations, S8 weights per"
            f" channel{bits}",
        ]
        if planned.recurrent:
            notes.append(f"{len(planned.recurrent)} LSTM with S8 weights, its activations scaled as they come")
        notes += [f"in float: {text}" for text in self.kept(planned)]
        if self.front is not None:
            notes.append("in float: the front end in the graph")
        notes.append(f"cosine to the float graph {candidate.cosine:.4f} on {len(self.expected)} calibration utterances")
        if self.settings.target == "onnxruntime":
            notes.append(self.quantization.summary(self.operators_run(artifact)))
        return self.artifact.with_files(artifact.files, self.settings.step(*notes), Format.ONNX, "int8")

    def kept(self, planned: "Plan") -> list[str]:
        """What stays in float and why, operators with one reason together."""
        by_reason: dict[str, list[str]] = {}
        for name, why in planned.kept.items():
            by_reason.setdefault(why.split(": alone")[0], []).append(name)
        return [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({why})"
            for why, names in by_reason.items()
        ]

    def operators_run(self, artifact: Artifact) -> "tuple[Operator, ...]":
        """What ONNX Runtime made of the graph, on 3 s of input."""
        front_end = artifact.front_end
        shape = front_end.input_shape(1, front_end.frames_of(3.0))
        inputs = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.1
        name = "waveform" if front_end.in_graph else self.network.graph.input[0].name
        return self.quantization.operators_run(artifact.onnx, {name: inputs})
