"""Arithmetic of embeddings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """Cosine of the angle between two embeddings (embedding_size,); NaN if one is all zeros."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
