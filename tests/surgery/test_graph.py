"""Tracing: which channels are coupled, which are frozen, and why."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ModelError, SettingError
from compress.surgery import Role, count_parameters, parameters_after, remove_channels, trace, verify_removal


def test_campplus_freezes_nothing_but_the_embedding(campplus) -> None:
    frozen = campplus.graph.frozen_groups()
    assert [(group.name, group.width) for group in frozen] == [("xvector.dense.linear", 192)]
    assert frozen[0].frozen == "it is an output of the network"
    assert campplus.graph.refusals == ()


def test_campplus_couples_the_growth_channels_with_their_gate(campplus) -> None:
    group = next(g for g in campplus.graph.groups() if g.name == "xvector.block1.tdnnd1.cam_layer.linear_local")
    producers = {member.name for member in group.members if member.role is Role.PRODUCER}
    layer = "xvector.block1.tdnnd1.cam_layer"
    assert producers == {f"{layer}.linear_local.weight", f"{layer}.linear2.weight"}
    assert group.width == 16


def test_a_channel_of_the_campplus_front_owns_a_column_per_mel_bin(campplus) -> None:
    group = next(g for g in campplus.graph.groups() if g.name == "head.conv2")
    reader = next(m for m in group.members if m.name == "xvector.tdnn.linear.weight")
    assert reader.indices[3] == tuple(range(30, 40))


def test_pooled_statistics_take_the_same_columns_of_both_halves(zoo) -> None:
    group = next(g for g in zoo["image"].graph.groups() if g.name == "body.conv2")
    reader = next(m for m in group.members if m.name == "embedding.weight")
    assert reader.indices[1] == (4, 5, 6, 7, 132, 133, 134, 135)


def test_a_column_behind_an_offset_is_leaky(zoo) -> None:
    group = next(g for g in zoo["image with eps"].graph.groups() if g.name == "body.conv2")
    readers = {m.leaky: m.indices[0] for m in group.members if m.name == "embedding.weight"}
    assert readers == {False: (0, 1, 2, 3), True: (128, 129, 130, 131)}


def test_residual_and_shortcut_are_one_group(zoo) -> None:
    group = next(g for g in zoo["image"].graph.groups() if g.name == "body.conv2")
    assert {m.name for m in group.members if m.role is Role.PRODUCER} == {"body.conv2.weight", "body.shortcut.weight"}


def test_a_tied_parameter_is_listed_once_with_its_other_name(zoo) -> None:
    graph = zoo["tied"].graph
    assert graph.aliases == {"body.left.weight": ("body.right.weight",)}
    assert "body.right.weight" not in graph.shapes


def test_parameters_per_channel_is_what_one_channel_costs(zoo) -> None:
    for network in zoo.values():
        before = count_parameters(network.model)
        for group in network.graph.groups():
            alone = replace(network.graph, all_groups=(replace(group, bundle=None),))
            assert before - parameters_after(alone, {group.name: [0]}) == group.parameters_per_channel


@pytest.mark.parametrize(
    ("network", "bundles"),
    [
        ("lstm", {"body.recurrent.hidden_size": 1}),
        ("blstm", {"body.recurrent.hidden_size": 4}),
        ("lstm with projection", {"body.recurrent.hidden_size": 2, "body.recurrent.proj_size": 2}),
        ("gru", {"body.recurrent.hidden_size": 4}),
        ("residual blstm", {"body.second.hidden_size": 2}),
    ],
)
def test_layers_and_directions_of_a_recurrent_network_are_a_bundle(zoo, network: str, bundles: dict[str, int]) -> None:
    graph = zoo[network].graph
    assert Counter(group.bundle for group in graph.groups() if group.bundle) == bundles
    assert {group.width for group in graph.groups() if group.bundle} <= {8, 16}
    assert not graph.refusals


def test_units_of_an_lstm_own_a_row_of_each_gate_and_a_column(zoo) -> None:
    group = next(g for g in zoo["blstm"].graph.groups() if g.name == "body.recurrent.weight_ih_l0_reverse")
    members = {(m.name.removeprefix("body.recurrent."), m.dim): m.indices[3] for m in group.members}
    assert members == {
        **{(f"{kind}_l0_reverse", 0): (3, 19, 35, 51) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
        ("weight_hh_l0_reverse", 1): (3,),
        ("weight_ih_l1", 1): (19,),
        ("weight_ih_l1_reverse", 1): (19,),
    }


def test_a_bundle_loses_equally_many_channels(zoo) -> None:
    network = zoo["blstm"]
    forward, *_ = (group.name for group in network.graph.groups() if group.bundle)
    with pytest.raises(SettingError, match=r"would lose 0 channels and .* 2, but body\.recurrent\.hidden_size is"):
        remove_channels(network.model, network.graph, {forward: [0, 1]})


def test_a_recurrent_layer_that_is_given_its_state_is_frozen() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 4, batch_first=True)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(1, x.shape[0], 4)
            result: Tensor = self.out(self.lstm(x, (state, state))[0])
            return result

    graph = trace(Given(), torch.randn(2, 12, 8))
    assert graph.groups() == ()
    assert graph.refusals == ("lstm: lstm starts from a state that was given to it",)


def test_the_last_states_of_several_layers_freeze_them() -> None:
    torch.manual_seed(0)
    graph = trace(LastState(2), torch.randn(2, 12, 8))
    assert graph.groups() == ()
    assert graph.refusals == ("lstm: lstm gives states that are read, for which there is no removal rule",)


class LastState(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, layers, batch_first=True)
        self.embedding = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.embedding(self.lstm(x)[1][0][-1])
        return result


def test_a_stored_width_belongs_to_the_channels_it_counts(zoo) -> None:
    network = zoo["res2net with stored width"]
    assert network.graph.stored_widths == {"body.width": 12}
    pruned = remove_channels(network.model, network.graph, {"body.enter": [0, 5]})
    assert (pruned.body.width, pruned.body.enter.out_channels) == (10, 40)


def test_a_split_at_a_width_that_no_attribute_tells_is_frozen() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 12), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.split(self.enter(x), 6, -1)
            result: Tensor = self.leave(left * right)
            return result

    graph = trace(Fixed(), torch.randn(2, 12, 8))
    assert graph.groups() == ()
    assert graph.refusals == ("the network: split cuts the channels at the fixed width 6",)


def test_where_export_gives_up_the_network_is_run_without_data(zoo) -> None:
    network = zoo["tried"]
    with pytest.raises(Exception, match=r"Unexpected key|export"):
        torch.export.export(network.model, (torch.randn(2, 30, 8),), strict=False)
    assert network.graph.stored_widths == {"body.layers.0.width": 12}
    assert not network.graph.refusals
    assert [group.name for group in network.graph.frozen_groups()] == ["embedding"]


class WithOddOp(nn.Module):
    """One branch goes through an operator that has no rule."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.known = nn.Linear(8, 16)
        self.entering = nn.Linear(16, 16)
        self.odd = op
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.odd(self.entering(torch.relu(self.known(x)))))
        return y


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, -1)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cat([x[..., :8], x[..., :8]], dim=-1)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x.relu())


class Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (nn.LayerNorm(16), "odd: layer_norm normalises over the channels"),
        (Roll(), "odd: roll has no removal rule"),
        (Half(), "odd: slice cuts the channels at a fixed index"),
        (Log(), "odd: log of a removed channel is infinite"),
        (Normalised(), "odd: sum sums over the channels"),
        (nn.Softmax(-1), "odd: softmax normalises over the channels"),
        (nn.InstanceNorm1d(5), "odd: instance_norm normalises over the channels"),
        (nn.BatchNorm1d(5, track_running_stats=False), "odd: batch_norm normalises over the channels"),
        (nn.Unflatten(-1, (4, 4)), None),
    ],
)
def test_an_operator_outside_the_list_freezes_what_enters_it_and_is_named(op: nn.Module, reason: str | None) -> None:
    graph = trace(WithOddOp(nn.Sequential(op, nn.Flatten(2)) if reason is None else op), torch.randn(2, 5, 8))
    assert [group.name for group in graph.groups()] == ["known"]
    reasons = {group.name: group.frozen for group in graph.frozen_groups()}
    assert reasons.keys() == {"entering", "out"}
    if reason is not None:
        assert reasons["entering"] == reason
        assert reason in graph.refusals


def test_a_fixed_tensor_added_to_channels_freezes_them() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(16.0)

    graph = trace(WithOddOp(Positions()), torch.randn(2, 5, 8))
    assert "odd: add joins it with a tensor of fixed width" in graph.refusals


