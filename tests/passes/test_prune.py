"""Pruning: the asked parameters go, the function of what stays is kept, and batch norm is re-estimated."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.artifact import Artifact, FrontEnd, Step
from compress.errors import CompressError, InputError, SettingError
from compress.passes import Context, Prune, build
from compress.passes.planning import Planner
from compress.passes.recovery import batch_norms, mean_cosine, reestimate_batch_norm


@pytest.fixture(scope="module")
def pruned(campplus: Artifact, speech_context: Context) -> Artifact:
    """The embedded network at 60 % of its parameters, batch norm as it was."""
    return Prune(scope="uniform", bn_utterances=0).run(campplus, speech_context)


@pytest.mark.parametrize("scope", ["uniform", "global", "sensitivity"])
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


class Plain(nn.Module):
    """Two TDNN layers, mean and deviation over time, embedding: a network of which both layers can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(16, 48, 5, bias=False)
        self.norm1 = nn.BatchNorm1d(48)
        self.second = nn.Conv1d(48, 48, 3, dilation=2, bias=False)
        self.norm2 = nn.BatchNorm1d(48)
        self.embedding = nn.Linear(96, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.first(x.transpose(1, 2))))
        y = torch.relu(self.norm2(self.second(y)))
        result: torch.Tensor = self.embedding(torch.cat([y.mean(-1), y.std(-1)], dim=1))
        return result


PLAIN = 16 * 48 * 5 + 48 * 48 * 3 + 4 * 48 + 96 * 24 + 24  # parameters


@pytest.fixture(scope="module")
def plain() -> Artifact:
    torch.manual_seed(0)
    model = Plain().train()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight.uniform_(0.5, 1.5)
        model(torch.randn(8, 60, 16))
    return Artifact.from_module(model, FrontEnd(num_mel_bins=16))


def test_the_default_is_two_fifths_of_the_parameters() -> None:
    assert Prune().ratio == 0.4
    assert Prune() == Prune(ratio=0.4)
    assert Prune(macs_ratio=0.2).ratio is None


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"macs_ratio": 0.3}, r"removed (\d+\.\d)% of the multiply-accumulates \(asked 30\.0%\): .* for 3 s of audio"),
        ({"params": 9000}, r"removed 3\d\.\d% of the parameters: 13,272 to ([\d,]+) \(asked 9,000\)"),
        ({"size_mb": 0.03}, r"removed \d+\.\d% of the bytes of weights: 0\.05 MB to (0\.03) MB \(asked 0\.03 MB\)"),
    ],
)
def test_other_targets_are_met_and_told(plain, tiny_context, settings: dict[str, float], note: str) -> None:
    result = Prune(**settings, round_to=1, bn_utterances=0).run(plain, tiny_context)
    told = re.fullmatch(note, result.history[-1].notes[0])
    assert told, result.history[-1].notes[0]
    reached = float(told[1].replace(",", ""))
    if "macs_ratio" in settings:
        assert abs(result.macs / plain.macs - 0.7) <= 0.01
        assert reached == pytest.approx(100 * (1 - result.macs / plain.macs), abs=0.06)
    elif "params" in settings:
        assert result.params == reached == pytest.approx(9000, rel=0.01)
    else:
        elements = sum(tensor.numel() for tensor in result.module.state_dict().values())
        assert 4 * elements / 1e6 == pytest.approx(0.03, abs=0.01 * 0.05)
    if "params" not in settings:
        expected = f"removed {1 - result.params / PLAIN:.1%} of the parameters: {PLAIN:,} to {result.params:,}"
        assert result.history[-1].notes[1] == expected


@pytest.mark.parametrize("score", ["l1", "l2", "bn_scale", "activation", "taylor"])
@pytest.mark.parametrize("scope", ["uniform", "global", "sensitivity"])
def test_every_score_goes_with_every_scope(plain, speaking_context, score: str, scope: str) -> None:
    settings = {"score_utterances": 6, "sensitivity_utterances": 3, "round_to": 1, "bn_utterances": 0}
    result = Prune(ratio=0.3, score=score, scope=scope, **settings).run(plain, speaking_context)
    assert abs(result.params / plain.params - 0.7) <= 0.01


@pytest.fixture
def speaking_context(tiny_context: Context) -> Context:
    """Calibration features with speakers, two of each."""
    return replace(tiny_context, speakers=[f"s{i // 2}" for i in range(len(tiny_context.calibration))])


def test_scores_choose_different_channels(plain, speaking_context) -> None:
    kinds = ("l1", "l2", "bn_scale", "activation", "taylor")
    made = {Prune(score=score, bn_utterances=0).run(plain, speaking_context).sha256 for score in kinds}
    assert len(made) > 3


