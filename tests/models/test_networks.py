"""What holds for every network known by name."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.models import ARCHITECTURES, architecture

BINS = 16
WIDER: dict[str, dict[str, Any]] = {
    "campplus": {"growth_rate": 12, "bn_size": 2, "init_channels": 10},
    "tdnn_blstm": {"channels": 20, "hidden_size": 11, "attention_channels": 7},
    "ecapa_tdnn": {"channels": [24, 24, 24, 24, 30], "attention_channels": 7, "res2net_scale": 4, "se_channels": 9},
    "eres2net": {"m_channels": 6},
    "eres2netv2": {"m_channels": 12, "scale": 3},
    "resnet34": {"m_channels": 5},
    "fsmn_vad": {"input_affine_dim": 18, "linear_dim": 21, "proj_dim": 11, "output_affine_dim": 13, "output_dim": 9},
}

every_network = pytest.mark.parametrize("name", ARCHITECTURES)
speaker_networks = pytest.mark.parametrize(
    "name", [name for name, entry in ARCHITECTURES.items() if entry.task == "sv"]
)


def ends(name: str) -> dict[str, int]:
    return {"input_dim": BINS} if name == "fsmn_vad" else {"feat_dim": BINS, "embedding_size": 10}


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A network in float64 whose batch norms have the statistics of noise."""
    torch.manual_seed(0)
    model = architecture(name).build(**ends(name), **arguments).double()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(features(4, 80))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def features(batch: int, frames: int) -> Tensor:
    return torch.randn(batch, frames, BINS, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))


@pytest.fixture(scope="module")
def small(small_arguments: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """Every network at a small width. Not to be changed."""
    return {name: build(name, small_arguments[name]) for name in ARCHITECTURES}


@every_network
@torch.no_grad()
def test_output_does_not_depend_on_the_rest_of_the_batch(small, name: str) -> None:
    for batch, frames in ((3, 9), (2, 40), (2, 101)):
        x = features(batch, frames)
        together = small[name](x)
        alone = torch.cat([small[name](utterance[None]) for utterance in x])
        assert together.shape == ((batch, 10) if ARCHITECTURES[name].task == "sv" else (batch, frames, 9))
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
        assert (together[0] - together[1]).abs().max() > 1e-6, "different inputs have different outputs"


@speaker_networks
@torch.no_grad()
def test_shortest_input_gives_an_embedding_and_a_shorter_one_does_not(small, name: str) -> None:
    fewest = ARCHITECTURES[name].min_frames
    assert small[name](features(2, fewest)).isfinite().all()
    if name == "tdnn_blstm":  # it pools means alone, so that one frame will do
        return
    try:
        embedding = small[name](features(2, fewest - 1))
    except RuntimeError:
        return
    assert not embedding.isfinite().any()


@every_network
@torch.no_grad()
def test_network_is_rebuilt_from_its_shapes_and_loads_its_weights(small, name: str) -> None:
    state = small[name].state_dict()
    arguments = architecture(name).infer_arguments({key: value.shape for key, value in state.items()})
    rebuilt = architecture(name).build(**arguments).double().eval()
    rebuilt.load_state_dict(state)
    assert torch.equal(rebuilt(features(2, 30)), small[name](features(2, 30)))


@every_network
def test_every_parameter_has_a_gradient(small, name: str) -> None:
    model = copy.deepcopy(small[name]).train()
    output = model(features(4, 30))
    (output * torch.randn_like(output)).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    still = {key for key, gradient in gradients.items() if not gradient.abs().max() > 0}
    assert not still


@every_network
@torch.no_grad()
def test_layers_alone_know_their_widths(small, name: str) -> None:
    """A network built wider is the narrow one once its layers are those of the narrow one, as after pruning."""
    model = build(name, WIDER[name])
    narrow = dict(small[name].named_modules())
    for path, module in list(model.named_modules()):
        if path and not list(module.children()):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, narrow[path])
    assert torch.equal(model(features(2, 30)), small[name](features(2, 30)))
