from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.seeds import EVALUATION, MAX_STORE_SEED, draw_noise, evaluation_seed, noise_fingerprint, pair_seed


def test_reference_values() -> None:
    """The recipe is frozen: these numbers may never change while it is called philox-normal-1."""
    noise = draw_noise([0, 1], (2, 2))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.ravel(), REFERENCE, atol=1e-6)
    assert noise_fingerprint() == FINGERPRINT


REFERENCE = [0.0599110, 0.0155596, -1.1644385, -0.1326471, 1.0916891, 0.4558267, 0.7017897, 0.2849434]
FINGERPRINT = "668be180af1ce17f"


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**62), max_size=4))
def test_noise_depends_on_its_own_seed_alone(seed: int, others: list[int]) -> None:
    alone = draw_noise([seed], (3, 4, 4))[0]
    np.testing.assert_array_equal(draw_noise([*others, seed], (3, 4, 4))[-1], alone)


@given(st.integers(0, MAX_STORE_SEED), st.integers(0, MAX_STORE_SEED), st.integers(0, 2**40 - 1), st.integers(0, 2**40 - 1))
def test_seeds_are_distinct_and_never_evaluation_seeds(a: int, b: int, i: int, j: int) -> None:
    assert (pair_seed(a, i) == pair_seed(b, j)) == ((a, i) == (b, j))
    assert not pair_seed(a, i) & EVALUATION
    assert evaluation_seed(i) & EVALUATION


def test_simulate_refuses_evaluation_seeds() -> None:
    with pytest.raises(UserError, match="kept for evaluation"):
        pair_seed(MAX_STORE_SEED + 1, 0)


def test_standard_normal() -> None:
    noise = draw_noise(range(64), (4, 32, 32))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    flat = noise.reshape(64, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(64)).max() < 0.08
