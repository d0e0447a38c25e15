"""Cosine: in [-1, 1], blind to length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.vectors import cosine


@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_length_does_not_matter(seed: int, scale: float) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 24))
    assert -1 <= cosine(a, b) <= 1
    assert cosine(a, b) == pytest.approx(cosine(b, scale * a))
    assert cosine(a, scale * a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
