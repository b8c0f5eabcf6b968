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
    assert _step(clip, parameters, 150.0) == pytest.approx((150.0, 150.0))
    assert clip.scale == pytest.approx((100 * 150) ** 0.5)
    scale = clip.scale
    assert _step(clip, parameters, 1e6) == pytest.approx((1e6, 2 * scale))
    # Of three so far, as it was measured.
    assert clip.scale == pytest.approx((100 * 150 * 1e6) ** (1 / 3))
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
    for _ in range(30):
        _step(clip, parameters, 1.0)
    # One spike in a long run is a tenth of its logarithm.
    assert _step(clip, parameters, 1000.0) == pytest.approx((1000.0, 2.0))
    assert clip.scale == pytest.approx(1000**0.1)


def test_what_stays_larger_is_followed() -> None:
    """As the gradients of a discriminator that begins undecided."""
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    clip = RelativeClip(2.0)
    for _ in range(5):
        _step(clip, parameters, 0.01)
    left = [_step(clip, parameters, 1.0)[1] for _ in range(60)]
    assert left[0] == pytest.approx(0.02)
    assert left[-1] == pytest.approx(1.0)


def test_a_gradient_of_nothing_is_passed_over() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    clip = RelativeClip(2.0)
    assert _step(clip, parameters, 0.0) == (0.0, 0.0)
    assert _step(clip, parameters, 3.0) == pytest.approx((3.0, 3.0))
    again = RelativeClip(2.0)
    again.state = (0.0, 7)  # of a checkpoint from before
    assert _step(again, parameters, 5.0) == pytest.approx((5.0, 5.0))
    again.state = clip.state
    assert _step(again, parameters, 30.0) == _step(clip, parameters, 30.0) == pytest.approx((30.0, 6.0))
