"""The configuration of a run: the same from the command line, YAML and Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from compress.artifact import Format
from compress.errors import InputError, SettingError, unknown_name
from compress.passes import Pass, build, pass_named, passes


@dataclass(frozen=True)
class RunConfig:
    """What to run.

    Attributes:
        model: Registry name, checkpoint (with ``arch``), artifact folder or ``.onnx`` file.
        passes: In order.
        data: Data folder; None takes the embedded data.
        trials: Name of a list in ``data``, or a path; None takes the folder's only one.
        calib: List in the form of ``wav.scp``; None takes ``calib.scp`` of ``data``.
        out: Run folder; None makes one under ``runs/``.
        device: ``cpu`` or ``cuda``, for the PyTorch rows.
        threads: Threads of every runtime while latency is measured.
    """

    passes: tuple[Pass, ...]
    model: str = "campplus"
    arch: str | None = None
    data: str | None = None
    trials: str | None = None
    calib: str | None = None
    out: str | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.passes:
            raise SettingError(f"no passes were given. Known: {', '.join(sorted(passes()))}.")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(f"device must be cpu or cuda, got '{self.device}'.")
        if not 1 <= self.threads <= 1024:
            raise SettingError(f"threads must be in 1..1024, got {self.threads}.")

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.out is not None:
            return Path(self.out)
        name = Path(self.model).stem or "run"
        return Path("runs") / "-".join([name, *(step.name for step in self.passes)])

    def to_mapping(self) -> dict[str, Any]:
        """Give the form that YAML holds and :func:`from_mapping` reads."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "passes"}
        return {**plain, "passes": [{step.name: step.settings} for step in self.passes]}


def from_mapping(values: Mapping[str, Any], source: str) -> RunConfig:
    """Read a configuration; a pass is a name, or a mapping of its name to its settings.

    Raises:
        SettingError: For an unknown key, pass or setting, or a value out of range.
    """
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise unknown_name(f"key in {source}:", key, known)
    listed = values.get("passes", ())
    if isinstance(listed, str):
        listed = listed.split(",")
    steps = tuple(_read_pass(entry, source) for entry in listed)
    plain = {key: value for key, value in values.items() if key != "passes" and value is not None}
    for key in ("model", "arch", "data", "trials", "calib", "out", "device"):
        if key in plain:
            plain[key] = str(plain[key])
    if not isinstance(plain.get("threads", 1), int):
        raise SettingError(f"{source}: threads must be a whole number, got {plain['threads']!r}.")
    return RunConfig(passes=steps, **plain)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file to a mapping, without running code from it.

    Raises:
        InputError: If it is missing or not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping (keys such as model, passes, data), not {type(values).__name__}.")
    return values


def apply_settings(entries: Sequence[Any], assignments: Sequence[str]) -> list[dict[str, Any]]:
    """Apply ``pass.key=value`` assignments to a list of passes as YAML holds it.

    Raises:
        SettingError: If an assignment has another form, or names a pass that is not in the list.
    """
    listed = [{name: dict(settings or {})} for name, settings in map(_name_and_settings, entries)]
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        name, dot, key = target.partition(".")
        if not (equals and dot and key):
            raise SettingError(f"--set {assignment}: the form is pass.key=value, for example prune.ratio=0.4.")
        pass_named(name)
        matching = [entry for entry in listed if name in entry]
        if not matching:
            raise SettingError(f"--set {assignment}: the pass {name} is not in --passes.")
        for entry in matching:
            entry[name][key] = value
    return listed


def with_links(config: RunConfig, start: Format) -> RunConfig:
    """Insert the exports that are missing between formats.

    Raises:
        SettingError: If no pass leads from one format to the next.
    """
    steps: list[Pass] = []
    current = start
    for step in config.passes:
        if step.accepts != current:
            links = [kind for kind in _exports() if (kind.accepts, kind.returns) == (current, step.accepts)]
            if not links:
                raise SettingError(
                    f"{step.name} takes {step.accepts.value}, but there is {current.value} before it,"
                    f" and no pass leads from {current.value} to {step.accepts.value}."
                )
            steps.append(links[0]())
        steps.append(step)
        current = step.returns
    return replace(config, passes=tuple(steps))


def _exports() -> list[type[Pass]]:
    """Passes that change the format."""
    return [kind for kind in passes().values() if kind.accepts != kind.returns]


def _read_pass(entry: Any, source: str) -> Pass:
    name, settings = _name_and_settings(entry)
    if not isinstance(settings or {}, Mapping):
        raise SettingError(f"{source}: the settings of {name} must be a mapping, got {settings!r}.")
    return build(pass_named(name), settings or {})


def _name_and_settings(entry: Any) -> tuple[str, Any]:
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, settings = next(iter(entry.items()))
        return str(name), settings
    return str(entry).strip(), None
