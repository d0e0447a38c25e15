from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.artifact import Artifact, FrontEnd
from compress.errors import InputError, ModelError, SettingError
from compress.models.tdnn_blstm import TDNNBLSTM
from compress.training.distillation import class_logits, cosine_matrix_loss, embedding_loss, soft_label_loss
from compress.training.objective import Objective
from compress.training.recipe import Recipe
from compress.training.trainer import Crops, State, train
from compress.training.tutor import find_tutor

RECIPE = Recipe(
    steps=5,
    final_steps=1,
    final_crop_s=0.4,
    crop_s=0.3,
    batch_size=4,
    warmup_steps=1,
    margin_steps=(1, 3),
    speeds=(1.0, 0.9),
    speeds_from_step=2,
    precision="fp32",
)
EVERYTHING = Objective(alpha=1.0, beta=0.7, beta_decay=0.5, gamma=0.3, delta=1.0, embedding=1.0)
LAYERS = ("wide=tdnn.0",)


class Student(nn.Module):
    """Mean of two pointwise layers: (batch, frames, 80) -> (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.last = nn.Linear(80, 10), nn.BatchNorm1d(10), nn.Linear(10, 6)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(torch.relu(self.wide(features)).mean(1)))
        return found


def crops(recipe: Recipe = RECIPE) -> Crops:
    rng = np.random.default_rng(0)
    utterances = [(3000 * rng.standard_normal(9000)).astype(np.int16) for _ in range(6)]
    return Crops(recipe, utterances, np.array([0, 0, 1, 1, 2, 2]), [])


def state(recipe: Recipe) -> State:
    torch.manual_seed(0)
    model = Student()
    return State(model, 6, 6, recipe, tutor=find_tutor(recipe, model, crops(recipe), "cpu"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    arguments = {"embedding_size": 12, "channels": 8, "hidden_size": 4, "attention_channels": 4}
    path = tmp_path_factory.mktemp("teacher") / "model"
    Artifact.from_module(TDNNBLSTM(**arguments), arch="tdnn_blstm", arguments=arguments).save(path)
    return str(path)


def taught(teacher: str, objective: Objective = EVERYTHING) -> Recipe:
    return replace(RECIPE, teacher=teacher, objective=objective, layers=LAYERS if objective.gamma else ())


def test_the_teacher_hears_the_features_of_the_batch_and_is_not_changed(teacher: str) -> None:
    """Every term against the losses it is made of, of what both networks give for the same batch."""
    recipe = taught(teacher)
    begun, module = state(recipe), Artifact.open(teacher).module
    features, labels = crops(recipe)[3]
    terms, accuracy = begun.losses(features, labels, begun.step, None)
    assert begun.tutor is not None
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in begun.tutor.module.parameters())
    assert all(parameter.grad is not None for parameter in begun.heads.parameters())
    ours, theirs = begun.model(features), module(features)
    centers = torch.stack([F.normalize(module(crops().clean(label, 4))).mean(0) for label in range(6)])
    scale = recipe.scale[1]
    student, wanted = class_logits(ours, begun.classifier.weight, scale), class_logits(theirs, centers, scale)
    adapted = begun.tutor.comparison.adapters["embedding"](ours)
    assert terms["CE"].item() == pytest.approx(begun.classifier(ours, labels)[0].item(), rel=1e-5)
    assert terms["KD"].item() == pytest.approx(soft_label_loss(student, wanted, 4.0).item(), rel=1e-4)
    assert terms["relation"].item() == pytest.approx(cosine_matrix_loss(ours, theirs).item(), rel=1e-5)
    assert terms["embedding"].item() == pytest.approx(embedding_loss(adapted, theirs).item(), rel=1e-5)
    assert terms["feature"] > 0
    assert accuracy is not None


def test_soft_labels_are_over_the_classes_that_have_crops(teacher: str) -> None:
    recipe = taught(teacher, Objective(beta=1.0))
    begun = state(recipe)
    features, labels = crops(recipe)[0]
    few, _ = begun.losses(features, labels, begun.step, 3)
    begun.classifier.weight.data[3:] = 0.3
    again, _ = begun.losses(features, labels, begun.step, 3)
    every, _ = begun.losses(features, labels, begun.step, None)
    assert few["KD"].item() == pytest.approx(again["KD"].item(), rel=1e-6)
    assert every["KD"].item() != pytest.approx(few["KD"].item(), rel=1e-3)


@pytest.mark.parametrize(
    "objective",
    [Objective(beta=1.0), Objective(gamma=1.0), Objective(delta=1.0), Objective(embedding=1.0)],
    ids=["beta", "gamma", "delta", "embedding"],
)
def test_each_term_alone_teaches(teacher: str, tmp_path: Path, objective: Objective) -> None:
    recipe = replace(taught(teacher, objective), steps=60, learning_rate=1e-2, batch_size=8, speeds_from_step=0)
    begun, lines = state(recipe), []
    train(begun, recipe, crops(recipe), tmp_path, lines.append, workers=0)
    (term,) = {"KD", "feature", "relation", "embedding"} & lines[0].keys()
    (before, _), (after, _) = (x.losses(*crops(recipe)[0], x.step, None) for x in (state(recipe), begun))
    assert after[term] < 0.9 * before[term]
    assert ("accuracy" in lines[0]) == (objective.beta > 0)


def test_interrupted_and_resumed_heads_and_optimizer_are_those_of_an_unbroken_run(teacher: str, tmp_path: Path) -> None:
    recipe = taught(teacher)
    whole, first, second = state(recipe), state(recipe), state(recipe)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    train(whole, recipe, crops(recipe), tmp_path / "whole", lambda line: None, workers=0)

    def interrupt(line: dict[str, float]) -> None:
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(first, recipe, crops(recipe), tmp_path / "broken", interrupt, workers=0)
    second.load(tmp_path / "broken" / "checkpoint.pt")
    train(second, recipe, crops(recipe), tmp_path / "broken", lambda line: None, workers=0)
    assert flat(whole.heads.state_dict()).keys() >= {"centers", "adapters.embedding.weight"}
    for part in ("model", "average", "classifier", "heads", "optimizer"):
        ours, theirs = flat(getattr(whole, part).state_dict()), flat(getattr(second, part).state_dict())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])) for name, value in ours.items())


def flat(values: object, name: str = "") -> dict[str, Tensor | float]:
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in flat(value, f"{name}.{key}".strip(".")).items()}
    return {name: values} if isinstance(values, Tensor | float | int) else {}


def test_a_checkpoint_of_another_teacher_is_refused(teacher: str, tmp_path: Path) -> None:
    recipe = taught(teacher)
    begun = state(recipe)
    begun.save(tmp_path / "checkpoint.pt")
    begun.origin["teacher"] = "another"
    with pytest.raises(InputError, match="the teacher is another file"):
        begun.load(tmp_path / "checkpoint.pt")


def test_teachers_that_do_not_fit(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="unknown model 'campplu'"):
        state(taught("campplu"))
    with pytest.raises(SettingError, match="unknown layer in the recipe's layers 'wid'"):
        state(replace(taught(teacher), layers=("wid=tdnn.0",)))
    with pytest.raises(SettingError, match=r"no layer has the same name.* or set gamma to 0"):
        state(replace(taught(teacher), layers=()))
    foreign = Artifact.from_module(
        TDNNBLSTM(40, 4, 4, 4, 4),
        FrontEnd(num_mel_bins=40),
        arch="tdnn_blstm",
        arguments={"feat_dim": 40, "embedding_size": 4, "channels": 4, "hidden_size": 4, "attention_channels": 4},
    )
    foreign.save(tmp_path / "foreign")
    with pytest.raises(ModelError, match="takes 40 mel bins at 16000 Hz minus their mean; a training computes 80"):
        state(taught(str(tmp_path / "foreign")))
