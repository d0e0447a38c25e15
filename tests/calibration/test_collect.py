"""Ranges of the tensors of a network: exact extremes, constant memory, errors that name the place."""

import builtins
import math
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.calibration import Method, Range, collect_ranges
from compress.calibration.collect import MAX_FRAMES
from compress.errors import InputError, ModelError, SettingError
from compress.evaluation.memory import peak_rss_of
from compress.onnx_file import open_session

TENSORS = ("feats", "product", "hidden", "hidden2", "pooled")
METHODS: tuple[Method, ...] = ("minmax", "percentile", "entropy", "mse")


@pytest.fixture(scope="module")
def model(tiny_graph: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_graph))


@pytest.fixture(scope="module")
def utterances() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((frames, 80)).astype(np.float32) for frames in (90, 200, 31, 150, 200, 77)]


@pytest.fixture(scope="module")
def values(model: onnx.ModelProto, utterances: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All values of each tensor, fetched and kept."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in TENSORS)
    session = open_session(probed.SerializeToString(), 1)
    runs = [session.run(list(TENSORS), {"feats": utterance[None]}) for utterance in utterances]
    return {name: np.concatenate([run[i].ravel() for run in runs]) for i, name in enumerate(TENSORS)}


def test_extremes_are_exact(model: onnx.ModelProto, utterances, values: dict[str, np.ndarray]) -> None:
    before = model.SerializeToString()
    found = collect_ranges(model, TENSORS, iter(utterances))
    assert (found.utterances, found.frames) == (6, sum(map(len, utterances)))
    assert list(found.ranges) == list(TENSORS)
    for name, kept in values.items():
        low, high = float(kept.min()), float(kept.max())
        assert found.ranges[name] == Range(min(low, 0), max(high, 0), low, high, 0)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_chosen_ranges_hold_what_they_say(
    model: onnx.ModelProto, utterances, values: dict[str, np.ndarray], method: Method, symmetric: bool
) -> None:
    found = collect_ranges(model, TENSORS, utterances, method, symmetric=symmetric, percentile=99.5).ranges
    for name, kept in values.items():
        chosen = found[name]
        assert (chosen.seen_low, chosen.seen_high) == (kept.min(), kept.max())
        assert chosen.low <= 0 <= chosen.high
        assert -chosen.low <= np.abs(kept).max() >= chosen.high
        inside = kept[(kept >= chosen.low) & (kept <= chosen.high)]
        whole = max(kept.max(), 0) - min(kept.min(), 0)
        assert chosen.covered >= (inside.max() - min(inside.min(), 0)) / whole - 1e-6
        assert chosen.covered <= 1
        assert (chosen.covered == 1) == (chosen.low <= kept.min() and chosen.high >= kept.max())
        if symmetric:
            assert chosen.low == -chosen.high
        if kept.size <= 6 * 2**14:  # all were counted
            outside = np.mean((kept < chosen.low) | (kept > chosen.high))
            assert chosen.clipped == pytest.approx(outside, abs=1e-9)
        if method == "percentile" and kept.size > 1000:
            assert 0 < chosen.clipped <= 0.005


@pytest.mark.parametrize("method", METHODS)
def test_order_of_utterances_does_not_matter(model: onnx.ModelProto, utterances, method: Method) -> None:
    found = collect_ranges(model, TENSORS, utterances, method)
    for order in (utterances[::-1], utterances[3:] + utterances[:3]):
        assert collect_ranges(model, TENSORS, order, method) == found


@pytest.mark.parametrize("method", METHODS)
def test_number_of_threads_does_not_matter(model: onnx.ModelProto, utterances, method: Method) -> None:
    alone = collect_ranges(model, TENSORS, utterances, method)
    for threads in (2, 9):
        found = collect_ranges(model, TENSORS, utterances, method, threads=threads)
        assert (found.utterances, found.frames) == (alone.utterances, alone.frames)
        for name, chosen in alone.ranges.items():  # kernels may sum in another order
            assert astuple(found.ranges[name]) == pytest.approx(astuple(chosen), rel=1e-5)


def test_long_utterances_are_run_in_equal_pieces(model: onnx.ModelProto) -> None:
    utterance = np.random.default_rng(0).standard_normal((2 * MAX_FRAMES + 2, 80)).astype(np.float32)
    pieces = np.array_split(utterance, 3)
    whole, cut = (collect_ranges(model, TENSORS, given, "mse") for given in ([utterance], pieces))
    assert whole.ranges == cut.ranges
    assert (whole.utterances, whole.frames) == (1, 2 * MAX_FRAMES + 2)


MEASURED = """
import numpy as np, onnx
from compress.calibration import collect_ranges
rng = np.random.default_rng(0)
utterances = (rng.standard_normal(({frames}, 80), dtype=np.float32) for _ in range({count}))
collect_ranges(onnx.load({path!r}), ["feats", "product", "sum", "hidden", "hidden2"], utterances, "mse")
"""


def test_memory_grows_neither_with_their_number_nor_with_their_length(tiny_graph: Path) -> None:
    def peak(count: int, frames: int) -> int:
        return peak_rss_of(builtins.exec, MEASURED.format(count=count, frames=frames, path=str(tiny_graph)), {})[1]

    few = peak(20, 300)
    assert peak(400, 300) <= 1.05 * few  # keeping the values would add 140 MB
    seconds_600 = 60_000 * 80 * 4
    assert peak(1, 60_000) <= 1.1 * few + 1.1 * seconds_600  # the tensors of a run over all of it would add 60 MB


def broken(model: onnx.ModelProto, weight: str, value: float) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensor = next(t for t in result.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[5] = value
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    return result


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensor_that_is_not_finite_is_named_with_its_node(model: onnx.ModelProto, utterances, value: float) -> None:
    for method in METHODS:
        with pytest.raises(
            InputError, match=r"tensor 'product2' of MatMul 'second' is NaN or infinite on calibration utterance 1\."
        ):
            collect_ranges(broken(model, "w2", value), ("hidden", "product2", "pooled"), utterances, method)


def test_broken_features_are_told(model: onnx.ModelProto, utterances) -> None:
    nan = utterances[0].copy()
    nan[3, 3] = np.nan
    with pytest.raises(InputError, match=r"the features of calibration utterance 3 hold NaN or infinity"):
        collect_ranges(model, TENSORS, [*utterances[:2], nan])
    with pytest.raises(
        InputError, match=r"calibration utterance 1 has features of shape \(90, 40\); \(frames, 80\) are needed"
    ):
        collect_ranges(model, TENSORS, [utterances[0][:, :40]])
    with pytest.raises(InputError, match=r"features of shape \(0, 80\); \(frames, 80\) are needed"):
        collect_ranges(model, TENSORS, [utterances[0][:0]])


def test_no_utterances_are_told(model: onnx.ModelProto) -> None:
    empty: Iterator[np.ndarray] = iter(())
    with pytest.raises(InputError, match=r"there are no calibration utterances; at least one is needed"):
        collect_ranges(model, TENSORS, empty)


def test_unknown_names_are_told(model: onnx.ModelProto, utterances) -> None:
    with pytest.raises(ModelError, match=r"the graph has no tensor 'hiden'"):
        collect_ranges(model, ["hiden"], utterances)
    with pytest.raises(SettingError, match=r"unknown calibration method 'entrpy'\. Did you mean 'entropy'\?"):
        collect_ranges(model, TENSORS, utterances, "entrpy")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"the calibration percentile must be over 50 and up to 100, got 0\.9999"):
        collect_ranges(model, TENSORS, utterances, "percentile", percentile=0.9999)


def test_tensor_that_is_always_zero_has_an_empty_range(model: onnx.ModelProto) -> None:
    zeros = [np.zeros((50, 80), np.float32)]
    for method in METHODS:
        assert collect_ranges(model, ["feats"], zeros, method).ranges["feats"] == Range(0, 0, 0, 0, 0)
