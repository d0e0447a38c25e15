"""A training recipe: the YAML file that, with its data, makes a network's weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from compress.errors import SettingError, unknown_name
from compress.models import architecture
from compress.training.augment import Augmentation, check_bounds, check_pair
from compress.training.objective import Objective
from compress.yaml_file import read_yaml

LABELS = Objective(alpha=1.0)  # what is learned without a teacher
OF_THE_RECIPE = ("margin", "scale")  # of an objective: the recipe has its own, which grow


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained, apart from the data."""

    model: str = "campplus"
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the network
    steps: int = 4800
    batch_size: int = 32
    accumulation: int = 1  # parts of a batch, whose gradients are added up: less memory for the same batch
    crop_s: float = 1.5
    final_steps: int = 600  # the last steps, on longer crops
    final_crop_s: float = 3.0
    final_margin: float = 0.0  # of the last steps; 0: as before them
    final_speeds: bool = True  # whether the last steps hear all speeds; else the first alone, and its classes alone
    optimizer: str = "adamw"  # or sgd
    momentum: float = 0.9  # of sgd, Nesterov's
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.05
    margin: float = 0.2  # of AAM-softmax, in radians
    margin_steps: tuple[int, int] = (600, 2400)  # margin and scale grow linearly between these steps
    scale: tuple[float, float] = (16.0, 32.0)
    sub_centers: int = 1  # of each class; the nearest counts, so that crops of a wrong label find one of their own
    speeds: tuple[float, ...] = (1.0, 0.9, 1.1)  # each speed of a speaker is a class of its own
    speeds_from_step: int = 1000  # before it, only the first speed: fewer classes make a quicker start
    average_decay: float = 0.998  # of the exponential moving average of the weights
    augmentation: Augmentation = field(default_factory=Augmentation)
    features: str = "live"  # made of audio for each batch, or stored: of copies that are disturbed once
    copies: int = 4  # of each utterance at each speed, of stored features
    precision: str = "bf16"  # of the network's arithmetic while training; weights and loss are float32
    seed: int = 1
    teacher: str = ""  # a registered model or artifact folder to learn from; none: speakers' labels alone
    objective: Objective = LABELS  # weights of the terms; margin and scale are above
    layers: tuple[str, ...] = ()  # whose features are compared: names, or pairs student=teacher

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not 0 <= self.final_steps <= self.steps:
            raise SettingError("recipe: steps and batch_size must be positive, and final_steps in 0..steps.")
        if not 1 <= self.sub_centers <= 100:
            raise SettingError(f"recipe: sub_centers must be in 1..100, got {self.sub_centers}.")
        if self.accumulation < 1 or self.batch_size % self.accumulation:
            raise SettingError(
                f"recipe: accumulation cuts batch_size into equal parts; {self.batch_size} cannot be cut into"
                f" {self.accumulation}."
            )
        if self.batch_size // self.accumulation < 2:
            raise SettingError(
                "recipe: batch norm needs two crops at a time; batch_size / accumulation must be 2 or more."
            )
        if min(self.warmup_steps, self.speeds_from_step, self.seed) < 0:
            raise SettingError("recipe: warmup_steps, speeds_from_step and seed must not be negative.")
        if not self.speeds:
            raise SettingError("recipe: speeds must hold at least one speed, such as 1.0.")
        for speed in self.speeds:
            check_bounds("speeds", speed, 0.1, 10.0)
        for name, low, high in _BOUNDS:
            check_bounds(name, getattr(self, name), low, high)
        check_pair("margin_steps", self.margin_steps, 0, math.inf)
        check_pair("scale", self.scale, 1.0, 1000.0)
        if self.precision not in ("bf16", "fp32"):
            raise SettingError(f"recipe: precision must be bf16 or fp32, got '{self.precision}'.")
        if self.features not in ("live", "stored"):
            raise SettingError(f"recipe: features must be live or stored, got '{self.features}'.")
        if not 1 <= self.copies <= 1000:
            raise SettingError(f"recipe: copies must be in 1..1000, got {self.copies}.")
        if self.optimizer not in ("adamw", "sgd"):
            raise SettingError(f"recipe: optimizer must be adamw or sgd, got '{self.optimizer}'.")
        self.objective.check("recipe: objective.")
        if self.objective.needs_teacher and not self.teacher:
            raise SettingError("recipe: objective asks to equal a teacher, and there is none. Name one as `teacher`.")
        if self.teacher and not self.objective.needs_teacher:
            raise SettingError(
                f"recipe: teacher is {self.teacher}, and nothing is learned from it. Give objective a beta, gamma,"
                " delta or embedding of more than 0."
            )
        if self.layers and not self.objective.gamma:
            raise SettingError("recipe: layers are compared by objective.gamma, and that is 0.")
        if self.objective.delta and self.batch_size // self.accumulation < 3:
            raise SettingError(
                "recipe: objective.delta compares the crops of a batch, or of its parts; batch_size / accumulation"
                " must be 3 or more."
            )

    def is_final(self, step: int) -> bool:
        """Whether a step is one of the last, on longer crops."""
        return step >= self.steps - self.final_steps


