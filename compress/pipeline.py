"""A run: passes in order, each followed by evaluation, resumable at any point, ending with the table.

runs/<name>/NN-<pass>/     the artifact of each step; ``step.json`` says what made it, ``embeddings-<runtime>.npy``
                           is kept for the report
"""

import contextlib
import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

import compress
from compress import machine, table
from compress.artifact import Artifact, Threshold, versions
from compress.audio import probe
from compress.calibration import level_db
from compress.config import RunConfig, from_mapping, with_links
from compress.data import DataFolder, embedded_data
from compress.errors import CompressError, InputError, MachineError, UnmetBudgetError
from compress.evaluation.memory import peak_rss_of
from compress.evaluation.side_by_side import time_runners
from compress.evaluation.speakers import Figures, Verification, measure
from compress.files import (
    append_line,
    is_temporary,
    read_json,
    remove_temporary,
    replaced_folder,
    sha256_of,
    write_json,
    write_text,
)
from compress.passes import Context, Pass
from compress.progress import Progress, Silent
from compress.report import TrialScores, render_report, summarize
from compress.runners import Runner, golden_outputs, open_runner, runners_for, torch_threads
from compress.verification import eer

__all__ = ["RunConfig", "from_mapping", "run"]

LATENCY_SECONDS = 3.0  # of audio
MARKER = "run.yaml"  # tells a run folder
EVENTS = "events.jsonl"
BASELINE = "baseline"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PlannedStep:
    """A step before it is run: where it goes, what makes it and the name of what it gives."""

    folder: Path
    variant: str
    maker: Pass | None  # None for the baseline


@dataclass(frozen=True, eq=False)
class Earlier:
    """What an earlier run left of a step.

    Attributes:
        rows: None if it was killed before they were measured.
        embeddings: Those of each runtime that was measured.
    """

    artifact: Artifact
    build_s: float
    rows: list[dict[str, Any]] | None
    embeddings: Mapping[str, Array]


