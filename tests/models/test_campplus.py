"""CAM++: the segment-wise context, and parity with reference checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compress
from compress.models.campplus import BLOCKS, SEGMENT_FRAMES, CAMLayer, CAMPPlus, infer_arguments, segments_of

REFERENCES = ("campplus_192.bin", "campplus_512_small.safetensors")


def context_per_frame(x: Tensor) -> Tensor:
    """The published form: the utterance mean plus the mean of each 100-frame segment, written out per frame."""
    means = torch.nn.functional.avg_pool1d(x, SEGMENT_FRAMES, SEGMENT_FRAMES, ceil_mode=True)
    repeated = means.repeat_interleave(SEGMENT_FRAMES, dim=-1)[..., : x.shape[-1]]
    return x.mean(-1, keepdim=True) + repeated


@settings(deadline=None)
@given(frames=st.integers(1, 650), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_context_per_segment_equals_context_per_frame(frames: int, batch: int, seed: int) -> None:
    x = torch.randn(batch, 4, frames, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    segments = segments_of(frames, x)
    torch.testing.assert_close(x @ segments.pool @ segments.spread, context_per_frame(x), rtol=0, atol=1e-13)


@settings(deadline=None)
@given(frames=st.integers(1, 450), dilation=st.integers(1, 2), seed=st.integers(0, 99))
@torch.no_grad()
def test_gated_layer_equals_its_per_frame_form(frames: int, dilation: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = CAMLayer(8, 6, kernel_size=3, dilation=dilation).double()
    x = torch.randn(2, 8, frames, dtype=torch.float64)
    mask = torch.sigmoid(layer.linear2(torch.relu(layer.linear1(context_per_frame(x)))))
    torch.testing.assert_close(layer(x, segments_of(frames, x)), layer.linear_local(x) * mask, rtol=0, atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(frames=st.integers(3, 420), batch=st.integers(2, 4))
@torch.no_grad()
def test_embedding_does_not_depend_on_the_rest_of_the_batch(small_campplus, frames: int, batch: int) -> None:
    x = torch.randn(batch, frames, 80, generator=torch.Generator().manual_seed(frames))
    together = small_campplus.module(x)
    alone = torch.cat([small_campplus.module(utterance[None]) for utterance in x])
    assert (together - alone).abs().max() <= 1e-4 * together.abs().max()


@settings(max_examples=20, deadline=None)
@given(
    feat_dim=st.sampled_from([16, 40, 64, 80]),
    embedding_size=st.integers(1, 300),
    growth_rate=st.integers(1, 8),
    bn_size=st.integers(1, 4),
    init_channels=st.sampled_from([8, 10, 24]),
)
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    arguments["growth_rate"] *= 2
    shapes = {name: value.shape for name, value in CAMPPlus(**arguments).state_dict().items()}
    assert infer_arguments(shapes) == arguments


def test_default_is_the_public_network_in_size() -> None:
    model = CAMPPlus()
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_848_544
    assert [len(model.xvector[f"block{i + 1}"]) for i in range(3)] == [layers for layers, _, _ in BLOCKS]


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request, bench_data) -> tuple[Path, dict[str, np.ndarray]]:
    path = bench_data / "reference" / "checkpoints" / request.param
    if not path.is_file():
        pytest.skip(f"no reference checkpoint at {path}")
    with np.load(path.parent / f"{path.stem}.vectors.npz") as vectors:
        return path, dict(vectors)


@torch.inference_mode()
def test_reference_vectors_are_reproduced(reference) -> None:
    path, vectors = reference
    model = compress.load_model(path, arch="campplus")
    assert not model.training
    cases = [name.removeprefix("in_") for name in vectors if name.startswith("in_")]
    assert len(cases) >= 4
    for case in cases:
        expected = vectors[f"out_{case}"]
        embedding = model(torch.from_numpy(vectors[f"in_{case}"])).numpy()
        assert embedding.shape == expected.shape
        assert np.abs(embedding - expected).max() <= 1e-4 * np.abs(expected).max(), case


@torch.inference_mode()
def test_reference_holds_at_every_length_in_float64(reference) -> None:
    """Lengths around the segment borders, against the published per-frame form of every gate."""
    path, _ = reference
    model = compress.load_model(path, arch="campplus").double()
    for frames in (5, 97, 100, 199, 200, 201, 202, 399, 402):
        x = torch.randn(1, frames, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(frames))
        expected = embed_per_frame(model, x)
        assert (model(x) - expected).abs().max() <= 1e-10 * expected.abs().max(), frames


def embed_per_frame(model: torch.nn.Module, x: Tensor) -> Tensor:
    """Run the network with every context computed per frame."""
    layers = model.xvector
    y = layers["tdnn"](model.head(x.transpose(1, 2)))
    for i in range(1, len(BLOCKS) + 1):
        for layer in layers[f"block{i}"].values():
            z = layer.nonlinear2(layer.linear1(layer.nonlinear1(y)))
            cam = layer.cam_layer
            mask = torch.sigmoid(cam.linear2(torch.relu(cam.linear1(context_per_frame(z)))))
            y = torch.cat([y, cam.linear_local(z) * mask], dim=1)
        y = layers[f"transit{i}"](y)
    y = layers["out_nonlinear"](y)
    statistics = torch.cat([y.mean(-1), y.std(-1, unbiased=True)], dim=1)
    return layers["dense"](statistics)
