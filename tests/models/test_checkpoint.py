"""Checkpoints are read without running code from them; what does not fit is named."""

import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.checkpoint import load_into, name_some, read_state_dict

FILES = ("weights.bin", "weights.ckpt", "weights.pt", "weights.pth", "weights.safetensors")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 4))


def save(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Harmful:
    """Pickles to a call that makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", FILES)
def test_state_dict_comes_back_as_saved(tmp_path: Path, name: str) -> None:
    state = network().state_dict()
    assert same(read_state_dict(save(state, tmp_path / name)), state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_as_float32(tmp_path: Path, kind: torch.dtype) -> None:
    state = {
        key: value.to(kind) if value.is_floating_point() else value for key, value in network().state_dict().items()
    }
    read = read_state_dict(save(state, tmp_path / "weights.safetensors"))
    assert {value.dtype for value in read.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(read[key], state[key].to(read[key].dtype)) for key in state)


def test_wrappers_and_parallel_prefix_are_taken_off(tmp_path: Path) -> None:
    state = network().state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    for wrapped in ({"state_dict": state}, {"model": parallel, "epoch": 7}, parallel):
        assert same(read_state_dict(save(wrapped, tmp_path / "weights.pt")), state)


def test_loaded_weights_are_the_networks(tmp_path: Path) -> None:
    state = network().state_dict()
    model = nn.Sequential(nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 4))
    load_into(model, state, "weights.pt")
    assert same(model.state_dict(), state)


def test_counters_of_batches_may_be_missing() -> None:
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    load_into(network(), state, "weights.pt")


def test_missing_and_extra_keys_are_named() -> None:
    state = network().state_dict()
    state["encoder.weight"] = state.pop("2.weight")
    with pytest.raises(
        ModelError,
        match=r"weights\.pt does not fit Sequential: missing 2\.weight; extra encoder\.weight\. Is --arch right\?",
    ):
        load_into(network(), state, "weights.pt")
    with pytest.raises(ModelError, match=r"missing 0\.weight, 0\.bias, 1\.weight and 5 more\. "):
        load_into(network(), {}, "weights.pt")


def test_misshaped_key_is_named_with_both_shapes() -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {**before, "0.weight": torch.zeros(6, 8, 3), "2.weight": torch.zeros(4, 7)}
    with pytest.raises(ModelError, match=r"weights\.pt: 2\.weight has shape \[4, 7\], Sequential needs \[4, 6\]\."):
        load_into(model, state, "weights.pt")
    assert same(model.state_dict(), before), "nothing is loaded from a checkpoint that does not fit"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_nan_weights_are_refused_and_named(tmp_path: Path, name: str, value: float) -> None:
    state = network().state_dict()
    state["2.weight"][1, 2] = value
    path = save(state, tmp_path / name)
    with pytest.raises(ModelError, match=rf"{name} holds NaN or infinite weights in 2\.weight\. The training diverged"):
        read_state_dict(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", FILES[:4])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, name: str, zipped: bool) -> None:
    target = tmp_path / "made by the checkpoint"
    path = tmp_path / name
    torch.save({**network().state_dict(), "extra": Harmful(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModelError, match=r"holds pickled Python objects .* refused, because loading them would run code"
    ):
        read_state_dict(path)
    assert not target.exists()


@pytest.mark.parametrize("name", FILES)
def test_bare_pickle_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    target = tmp_path / "made by the checkpoint"
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Harmful(target)))
    with pytest.raises(ModelError, match=name):
        read_state_dict(path)
    assert not target.exists()


def test_whole_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pickled Python objects.*Save model\.state_dict\(\) alone"):
        read_state_dict(save(network(), tmp_path / "model.pt"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 3), torch.zeros(1, 2)), tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"model\.pt holds pickled Python objects beside tensors; they are refused"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "it is empty"),
        ({"epoch": 3}, "key 'epoch' is not a tensor"),
        ({"encoder": {"weight": torch.zeros(2)}}, "key 'encoder' is not a tensor"),
        ({3: torch.zeros(2)}, "key '3' is not a name"),
    ],
)
def test_what_is_no_flat_state_dict_is_told(tmp_path: Path, content: dict, found: str) -> None:
    with pytest.raises(ModelError, match=rf"is not a flat state dict: {found}\. Save model\.state_dict\(\)\."):
        read_state_dict(save(content, tmp_path / "weights.pt"))
    with pytest.raises(ModelError, match=r"holds a Tensor, not a state dict\. Save model\.state_dict\(\)\."):
        read_state_dict(save(torch.zeros(3), tmp_path / "weights.pt"))


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.pt: no such checkpoint\."):
        read_state_dict(tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_checkpoint_is_told_at_any_length(tmp_path: Path, name: str, share: float) -> None:
    path = save(network().state_dict(), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match=r"is not a readable .*Is it truncated\?"):
        read_state_dict(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_legacy_checkpoint_is_told_at_any_length(tmp_path: Path, share: float) -> None:
    path = tmp_path / "weights.bin"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    # Cut within the name of a class, it is a class that is not known.
    with pytest.raises(ModelError, match=r"weights\.bin (is not a readable PyTorch checkpoint\. Is it|holds pickled)"):
        read_state_dict(path)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_other_file_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ModelError, match=name):
        read_state_dict(path)


@given(keys=st.lists(st.text("ab.", min_size=1), min_size=1, max_size=9))
def test_few_keys_are_listed_and_the_others_counted(keys: list[str]) -> None:
    text = name_some(keys)
    assert text.startswith(", ".join(keys[:3]))
    assert text.endswith(f" and {len(keys) - 3} more") == (len(keys) > 3)
