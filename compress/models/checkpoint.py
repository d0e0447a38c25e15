"""Reading checkpoints without running code from them."""

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from compress.errors import ModelError

TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
# What PyTorch's reader raises for damaged bytes, depending on where it meets them.
BROKEN_PICKLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, OSError, struct.error),
)
CHECKPOINT_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict; floating-point tensors come back as float32.

    A single enclosing level (``state_dict``, ``model``) and the prefix ``module.`` of data-parallel training
    are taken off.

    Raises:
        ModelError: If the file is missing, is not a state dict, needs pickled code (refused, never run), or
            holds NaN or infinite weights.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]  # type: ignore[assignment]
    nameless = [key for key in state if not isinstance(key, str)]
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if nameless or wrong or not state:
        found = f"key '{wrong[0]}' is not a tensor" if wrong else "it is empty"
        found = f"key '{nameless[0]}' is not a name" if nameless else found
        raise ModelError(f"{path} is not a flat state dict: {found}. Save model.state_dict().")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise ModelError(f"{path} holds NaN or infinite weights in {name_some(bad)}. The training diverged.")
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict whose keys and shapes must be exactly the model's.

    Counters of batches (``num_batches_tracked``) may be missing: they do not change the function.

    Raises:
        ModelError: Naming the keys that are missing, extra or of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    if missing or extra:
        parts = [f"missing {name_some(missing)}"] * bool(missing) + [f"extra {name_some(extra)}"] * bool(extra)
        raise ModelError(f"{name} does not fit {type(model).__name__}: {'; '.join(parts)}. Is --arch right?")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ModelError(
                f"{name}: {key} has shape {list(value.shape)}, {type(model).__name__} needs {list(own[key].shape)}."
            )
    model.load_state_dict(state, strict=False)


def name_some(keys: list[str], limit: int = 3) -> str:
    """List a few keys and say how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}). Is it truncated?") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # about the format of a file that is then refused, or read well
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        if "GLOBAL" in str(error) or "TorchScript" in str(error):
            raise ModelError(
                f"{path} holds pickled Python objects beside tensors; they are refused, because loading them would run"
                " code. Save model.state_dict() alone, best as safetensors."
            ) from error
        raise ModelError(f"{path} is not a readable PyTorch checkpoint. Is it truncated?") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"{path} holds a {type(state).__name__}, not a state dict. Save model.state_dict().")
    return dict(state)
