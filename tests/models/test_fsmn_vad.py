"""FSMN-VAD: parity with the original, whole and chunk by chunk, key names, arguments off the shapes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.errors import ModelError, SettingError
from compress.models.fsmn_vad import FSMNVAD, Memory, infer_arguments

SMALL = {"input_dim": 12, "input_affine_dim": 6, "fsmn_layers": 3, "linear_dim": 10, "proj_dim": 8, "lorder": 4} | {
    "output_affine_dim": 5,
    "output_dim": 7,
}


def small(**arguments: int) -> FSMNVAD:
    torch.manual_seed(0)
    return FSMNVAD(**(SMALL | arguments)).double().eval()


def test_reference_vectors_are_reproduced(reference, same_vectors) -> None:
    path, vectors = reference("fsmn_vad_encoder.pt")
    model = compress.load_model(path, arch="fsmn_vad")
    assert not model.training
    same_vectors(model, {name: vectors[name] for name in ("in_full", "out_full")})


def test_reference_with_look_ahead_is_reproduced_once_its_strides_are_told(reference, same_vectors) -> None:
    path, vectors = reference("fsmn_vad_encoder_lookahead.pt")
    same_vectors(compress.load_model(path, arch="fsmn_vad", arguments={"lstride": 2, "rstride": 1}), vectors)


@torch.inference_mode()
def test_reference_is_reproduced_chunk_by_chunk_with_its_caches(reference) -> None:
    path, vectors = reference("fsmn_vad_encoder.pt")
    model = compress.load_model(path, arch="fsmn_vad")
    x, outputs, caches, done = torch.from_numpy(vectors["in_full"]), [], None, 0
    for frames in (7, 20, 1, 32):
        y, caches = model.stream(x[:, done : done + frames], caches)
        outputs.append(y)
        done += frames
        for layer in (0, 3):
            expected = vectors[f"cache{layer}_after_{done}"]
            assert caches[layer].shape == expected.shape
            assert np.abs(caches[layer].numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    expected = vectors["out_stream_7_20_1_32"]
    assert np.abs(torch.cat(outputs, dim=1).numpy() - expected).max() <= 1e-4 * expected.max()


def test_default_is_the_public_network_in_size(shapes) -> None:
    with torch.device("meta"):
        model = FSMNVAD()
    assert sum(parameter.numel() for parameter in model.parameters()) == 428_738
    layer = {"linear.linear.weight": (128, 250), "fsmn_block.conv_left.weight": (128, 1, 20, 1)}
    layer |= {"affine.linear.weight": (250, 128), "affine.linear.bias": (250,)}
    expected = {f"encoder.fsmn.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    ends = {"in_linear1": (140, 400), "in_linear2": (250, 140), "out_linear1": (140, 250), "out_linear2": (248, 140)}
    expected |= {f"encoder.{name}.linear.weight": shape for name, shape in ends.items()}
    expected |= {f"encoder.{name}.linear.bias": shape[:1] for name, shape in ends.items()}
    assert shapes(model) == expected


@settings(max_examples=15, deadline=None)
@given(
    fsmn_layers=st.integers(1, 5),
    rorder=st.integers(0, 3),
    **{name: st.integers(1, 20) for name in sorted(SMALL.keys() - {"fsmn_layers"})},
)
def test_arguments_are_read_off_the_shapes(**arguments: int) -> None:
    with torch.device("meta"):
        state = FSMNVAD(**arguments).state_dict()
    assert infer_arguments({key: value.shape for key, value in state.items()}) == arguments | {
        "lstride": 1,
        "rstride": 1,
    }


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    lorder=st.integers(1, 5),
    lstride=st.integers(1, 3),
    batch=st.integers(1, 2),
)
@torch.inference_mode()
def test_chunks_of_any_length_give_the_whole(chunks: list[int], lorder: int, lstride: int, batch: int) -> None:
    model = small(lorder=lorder, lstride=lstride)
    x = torch.randn(batch, sum(chunks), 12, dtype=torch.float64)
    outputs, caches = [], None
    for chunk in x.split(chunks, dim=1):
        y, caches = model.stream(chunk, caches)
        outputs.append(y)
        assert {tuple(cache.shape) for cache in caches} == {(batch, 8, (lorder - 1) * lstride, 1)}
    whole = model(x)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(whole.sum(-1), torch.ones(batch, sum(chunks), dtype=torch.float64))


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(
    lorder=st.integers(1, 4),
    rorder=st.integers(0, 3),
    lstride=st.integers(1, 3),
    rstride=st.integers(1, 3),
    frames=st.integers(1, 12),
)
def test_memory_is_a_sum_over_taps(lorder: int, rorder: int, lstride: int, rstride: int, frames: int) -> None:
    memory = Memory(2, lorder, rorder, lstride, rstride).double()
    x = torch.randn(1, 2, frames, 1, dtype=torch.float64)
    expected = x.clone()
    for t in range(frames):
        for tap in range(lorder):
            if (at := t - tap * lstride) >= 0:
                expected[:, :, t, 0] += memory.conv_left.weight[:, 0, lorder - 1 - tap, 0] * x[:, :, at, 0]
        for tap in range(rorder):
            if (at := t + (tap + 1) * rstride) < frames:
                expected[:, :, t, 0] += memory.conv_right.weight[:, 0, tap, 0] * x[:, :, at, 0]
    torch.testing.assert_close(memory(x, None)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"rorder": 2, "lstride": 2}], ids=["causal", "look-ahead"])
def test_traced_network_takes_any_batch_and_frames(arguments: dict[str, int]) -> None:
    model = small(**arguments)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")}
    example = torch.randn(2, 20, 12, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=(axes,), strict=False)
    for batch, frames in ((2, 2), (3, 7), (4, 50)):
        x = torch.randn(batch, frames, 12, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), model(x))


def test_a_network_that_looks_ahead_does_not_stream() -> None:
    with pytest.raises(ModelError, match=r"look-ahead \(rorder above 0\) cannot run chunk by chunk"):
        small(rorder=2).stream(torch.zeros(1, 4, 12, dtype=torch.float64))


def test_an_unknown_argument_is_told(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "vad.pt")
    with pytest.raises(SettingError, match=r"unknown argument of fsmn_vad 'lstrides'\. Did you mean 'lstride'\?"):
        compress.load_model(tmp_path / "vad.pt", arch="fsmn_vad", arguments={"lstrides": 2})
    with pytest.raises(ModelError, match=r"fsmn_block\.conv_left\.weight has shape \[8, 1, 4, 1\], FSMNVAD needs"):
        compress.load_model(tmp_path / "vad.pt", arch="fsmn_vad", arguments={"lorder": 5})
