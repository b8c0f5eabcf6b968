from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion2gan.training.clipping import RelativeClip


def _step(clip: RelativeClip, parameters: list[nn.Parameter], norm: float) -> tuple[float, float]:
    """One step with a gradient of length `norm`; what was measured, and how long the gradient is then."""
    for p in parameters[:-1]:
        p.grad = torch.ones_like(p) * norm / sum(q.numel() for q in parameters[:-1]) ** 0.5
    measured = clip.measure(parameters)
    clip.apply(measured)
    return measured, torch.cat([p.grad.flatten() for p in parameters[:-1] if p.grad is not None]).norm().item()


def test_a_gradient_is_cut_to_twice_its_running_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(4))]  # the last has none
    clip = RelativeClip(2.0)
    assert _step(clip, parameters, 100.0) == pytest.approx((100.0, 100.0))  # nothing to compare with yet
    assert clip.scale == pytest.approx(100.0)
    assert _step(clip, parameters, 150.0) == pytest.approx((150.0, 150.0))
    assert clip.scale == pytest.approx(0.99 * 100 + 0.01 * 150)
    scale = clip.scale
    assert _step(clip, parameters, 1e6) == pytest.approx((1e6, 2 * scale))
    # A spike is remembered as what was left of it.
    assert clip.scale == pytest.approx(0.99 * scale + 0.01 * 2 * scale)
    assert parameters[-1].grad is None


def test_measuring_changes_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip = RelativeClip(1.0)
    clip.scale = 1e-3
    assert clip.measure([parameter]) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_how_soon_it_forgets() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    clip = RelativeClip(2.0, memory=10)
    _step(clip, parameters, 1.0)
    assert _step(clip, parameters, 100.0) == pytest.approx((100.0, 2.0))
    assert clip.scale == pytest.approx(1 + 0.1)
