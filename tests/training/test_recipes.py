"""Every recipe of the repository builds its network and learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.artifact import Artifact
from compress.training.recipe import build_network, read_recipe
from compress.training.trainer import Crops, State, train

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


def test_there_is_a_recipe_for_each_network_that_is_asked_for() -> None:
    models = {read_recipe(path).model for path in RECIPES}
    assert models == {"campplus", "ecapa_tdnn", "eres2net", "resnet34", "tdnn_blstm"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_step_of_either_length(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    recipe = replace(
        recipe, steps=2, final_steps=1, batch_size=2, accumulation=1, crop_s=0.3, final_crop_s=0.4, speeds_from_step=0
    )
    rng = np.random.default_rng(0)
    utterances = [(3000 * rng.standard_normal(9000)).astype(np.int16) for _ in range(4)]
    crops = Crops(recipe, utterances, np.array([0, 0, 1, 1]), utterances[:1])
    torch.manual_seed(recipe.seed)
    model = build_network(recipe)
    before = {name: value.clone() for name, value in model.named_parameters()}
    state = State(model, Artifact.from_module(model).embedding_size, 2 * len(recipe.speeds), recipe)
    lines: list[dict[str, float]] = []
    train(state, recipe, crops, tmp_path, lines.append, workers=0)
    assert [line["step"] for line in lines] == [1, 2]
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still
