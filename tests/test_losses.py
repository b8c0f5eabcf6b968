from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion2gan import losses
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


def _maps(seed: int, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{s}": 2 * torch.randn(batch, 1, s, s + 1, generator=generator, dtype=torch.float64) for s in (2, 4)}


def _by_hand(function: Callable[..., float], *maps: dict[str, Tensor]) -> Tensor:
    """Mean over maps of the mean over locations, sample by sample, location by location."""
    rows = []
    for i in range(len(next(iter(maps[0].values())))):
        of_maps = []
        for name in maps[0]:
            locations = zip(*(m[name][i].flatten().tolist() for m in maps), strict=True)
            of_maps.append(np.mean([function(*values) for values in locations]))
        rows.append(np.mean(of_maps))
    return torch.tensor(rows, dtype=torch.float64)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_adversarial_losses_are_eq_5_and_6() -> None:
    real, fake = _maps(0), _maps(1)
    of_d = {
        "logistic": lambda r, f: -math.log(_sigmoid(r)) - math.log(1 - _sigmoid(f)),
        "hinge": lambda r, f: max(0, 1 - r) + max(0, 1 + f),
        "relativistic": lambda r, f: -math.log(_sigmoid(r - f)),
    }
    of_g = {
        "logistic": lambda f, r: -math.log(_sigmoid(f)),
        "hinge": lambda f, r: -f,
        "relativistic": lambda f, r: -math.log(_sigmoid(f - r)),
    }
    for kind in of_d:
        torch.testing.assert_close(losses.discriminator_loss(real, fake, kind), _by_hand(of_d[kind], real, fake))
        torch.testing.assert_close(losses.generator_loss(fake, kind, real), _by_hand(of_g[kind], fake, real))
    for call in (lambda: losses.discriminator_loss(real, fake, "wgan"), lambda: losses.generator_loss(fake, "wgan")):
        with pytest.raises(ValueError, match="'wgan', expected logistic, hinge or relativistic"):
            call()
    with pytest.raises(ValueError, match="relativistic loss compares with real samples"):
        losses.generator_loss(fake, "relativistic")


def test_adversarial_losses_do_not_depend_on_resolution_or_number_of_maps() -> None:
    small = {"a": torch.full((2, 1, 2, 2), 0.7)}
    large = {name: torch.full((2, 1, size, size), 0.7) for name, size in (("a", 2), ("b", 16), ("c", 9))}
    for kind in ("logistic", "hinge", "relativistic"):
        torch.testing.assert_close(losses.discriminator_loss(small, small, kind), losses.discriminator_loss(large, large, kind))
        torch.testing.assert_close(losses.generator_loss(small, kind, small), losses.generator_loss(large, kind, large))


def test_adversarial_losses_of_large_logits_are_finite() -> None:
    large = {"a": torch.tensor([[[[1e4, -1e4]]]])}
    for kind in ("logistic", "relativistic"):
        assert torch.isfinite(losses.discriminator_loss(large, large, kind)).all()
        assert torch.isfinite(losses.generator_loss(large, kind, large)).all()
