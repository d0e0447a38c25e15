"""ResNet34: parity with the original, key names, arguments off the shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.models.resnet34 import ResNet34, infer_arguments


def test_reference_vectors_are_reproduced(reference, same_vectors) -> None:
    path, vectors = reference("resnet34_small.pt")
    model = compress.load_model(path, arch="resnet34")
    assert not model.training
    same_vectors(model, vectors)


def test_default_is_the_original_in_keys_and_shapes(full_size, shapes) -> None:
    arguments, parameters, expected = full_size("resnet34")
    with torch.device("meta"):
        model = ResNet34()
    assert shapes(model) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert infer_arguments({key: torch.Size(shape) for key, shape in expected.items()}) == arguments


def test_default_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ResNet34()
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_343_648
    assert len(model.state_dict()) == 223


@settings(max_examples=10, deadline=None)
@given(
    feat_dim=st.sampled_from([8, 40, 64, 80]),
    embedding_size=st.integers(1, 300),
    m_channels=st.integers(1, 40),
)
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    with torch.device("meta"):
        state = ResNet34(**arguments).state_dict()
    assert infer_arguments({name: value.shape for name, value in state.items()}) == arguments


@torch.inference_mode()
@pytest.mark.parametrize("frames", [9, 16, 17, 40])
def test_deviation_is_the_unbiased_one_over_an_eighth_of_the_frames(frames: int) -> None:
    torch.manual_seed(0)
    model = ResNet34(feat_dim=16, embedding_size=5, m_channels=2).eval()
    read = []
    model.layer4.register_forward_hook(lambda _, __, y: read.append(y))
    model.seg_1.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(torch.randn(2, frames, 16))
    planes, statistics = read
    assert planes.shape == (2, 16, 2, (frames + 7) // 8)
    mean = planes.mean(-1, keepdim=True)
    variance = (planes - mean).square().sum(-1) / (planes.shape[-1] - 1)
    expected = torch.cat([mean.flatten(1), (variance + 1e-8).sqrt().flatten(1)], dim=1)
    torch.testing.assert_close(statistics, expected)
