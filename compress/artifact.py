"""An artifact: a network in some format with everything needed to use it, in memory or as a folder."""

import copy
import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from compress import features, openvino_file
from compress.decision import Decision
from compress.errors import InputError, ModelError, SettingError
from compress.files import read_json, replaced_file, replaced_folder, sha256_of, write_json
from compress.models import ARCHITECTURES, MIN_FRAMES, architecture, load_with_arguments
from compress.models.checkpoint import CHECKPOINT_SUFFIXES, load_into
from compress.onnx_file import OnnxFile, read_onnx, with_metadata
from compress.surgery import count_macs, count_parameters, resize_to

SCHEMA = 1
TASKS = ("sv", "vad", "asr")
COHORTS = "cohort-*.npy"  # beside artifact.json, where its decision normalizes scores
MACS_SECONDS = 3.0  # MACs are counted on this much audio and told per second

Array = NDArray[np.float32]


class Format(StrEnum):
    """What an artifact's network is stored as."""

    TORCH = "torch"
    ONNX = "onnx"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"


FILE_NAMES = {
    Format.TORCH: "model.safetensors",
    Format.ONNX: "model.onnx",
    Format.TENSORRT: "model.plan",
    Format.OPENVINO: openvino_file.GRAPH,
}


@dataclass(frozen=True)
class FrontEnd:
    """The features a network was trained on: Kaldi Fbank with mean normalisation."""

    sample_rate: int = features.SAMPLE_RATE
    num_mel_bins: int = features.NUM_MEL_BINS
    frame_length_ms: float = features.FRAME_LENGTH_MS
    frame_shift_ms: float = features.FRAME_SHIFT_MS
    window: str = "povey"
    cmn: bool = True
    in_graph: bool = False  # the network's file computes the features itself and takes the waveform
    assumed: bool = False  # a foreign file that does not tell its features; these are the defaults

    def __post_init__(self) -> None:
        if not 4000 <= self.sample_rate <= 192000:
            raise InputError(f"front end: sample_rate must be in 4000..192000 Hz, got {self.sample_rate}.")
        fixed = (self.window, self.frame_length_ms, self.frame_shift_ms)
        if fixed != ("povey", features.FRAME_LENGTH_MS, features.FRAME_SHIFT_MS):
            raise InputError(f"front end: only 25/10 ms Povey windows are supported, got {fixed}.")

    def __call__(self, waveform: Array) -> Array:
        """What the network takes of a waveform (samples,) at ``sample_rate``: its features, or the waveform itself."""
        return waveform if self.in_graph else self.features(waveform)

    def features(self, waveform: Array) -> Array:
        """(samples,) at ``sample_rate`` -> (frames, num_mel_bins)."""
        compute = features.fbank_cmn if self.cmn else features.fbank
        return compute(waveform, self.sample_rate, self.num_mel_bins)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a waveform at ``sample_rate``.

        Raises:
            InputError: If it is shorter than one.
        """
        return features.num_frames(num_samples, self.sample_rate)

    def frames_of(self, duration_s: float) -> int:
        """Frames of an utterance of ``duration_s`` seconds."""
        return self.num_frames(int(duration_s * self.sample_rate))

    @property
    def assumption(self) -> str | None:
        """What a user has to know who gave a file that does not tell its features."""
        if not self.assumed:
            return None
        mean = "minus its mean over the utterance" if self.cmn else "with its mean"
        return (
            "the metadata of the ONNX file does not tell sample_rate and feature_normalize_type; assumed is Fbank of"
            f" {self.num_mel_bins} bins at {self.sample_rate} Hz {mean}"
        )

    @property
    def input_name(self) -> str:
        """What the network takes: ``features`` or ``waveform``."""
        return "waveform" if self.in_graph else "features"

    def input_shape(self, batch: int, frames: int) -> tuple[int, ...]:
        """Shape of what the network takes: (batch, frames, num_mel_bins), or (batch, samples) of so many frames."""
        if not self.in_graph:
            return batch, frames, self.num_mel_bins
        window, shift = features.window_and_shift(self.sample_rate)
        return batch, window + (frames - 1) * shift


@dataclass(frozen=True)
class Threshold:
    """The cosine score from which two utterances are taken for one speaker, and where it was fitted."""

    value: float
    eer: float
    trials: str
    data: str


@dataclass(frozen=True)
class Step:
    """One pass in an artifact's history: its name, its settings and what it has to tell."""

    name: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deferral:
    """Why a step could not be done on this machine, and the command that does it on the target."""

    reason: str
    command: str


