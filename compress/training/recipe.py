"""A training recipe: the YAML file that, with its data, makes a network's weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import InputError, SettingError, unknown_name
from compress.training.augment import Augmentation


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained, apart from the data."""

    model: str = "campplus"
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the network
    steps: int = 4800
    batch_size: int = 32
    crop_s: float = 1.5
    final_steps: int = 600  # the last steps, on longer crops
    final_crop_s: float = 3.0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.05
    margin: float = 0.2  # of AAM-softmax, in radians
    margin_steps: tuple[int, int] = (600, 2400)  # margin and scale grow linearly between these steps
    scale: tuple[float, float] = (16.0, 32.0)
    speeds: tuple[float, ...] = (1.0, 0.9, 1.1)  # each speed of a speaker is a class of its own
    speeds_from_step: int = 1000  # before it, only the first speed: fewer classes make a quicker start
    average_decay: float = 0.998  # of the exponential moving average of the weights
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: str = "bf16"  # of the network's arithmetic while training; weights and loss are float32
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 <= self.final_steps <= self.steps:
            raise SettingError("recipe: steps and batch_size must be positive, and final_steps in 0..steps.")
        if min(self.crop_s, self.final_crop_s) < 0.1:
            raise SettingError("recipe: crop_s and final_crop_s must be at least 0.1 s.")
        if not self.speeds or min(self.speeds) <= 0:
            raise SettingError(f"recipe: speeds must be positive, got {self.speeds}.")
        if self.precision not in ("bf16", "fp32"):
            raise SettingError(f"recipe: precision must be bf16 or fp32, got '{self.precision}'.")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; keys that it leaves out keep their defaults.

    Raises:
        InputError: If the file is missing or no YAML mapping.
        SettingError: For an unknown key (the nearest name is offered) or a value of the wrong type or range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{path} must hold a mapping (keys such as model, steps), not {type(values).__name__}.")
    values = dict(values)
    if "augmentation" in values:
        values["augmentation"] = _checked(Augmentation, values["augmentation"], f"{path}: augmentation")
    recipe: Recipe = _checked(Recipe, values, str(path))
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its defaults, in the form that :func:`read_recipe` reads."""
    values = dataclasses.asdict(recipe)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    plain["augmentation"] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in values["augmentation"].items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def _checked(kind: type[Any], values: Any, source: str) -> Any:
    """Build a dataclass from a mapping; every value must have the type of its default."""
    if not isinstance(values, Mapping):
        raise SettingError(f"{source} must be a mapping, got {values!r}.")
    defaults = kind()
    known = [f.name for f in dataclasses.fields(kind)]
    read = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"key in {source}:", key, known)
        default = getattr(defaults, key)
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(type(default[0])(item) for item in value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if not isinstance(value, type(default)):
            raise SettingError(f"{source}: {key} must be of type {type(default).__name__}, got {value!r}.")
        read[key] = value
    return kind(**read)