@dataclass(frozen=True)
class Plan:
    """A checked configuration with its inputs read."""

    config: RunConfig
    source: Artifact
    data: DataFolder
    trials: Path
    verification: Verification
    calibration: DataFolder
    context: Context
    steps: tuple[PlannedStep, ...]
    warnings: tuple[str, ...]

    @property
    def data_label(self) -> str:
        """Name of the data for tables and thresholds."""
        return self.data.root.resolve().name if self.config.data else "embedded"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every step depends on beside its parent and its settings."""
        return {
            "code": code_hash(),
            "versions": versions(),
            "trials": sha256_of(self.trials),
            "data": _list_hash(self.data, self.verification.trials.utterances),
            "calibration": _list_hash(self.calibration, self.calibration.utterances),
            "device": self.config.device,
        }


def plan(config: RunConfig) -> Plan:
    """Check a configuration and read its inputs; nothing is written.

    Raises:
        CompressError: For anything wrong that can be known before work starts.
    """
    if config.device == "cuda" and machine.probe_cuda().missing:
        raise MachineError(f"device cuda: {machine.probe_cuda().missing}. Use --device cpu.")
    source = Artifact.open(config.model, config.arch)
    config = replace(with_links(config, source.format), out=str(config.folder))
    precision = source.precision
    for maker in config.passes:
        check_files(maker)
        precision = maker.precision_after(precision)
    data = DataFolder.read(config.data or embedded_data())
    trials = data.find_trials(config.trials)
    verification = Verification.read(data, trials)
    wanted = max((step.calibration_utterances for step in config.passes), default=0)
    calibration = data.calibration(config.calib) if wanted or config.calib else data.subset(())
    context = calibration_context(calibration, source)
    check_calibration(calibration, config.passes, context)
    tested = data.subset(verification.trials.utterances)
    warnings = [text for maker in config.passes for text in check_learned(maker, calibration, tested)]
    steps = [PlannedStep(config.folder / f"00-{BASELINE}", BASELINE, None)]
    names: list[str] = []
    for number, maker in enumerate(config.passes, start=1):
        variant = "+".join([*names, maker.name])
        steps.append(PlannedStep(config.folder / f"{number:02d}-{maker.name}", variant, maker))
        if maker.name != "onnx":  # the export is a link, not a change: prune+ptq and not prune+onnx+ptq
            names.append(maker.name)
    return Plan(config, source, data, trials, verification, calibration, context, tuple(steps), tuple(warnings))


def check_files(maker: Pass) -> None:
    """Refuse a pass for which this machine lacks something, or which reads a file that is not there.

    Raises:
        MachineError: If a package is missing.
        InputError: If a file is missing.
    """
    lacking = maker.missing()
    if lacking is not None:
        raise MachineError(f"{maker.name}: {lacking}")
    for path in maker.reads:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; {maker.name} was told to read it.")


def calibration_context(calibration: DataFolder, source: Artifact) -> Context:
    """What passes are handed of a calibration list."""
    names = calibration.utterances

    @cache
    def measure(place: int) -> tuple[float, float]:
        waveform = calibration_waveform(calibration, names[place], source.front_end.sample_rate)
        return len(waveform) / source.front_end.sample_rate, level_db(waveform)

    return Context(
        calibration=[partial(calibration_features, calibration, name, source) for name in names],
        speakers=[calibration.speakers.get(name) for name in names],
        measure=measure,
        source=source,
        files=[calibration.path(name) for name in names],
    )


def check_calibration(calibration: DataFolder, makers: Sequence[Pass], context: Context) -> None:
    """Read the calibration audio that the passes will use, so that broken audio does not stop a run half-way.

    Raises:
        InputError: If the list is too short, a file of it is missing, or one that will be used cannot be.
    """
    for maker in makers:
        if len(calibration) < maker.calibration_utterances:
            raise InputError(
                f"{maker.name} asks for {maker.calibration_utterances} calibration utterances, the list has"
                f" {len(calibration)}. Give a longer --calib list, or ask for fewer."
            )
    for utterance in calibration.utterances:
        if not calibration.path(utterance).is_file():
            raise InputError(f"{calibration.path(utterance)}: no such audio file; the calibration list names it.")
    for place in dict.fromkeys(place for maker in makers for place in maker.calibration_places(context)):
        context.calibration[place]()


def check_learned(maker: Pass, calibration: DataFolder, tested: DataFolder) -> list[str]:
    """Refuse a pass that learns from what the run measures on.

    Returns:
        A warning, if it learns from other utterances of speakers who have to be strangers.

    Raises:
        InputError: If an utterance of the trials is learned from, under whatever name, or one of the files is missing.
    """
    learned = maker.learned(calibration)
    if learned is None:
        return []
    shared = learned.shared_with(tested)
    if shared:
        raise InputError(
            f"{maker.name} would learn from {len(shared)} of the {len(tested)} utterances that the run measures on, one"
            f" is {shared[0]}; the EER would be too good. Take them out of {learned.root}, or name other trials with"
            " --data or --trials."
        )
    known = {tested.speakers.get(name) for name in tested.utterances} - {None}
    same = known & {learned.speakers.get(name) for name in learned.utterances}
    if maker.own_speakers or not same:
        return []
    return [
        f"warning: {maker.name} learns from other utterances of {len(same)} of the {len(known)} speakers of the trials;"
        " the EER of strangers may be higher."
    ]


def run(config: RunConfig, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run the passes, measure after each, and write the run folder.

    Args:
        config: What to run.
        resume: Reuse the finished steps of an earlier run in the same folder whose inputs, settings and code are
            the same.
        progress: Told how far the work is.

    Returns:
        The content of ``table.json``.

    Raises:
        CompressError: For wrong input; nothing is written then. A pass that fails is a row of status "failed".
    """
    return Run(plan(config), resume, progress or Silent()).execute()


