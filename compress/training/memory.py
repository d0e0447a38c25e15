"""Memory that is too small, told with what to set smaller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compress.errors import MachineError


@contextmanager
def out_of_memory_told(told: str) -> Iterator[None]:
    """Say what happened and what to do when memory is too small.

    Raises:
        MachineError: In place of the error of PyTorch or NumPy.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(told) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MachineError(told) from error