def test_the_speakers_matter_to_taylor(plain, speaking_context) -> None:
    maker = Prune(score="taylor", bn_utterances=0, score_utterances=8)
    others = replace(speaking_context, speakers=[f"s{i % 7}" for i in range(len(speaking_context.calibration))])
    assert maker.run(plain, speaking_context).sha256 != maker.run(plain, others).sha256
    silent = replace(speaking_context, speakers=[None, *speaking_context.speakers[1:]])
    with pytest.raises(InputError, match=r"Put an utt2spk beside the calibration list, or choose another score\."):
        maker.run(plain, silent)
    alone = replace(speaking_context, speakers=["s0"] * len(speaking_context.calibration))
    with pytest.raises(InputError, match="score taylor tells speakers apart"):
        maker.run(plain, alone)


def test_a_score_that_says_nothing_of_the_network_is_refused() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), Mean(), nn.Linear(64, 16))
    with pytest.raises(
        SettingError, match=r"prune\.score bn_scale says nothing of any channel of this network\. Use l1"
    ):
        Prune(score="bn_scale", scope="uniform", bn_utterances=0).run(Artifact.from_module(module), Context())


def test_groups_that_a_score_says_nothing_of_are_told() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(80, 64), nn.ReLU(), Mean(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)]
    artifact = Artifact.from_module(nn.Sequential(*layers))
    result = Prune(score="bn_scale", scope="uniform", bn_utterances=0).run(artifact, Context())
    assert "1 of 2 groups were scored by l1: bn_scale says nothing of them" in result.history[-1].notes


def test_embedded_weights_bring_their_sensitivities(campplus: Artifact) -> None:
    """No audio is needed to plan for them; any other weights of the same network are measured."""
    said: list[str] = []
    planner = Planner(Prune(), campplus, Context(say=said.append))
    table = planner.sensitivity(planner.scores()[0])
    assert said[-1] == "sensitivities of the embedded weights"
    assert len(table.losses) == len(planner.graph.groups())
    other = copy.deepcopy(campplus.module)
    torch.nn.init.zeros_(other.head.conv1.weight)
    changed = campplus.with_model(other, Step("", {}, ()))
    with pytest.raises(
        InputError, match=r"prune\.scope sensitivity measures on unlabeled utterances, and there are none"
    ):
        Prune(bn_utterances=0).run(changed, Context())


def test_kept_layers_are_left_whole(plain, tiny_context) -> None:
    result = Prune(ratio=0.3, keep=("first",), round_to=1, bn_utterances=0).run(plain, tiny_context)
    assert result.module.first.weight.shape == plain.module.first.weight.shape
    assert len(result.module.second.weight) < len(plain.module.second.weight)
    assert abs(result.params / plain.params - 0.7) <= 0.01


def test_channels_of_a_file_go_and_no_others(plain, tiny_context, tmp_path: Path) -> None:
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"first": [0, 5, 47], "embedding": [1]}))
    result = Prune(channels=str(path), bn_utterances=0).run(plain, tiny_context)
    kept = [i for i in range(48) if i not in (0, 5, 47)]
    assert torch.equal(result.module.first.weight, plain.module.first.weight[kept])
    assert torch.equal(result.module.second.weight, plain.module.second.weight[:, kept])
    assert (
        result.history[-1].notes[0].endswith(f"{PLAIN:,} to {result.params:,}; the channels are those of channels.json")
    )
    assert result.history[-1].notes[1] == "embedding: 1 of 1 channels stay: it is an output of the network"


def test_masks_of_a_pruner_go(plain, tiny_context, tmp_path: Path) -> None:
    norms = plain.module.first.weight.detach().abs().sum((1, 2))
    mask = (norms > norms.median()).float()
    path = tmp_path / "masks.pt"
    torch.save({"first": {"weight": mask[:, None, None].expand(48, 16, 5).clone(), "bias": None}}, path)
    result = Prune(channels=str(path), bn_utterances=0).run(plain, tiny_context)
    assert torch.equal(result.module.first.weight, plain.module.first.weight[mask.bool()])


def test_a_table_of_sensitivities_is_written_once_and_used_again(plain, tiny_context, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    maker = Prune(scope="sensitivity", sensitivity=str(path), bn_utterances=0, sensitivity_utterances=4)
    first = maker.run(plain, tiny_context)
    written = path.read_bytes()
    said: list[str] = []
    again = maker.run(plain, replace(tiny_context, say=said.append))
    assert path.read_bytes() == written
    assert f"sensitivities of {path}" in said
    assert first.sha256 == again.sha256
    assert json.loads(written)["network"] == plain.sha256
    replace(maker, ratio=0.2).run(plain, tiny_context)
    with pytest.raises(InputError, match=r"sensitivity\.json was measured with score 'l1', not 'l2'"):
        replace(maker, score="l2").run(plain, tiny_context)
    with pytest.raises(InputError, match=r"sensitivity\.json was measured with network '\w+', not '\w+'"):
        maker.run(first, tiny_context)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"sensitivity\.json is not a sensitivity table of this version"):
        maker.run(plain, tiny_context)


