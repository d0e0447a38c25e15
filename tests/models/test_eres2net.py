"""ERes2Net: parity with the original, key names, arguments off the shapes, fusion."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.models.eres2net import AFF, PIECES, Activation, ERes2Net, Res2NetBlock, infer_arguments


def test_reference_vectors_are_reproduced(reference, same_vectors) -> None:
    path, vectors = reference("eres2net_small.pt")
    model = compress.load_model(path, arch="eres2net")
    assert not model.training
    same_vectors(model, vectors)


def test_default_is_the_original_in_keys_and_shapes(full_size, shapes) -> None:
    arguments, parameters, expected = full_size("eres2net_base")
    with torch.device("meta"):
        model = ERes2Net()
    assert shapes(model) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert infer_arguments({key: torch.Size(shape) for key, shape in expected.items()}) == arguments


def test_default_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ERes2Net()
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_610_688
    assert len(model.state_dict()) == 587


@settings(max_examples=10, deadline=None)
@given(feat_dim=st.sampled_from([8, 40, 80]), embedding_size=st.integers(1, 300), m_channels=st.integers(2, 40))
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    with torch.device("meta"):
        state = ERes2Net(**arguments).state_dict()
    assert infer_arguments({name: value.shape for name, value in state.items()}) == arguments


@torch.no_grad()
def test_an_open_gate_shares_evenly_and_a_shut_one_takes_one_input() -> None:
    fusion = AFF(8).eval()
    x, y = torch.randn(2, 1, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    last = fusion.local_att[-1]
    for offset, expected in ((0.0, x + y), (50.0, 2 * x), (-50.0, 2 * y)):
        last.weight.zero_()
        last.bias.fill_(offset)
        torch.testing.assert_close(fusion(x, y), expected)


@torch.no_grad()
def test_pieces_are_fused_one_after_the_other() -> None:
    torch.manual_seed(0)
    block = Res2NetBlock(8, 8, 1, PIECES._replace(scale=3), attentional=True).eval()
    x = torch.randn(1, 8, 6, 7)
    z = block.activation(block.bn1(block.conv1(x)))
    expected = []
    for i in range(3):
        piece = z[:, 4 * i : 4 * i + 4]
        entering = block.fuse_models[i - 1](expected[-1], piece) if i else piece
        expected.append(block.activation(block.bns[i](block.convs[i](entering))))
    y = block.bn3(block.conv3(torch.cat(expected, dim=1))) + block.shortcut(x)
    torch.testing.assert_close(block(x), block.activation(y))


def test_activation_has_a_ceiling() -> None:
    assert Activation()(torch.tensor([-1.0, 0.5, 19.0, 21.0])).tolist() == [0.0, 0.5, 19.0, 20.0]
