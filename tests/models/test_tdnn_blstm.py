"""TDNN-BLSTM: size, key names, arguments off the shapes, length of the embedding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models.tdnn_blstm import LAYERS, TDNNBLSTM, SelfAttentivePooling, infer_arguments

SMALL = {"feat_dim": 16, "embedding_size": 12, "channels": 24, "hidden_size": 10, "attention_channels": 6}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_default_has_17_8_million_parameters() -> None:
    with torch.device("meta"):
        model = TDNNBLSTM()
    assert count(model) == 17_794_592
    left = [round((1 - removed) * count(model) / 1e6, 1) for removed in (0, 0.2, 0.4, 0.6)]
    assert left == [17.8, 14.2, 10.7, 7.1], "the table of the classic experiment"


def test_nearly_all_parameters_are_in_channels_of_the_tdnn_and_the_lstm() -> None:
    with torch.device("meta"):
        least = TDNNBLSTM(channels=8, hidden_size=8)
    assert count(least) < 0.001 * 17_794_592


def test_key_names_are_those_of_the_parts() -> None:
    keys = TDNNBLSTM(**SMALL).state_dict().keys()
    norm = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    expected = {f"tdnn.{i}.{name}" for i in range(len(LAYERS)) for name in ("conv.weight", *norm)}
    ends = [f"{name}_l0{direction}" for name in ("weight", "bias") for direction in ("", "_reverse")]
    expected |= {f"blstm.{name.replace('_l0', f'_{gate}_l0')}" for name in ends for gate in ("ih", "hh")}
    expected |= {"pooling.hidden.weight", "pooling.hidden.bias", "pooling.score.weight"}
    expected |= {*norm, "embedding.weight", "embedding.bias"}
    assert keys == expected


@settings(max_examples=10, deadline=None)
@given(
    feat_dim=st.integers(1, 80),
    embedding_size=st.integers(1, 300),
    channels=st.integers(1, 40),
    hidden_size=st.integers(1, 40),
    attention_channels=st.integers(1, 40),
)
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    with torch.device("meta"):
        state = TDNNBLSTM(**arguments).state_dict()
    assert infer_arguments({name: value.shape for name, value in state.items()}) == arguments


@torch.inference_mode()
def test_embedding_has_length_one() -> None:
    torch.manual_seed(0)
    embedding = TDNNBLSTM(**SMALL).eval()(torch.randn(3, 50, 16))
    assert embedding.shape == (3, 12)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


@torch.inference_mode()
def test_embedding_of_zeros_is_not_divided_by_zero() -> None:
    model = TDNNBLSTM(**SMALL).eval()
    model.embedding.weight.zero_()
    model.embedding.bias.zero_()
    assert torch.equal(model(torch.randn(1, 20, 16)), torch.zeros(1, 12))


@torch.inference_mode()
def test_lstm_runs_over_half_of_the_frames_in_both_directions() -> None:
    model = TDNNBLSTM(**SMALL).eval()
    outputs = []
    model.blstm.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    for frames in (1, 2, 9, 40):
        model(torch.randn(2, frames, 16))
    assert [tuple(y.shape) for y in outputs] == [(2, (frames + 1) // 2, 20) for frames in (1, 2, 9, 40)]


@torch.inference_mode()
def test_both_ends_of_an_utterance_reach_the_first_and_the_last_step() -> None:
    torch.manual_seed(0)
    model = TDNNBLSTM(**SMALL).eval()
    outputs = []
    model.blstm.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    x = torch.randn(1, 60, 16)
    for frame in (None, 0, 59):
        changed = x.clone()
        if frame is not None:
            changed[:, frame] += 1
        model(changed)
    same, first, last = outputs
    assert (first[:, -1, :10] != same[:, -1, :10]).any(), "forward units remember the first frame"
    assert (last[:, 0, 10:] != same[:, 0, 10:]).any(), "backward units have seen the last frame"


@torch.no_grad()
@given(frames=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_pooling_is_a_mean_weighted_by_the_softmax_of_the_scores(frames: int, seed: int) -> None:
    torch.manual_seed(seed)
    pooling = SelfAttentivePooling(5, 3)
    x = torch.randn(2, frames, 5)
    score = torch.tanh(x @ pooling.hidden.weight.T + pooling.hidden.bias) @ pooling.score.weight[0]
    weights = score.exp() / score.exp().sum(1, keepdim=True)
    torch.testing.assert_close(pooling(x), torch.einsum("bt,btc->bc", weights, x))