def test_sensitivity_by_eer_asks_the_score_of_the_run(plain, tiny_context) -> None:
    asked: list[int] = []

    def score(artifact: Artifact) -> float:
        asked.append(int((artifact.module.norm1.weight == 0).sum()))
        return 0.1 + 0.01 * asked[-1]  # the first layer is sensitive, the second is not

    maker = Prune(ratio=0.2, scope="sensitivity", sensitivity_loss="eer", bn_utterances=0, round_to=1)
    result = maker.run(plain, replace(tiny_context, score=score))
    assert asked == [0, 12, 24, 36, 0, 0, 0]
    assert len(result.module.first.weight) == 48
    assert len(result.module.second.weight) < 48


def test_a_preview_shows_groups_and_writes_nothing(plain, tiny_context, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    maker = Prune(ratio=0.3, scope="sensitivity", sensitivity=str(path), keep=("embed*",), sensitivity_utterances=3)
    preview = maker.preview(plain, tiny_context)
    assert not path.exists()
    assert [(row["group"], row["width"], row["stays because"]) for row in preview.rows] == [
        ("first", 48, None),
        ("second", 48, "keep names a layer of it"),
        ("embedding", 24, "it is an output of the network"),
    ]
    first, second, embedding = preview.rows
    assert first["members"] == ("first", "norm1", "second")
    assert first["planned"] < 48
    assert second["planned"] == 48
    assert first["parameters each"] == 5 * 16 + 2 + 3 * 48
    assert first["MACs each"] == 5 * 16 * 294 + 3 * 48 * 290  # 298 frames, fewer after each kernel
    assert embedding["MACs each"] is None
    removed = maker.run(plain, tiny_context)
    assert len(removed.module.first.weight) == first["planned"]
    assert removed.history[-1].notes[0] == preview.notes[0]


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
    pruned_campplus = Prune(ratio=0.3, scope="uniform", bn_utterances=0).run(small_campplus, Context())
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
    result = Prune(scope="uniform", bn_utterances=0).run(Artifact.from_module(module), Context())
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
        ({"scope": "local"}, r"prune\.scope must be uniform, global or sensitivity, got 'local'"),
        ({"score": "l3"}, r"prune\.score must be l1, l2, bn_scale, activation or taylor, got 'l3'"),
        ({"normalise": "sum"}, r"prune\.normalise must be mean, max or none, got 'sum'"),
        ({"sensitivity_loss": "wer"}, r"prune\.sensitivity_loss must be cosine or eer, got 'wer'"),
        ({"macs_ratio": 1.5}, r"prune\.macs_ratio must be in 0\.\.1 \(fraction of multiply-accumulates .*, got 1\.5"),
        ({"latency_ratio": -1.0}, r"prune\.latency_ratio must be in 0\.\.1 \(fraction of latency to save\), got -1\.0"),
        ({"params": 0}, r"prune\.params must be at least 1, got 0"),
        ({"size_mb": 0.0}, r"prune\.size_mb must be more than 0, got 0\.0"),
        ({"size_mb": float("inf")}, r"prune\.size_mb must be more than 0, got inf"),
        ({"score_utterances": 0}, r"prune\.score_utterances must be at least 1, got 0"),
        ({"sensitivity_utterances": 0}, r"prune\.sensitivity_utterances must be at least 1, got 0"),
        ({"ratio": 0.4, "params": 9}, r"prune: one target is needed, got ratio and params\. Leave all but one out"),
        ({"ratio": 0.4, "latency_ratio": 0.1, "scope": "uniform"}, "need the scope sensitivity, got 'uniform'"),
        ({"channels": "a.json", "latency_ratio": 0.1}, "got latency_ratio and channels. Leave all but one"),
        ({"ratio": 0.4, "channels": "a.json"}, r"prune: one target is needed, got ratio and channels\."),
        ({"macs_ratio": 0.4, "latency_ratio": 0.1, "size_mb": 1.0}, "got macs_ratio and latency_ratio and size_mb"),
        ({"channels": "a.json", "keep": ("first",)}, "prune: channels says what goes, layer by layer. Leave keep out"),
        ({"round_to": 0}, r"prune\.round_to must be at least 1, got 0"),
        ({"bn_utterances": -1}, r"prune\.bn_utterances must be 0 or at least 2, got -1"),
        ({"bn_utterances": 1}, r"prune\.bn_utterances must be 0 or at least 2, got 1"),
    ],
)
def test_setting_out_of_range_is_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Prune(**settings)


