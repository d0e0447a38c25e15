from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError, SettingError
from compress.training.objective import Objective
from compress.training.recipe import Recipe, build_network, read_recipe, to_yaml

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


def test_a_recipe_with_a_teacher_survives_yaml(tmp_path: Path) -> None:
    text = "{teacher: runs/big, layers: [a=b], objective: {beta: 0.7, gamma: 0.3, relations: [distance, angle]}}"
    recipe = read(text, tmp_path)
    assert recipe.objective == Objective(alpha=1.0, beta=0.7, gamma=0.3, relations=("distance", "angle"))
    assert read(to_yaml(recipe), tmp_path) == recipe


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
        ("steps: true", "steps must be of type int, got True"),
        ("crop_s: 0.01", r"crop_s must be in 0\.1\.\.600, got 0\.01"),
        ("learning_rate: .nan", r"learning_rate must be in 0\.\.1, got nan"),
        ("average_decay: 1.5", r"average_decay must be in 0\.\.1, got 1\.5"),
        ("seed: -1", "must not be negative"),
        ("scale: [32.0]", r"scale must be two values, the lower first, got \[32\.0\]"),
        ("scale: 32.0", "scale must be a list such as"),
        ("margin_steps: [5, 1]", r"margin_steps must be two values, the lower first, got \[5, 1\]"),
        ("margin_steps: [1.5, 2]", "items of margin_steps must be of type int, got 1.5"),
        ("scale: [low, high]", "items of scale must be of type float, got 'low'"),
        ("augmentation: {p_room: 2}", r"p_room must be in 0\.\.1, got 2"),
        ("augmentation: {snr_db: [1, 2, 3]}", "snr_db must be two values"),
        ("augmentation: {babble_snr_db: [9, 2]}", "babble_snr_db must be two values, the lower first"),
        ("augmentation: {rt60_s: [0, 1]}", r"rt60_s must be in 0\.01\.\.10, got 0"),
        ("augmentation: {p_codec: -1}", r"p_codec must be in 0\.\.1, got -1"),
        ("augmentation: {p_bands: 2}", r"p_bands must be in 0\.\.1, got 2"),
        ("augmentation: {p_masks: 2}", r"p_masks must be in 0\.\.1, got 2"),
        ("augmentation: {bands: [0, 3]}", r"bands must be in 1\.\.79, got 0"),
        ("augmentation: {band_db: [6, -6]}", "band_db must be two values, the lower first"),
        ("augmentation: {mask_bins: 80}", r"mask_bins must be in 1\.\.79, got 80"),
        ("augmentation: {masks: 0}", r"masks must be in 1\.\.100, got 0"),
        ("augmentation: loud", "augmentation must be a mapping, got 'loud'"),
        ("speeds: []", "at least one speed"),
        ("features: kept", "features must be live or stored, got 'kept'"),
        ("copies: 0", r"copies must be in 1\.\.1000, got 0"),
        ("precision: fp8", "bf16 or fp32, got 'fp8'"),
        ("speeds: [1.0, -1.0]", r"speeds must be in 0\.1\.\.10, got -1"),
        ("objective: {beta: 0.7}", "objective asks to equal a teacher, and there is none"),
        ("teacher: campplus", "teacher is campplus, and nothing is learned from it"),
        ("objective: {alpha: 0}", r"objective\.alpha, beta, gamma, delta and embedding are all 0"),
        ("objective: {alpha: -1.0}", r"objective\.alpha must be 0 or more, got -1\.0"),
        ("objective: {temperature: 0}", r"objective\.temperature must be more than 0"),
        ("objective: {margin: 0.1}", "unknown key in .*objective: 'margin'"),
        ("objective: {feature_loss: l1}", r"objective\.feature_loss must be mse or cosine, got 'l1'"),
        ("objective: {relations: [angel]}", r"objective\.relations must be of cosine, distance, angle, got 'angel'"),
        ("layers: [block1]", r"layers are compared by objective\.gamma, and that is 0"),
        ("{teacher: campplus, batch_size: 2, objective: {delta: 1}}", "batch_size / accumulation must be 3 or more"),
        ("accumulation: 5", "32 cannot be cut into 5"),
        ("accumulation: 32", "batch norm needs two crops at a time"),
        ("batch_size: 1", "batch norm needs two crops at a time"),
        ("accumulation: 0", "32 cannot be cut into 0"),
        ("optimizer: adam", "optimizer must be adamw or sgd, got 'adam'"),
        ("momentum: 1", r"momentum must be in 0\.\.0\.999, got 1"),
        ("sub_centers: 0", r"sub_centers must be in 1\.\.100, got 0"),
        ("final_margin: 2", r"final_margin must be in 0\.\.1\.5708, got 2"),
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
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(InputError, match="is not valid YAML"):
        read_recipe(tmp_path / "latin.yaml")


def test_a_network_that_cannot_be_built_is_told() -> None:
    assert isinstance(build_network(Recipe(arguments={"embedding_size": 8})), torch.nn.Module)
    for arguments in ({"embeding_size": 8}, {"growth_rate": -1}, {"feat_dim": "80"}, {1: 2}):
        with pytest.raises(SettingError, match="campplus cannot be built from arguments"):
            build_network(Recipe(arguments=arguments))


def test_a_network_for_another_task_is_not_trained() -> None:
    with pytest.raises(SettingError, match="fsmn_vad is a network for vad; only speaker networks are trained"):
        build_network(Recipe(model="fsmn_vad"))
