from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError, SettingError
from compress.training.recipe import Recipe, read_recipe, to_yaml

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def read(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


@given(steps=st.integers(600, 10000), margin=st.floats(0, 0.5), speeds=st.lists(st.floats(0.8, 1.2), min_size=1))
def test_a_recipe_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, steps: int, margin: float, speeds: list[float]
) -> None:
    recipe = Recipe(steps=steps, margin=margin, speeds=tuple(speeds))
    assert read(to_yaml(recipe), tmp_path_factory.mktemp("recipe")) == recipe


def test_every_recipe_of_the_repository_reads() -> None:
    found = sorted(RECIPES.glob("*.yaml"))
    assert found
    for path in found:
        read_recipe(path)


def test_an_unknown_key_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'steps'"):
        read("stepz: 10", tmp_path)
    with pytest.raises(SettingError, match="Did you mean 'p_noise'"):
        read("augmentation: {p_nois: 0.1}", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "steps must be of type int, got 'many'"),
        ("steps: 0", "must be positive"),
        ("crop_s: 0.01", "at least 0.1 s"),
        ("precision: fp8", "bf16 or fp32, got 'fp8'"),
        ("speeds: [1.0, -1.0]", "speeds must be positive"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read(text, tmp_path)


def test_what_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold a mapping"):
        read("- 1", tmp_path)
    with pytest.raises(InputError, match="no such recipe"):
        read_recipe(tmp_path / "absent.yaml")