def test_settings_are_read_as_text_and_as_values() -> None:
    typed = build(Prune, {"macs_ratio": "0.3", "scope": "global", "keep": "head,xvector.tdnn*", "normalise": "none"})
    assert typed == Prune(macs_ratio=0.3, scope="global", keep=("head", "xvector.tdnn*"), normalise="none")
    assert build(Prune, {"keep": ["head"], "params": 5}) == Prune(keep=("head",), params=5)
    for settings, message in (
        ({"scope": 3}, r"prune\.scope must be str, got 3"),
        ({"scope": ["global"]}, r"prune\.scope must be str, got \['global'\]"),
        ({"params": "many"}, r"prune\.params must be int, got 'many'"),
    ):
        with pytest.raises(SettingError, match=message):
            build(Prune, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.99}, r"prune\.ratio 0\.99 cannot be reached: .* 0\.\d+ of the parameters is removed \([\d,]+ of"),
        ({"macs_ratio": 0.99}, r"prune\.macs_ratio 0\.99 cannot be reached: .* 0\.\d+ of the multiply-accumulates is"),
        ({"params": 9}, r"prune\.params 9 cannot be reached: .* \([\d,]+ of 13,272 stay\)\. Ask for less"),
        ({"size_mb": 0.001}, r"prune\.size_mb 0\.001 cannot be reached: .* of the bytes of weights is removed"),
        (
            {"params": 20000},
            r"prune\.params 20,000: the network has 13,272 parameters, no more\. Ask for less than that",
        ),
        ({"size_mb": 1.0}, r"prune\.size_mb 1\.0: the network has 0\.05 MB of weights, no more"),
        (
            {"ratio": 0.3, "keep": ("first", "second")},
            r"prune\.ratio 0\.3 cannot be reached: with all 0 prunable groups",
        ),
        ({"keep": ("frist",)}, r"keep: no layer matches 'frist'\. Near it are first"),
        (
            {"score": "taylor", "score_utterances": 4},
            "prune.score taylor needs the speaker of every calibration utterance",
        ),
        ({"scope": "sensitivity", "sensitivity_loss": "eer"}, "prune.sensitivity_loss eer needs trials, which only"),
        ({"channels": "none.json"}, r"none\.json: no such file"),
    ],
)
def test_what_this_network_cannot_give_is_told(plain, tiny_context, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        Prune(**settings).run(plain, replace(tiny_context, speakers=()))


def test_too_few_utterances_are_told(tiny: Artifact, noise) -> None:
    context = Context(calibration=[lambda features=features: features for features in noise(5, 16)])
    with pytest.raises(InputError, match=r"prune\.bn_utterances: 60 calibration utterances were asked for, .* has 5\."):
        Prune().run(tiny, context)


class Unnormalised(nn.Module):
    """An LSTM between linear layers, without batch norm, whose inner widths it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.enter = nn.Linear(16, 32)
        self.lstm = nn.LSTM(32, 24, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(torch.tanh(self.enter(x)), self.width, -1)
        y, _ = self.lstm(torch.cat([first, first * second], -1))
        result: torch.Tensor = self.leave(y.mean(1))
        return result


def test_a_network_without_batch_norm_has_its_weights_fitted(tiny_context: Context, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Artifact.from_module(Unnormalised(), FrontEnd(num_mel_bins=16))
    result = Prune(ratio=0.4, round_to=1, bn_utterances=20).run(dense, tiny_context)
    note = result.history[-1].notes[-1]
    found = re.fullmatch(
        r"3 weights that lost inputs fitted by least squares on 20 utterances:"
        r" cosine to the dense embedding (0\.\d+) to ([01]\.\d+)",
        note,
    )
    assert found, note
    assert float(found[2]) > float(found[1])
    assert result.stored_widths["width"] == result.module.width < 16
    result.save(tmp_path / "pruned")
    loaded = Artifact.load(tmp_path / "pruned", Unnormalised())
    features = torch.randn(1, 50, 16)
    with torch.no_grad():
        assert torch.equal(loaded.module(features), result.module(features))


def test_recovery_that_leads_away_is_not_kept(tiny: Artifact, noise) -> None:
    other = [3 * features + 2 for features in noise(20, 16)]  # of other statistics than those of the network
    context = Context(calibration=[lambda features=features: features for features in other])
    result = Prune(ratio=0.01, round_to=1, bn_utterances=20).run(tiny, context)
    as_it_was = Prune(ratio=0.01, round_to=1, bn_utterances=0).run(tiny, context)
    note = result.history[-1].notes[-1]
    assert re.fullmatch(r"batch norm re-estimated on 20 utterances: cosine .* so it was left as it was", note), note
    assert result.sha256 == as_it_was.sha256