class Run:
    """One execution of a plan."""

    def __init__(self, planned: Plan, resume: bool, progress: Progress) -> None:
        self.plan, self.config, self.progress = planned, planned.config, progress
        self.folder = self.config.folder
        self.new_folders = claim_folder(self.folder, resume)
        self.resume = resume
        self.scores: dict[str, TrialScores] = {}
        self.baseline: Array | None = None

    def execute(self) -> dict[str, Any]:
        """Do every step, then time all variants side by side, then write the table and the report."""
        write_text(self.folder / MARKER, yaml.safe_dump(self.config.to_mapping(), sort_keys=False))
        self.event("start", resume=self.resume, version=compress.__version__)
        for warning in self.plan.warnings:
            self.progress.say(warning)
        rows: list[dict[str, Any]] = []
        artifact = self.plan.source
        failure: str | None = None
        for step in self.plan.steps:
            if failure:
                rows.append(self.unmade_row(step, failure))
                continue
            try:
                artifact, made = self.step(step, artifact)
                rows += made
                if step.maker is None:  # not before: if the baseline fails, an earlier run stays as it was
                    self.remove_others()
                if artifact.deferred and step is not self.plan.steps[-1]:
                    failure = f"not tried, because {step.variant} is deferred."
            except CompressError as error:
                if step.maker is None:
                    self.withdraw()
                    raise
                if isinstance(error, UnmetBudgetError):  # no key: a resumed run makes it anew
                    save_step(step.folder, error.best, {"key": None, "build_s": None, "rows": None})
                self.event("failed", step=step.folder.name, reason=str(error))
                rows.append(self.unmade_row(step, str(error)))
                failure = f"not tried, because {step.variant} failed."
        self.add_timings(rows)
        result = {
            "schema": table.SCHEMA,
            "run": self.folder.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": {**machine.describe(), "threads": self.config.threads, "versions": versions()},
            "data": self.describe_data(),
            "rows": rows,
        }
        self.write_results(result)
        self.event("done")
        return result

    def remove_others(self) -> None:
        """Remove the steps of an earlier run that are none of this one, so that nobody takes them for its result."""
        planned = {step.folder.name for step in self.plan.steps}
        for folder in sorted(self.folder.glob("[0-9][0-9]-*")):
            if folder.name not in planned and (folder / "step.json").is_file():
                shutil.rmtree(folder)
                self.progress.say(f"{folder.name}: not among the passes any more, removed")
                self.event("removed", step=folder.name)

    def step(self, step: PlannedStep, parent: Artifact) -> tuple[Artifact, list[dict[str, Any]]]:
        """Make and measure one step, or take it from the earlier run."""
        key = _hash({**self.plan.inputs, "parent": parent.sha256, "pass": _identity(step.maker, self.plan.calibration)})
        earlier = self.earlier(step, key)
        if earlier and earlier.rows is not None:
            self.progress.say(f"{step.folder.name}: unchanged, taken from the earlier run")
            self.event("reused", step=step.folder.name, key=key)
            for figures in earlier.rows:
                if figures["status"] == "ok":
                    self.keep_scores(step.variant, earlier.embeddings[figures["runtime"]])
            return earlier.artifact, earlier.rows
        if earlier:
            self.progress.say(f"{step.folder.name}: made by the earlier run, measuring it")
            artifact, build_s = earlier.artifact, earlier.build_s
        else:
            if step.folder.exists():
                shutil.rmtree(step.folder)  # of other settings: it must not stand there if this one fails
            artifact, build_s = self.make(step, parent)
            if step.maker is not None:
                save_step(step.folder, artifact, {"key": key, "build_s": build_s, "rows": None})
            self.event("made", step=step.folder.name, key=key, build_s=build_s)
        artifact, rows, embeddings = self.evaluate(step, artifact, build_s)
        save_step(step.folder, artifact, {"key": key, "build_s": build_s, "rows": rows}, embeddings)
        self.event("measured", step=step.folder.name)
        return artifact, rows

    def earlier(self, step: PlannedStep, key: str) -> "Earlier | None":
        """What the earlier run left for this step, if it was made in the same way and is still whole."""
        record = step.folder / "step.json"
        if not (self.resume and record.is_file()):
            return None
        try:
            found = read_json(record)
            if not isinstance(found, dict) or found.get("key") != key:
                self.progress.say(f"{step.folder.name}: its input, settings, data or code changed; made anew")
                return None
            artifact, rows = Artifact.load(step.folder), found["rows"]
            measured = [figures["runtime"] for figures in rows or () if figures["status"] == "ok"]
            kept = {runtime: read_embeddings(step.folder, runtime) for runtime in measured}
            return Earlier(artifact, found["build_s"], rows, kept)
        except CompressError as error:
            self.progress.say(f"{step.folder.name}: damaged since the earlier run, made anew ({error})")
            return None

    def make(self, step: PlannedStep, parent: Artifact) -> tuple[Artifact, float]:
        """Run the pass; returns the artifact and the seconds it took."""
        if step.maker is None:
            return parent, 0.0
        self.progress.say(f"{step.folder.name}: {step.maker}")
        context = replace(
            self.plan.context,
            threads=machine.cores(),
            score=self.score,
            say=lambda text: self.progress.say(f"{step.folder.name}: {text}"),
            progress=self.progress,
        )
        started = time.monotonic()
        with torch_threads(context.threads):
            artifact = step.maker.run(parent, context)
        return artifact, round(time.monotonic() - started, 3)

    def evaluate(
        self, step: PlannedStep, artifact: Artifact, build_s: float
    ) -> tuple[Artifact, list[dict[str, Any]], dict[str, Array]]:
        """Embed the trial list with every runtime that can run the artifact here, and fit its threshold."""
        if artifact.deferred:
            common = self.common_figures(step, artifact, build_s)
            return artifact, [table.row(**common, status="deferred", **asdict(artifact.deferred))], {}
        found: list[dict[str, Any]] = []
        embeddings: dict[str, Array] = {}
        for kind in runners_for(artifact.format):
            runner = kind(artifact, 1, self.config.device)
            embedded = self.plan.verification.embed(runner, self.progress, f"{step.variant}: {kind.runtime}")
            embeddings[kind.runtime] = embedded
            figures = measure(self.plan.verification, embedded, self.baseline)
            if not found:
                threshold = Threshold(figures.threshold, figures.eer, self.plan.trials.name, self.plan.data_label)
                metrics = {name: value for name, value in asdict(figures).items() if value is not None}
                golden = golden_outputs(runner, self.example_inputs(artifact))
                artifact = artifact.measured(threshold, golden, metrics)
            found.append(_plain(figures) | {"status": "ok", "runtime": kind.runtime, "device": runner.device})
            self.keep_scores(step.variant, embedded)
        if not found:
            found = [{"status": "deferred", "reason": f"no runtime here runs {artifact.format.value}."}]
        common = self.common_figures(step, artifact, build_s)  # of what is stored: an ONNX file tells its threshold
        return artifact, [table.row(**common, **figures) for figures in found], embeddings

    def common_figures(self, step: PlannedStep, artifact: Artifact, build_s: float) -> dict[str, Any]:
        """Fields that do not depend on the runtime."""
        record = artifact.history[-1] if step.maker and artifact.history else None
        assumption = artifact.front_end.assumption if step.maker is None else None
        return {
            "build_s": build_s,
            "variant": step.variant,
            "pass": step.maker.name if step.maker else None,
            "settings": step.maker.settings if step.maker else {},
            "notes": [*(record.notes if record else ()), *([assumption] if assumption else ())],
            "format": artifact.format.value,
            "precision": artifact.precision,
            "params": artifact.params,
            "size_bytes": None if artifact.deferred else artifact.size_bytes,
            "macs": artifact.macs,
            "artifact": {"folder": step.folder.name, "sha256": artifact.sha256},
        }

    def unmade_row(self, step: PlannedStep, reason: str) -> dict[str, Any]:
        """Row of a step that failed or could not be tried."""
        assert step.maker is not None, "the baseline is read while planning"
        return table.row(
            **{"pass": step.maker.name},
            variant=step.variant,
            settings=step.maker.settings,
            notes=[],
            status="failed",
            reason=reason,
            format=step.maker.returns.value,
        )

    def keep_scores(self, variant: str, embeddings: Array) -> None:
        """Keep the trial scores for the report, and the baseline's embeddings for comparison."""
        if self.baseline is None:
            self.baseline = embeddings
        self.scores.setdefault(variant, measure_threshold(self.plan.verification, embeddings))

    def example_inputs(self, artifact: Artifact) -> list[Array]:
        """What the network takes of two real utterances, for the golden file: a whole one, and 0.9 s of another."""
        first, second = self.plan.verification.trials.utterances[:2]
        rate = artifact.front_end.sample_rate
        short = self.plan.data.waveform(second, rate)[: int(0.9 * rate)]
        return [artifact.front_end(self.plan.data.waveform(first, rate)), artifact.front_end(short)]

    def score(self, artifact: Artifact) -> float:
        """EER of an artifact on the run's trials, for passes that search."""
        runner = open_runner(artifact, 1, self.config.device)
        return measure(self.plan.verification, self.plan.verification.embed(runner, self.progress, "scoring")).eer

    def add_timings(self, rows: list[dict[str, Any]]) -> None:
        """Time all variants interleaved, so that their ratios hold whatever else the machine does."""
        timed = [figures for figures in rows if figures["status"] == "ok"]
        variants = [[figures["artifact"]["sha256"], figures["runtime"]] for figures in timed]
        about = [self.config.threads, self.config.device, self.config.timing_s, machine.describe()]
        key = _hash([variants, about, code_hash(), versions()])
        path = self.folder / "timings.json"
        found = kept_timings(path, key) if self.resume else None
        if found is None:
            found = self.measure_timings(timed)
            write_json(path, {"key": key, "rows": found})
        for figures, timing in zip(timed, found, strict=True):
            figures.update(timing["figures"], threads=self.config.threads)
            figures["notes"] = [*figures["notes"], *timing["notes"]]

    def measure_timings(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Latency, throughput and peak memory of each row: the figures, and notes on what could not be measured."""
        runners = [self.runner_of(figures) for figures in rows]
        self.progress.say(f"timing {len(rows)} variants side by side, {self.config.threads} thread(s)")
        utterances = self.plan.verification.trials.utterances
        timings = time_runners(runners, self.plan.data, utterances, LATENCY_SECONDS, self.config.timing_s)
        found = []
        for runner, timing, figures in zip(runners, timings, self.progress.track(rows, "peak memory"), strict=True):
            peak, notes = self.peak_rss(runner, figures["artifact"]["folder"])
            if runner.artifact.front_end.in_graph:
                notes.append("the latency of the model includes the front end, which is in its graph")
            measured = {
                "latency_ms": timing.model.as_dict(),
                "e2e_latency_ms": timing.whole.as_dict(),
                "speedup": timing.speedup,
                "rtf": timing.whole.mean / 1000 / LATENCY_SECONDS,
                "qps": 1000 / timing.whole.mean,
                "peak_rss_bytes": peak,
            }
            found.append({"figures": measured, "notes": notes})
        return found

    def runner_of(self, figures: Mapping[str, Any]) -> Runner:
        """Load what a row is about, in the runtime of the row."""
        artifact = Artifact.load(self.folder / figures["artifact"]["folder"])
        kind = next(k for k in runners_for(artifact.format) if k.runtime == figures["runtime"])
        return kind(artifact, self.config.threads, self.config.device)

    def peak_rss(self, runner: Runner, folder: str) -> tuple[int | None, list[str]]:
        """Peak memory of a fresh process that loads a variant and runs it on the CPU, or why it was not measured."""
        if runner.device != "cpu":
            return None, []
        front_end = runner.artifact.front_end
        shape, place = front_end.input_shape(1, front_end.frames_of(LATENCY_SECONDS)), (self.folder / folder).resolve()
        try:
            _, peak = peak_rss_of(type(runner).run_once, str(place), shape, self.config.threads)
        except (MachineError, OSError) as error:
            return None, [f"peak memory was not measured: {error}"]
        return peak, []

    def describe_data(self) -> dict[str, Any]:
        """What the figures were measured on."""
        trials = self.plan.verification.trials
        return {
            "folder": self.plan.data_label,
            "trials": self.plan.trials.name,
            "n_trials": len(trials),
            "n_targets": int(trials.labels.sum()),
            "n_utterances": len(trials.utterances),
            "n_speakers": len({self.plan.data.speaker(utterance) for utterance in trials.utterances}),
            "calibration_utterances": len(self.plan.calibration),
        }

    def withdraw(self) -> None:
        """Leave the disk as it was: the baseline could not be measured, so nothing is worth keeping."""
        if not self.resume:
            for name in (MARKER, EVENTS):
                (self.folder / name).unlink(missing_ok=True)
        for folder in self.new_folders:
            with contextlib.suppress(OSError):  # somebody put something there meanwhile
                folder.rmdir()

    def write_results(self, result: dict[str, Any]) -> None:
        """Write the table in all its forms and the report."""
        write_json(self.folder / "table.json", result)
        write_text(self.folder / "table.csv", table.to_csv(result["rows"]))
        said = [*summarize(result), *(table.reason(figures) for figures in result["rows"] if figures["reason"])]
        write_text(self.folder / "table.md", "\n".join([table.to_markdown(result["rows"]), *(f"{s}\n" for s in said)]))
        write_text(self.folder / "report.html", render_report(result, self.scores))

    def event(self, kind: str, **details: Any) -> None:
        """Append a line to ``events.jsonl``."""
        line = {"time": round(time.time(), 3), "event": kind, **details}
        append_line(self.folder / EVENTS, json.dumps(line))


def claim_folder(folder: Path, resume: bool) -> list[Path]:
    """Make the run folder, or refuse one that holds something else. What a killed run was writing is cleared away.

    Returns:
        The folders that were made, innermost first.

    Raises:
        InputError: If it holds another run and ``resume`` is off, or files that are no run.
    """
    found = list(folder.iterdir()) if folder.is_dir() else []
    unfinished = [path for path in found if is_temporary(path)]
    if len(found) > len(unfinished):
        if not (folder / MARKER).is_file():
            raise InputError(f"{folder} is not empty and not a run. Choose another --out folder.")
        if not resume:
            raise InputError(
                f"{folder} holds a run already. Go on with it by --resume, or choose another --out folder."
            )
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder} cannot be made ({error.strerror}). Choose another --out folder.") from error
    for path in unfinished:
        remove_temporary(path)
    return new


def kept_timings(path: Path, key: str) -> list[dict[str, Any]] | None:
    """Timings of an earlier run, if they are there, whole, and of the same variants under the same conditions."""
    try:
        kept = read_json(path)
    except InputError:
        return None
    rows = kept.get("rows") if isinstance(kept, dict) and kept.get("key") == key else None
    return rows if isinstance(rows, list) else None


def read_embeddings(folder: Path, runtime: str) -> Array:
    """Read the embeddings that an earlier run kept beside the artifact.

    Raises:
        InputError: If they are missing or damaged.
    """
    path = folder / f"embeddings-{runtime}.npy"
    try:
        embeddings: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return embeddings


def save_step(
    folder: Path, artifact: Artifact, record: Mapping[str, Any], embeddings: Mapping[str, Array] | None = None
) -> None:
    """Write the artifact folder of a step together with its record, whole or not at all."""
    with replaced_folder(folder) as temporary:
        artifact.write(temporary)
        for runtime, matrix in (embeddings or {}).items():
            np.save(temporary / f"embeddings-{runtime}.npy", matrix)
        write_json(temporary / "step.json", record)


def measure_threshold(data: Verification, embeddings: Array) -> TrialScores:
    """Scores of the trials with the threshold at the EER point."""
    scores = data.scores(embeddings)
    return TrialScores(data.trials.labels, scores, eer(data.trials.labels, scores)[1])


@lru_cache
def code_hash() -> str:
    """Hash of this package's source: a step made by other code is not reused."""
    root = Path(compress.__file__).parent
    files = sorted(root.rglob("*.py"))
    return _hash([[str(path.relative_to(root)), sha256_of(path)] for path in files])


def calibration_features(calibration: DataFolder, utterance: str, source: Artifact) -> Array:
    """Features of a calibration utterance, (frames, num_mel_bins).

    Raises:
        InputError: If the audio cannot be used or is too short; the file is named.
    """
    front_end = source.front_end
    waveform = calibration_waveform(calibration, utterance, front_end.sample_rate)
    try:
        features = front_end.features(waveform)
    except InputError as error:
        raise InputError(f"{calibration.path(utterance)}: {error}") from error
    if len(features) < source.min_frames:
        raise InputError(
            f"{calibration.path(utterance)}: {len(features)} frames are too short to calibrate with; at least"
            f" {source.min_frames} are needed. Take it off the calibration list."
        )
    return features


def calibration_waveform(calibration: DataFolder, utterance: str, sample_rate: int) -> Array:
    """Waveform of a calibration utterance, (samples,) at ``sample_rate`` hertz.

    Raises:
        InputError: If the audio cannot be used, or was recorded at a lower rate.
    """
    path = calibration.path(utterance)
    recorded = probe(path).sample_rate
    if recorded < sample_rate:
        raise InputError(
            f"{path}: {recorded} Hz. The network takes {sample_rate} Hz, and there is nothing above {recorded // 2} Hz"
            f" to calibrate on. Give a list of recordings at {sample_rate} Hz or more; if the network will get such"
            f" audio in use, resample the files to {sample_rate} Hz first."
        )
    return calibration.waveform(utterance, sample_rate)


def _identity(maker: Pass | None, calibration: DataFolder) -> Any:
    """What makes a step: the pass, its settings, what it reads, and its source, which may lie outside this package."""
    if maker is None:
        return None
    learned = maker.learned(calibration)
    read = [sha256_of(Path(path)) for path in maker.reads]
    read += [] if learned is None else [_list_hash(learned, learned.utterances)]
    return [maker.name, maker.settings, read, source_hash(type(maker))]


def source_hash(kind: type[Pass]) -> str | None:
    """Hash of the file that defines a pass; None of one that was typed in."""
    try:
        return sha256_of(Path(inspect.getfile(kind)))
    except (OSError, TypeError):
        return None


def _list_hash(data: DataFolder, utterances: tuple[str, ...]) -> str:
    """Hash of names, speakers, sizes and modification times: cheap, and changes when the audio does."""

    def entry(utterance: str) -> list[Any]:
        path = data.path(utterance)
        stat = path.stat()
        return [utterance, data.speakers.get(utterance), str(path.resolve()), stat.st_size, stat.st_mtime_ns]

    return _hash([entry(utterance) for utterance in utterances])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(figures: Figures) -> dict[str, Any]:
    """Figures as JSON holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(figures).items()}
