"""Reading YAML files without running code from them."""

from pathlib import Path
from typing import Any

import yaml

from compress.errors import InputError


def read_yaml(path: Path, what: str, keys: str) -> dict[str, Any]:
    """Read a YAML file to a mapping.

    Args:
        path: UTF-8 text.
        what: What the file is, for the error: ``recipe``.
        keys: A few keys that it may hold, for the error: ``model, steps``.

    Raises:
        InputError: If it is missing, unreadable or not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping (keys such as {keys}), not {type(values).__name__}.")
    return values
