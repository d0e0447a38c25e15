"""What a user can mend. Anything else that goes wrong is a bug and stays an ordinary exception."""

import difflib
from collections.abc import Iterable
from typing import Any


class CompressError(Exception):
    """An error that names the input, what it holds, what was needed and what to do next."""


class SettingError(CompressError):
    """A wrong setting: unknown name, or a value out of range."""


class InputError(CompressError):
    """Audio, a data folder or a trial list that cannot be used."""


class ModelError(CompressError):
    """A checkpoint, network, ONNX file or artifact that cannot be used."""


class MachineError(CompressError):
    """Something this machine lacks: a driver, a package, disk space."""


class UnmetBudgetError(CompressError):
    """A pass could not keep to its budget.

    Attributes:
        best: The artifact that came nearest, worth keeping.
    """

    def __init__(self, message: str, best: Any) -> None:
        super().__init__(message)
        self.best = best


def unknown_name(kind: str, name: str, known: Iterable[str]) -> SettingError:
    """Build the error for a name outside a closed set, offering the nearest name or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."
    return SettingError(f"unknown {kind} '{name}'. {hint}")