@dataclass(frozen=True, eq=False)
class Artifact:
    """A network with its front end, history and figures. Never changed: passes derive a new one.

    Attributes:
        task: ``sv``, ``vad`` or ``asr``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8``: that of the weighted layers.
        params: Logical weights, whatever their storage.
        macs: Multiply-accumulates per second of audio, or None where not counted.
        model: The network in eval mode, for format torch.
        files: Deployable files by name, for the other formats.
        arch: Name of the network, or None for a foreign module.
        arguments: What ``arch`` is built from.
        stored_widths: Attributes in which the network keeps numbers of channels, by dotted path, as pruned.
        golden: ``features_<i>`` (1, frames, num_mel_bins), or ``waveform_<i>`` (1, samples) where the front end is in
            the graph, and ``embedding_<i>`` (1, embedding_size).
    """

    format: Format
    task: str
    precision: str
    front_end: FrontEnd
    embedding_size: int
    params: int
    macs: int | None
    model: nn.Module | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    arch: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stored_widths: Mapping[str, int] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    threshold: Threshold | None = None
    decision: Decision | None = None  # fitted by `compress threshold`
    deferred: Deferral | None = None
    golden: Mapping[str, Array] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        features: FrontEnd | None = None,
        task: str = "sv",
        arch: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> "Artifact":
        """Wrap a network that maps features (batch, frames, num_mel_bins) to embeddings (batch, embedding_size).

        The module is copied, and the copy is put on the CPU and in eval mode.

        Raises:
            ModelError: If it does not run on 3 s of features, does not return one embedding per utterance, or
                holds NaN or infinite weights.
        """
        front_end = features or FrontEnd()
        model = copy.deepcopy(module).eval().cpu()
        broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
        if broken:
            raise ModelError(f"{type(module).__name__} holds NaN or infinite weights in {broken[0]}.")
        example = torch.zeros(2, front_end.frames_of(MACS_SECONDS), front_end.num_mel_bins)
        try:
            with torch.no_grad():
                output = model(example)
        except Exception as error:
            raise ModelError(
                f"{type(module).__name__} does not take features of shape {list(example.shape)}: {error}"
            ) from error
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 2:
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ModelError(f"{type(module).__name__} returns {shape}; (batch, embedding_size) was expected.")
        return cls(
            format=Format.TORCH,
            task=task,
            precision="fp32",
            front_end=front_end,
            embedding_size=output.shape[1],
            params=count_parameters(model),
            macs=round(count_macs(model, example[:1]) / MACS_SECONDS),
            model=model,
            arch=arch,
            arguments=dict(arguments or {}),
        )

    @classmethod
    def from_onnx(cls, path: Path) -> "Artifact":
        """Read an ONNX file with one input (batch, frames, num_mel_bins) and one output (batch, embedding_size).

        Or one with the front end inside, as the pass ``onnx`` writes it. Where its metadata does not tell the
        features, the defaults are assumed and the front end says so.

        Raises:
            ModelError: If it is corrupt, of an unsupported opset, of another shape, has external data outside its
                folder, or tells of features that this package does not compute.
        """
        graph = read_onnx(path)
        return cls(
            format=Format.ONNX,
            task=graph.metadata["task"] if graph.metadata.get("task") in TASKS else "sv",
            precision=graph.precision,
            front_end=_front_end_of(graph, path),
            embedding_size=graph.embedding_size,
            params=graph.params,
            macs=None,
            files={FILE_NAMES[Format.ONNX]: graph.data},
        )

    @classmethod
    def open(cls, source: str | Path, arch: str | None = None) -> "Artifact":
        """Open a registry name, a checkpoint (with ``arch``), an artifact folder or an ``.onnx`` file.

        A folder named like a network is opened only if it holds an artifact.

        Raises:
            SettingError: If ``source`` is neither a known name nor a path, or the network is not for speakers.
            ModelError: If what lies there cannot be used.
        """
        path = Path(source)
        if path.is_dir() and (str(source) not in ARCHITECTURES or (path / "artifact.json").is_file()):
            return cls.load(path)
        if path.suffix == ".onnx":
            return cls.from_onnx(path)
        if path.suffix in CHECKPOINT_SUFFIXES:
            if arch is not None:
                _check_task(arch)
            model, arguments = load_with_arguments(path, arch)
            front_end = FrontEnd(num_mel_bins=arguments.get("feat_dim", features.NUM_MEL_BINS))
            return cls.from_module(model, front_end, architecture(str(arch)).task, arch, arguments)
        if path.suffix or "/" in str(source):
            raise ModelError(f"{source}: no such model. A checkpoint, artifact folder or .onnx file was expected.")
        _check_task(str(source))
        weights = architecture(str(source)).weights
        if weights is None:
            known = [name for name, entry in ARCHITECTURES.items() if entry.weights]
            raise SettingError(
                f"{source} has no embedded weights; give a checkpoint. With weights: {', '.join(known)}."
            )
        return cls.load(weights)

    @classmethod
    def load(cls, folder: Path, module: nn.Module | None = None) -> "Artifact":
        """Read an artifact folder; every file's SHA-256 is checked.

        Args:
            folder: Written by :meth:`save`.
            module: A fresh instance of a foreign network, whose class this package does not know; it is copied
                and brought to the stored widths.

        Raises:
            ModelError: If the folder is no artifact, a file is missing or altered, or the weights do not fit.
        """
        if not (folder / "artifact.json").is_file():
            raise ModelError(f"{folder} is not an artifact folder: it has no artifact.json.")
        record = read_json(folder / "artifact.json")
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise ModelError(f"{folder}/artifact.json has schema {schema}; this version reads {SCHEMA}.")
        try:
            stored = cls(**_stored_fields(folder, record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{folder}/artifact.json is damaged ({type(error).__name__}: {error}). Make the artifact again."
            ) from error
        needed = {FILE_NAMES[stored.format]} | ({openvino_file.WEIGHTS} if stored.format == Format.OPENVINO else set())
        if stored.deferred is None and needed - stored.files.keys():
            name = min(needed - stored.files.keys())
            raise ModelError(f"{folder}/artifact.json is damaged: it lists no {name}. Make the artifact again.")
        if stored.format != Format.TORCH:
            return stored
        files = dict(stored.files)
        model = _rebuild(folder, files.pop(FILE_NAMES[Format.TORCH]), stored, module)
        return replace(stored, model=model, files=files)

    def save(self, folder: Path) -> None:
        """Write the artifact folder, whole or not at all; an older one there is replaced.

        Raises:
            MachineError: If the disk is full or the folder cannot be written.
        """
        taken = any(folder.iterdir()) if folder.is_dir() else folder.exists()
        if taken and not (folder / "artifact.json").is_file():
            raise InputError(f"{folder} exists and is not an artifact folder. Choose another output folder.")
        with replaced_folder(folder) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Write the artifact's files into an existing folder, ``artifact.json`` last."""
        for name, data in self.payload.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        if self.golden:
            np.savez(folder / "golden.npz", **self.golden)  # type: ignore[arg-type]
        _write_cohort(folder, self.decision)
        write_json(folder / "artifact.json", self._record())

    @property
    def module(self) -> nn.Module:
        """The network of a torch artifact."""
        assert self.model is not None, "passes that accept torch are given torch"
        return self.model

    @cached_property
    def payload(self) -> Mapping[str, bytes]:
        """Deployable files by name."""
        if self.model is None:
            return self.files
        state = {name: value.detach().clone().contiguous() for name, value in self.model.state_dict().items()}
        return {FILE_NAMES[Format.TORCH]: safetensors.torch.save(state), **self.files}

    @cached_property
    def sha256(self) -> str:
        """Hash over the deployable files; that of the file itself when there is one."""
        hashes = [sha256_of(data) for _, data in sorted(self.payload.items())]
        return hashes[0] if len(hashes) == 1 else sha256_of("".join(hashes).encode())

    @property
    def size_bytes(self) -> int:
        """Bytes of the deployable files; of a built engine those of its plan alone."""
        engine = self.files.get(FILE_NAMES[Format.TENSORRT])
        return len(engine) if engine is not None else sum(len(data) for data in self.payload.values())

    @property
    def min_frames(self) -> int:
        """The shortest input that gives an embedding; of a foreign network, a guess."""
        return architecture(self.arch).min_frames if self.arch else MIN_FRAMES

    @property
    def onnx(self) -> bytes:
        """The serialized graph of an ONNX artifact."""
        return self.files[FILE_NAMES[Format.ONNX]]

    def with_model(self, model: nn.Module, step: Step, stored_widths: Mapping[str, int] | None = None) -> "Artifact":
        """Derive a torch artifact with another network; parameters and MACs are counted anew.

        Args:
            model: The network.
            step: What made it.
            stored_widths: Where it keeps numbers of channels that have changed; see ``surgery.widths_stored_in``.
        """
        example = torch.zeros(1, self.front_end.frames_of(MACS_SECONDS), self.front_end.num_mel_bins)
        changed = replace(
            self,
            model=model.eval(),
            params=count_parameters(model),
            macs=round(count_macs(model, example) / MACS_SECONDS),
            stored_widths={**self.stored_widths, **(stored_widths or {})},
        )
        return changed._after(step)

    def with_files(
        self,
        files: Mapping[str, bytes],
        step: Step,
        format: Format,
        precision: str,
        deferred: Deferral | None = None,
    ) -> "Artifact":
        """Derive an artifact of another format."""
        files = _with_threshold(files, None)
        changed = replace(self, model=None, files=files, format=format, precision=precision, deferred=deferred)
        return changed._after(step)

    def measured(self, threshold: Threshold, golden: Mapping[str, Array], metrics: Mapping[str, Any]) -> "Artifact":
        """The same with what was measured on it; an ONNX file tells its threshold, too."""
        files = _with_threshold(self.files, threshold)
        return replace(self, files=files, threshold=threshold, golden=golden, metrics=metrics)

    def with_decision(self, decision: Decision) -> "Artifact":
        """The same network with how it decides."""
        return replace(self, decision=decision)

    def _after(self, step: Step) -> "Artifact":
        """Append to the history; what was measured on the parent does not hold any more."""
        return replace(self, history=(*self.history, step), threshold=None, decision=None, golden={}, metrics={})

    def _pruned_shapes(self) -> dict[str, list[int]]:
        """Shapes of the tensors that differ from those of the network as it is built; all of a foreign network's."""
        if self.model is None:
            return {}
        built = architecture(self.arch).build(**self.arguments).state_dict() if self.arch else {}
        state = self.model.state_dict()
        return {name: list(t.shape) for name, t in state.items() if name not in built or built[name].shape != t.shape}

    def _record(self) -> dict[str, Any]:
        files = {
            name: {"size_bytes": len(data), "sha256": sha256_of(data)} for name, data in sorted(self.payload.items())
        }
        return {
            "schema": SCHEMA,
            "task": self.task,
            "format": self.format.value,
            "precision": self.precision,
            "model": {
                "arch": self.arch,
                "arguments": dict(self.arguments),
                "embedding_size": self.embedding_size,
                "params": self.params,
                "macs": self.macs,
                "pruned_shapes": self._pruned_shapes(),
                "stored_widths": dict(self.stored_widths),
            },
            "front_end": asdict(self.front_end),
            "threshold": asdict(self.threshold) if self.threshold else None,
            "decision": self.decision.record() if self.decision else None,
            "deferred": asdict(self.deferred) if self.deferred else None,
            "history": [{"name": s.name, "settings": dict(s.settings), "notes": list(s.notes)} for s in self.history],
            "metrics": dict(self.metrics),
            "files": files,
            "versions": versions(),
        }


def store_decision(folder: Path, decision: Decision) -> None:
    """Write a decision into an artifact folder, in place of an older one; the other files stay as they are."""
    _write_cohort(folder, decision)
    write_json(folder / "artifact.json", {**read_json(folder / "artifact.json"), "decision": decision.record()})
    for path in folder.glob(COHORTS):
        if decision.cohort is None or path.name != decision.cohort.file_name:
            path.unlink()


def _write_cohort(folder: Path, decision: Decision | None) -> None:
    if decision is not None and decision.cohort is not None:
        with replaced_file(folder / decision.cohort.file_name) as temporary, temporary.open("wb") as stream:
            np.save(stream, decision.cohort.embeddings)


def _read_decision(folder: Path, record: Mapping[str, Any] | None) -> Decision | None:
    if record is None:
        return None
    cohort = record["cohort"]
    try:
        embeddings = np.load(folder / cohort["file"], allow_pickle=False) if cohort else None
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(
            f"{folder / cohort['file']} cannot be read ({error}). Set `decision` in {folder / 'artifact.json'} to null,"
            " and fit the thresholds again with `compress threshold`."
        ) from error
    return Decision.of_record(record, embeddings)


def _check_task(name: str) -> None:
    """Refuse a network whose output is not one embedding per utterance."""
    task = architecture(name).task
    if task != "sv":
        raise SettingError(
            f"{name} is a network for {task}; commands take networks for speaker verification (sv) alone so far."
            f" In Python, compress.load_model(PATH, arch='{name}') gives it as a module."
        )


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide its results."""
    found = {}
    for name in ("speech-compress", "torch", "onnx", "onnxruntime", "openvino", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _front_end_of(graph: OnnxFile, path: Path) -> FrontEnd:
    """What the file's metadata says of the features, and the defaults where it says nothing."""
    told = graph.metadata
    sample_rate = told.get("sample_rate", str(features.SAMPLE_RATE))
    if not sample_rate.isdecimal():
        raise ModelError(f"{path}: metadata sample_rate must be a whole number, got '{sample_rate}'.")
    normalisation = told.get("feature_normalize_type", "global-mean")
    if normalisation not in ("global-mean", ""):
        raise ModelError(
            f"{path}: metadata feature_normalize_type is '{normalisation}'; computed are 'global-mean' and '' (none)."
        )
    if told.get("window", "povey") != "povey":
        raise ModelError(f"{path}: metadata window is '{told['window']}'; only 'povey' is computed.")
    if told.get("normalize_samples") == "0" and not normalisation:
        raise ModelError(
            f"{path} takes features of samples in the 16-bit range (metadata normalize_samples 0) with their mean;"
            " they are computed from samples in [-1, 1) here."
        )
    return FrontEnd(
        int(sample_rate),
        graph.num_mel_bins,
        cmn=normalisation != "",
        in_graph=graph.takes_waveform,
        assumed=not {"sample_rate", "feature_normalize_type"} <= told.keys(),
    )


def _with_threshold(files: Mapping[str, bytes], threshold: Threshold | None) -> dict[str, bytes]:
    """Write the threshold into the ONNX file where there is one, or take that of another graph out."""
    value = None if threshold is None else f"{threshold.value:.6f}"
    name = FILE_NAMES[Format.ONNX]
    changed = {name: with_metadata(files[name], "threshold", value)} if name in files else {}
    return {**files, **changed}


def _stored_fields(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a stored artifact but its network; its weights are among the files still."""
    spec = record["model"]
    for name in record["files"]:
        path = PurePosixPath(name)
        if str(path) != name or path.is_absolute() or len(path.parts) not in (1, 2) or ".." in path.parts:
            raise ModelError(f"{folder}/artifact.json lists '{name}', which is not a name of a file in its folder.")
    return {
        "format": Format(record["format"]),
        "task": record["task"],
        "precision": record["precision"],
        "front_end": FrontEnd(**record["front_end"]),
        "embedding_size": spec["embedding_size"],
        "params": spec["params"],
        "macs": spec["macs"],
        "files": {name: _checked(folder / name, entry["sha256"]) for name, entry in record["files"].items()},
        "arch": spec["arch"],
        "arguments": spec["arguments"],
        "stored_widths": spec.get("stored_widths", {}),
        "history": tuple(Step(s["name"], s["settings"], tuple(s["notes"])) for s in record["history"]),
        "threshold": Threshold(**record["threshold"]) if record["threshold"] else None,
        "decision": _read_decision(folder, record.get("decision")),
        "deferred": Deferral(**record["deferred"]) if record["deferred"] else None,
        "golden": _read_golden(folder / "golden.npz"),
        "metrics": record["metrics"],
    }


def _checked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise ModelError(f"{path} is missing; artifact.json lists it.")
    data = path.read_bytes()
    if sha256_of(data) != sha256:
        raise ModelError(f"{path} was altered: its SHA-256 is not the one in artifact.json. Make the artifact again.")
    return data


def _read_golden(path: Path) -> dict[str, Array]:
    if not path.is_file():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} cannot be read ({error}). Make the artifact again.") from error


def _rebuild(folder: Path, weights: bytes, stored: Artifact, module: nn.Module | None) -> nn.Module:
    """Build the network, bring it to the stored widths and load its weights."""
    if module is not None:
        model = copy.deepcopy(module)
    elif stored.arch is not None:
        try:
            model = architecture(stored.arch).build(**stored.arguments)
        except TypeError as error:
            raise ModelError(
                f"{folder}/artifact.json: {stored.arch} cannot be built from its arguments ({error})."
            ) from error
    else:
        raise ModelError(
            f"{folder} holds a network whose class is not known here. In Python, pass a fresh instance of it:"
            " Artifact.load(folder, module=MyNetwork())."
        )
    try:
        state = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{folder}: model.safetensors cannot be read ({error}).") from error
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    model = resize_to(model, {name: tuple(value.shape) for name, value in state.items()}, stored.stored_widths)
    load_into(model, state, str(folder))
    return model.eval()
