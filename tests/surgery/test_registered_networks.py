"""Properties that hold for every registered network: removing channels is exact, and leaves nothing stale."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from compress.models.registry import ARCHITECTURES
from compress.surgery import (
    choose_channels,
    count_parameters,
    l1_scores,
    mask_channels,
    mask_consumers,
    remove_channels,
    resize_to,
    trace,
    verify_removal,
    widths_stored_in,
)

TOLERANCE = 1e-10  # relative, in float64; right removals measure 1e-15
SMALL = {
    "campplus": {"growth_rate": 16, "bn_size": 2, "init_channels": 64},
    "ecapa_tdnn": {"channels": (64, 64, 64, 64, 96), "attention_channels": 24, "se_channels": 24},
    "eres2net": {"m_channels": 8},
    "eres2netv2": {"m_channels": 8},
    "fsmn_vad": {"input_affine_dim": 24, "linear_dim": 32, "proj_dim": 24, "output_affine_dim": 24},
    "resnet34": {"m_channels": 4},
    "tdnn_blstm": {"channels": 48, "hidden_size": 32, "attention_channels": 16},
}
WIDTHS = {"fsmn_vad": 400}  # of the features; 80 mel bins for the others
CASES = [(scope, ratio) for scope in ("uniform", "global") for ratio in (0.2, 0.4, 0.6)]
ONE_FAST = [pytest.param(*case, marks=() if case == ("uniform", 0.4) else pytest.mark.slow) for case in CASES]
TWO_FAST = [
    pytest.param(*case, marks=() if case in (("uniform", 0.4), ("global", 0.6)) else pytest.mark.slow) for case in CASES
]


def features_of(name: str, batch: int, frames: int) -> Tensor:
    return torch.randn(batch, frames, WIDTHS.get(name, 80), dtype=torch.float64)


class Network:
    """A registered network of small width, with random batch-norm statistics, in float64."""

    def __init__(self, name: str, randomise) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = randomise(ARCHITECTURES[name].build(**SMALL[name]), WIDTHS.get(name, 80)).double()
        self.graph = trace(self.model, features_of(name, 2, 120))
        self.scores = l1_scores(self.model, self.graph)

    def choose(self, scope: str, ratio: float) -> dict[str, tuple[int, ...]]:
        return dict(choose_channels(self.graph, self.scores, ratio, scope, round_to=1, min_width=1).channels)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def network(request, randomise) -> Network:
    return Network(request.param, randomise)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("scope", "ratio"), TWO_FAST)
@torch.no_grad()
def test_removed_equals_masked_at_any_length(network: Network, scope: str, ratio: float) -> None:
    channels = network.choose(scope, ratio)
    pruned = remove_channels(network.model, network.graph, channels)
    references = [mask(network.model, network.graph, channels) for mask in (mask_channels, mask_consumers)]
    for batch, frames in ((3, 97), (1, 100), (1, 101), (1, 345)):
        features = features_of(network.name, batch, frames)
        output, dense = pruned(features), network.model(features)
        assert output.shape == dense.shape
        assert relative_error(dense, output) > 1e-3
        for masked in references:
            assert relative_error(output, masked(features)) < TOLERANCE


@pytest.mark.parametrize(("scope", "ratio"), TWO_FAST)
def test_the_gate_passes_and_its_control_does_not(network: Network, scope: str, ratio: float) -> None:
    channels = network.choose(scope, ratio)
    pruned = remove_channels(network.model, network.graph, channels)
    report = verify_removal(network.model, pruned, network.graph, channels, features_of(network.name, 1, 130))
    assert report.max_relative_error < TOLERANCE < report.control_error


@pytest.mark.parametrize(("scope", "ratio"), CASES)
def test_the_parameters_asked_for_go(network: Network, scope: str, ratio: float) -> None:
    selection = choose_channels(network.graph, network.scores, ratio, scope, round_to=1, min_width=1)
    pruned = remove_channels(network.model, network.graph, selection.channels)
    assert count_parameters(pruned) == selection.parameters_after
    assert abs(selection.achieved - ratio) <= 0.01


@pytest.mark.parametrize(("scope", "ratio"), ONE_FAST)
@torch.no_grad()
def test_channels_in_another_order_are_the_same_function(network: Network, scope: str, ratio: float) -> None:
    """Before pruning and after it, if the same channels go."""
    permuted = copy.deepcopy(network.model)
    rng = np.random.default_rng(0)
    channels, moved = network.choose(scope, ratio), {}
    state = permuted.state_dict(keep_vars=True)
    for group in network.graph.groups():
        order = rng.permutation(group.width)
        moved[group.name] = tuple(np.flatnonzero(np.isin(order, channels.get(group.name, ()))).tolist())
        for member in group.members:
            tensor = state[member.name]
            index = torch.arange(tensor.shape[member.dim])
            index[np.array(member.indices).ravel()] = torch.from_numpy(np.array(member.indices)[order].ravel())
            tensor.copy_(tensor.index_select(member.dim, index))
    features = features_of(network.name, 2, 110)
    assert not all(torch.equal(a, b) for a, b in zip(permuted.parameters(), network.model.parameters(), strict=True))
    assert relative_error(permuted(features), network.model(features)) < TOLERANCE
    pruned = remove_channels(permuted, network.graph, moved)
    expected = remove_channels(network.model, network.graph, channels)
    assert relative_error(pruned(features), expected(features)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "ratio"), CASES)
def test_one_half_of_the_groups_then_the_other_equals_all_at_once(network: Network, scope: str, ratio: float) -> None:
    channels = network.choose(scope, ratio)
    bundles = {group.name: group.bundle or group.name for group in network.graph.groups()}
    halves = sorted(set(bundles.values()))[::2]
    first = {name: gone for name, gone in channels.items() if bundles[name] in halves}
    second = {name: gone for name, gone in channels.items() if bundles[name] not in halves}
    half = remove_channels(network.model, network.graph, first)
    stepwise = remove_channels(half, trace(half, features_of(network.name, 2, 120)), second)
    at_once = remove_channels(network.model, network.graph, channels)
    for (name, actual), expected in zip(stepwise.state_dict().items(), at_once.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


@torch.no_grad()
def test_removing_nothing_is_bit_identical(network: Network) -> None:
    features = features_of(network.name, 2, 100)
    assert torch.equal(remove_channels(network.model, network.graph, {})(features), network.model(features))


@pytest.mark.parametrize(("scope", "ratio"), CASES)
def test_widths_are_multiples_above_the_floor(network: Network, scope: str, ratio: float) -> None:
    selection = choose_channels(network.graph, network.scores, ratio, scope, round_to=4, min_width=4)
    for before, after in selection.widths.values():
        assert after == before or (after % 4 == 0 and after >= min(before, 4))


@pytest.mark.parametrize(("scope", "ratio"), ONE_FAST)
@torch.no_grad()
def test_nothing_is_stale(network: Network, scope: str, ratio: float) -> None:
    channels = network.choose(scope, ratio)
    pruned = remove_channels(network.model, network.graph, channels)
    features = features_of(network.name, 1, 90)
    expected = pruned(features)
    rebuilt = ARCHITECTURES[network.name].build(**SMALL[network.name]).double().eval()
    shapes = {key: tuple(value.shape) for key, value in pruned.state_dict().items()}
    rebuilt = resize_to(rebuilt, shapes, widths_stored_in(pruned, network.graph))
    rebuilt.load_state_dict(pruned.state_dict())
    assert repr(rebuilt) == repr(pruned)
    for other in (rebuilt, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(other(features), expected)
    assert all(tensor.is_contiguous() for tensor in pruned.state_dict().values())


@pytest.mark.parametrize(("scope", "ratio"), ONE_FAST)
def test_types_flags_and_statistics_are_kept_and_gradients_flow(network: Network, scope: str, ratio: float) -> None:
    model = copy.deepcopy(network.model).float().train()
    frozen = next(name for name, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = remove_channels(model, network.graph, network.choose(scope, ratio))
    assert pruned.training
    assert {p.dtype for p in pruned.parameters()} == {torch.float32}
    assert not pruned.get_parameter(frozen).requires_grad
    for key, value in pruned.state_dict().items():
        if "running" in key:
            assert set(value.tolist()) <= set(before[key].tolist())
    pruned(features_of(network.name, 2, 60).float()).square().sum().backward()
    without = [name for name, p in pruned.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@torch.no_grad()
def test_a_pruned_lstm_reads_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(8, 12)
            self.lstm = nn.LSTM(12, 10, 2, bidirectional=True, batch_first=True)
            self.leave = nn.Linear(20, 4)

        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            y = torch.relu(self.enter(x))
            packed = y if lengths is None else pack_padded_sequence(y, lengths, batch_first=True)
            z, _ = self.lstm(packed)
            result: Tensor = self.leave(z.data if isinstance(z, PackedSequence) else z)
            return result

    torch.manual_seed(0)
    model = Packed().double().eval()
    graph = trace(model, torch.randn(2, 12, 8, dtype=torch.float64))
    channels = choose_channels(graph, l1_scores(model, graph), 0.4, "global", round_to=1, min_width=1).channels
    pruned = remove_channels(model, graph, channels)
    features, lengths = torch.randn(3, 30, 8, dtype=torch.float64), torch.tensor([30, 17, 4])
    assert (
        relative_error(pruned(features, lengths), mask_channels(model, graph, channels)(features, lengths)) < TOLERANCE
    )
    assert pruned.lstm.hidden_size < 10


@pytest.fixture(scope="module")
def full_blstm() -> Network:
    torch.manual_seed(0)
    network = Network.__new__(Network)
    network.name, network.model = "tdnn_blstm", ARCHITECTURES["tdnn_blstm"].build().eval()
    network.graph = trace(network.model, torch.randn(1, 60, 80))
    network.scores = l1_scores(network.model, network.graph)
    return network


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(("ratio", "millions"), [(0.2, 14.2), (0.4, 10.7), (0.6, 7.1)])
def test_the_classic_table_of_the_tdnn_blstm(full_blstm: Network, scope: str, ratio: float, millions: float) -> None:
    selection = choose_channels(full_blstm.graph, full_blstm.scores, ratio, scope)
    assert round(selection.parameters_before / 1e6, 1) == 17.8
    assert round(selection.parameters_after / 1e6, 1) == millions
    pruned = remove_channels(full_blstm.model, full_blstm.graph, selection.channels)
    assert count_parameters(pruned) == selection.parameters_after
    assert all(after % 8 == 0 for before, after in selection.widths.values() if after < before)