class Held(nn.Module):
    """A function of the module and of its input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **held: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, thing in held.items():
            setattr(self, name, thing)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def gain(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.2)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "bounds per channel": lambda: Held(lambda m, x: torch.clamp(x, min=m.low), low=gain(16)),
    "bounds around zero": lambda: nn.Hardtanh(0, 0.5),
    "bounds above zero": lambda: nn.Hardtanh(0.1, 0.5),
    "one value for every channel": lambda: Held(lambda m, x: m.one(x).expand_as(x), one=nn.Linear(16, 1)),
    "two layers of one weight": lambda: Held(
        lambda m, x: nn.functional.linear(torch.relu(nn.functional.linear(x, m.w)), m.w.t()), w=gain(6, 16)
    ),
    "offset above zero": lambda: Held(
        lambda m, x: nn.functional.instance_norm(x.transpose(1, 2), None, None, m.scale, m.offset.exp()).transpose(
            1, 2
        ),
        scale=gain(16),
        offset=gain(16),
    ),
    "joined with nothing": lambda: Held(lambda m, x: torch.cat([torch.zeros(0), x], -1)),
    "bare gain with a slope": lambda: Held(
        lambda m, x: x * nn.functional.prelu(m.gain, m.slope), gain=gain(16), slope=gain(1)
    ),
}


@pytest.mark.parametrize("op", EXACT)
def test_an_unusual_operator_is_pruned_exactly(op: str) -> None:
    torch.manual_seed(0)
    model = WithOddOp(EXACT[op]()).eval()
    graph = trace(model, torch.randn(2, 5, 8))
    assert "entering" in {group.name for group in graph.groups()}
    channels = {group.name: range(group.width // 2) for group in graph.groups() if group.width > 1}
    verify_removal(model, remove_channels(model, graph, channels), graph, channels, torch.randn(2, 5, 8))


def test_a_bound_above_zero_makes_its_readers_leaky() -> None:
    leaky = {}
    for low in (0.0, 0.1):
        graph = trace(WithOddOp(nn.Hardtanh(low, 20)), torch.randn(2, 5, 8))
        group = next(group for group in graph.groups() if group.name == "entering")
        leaky[low] = any(member.leaky for member in group.members)
    assert leaky == {0.0: False, 0.1: True}


def test_a_layer_whose_width_cannot_be_changed_is_frozen() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    op = Held(lambda m, x: m.attention(x, x, x)[0], attention=attention)
    graph = trace(WithOddOp(op).eval(), torch.randn(2, 5, 8))
    reasons = {group.name: group.frozen for group in graph.frozen_groups()}
    assert reasons["entering"] == "odd.attention: MultiheadAttention has a fixed width"


def test_a_network_that_cannot_be_copied_is_named() -> None:
    model = WithOddOp(nn.utils.weight_norm(nn.Linear(16, 16)))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="WithOddOp cannot be copied: Only Tensors created explicitly"):
        trace(model, torch.randn(2, 5, 8))


def test_a_parameter_that_is_never_used_is_frozen() -> None:
    model = WithOddOp(nn.Identity())
    model.idle = nn.Linear(16, 16)
    assert [group.name for group in trace(model, torch.randn(2, 5, 8)).groups()] == ["known", "entering"]


def test_tracing_changes_nothing(zoo) -> None:
    model = zoo["tdnn"].model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, torch.randn(2, 40, 8))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()


def test_a_network_that_cannot_be_traced_is_named_with_its_line(capfd) -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match=r"DataDependent cannot be traced at test_graph\.py:\d+ \(return x if x\.sum"):
        trace(DataDependent(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"body.9": [0]}, r"no channel group is called 'body\.9'"),
        ({"embedding": [0]}, "embedding: channels cannot be removed: it is an output of the network"),
        ({"body.0": [24]}, r"body\.0: channels are numbered 0\.\.23, got 24"),
        ({"body.0": range(24)}, r"body\.0: all 24 channels would be removed"),
    ],
)
def test_a_wrong_removal_is_refused(zoo, channels, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        zoo["tdnn"].graph.removed_indices(channels)
