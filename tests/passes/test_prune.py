"""Pruning: the asked parameters go, the function of what stays is kept, and batch norm is re-estimated."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.artifact import Artifact
from compress.errors import InputError, SettingError
from compress.passes import Context, Prune
from compress.passes.recovery import batch_norms, mean_cosine, reestimate_batch_norm


@pytest.fixture(scope="module")
def pruned(campplus: Artifact, speech_context: Context) -> Artifact:
    """The embedded network at 60 % of its parameters, batch norm as it was."""
    return Prune(bn_utterances=0).run(campplus, speech_context)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4])
def test_tiny_network_loses_what_was_asked(tiny: Artifact, tiny_context: Context, ratio: float, scope: str) -> None:
    result = Prune(ratio=ratio, scope=scope, round_to=1, bn_utterances=0).run(tiny, tiny_context)
    assert abs(result.params / tiny.params - (1 - ratio)) <= 0.01
    assert (result.macs == tiny.macs) == (ratio == 0)
    assert (result.sha256 == tiny.sha256) == (ratio == 0)


def test_campplus_keeps_the_asked_parameters_within_a_hundredth(campplus: Artifact, pruned: Artifact) -> None:
    assert abs(pruned.params / campplus.params - 0.6) <= 0.01
    assert pruned.params == sum(parameter.numel() for parameter in pruned.module.parameters())
    assert pruned.macs is not None
    assert campplus.macs is not None
    assert pruned.macs < 0.85 * campplus.macs
    removed, exact = pruned.history[-1].notes
    assert removed == f"removed {1 - pruned.params / campplus.params:.1%} of the parameters (asked 40.0%):" + (
        f" {campplus.params:,} to {pruned.params:,}"
    )
    assert float(exact.split(" to ")[1].split()[0]) < 1e-10


def test_widths_are_multiples_of_eight(pruned: Artifact) -> None:
    widths = {m.out_channels for m in pruned.module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}
    assert {width % 8 for width in widths} == {0}


def test_reestimated_batch_norm_brings_the_embedding_back(
    campplus: Artifact, pruned: Artifact, speech_features: list[np.ndarray]
) -> None:
    held_out, unlabeled = speech_features[:8], speech_features[8:]
    model = copy.deepcopy(pruned.module)
    before = mean_cosine(campplus.module, model, held_out)
    reestimate_batch_norm(model, unlabeled)
    after = mean_cosine(campplus.module, model, held_out)
    assert after > before
    assert not any(module.training for module in model.modules())
    learned = dict(model.named_parameters())
    assert all(torch.equal(value, learned[name]) for name, value in pruned.module.named_parameters())


def test_pass_reestimates_batch_norm_and_says_what_it_brought(tiny: Artifact, tiny_context: Context) -> None:
    plain = Prune(bn_utterances=0).run(tiny, tiny_context)
    result = Prune(bn_utterances=16).run(tiny, tiny_context)
    expected = copy.deepcopy(plain.module)
    utterances = [load() for load in tiny_context.utterances(16, "prune.bn_utterances")]
    reestimate_batch_norm(expected, utterances)
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), result.module.buffers(), strict=True))
    before, after = (mean_cosine(tiny.module, a.module, utterances) for a in (plain, result))
    assert after > before
    assert result.history[-1].notes[-1] == (
        f"batch norm re-estimated on 16 utterances: cosine to the dense embedding {before:.3f} to {after:.3f}"
    )


def test_pruned_network_is_rebuilt_from_its_folder(
    small_campplus: Artifact, tiny: Artifact, tiny_context: Context, fresh_tiny, tmp_path: Path
) -> None:
    pruned_campplus = Prune(ratio=0.3, bn_utterances=0).run(small_campplus, Context())
    pruned_campplus.save(tmp_path / "campplus")
    pruned_tiny = Prune().run(tiny, tiny_context)
    pruned_tiny.save(tmp_path / "tiny")
    loaded = (Artifact.load(tmp_path / "campplus"), Artifact.load(tmp_path / "tiny", module=fresh_tiny()))
    for made, again in zip((pruned_campplus, pruned_tiny), loaded, strict=True):
        features = torch.randn(2, 130, made.front_end.num_mel_bins)
        with torch.inference_mode():
            assert torch.equal(again.module(features), made.module(features))
        assert (again.params, again.macs, again.history) == (made.params, made.macs, made.history)


def test_network_can_be_pruned_again(tiny: Artifact, tiny_context: Context) -> None:
    once = Prune(ratio=0.3, round_to=1).run(tiny, tiny_context)
    twice = Prune(ratio=0.3, round_to=1).run(once, tiny_context)
    assert abs(twice.params / tiny.params - 0.49) <= 0.02
    assert [step.name for step in twice.history] == ["prune", "prune"]


def test_network_without_batch_norm_is_pruned_too() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), Mean(), nn.Linear(64, 16))
    result = Prune(bn_utterances=0).run(Artifact.from_module(module), Context())
    assert batch_norms(result.module) == []
    assert len(result.history[-1].notes) == 2


class Mean(nn.Module):
    """(batch, frames, channels) -> (batch, channels)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"prune\.ratio must be in 0\.\.1 \(fraction of parameters to remove\), got 1\.0"),
        ({"ratio": -0.1}, r"prune\.ratio must be in 0\.\.1"),
        ({"ratio": float("nan")}, r"prune\.ratio must be in 0\.\.1"),
        ({"scope": "local"}, r"prune\.scope must be uniform or global, got 'local'"),
        ({"round_to": 0}, r"prune\.round_to must be at least 1, got 0"),
        ({"bn_utterances": -1}, r"prune\.bn_utterances must be 0 or at least 2, got -1"),
        ({"bn_utterances": 1}, r"prune\.bn_utterances must be 0 or at least 2, got 1"),
    ],
)
def test_setting_out_of_range_is_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Prune(**settings)


def test_ratio_that_cannot_be_reached_is_told(tiny: Artifact, tiny_context: Context) -> None:
    with pytest.raises(SettingError, match=r"ratio 0\.99 cannot be reached: .* 0\.\d+ of the parameters is removed"):
        Prune(ratio=0.99).run(tiny, tiny_context)


def test_too_few_utterances_are_told(tiny: Artifact, noise) -> None:
    context = Context(calibration=[lambda features=features: features for features in noise(5, 16)])
    with pytest.raises(InputError, match=r"prune\.bn_utterances: 60 calibration utterances were asked for, .* has 5\."):
        Prune().run(tiny, context)
