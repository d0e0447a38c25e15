"""The contract of a pass."""

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from compress.artifact import Artifact, Format, Step
from compress.calibration import choose_utterances
from compress.data import DataFolder
from compress.errors import InputError, ModelError, SettingError, unknown_name
from compress.progress import Progress, Silent

Array = NDArray[np.float32]

T = TypeVar("T")

CANDIDATES = 4  # for each utterance to be chosen by its level, so many are decoded to know theirs


def _ignore(_: str) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """What a pass is handed beside the artifact.

    Attributes:
        calibration: Unlabeled utterances, each a call that returns features (frames, num_mel_bins).
        threads: For work that the pass itself runs.
        score: EER of an artifact on the run's trials, as a fraction, where there are trials.
        say: Takes a line about what is being done, for the progress display.
        speakers: Of each calibration utterance, None where it is not known; empty if none is.
        progress: Shows how far long work is.
        measure: Gives the duration in seconds and the level in decibels of the calibration utterance at a place of
            the list, where there is audio and not only features.
        source: The network that the run started from.
        files: Of each calibration utterance, where there is audio.
    """

    calibration: Sequence[Callable[[], Array]] = ()
    threads: int = 1
    score: Callable[[Artifact], float] | None = None
    say: Callable[[str], None] = _ignore
    speakers: Sequence[str | None] = ()
    progress: Progress = field(default_factory=Silent)
    measure: Callable[[int], tuple[float, float]] | None = None
    source: Artifact | None = None
    files: Sequence[Path] = ()

    def utterances(self, wanted: int, name: str) -> list[Callable[[], Array]]:
        """Give ``wanted`` calibration utterances, spread evenly over the list.

        Raises:
            InputError: If there are fewer.
        """
        self.check_enough(wanted, name)
        return spread(self.calibration, wanted)

    def check_enough(self, wanted: int, name: str) -> None:
        """Refuse a calibration list that is too short; ``name`` is the setting to change.

        Raises:
            InputError: If there are fewer than ``wanted`` utterances.
        """
        if len(self.calibration) < wanted:
            raise InputError(
                f"{name}: {wanted} calibration utterances were asked for, the list has {len(self.calibration)}."
                f" Give a longer --calib list or set {name}={len(self.calibration)}."
            )

    def places_by_level(self, wanted: int, seed: int) -> list[int]:
        """Choose places of the calibration list so that all durations and levels are among them.

        Of a list of more than ``CANDIDATES`` times as many, so many spread evenly over it are looked at. Where there
        is no audio, the places are spread evenly too.
        """
        places = list(range(len(self.calibration)))
        if self.measure is None or len(places) <= wanted:
            return spread(places, wanted)
        candidates = spread(places, min(len(places), CANDIDATES * wanted))
        durations, levels = zip(*map(self.measure, candidates), strict=True)
        return [candidates[i] for i in choose_utterances(durations, levels, wanted, seed)]


def spread(items: Sequence[T], wanted: int) -> list[T]:
    """Take ``wanted`` items, spread evenly over the list."""
    places = np.linspace(0, len(items), wanted, endpoint=False).astype(int)
    return [items[i] for i in places]


Cell: TypeAlias = (
    str | int | tuple[str, ...] | None
)  # of a table: text, number, names; None if there is nothing to tell


@dataclass(frozen=True)
class Preview:
    """What a dry run shows of a pass.

    Attributes:
        rows: Of a table, all with the same keys.
        notes: Sentences to stand below it.
    """

    rows: tuple[Mapping[str, Cell], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """One compression step. Its fields are its settings; constructing it only checks them.

    Attributes:
        name: On the command line and in the history.
        accepts: Format of the artifact it takes.
        returns: Format of the artifact it gives.
        own_speakers: Whether it is meant to learn the speakers that are met in use.
    """

    name: ClassVar[str]
    accepts: ClassVar[Format]
    returns: ClassVar[Format]
    own_speakers: ClassVar[bool] = False

    @abstractmethod
    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Derive a new artifact; the given one is never changed."""

    @property
    def calibration_utterances(self) -> int:
        """How many calibration utterances the pass will ask for, so that a run can be refused before it starts."""
        return 0

    def calibration_places(self, context: Context) -> list[int]:
        """Places in the calibration list of the utterances that the pass will use."""
        return spread(range(len(context.calibration)), self.calibration_utterances)

    @property
    def reads(self) -> tuple[str, ...]:
        """Files beside the artifact whose content decides what the pass gives."""
        return ()

    def learned(self, calibration: DataFolder) -> DataFolder | None:
        """The utterances that the network learns from, so that a run can be refused that measures on them.

        Args:
            calibration: The calibration list.

        Raises:
            InputError: If a data folder is missing or broken.
        """
        return None

    def missing(self) -> str | None:
        """What this machine lacks for the pass and how to get it, so that a run can be refused before it starts."""
        return None

    def preview(self, artifact: Artifact, context: Context) -> Preview:
        """What the pass would do to this artifact, for a dry run; nothing is written.

        Raises:
            CompressError: For what can be known to fail.
        """
        return Preview()

    def precision_after(self, precision: str) -> str:
        """Precision of what the pass gives, from that of what it is given: known before anything is run.

        Raises:
            ModelError: If it takes no artifact of that precision.
        """
        return precision

    def check_input(self, artifact: Artifact) -> None:
        """Refuse an artifact of the wrong format or precision.

        Raises:
            ModelError: Naming what was given and what is needed.
        """
        if artifact.format != self.accepts or artifact.deferred is not None:
            what = "deferred" if artifact.deferred else artifact.format.value
            raise ModelError(f"{self.name} takes {self.accepts.value} artifacts; this one is {what}.")
        self.precision_after(artifact.precision)

    def __str__(self) -> str:
        """The settings that are not at their defaults; the repr has all."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = [f"{f.name}={given[f.name]!r}" for f in dataclasses.fields(self) if given[f.name] != f.default]
        return f"{self.name}({', '.join(changed)})"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by name, as JSON can hold it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def step(self, *notes: str) -> Step:
        """Make this pass's record in the history."""
        return Step(self.name, self.settings, notes)


def build(kind: type[Pass], settings: Mapping[str, Any]) -> Pass:
    """Make a pass from settings as they come from the command line or YAML: strings are read as the field's type.

    Raises:
        SettingError: For an unknown setting (the nearest name is offered) or a value of the wrong type or range.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    types_ = typing.get_type_hints(kind)
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {kind.name}", name, known)
    return kind(**{name: _read(f"{kind.name}.{name}", value, types_[name]) for name, value in settings.items()})


def _read(name: str, value: Any, wanted: Any) -> Any:
    """Convert a value to a field's type; bool, int, float, str, a choice of names, tuples, and optional ones."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None or value in ("none", "null"):
            return None
        return _read(name, value, next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:  # which of them there are is checked by the pass, as for one made in Python
        return _read(name, value, str)
    if origin is tuple:
        if not isinstance(value, (str, list, tuple)):
            raise SettingError(f"{name} must be a list, got {value!r}.")
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_read(name, item, arguments[0]) for item in items if item != "")
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    convertible = isinstance(value, str) or (type(value) is int and wanted is float) or type(value) is wanted
    try:
        if (wanted is bool and type(value) is not bool) or not convertible:
            raise ValueError
        return wanted(value)
    except (ValueError, OverflowError):
        raise SettingError(f"{name} must be {wanted.__name__}, got {value!r}.") from None