_BOUNDS = (
    ("crop_s", 0.1, 600.0),
    ("final_crop_s", 0.1, 600.0),
    ("learning_rate", 0.0, 1.0),
    ("final_learning_rate", 0.0, 1.0),
    ("weight_decay", 0.0, 1.0),
    ("margin", 0.0, math.pi / 2),
    ("final_margin", 0.0, math.pi / 2),
    ("momentum", 0.0, 0.999),
    ("average_decay", 0.0, 1.0),
)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; keys that it leaves out keep their defaults.

    Raises:
        InputError: If the file is missing, unreadable or no YAML mapping.
        SettingError: For an unknown key (the nearest name is offered) or a value of the wrong type or range.
    """
    values = read_yaml(path, "recipe", "model, steps")
    if "augmentation" in values:
        values["augmentation"] = _checked(Augmentation(), values["augmentation"], f"{path}: augmentation")
    if "objective" in values:
        values["objective"] = _checked(LABELS, values["objective"], f"{path}: objective", OF_THE_RECIPE)
    recipe: Recipe = _checked(Recipe(), values, str(path))
    return recipe


def build_network(recipe: Recipe) -> nn.Module:
    """Build the network that a recipe names, with fresh weights.

    Raises:
        SettingError: If there is no such network, it is not for speakers, or it cannot be built from ``arguments``.
    """
    network = architecture(recipe.model)
    if network.task != "sv":
        raise SettingError(
            f"recipe: {recipe.model} is a network for {network.task}; only speaker networks are trained."
        )
    try:
        return network.build(**recipe.arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"recipe: {recipe.model} cannot be built from arguments {dict(recipe.arguments)}: {reason}"
        ) from error


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its defaults, in the form that :func:`read_recipe` reads."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False)


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """Give the values of a recipe as YAML has them: lists and mappings."""

    def plain(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    found = plain(dataclasses.asdict(recipe))
    objective = {name: value for name, value in found["objective"].items() if name not in OF_THE_RECIPE}
    return found | {"augmentation": plain(found["augmentation"]), "objective": plain(objective)}


def _checked(defaults: Any, values: Any, source: str, without: Sequence[str] = ()) -> Any:
    """Change a dataclass by a mapping; every value must have the type of its default."""
    if not isinstance(values, Mapping):
        raise SettingError(f"{source} must be a mapping, got {values!r}.")
    known = [f.name for f in dataclasses.fields(defaults) if f.name not in without]
    read = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"key in {source}:", str(key), known)
        default = getattr(defaults, key)
        if isinstance(default, tuple):
            if not isinstance(value, list):
                raise SettingError(f"{source}: {key} must be a list such as {list(default)}, got {value!r}.")
            kind = default[0] if default else ""
            read[key] = tuple(_typed(item, kind, f"{source}: the items of {key}") for item in value)
        else:
            read[key] = _typed(value, default, f"{source}: {key}")
    return dataclasses.replace(defaults, **read)


def _typed(value: Any, default: Any, name: str) -> Any:
    """Give a value of the type of its default; a whole number may stand for a float."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):  # and not isinstance: a bool is no number of steps
        raise SettingError(f"{name} must be of type {type(default).__name__}, got {value!r}.")
    return value
