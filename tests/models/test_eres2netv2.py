"""ERes2NetV2: key names, arguments off the shapes, and equality with its published form, written out."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.models.eres2net import LAYERS
from compress.models.eres2netv2 import ERes2NetV2, infer_arguments

State = dict[str, Tensor]


def test_default_has_the_published_size() -> None:
    """17.86 M, as modelscope/3D-Speaker says of it."""
    with torch.device("meta"):
        model = ERes2NetV2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_859_632
    assert len(model.state_dict()) == 557


def test_default_has_the_key_names_of_the_original(shapes) -> None:
    with torch.device("meta"):
        found = shapes(ERes2NetV2())
    expected = {
        "conv1.weight": (64, 1, 3, 3),
        "layer1.0.conv1.weight": (52, 64, 1, 1),
        "layer1.0.convs.1.weight": (26, 26, 3, 3),
        "layer1.0.shortcut.0.weight": (128, 64, 1, 1),
        "layer2.0.bns.1.running_var": (52,),
        "layer3.5.fuse_models.0.local_att.0.weight": (26, 208, 1, 1),
        "layer4.2.fuse_models.0.local_att.4.bias": (208,),
        "layer4.0.conv3.weight": (1024, 416, 1, 1),
        "layer3_ds.weight": (1024, 512, 3, 3),
        "fuse34.local_att.0.weight": (256, 2048, 1, 1),
        "fuse34.local_att.3.bias": (1024,),
        "seg_1.weight": (192, 20480),
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not [key for key in found if key.startswith(("layer1.", "layer2.")) and "fuse" in key]


@settings(max_examples=10, deadline=None)
@given(
    feat_dim=st.sampled_from([8, 40, 80]),
    embedding_size=st.integers(1, 300),
    m_channels=st.sampled_from([8, 16, 32, 64]),
    base_width=st.integers(16, 40),
    scale=st.integers(2, 4),
    expansion=st.integers(1, 4),
)
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    with torch.device("meta"):
        state = ERes2NetV2(**arguments).state_dict()
    assert infer_arguments({name: value.shape for name, value in state.items()}) == arguments


@settings(max_examples=4, deadline=None)
@given(scale=st.integers(2, 4), expansion=st.sampled_from([2, 4]), frames=st.sampled_from([17, 24, 33]))
@torch.inference_mode()
def test_network_equals_its_published_form(scale: int, expansion: int, frames: int) -> None:
    torch.manual_seed(scale)
    model = ERes2NetV2(16, 7, m_channels=8, scale=scale, expansion=expansion).double().eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 1.5)
    x = torch.randn(2, frames, 16, dtype=torch.float64)
    expected = published_form(model.state_dict(), x)
    assert expected.std(0).max() > 1e-3, "the embedding tells the inputs apart"
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def published_form(state: State, x: Tensor) -> Tensor:
    """The forward pass by key name, with splits by width and concatenation as the pieces come."""
    y = F.relu(norm(state, "bn1", F.conv2d(x.permute(0, 2, 1)[:, None], state["conv1.weight"], padding=1)))
    stages = []
    for stage, blocks in enumerate(LAYERS, start=1):
        for i in range(blocks):
            y = published_block(state, f"layer{stage}.{i}", y, stride=2 if stage > 1 and i == 0 else 1)
        stages.append(y)
    down = F.conv2d(stages[2], state["layer3_ds.weight"], stride=2, padding=1)
    fused = published_fusion(state, "fuse34", stages[3], down)
    deviation = torch.sqrt(torch.var(fused, dim=-1) + 1e-8)
    statistics = torch.cat([fused.mean(dim=-1).flatten(1), deviation.flatten(1)], dim=1)
    return F.linear(statistics, state["seg_1.weight"], state["seg_1.bias"])


def published_block(state: State, at: str, x: Tensor, stride: int) -> Tensor:
    y = norm(state, f"{at}.bn1", F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride)).clamp(0, 20)
    width = state[f"{at}.convs.0.weight"].shape[0]
    piece, outputs = None, []
    for i, part in enumerate(torch.split(y, width, 1)):
        if piece is None:
            piece = part
        elif f"{at}.fuse_models.0.local_att.0.weight" in state:
            piece = published_fusion(state, f"{at}.fuse_models.{i - 1}", piece, part)
        else:
            piece = piece + part
        piece = norm(state, f"{at}.bns.{i}", F.conv2d(piece, state[f"{at}.convs.{i}.weight"], padding=1)).clamp(0, 20)
        outputs.append(piece)
    y = norm(state, f"{at}.bn3", F.conv2d(torch.cat(outputs, 1), state[f"{at}.conv3.weight"]))
    if f"{at}.shortcut.0.weight" in state:
        x = norm(state, f"{at}.shortcut.1", F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=stride))
    return (y + x).clamp(0, 20)


def published_fusion(state: State, at: str, x: Tensor, y: Tensor) -> Tensor:
    def convolve(i: int, z: Tensor) -> Tensor:
        z = F.conv2d(z, state[f"{at}.local_att.{i}.weight"], state[f"{at}.local_att.{i}.bias"])
        return norm(state, f"{at}.local_att.{i + 1}", z)

    share = 1.0 + torch.tanh(convolve(3, F.silu(convolve(0, torch.cat([x, y], 1)))))
    return x * share + y * (2.0 - share)


def norm(state: State, at: str, x: Tensor) -> Tensor:
    vectors = (state[f"{at}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *vectors)
