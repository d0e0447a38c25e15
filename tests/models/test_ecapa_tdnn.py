"""ECAPA-TDNN: parity with the original, key names, arguments off the shapes, attentive statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.models.ecapa_tdnn import (
    CHANNELS,
    ECAPATDNN,
    MIN_FRAMES,
    AttentiveStatisticsPooling,
    Res2NetBlock,
    infer_arguments,
)


def test_reference_vectors_are_reproduced(reference, same_vectors) -> None:
    path, vectors = reference("ecapa_tdnn_small.pt")
    model = compress.load_model(path, arch="ecapa_tdnn")
    assert not model.training
    same_vectors(model, vectors)


def test_default_is_the_original_in_keys_and_shapes(full_size, shapes) -> None:
    arguments, parameters, expected = full_size("ecapa_tdnn_1024")
    with torch.device("meta"):
        model = ECAPATDNN()
    assert shapes(model) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    inferred = infer_arguments({key: torch.Size(shape) for key, shape in expected.items()})
    assert inferred["feat_dim"] == arguments["input_size"]
    assert inferred["embedding_size"] == arguments["lin_neurons"]
    assert inferred["channels"] == arguments["channels"] == list(CHANNELS)


def test_default_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ECAPATDNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_767_552
    assert len(model.state_dict()) == 231


@settings(max_examples=10, deadline=None)
@given(
    feat_dim=st.integers(8, 80),
    embedding_size=st.integers(1, 300),
    widths=st.tuples(*[st.integers(1, 4)] * 4),
    aggregated=st.integers(1, 40),
    attention_channels=st.integers(1, 20),
    res2net_scale=st.integers(2, 8),
    se_channels=st.integers(1, 20),
)
def test_arguments_are_read_off_the_shapes(widths, aggregated: int, **arguments) -> None:
    arguments["channels"] = [*(width * arguments["res2net_scale"] for width in widths), aggregated]
    with torch.device("meta"):
        state = ECAPATDNN(**arguments).state_dict()
    assert infer_arguments({name: value.shape for name, value in state.items()}) == arguments


def test_blocks_of_different_widths_have_a_shortcut_of_their_own() -> None:
    torch.manual_seed(0)
    model = ECAPATDNN(8, 6, channels=(16, 24, 24, 16, 20), attention_channels=4, se_channels=4).eval()
    shortcuts = [name for name in model.state_dict() if name.endswith("shortcut.conv.weight")]
    assert shortcuts == ["blocks.1.shortcut.conv.weight", "blocks.3.shortcut.conv.weight"]
    assert model(torch.randn(2, 20, 8)).shape == (2, 6)


@torch.no_grad()
@given(scale=st.integers(2, 5), frames=st.integers(3, 9))
@settings(max_examples=10, deadline=None)
def test_res2net_pieces_add_up_one_after_the_other(scale: int, frames: int) -> None:
    torch.manual_seed(scale)
    block = Res2NetBlock(3 * scale, scale, kernel_size=3, dilation=2).eval()
    x = torch.randn(1, 3 * scale, frames)
    pieces = [x[:, 3 * i : 3 * i + 3] for i in range(scale)]
    expected, y = [pieces[0]], torch.zeros(1)
    for layer, piece in zip(block.blocks, pieces[1:], strict=True):
        y = layer(piece + y)
        expected.append(y)
    torch.testing.assert_close(block(x), torch.cat(expected, dim=1))


@torch.no_grad()
def test_pooling_without_attention_is_mean_and_deviation() -> None:
    pooling = AttentiveStatisticsPooling(4, 3).eval()
    pooling.conv.conv.weight.zero_()  # the same weight for every frame
    x = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x.mean(-1), x.std(-1, unbiased=False)], dim=1)
    torch.testing.assert_close(pooling(x).squeeze(-1), expected)


@torch.no_grad()
def test_constant_features_have_a_gradient() -> None:
    with torch.enable_grad():
        x = torch.ones(1, 4, 10, requires_grad=True)
        AttentiveStatisticsPooling(4, 3).eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_fewest_frames_are_those_that_reflected_padding_needs() -> None:
    model = ECAPATDNN(8, 6, channels=(16, 16, 16, 16, 24), attention_channels=4, se_channels=4).eval()
    assert model(torch.randn(1, MIN_FRAMES, 8)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        model(torch.randn(1, MIN_FRAMES - 1, 8))
