"""The configuration of a run: the same from the command line, YAML and Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from compress import yaml_file
from compress.artifact import Format
from compress.errors import SettingError, unknown_name
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
        timing_s: Seconds spent on timing each row; at least 20 rounds are made even so.
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
    timing_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.passes:
            raise SettingError(f"no passes were given. Known: {', '.join(sorted(passes()))}.")
        if self.device not in ("cpu", "cuda"):
            raise SettingError(f"device must be cpu or cuda, got '{self.device}'.")
        if not 1 <= self.threads <= 1024:
            raise SettingError(f"threads must be in 1..1024, got {self.threads}.")
        if not 0 <= self.timing_s <= 3600:
            raise SettingError(f"timing_s must be in 0..3600 seconds, got {self.timing_s}.")

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
            raise unknown_name(f"key in {source}:", str(key), known)
    steps = tuple(build(pass_named(name), settings) for name, settings in listed_passes(values.get("passes"), source))
    plain = {key: value for key, value in values.items() if key != "passes" and value is not None}
    for key, value in plain.items():
        kinds, wanted = _KINDS.get(key, ((str,), "text"))
        if type(value) not in kinds:
            raise SettingError(f"{source}: {key} must be {wanted}, got {value!r}.")
    return RunConfig(passes=steps, **plain)


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "threads": ((int,), "a whole number"),
    "timing_s": ((int, float), "a number of seconds"),
}


def listed_passes(value: Any, source: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a list of passes as YAML or the command line holds it: names, settings.

    Args:
        value: Names with commas between; a list of names and of mappings of a name to its settings; a mapping of
            names to settings; or None.
        source: Where it stands, for the error.

    Raises:
        SettingError: If it has another form.
    """
    if isinstance(value, str):
        value = [name for name in value.split(",") if name.strip()]
    elif isinstance(value, Mapping):
        value = [{name: settings} for name, settings in value.items()]
    elif value is None:
        value = []
    if not isinstance(value, list | tuple):
        raise SettingError(f"{source}: passes must be a list such as [prune, ptq], got {value!r}.")
    found = []
    for entry in value:
        if isinstance(entry, Mapping) and len(entry) == 1:
            ((name, settings),) = entry.items()
        elif isinstance(entry, str):
            name, settings = entry, None
        else:
            raise SettingError(f"{source}: a pass is a name, or a name with its settings, got {entry!r}.")
        if not isinstance(settings or {}, Mapping):
            raise SettingError(f"{source}: the settings of {name} must be a mapping, got {settings!r}.")
        found.append((str(name).strip(), dict(settings or {})))
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration from YAML to the mapping that :func:`from_mapping` takes.

    Raises:
        InputError: If it is missing or not a YAML mapping.
    """
    return yaml_file.read_yaml(path, "configuration file", "model, passes, data")


def apply_settings(listed: Sequence[tuple[str, dict[str, Any]]], assignments: Sequence[str]) -> list[dict[str, Any]]:
    """Apply ``pass.key=value`` assignments to passes with their settings; gives the list that YAML holds.

    Raises:
        SettingError: If an assignment has another form, or names a pass that is not in the list.
    """
    changed = [(name, dict(settings)) for name, settings in listed]
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        name, dot, key = target.partition(".")
        if not (equals and dot and key):
            raise SettingError(f"--set {assignment}: the form is pass.key=value, for example prune.ratio=0.4.")
        kind = pass_named(name)
        matching = [settings for own, settings in changed if own == name]
        if not matching:
            links = " Left out, it is inserted with its defaults." if kind in _exports() else ""
            raise SettingError(
                f"--set {assignment}: the pass {name} is not in --passes.{links} Add {name} to --passes to set it."
            )
        for settings in matching:
            settings[key] = value
    return [{name: settings} for name, settings in changed]


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
