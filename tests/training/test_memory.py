from collections.abc import Callable

import numpy as np
import pytest
import torch

from compress.errors import MachineError
from compress.training.memory import out_of_memory_told

MAKERS = {"torch": lambda: torch.ones(1 << 50), "numpy": lambda: np.ones(1 << 50)}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_to_do_is_told(maker: str) -> None:
    make: Callable[[], object] = MAKERS[maker]
    with pytest.raises(MachineError, match=r"^too little\. Buy more\.$"), out_of_memory_told("too little. Buy more."):
        make()


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_told("too little."):
        torch.ones(3).view(2)
