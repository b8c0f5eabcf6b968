from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion2gan.losses import l1, mse, pseudo_huber


def test_known_answers() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([[[[1.0, 1], [1, 1]]], [[[3.0, 0], [0, 4]]]])
    assert mse(a, b).tolist() == [1.0, 6.25]
    assert l1(a, b).tolist() == [1.0, 1.75]
    torch.testing.assert_close(pseudo_huber(a, b, c=2.0), torch.tensor([(math.sqrt(8) - 2) / 2, (math.sqrt(29) - 2) / 2]))


def test_pseudo_huber_limits() -> None:
    """Quadratic near zero, the norm far from it."""
    x = torch.full((1, 1, 4, 4), 1e-3)
    assert pseudo_huber(x, 0 * x, c=10.0).item() == pytest.approx(x.square().sum().item() / 20 / 4, rel=1e-3)
    far = torch.full((1, 1, 4, 4), 1e3)
    assert pseudo_huber(far, 0 * far).item() == pytest.approx(1e3, rel=1e-4)


@given(st.integers(0, 2**31), st.sampled_from([mse, l1, pseudo_huber]))
def test_a_distance(seed: int, distance: object) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 4, 5, 5, generator=generator)
    assert distance(a, a).abs().max() < 1e-6  # type: ignore[operator]
    assert (distance(a, b) > 0).all()  # type: ignore[operator]
    torch.testing.assert_close(distance(a, b), distance(b, a))  # type: ignore[operator]
    torch.testing.assert_close(distance(a, b)[1:2], distance(a[1:2], b[1:2]))  # type: ignore[operator]
