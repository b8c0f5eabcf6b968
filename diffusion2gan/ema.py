"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters: of a LoRA student its changes alone, of another one everything."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {k: v for k, v in model.state_dict().items() if k not in frozen}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads what `trained_state` gave. Raises KeyError when a tensor of it is missing or unknown."""
    expected = trained_state(model).keys()
    if state.keys() != expected:
        raise KeyError(f"weights {sorted(state.keys() ^ expected)[:3]} do not belong to this network, or are missing")
    model.load_state_dict(state, strict=False)


class Ema:
    """Average of trained parameters and buffers; early on it forgets faster: min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: nn.Module, decay: float, device: torch.device | None = None):
        """`device`: where the average is kept, if not beside the weights."""
        self.decay, self.device = decay, device
        self.state = {
            k: v.detach().clone() if device is None else v.detach().to(device, copy=True) for k, v in trained_state(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, decay: float | None = None) -> None:
        """Moves the average towards the weights after step number `step` (counted from 0), by another `decay` if one is given."""
        decay = min(self.decay if decay is None else decay, (1 + step) / (10 + step))
        averages, values = [], []
        current = model.state_dict()
        for name, average in self.state.items():
            value = current[name]
            if not value.is_floating_point():
                average.copy_(value)
            elif self.device is None:
                averages.append(average)
                values.append(value)
            else:  # one at a time: elsewhere there may be no room for a second copy of all
                average.lerp_(value.to(self.device), 1 - decay)
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Copies a saved average in place, so that each tensor keeps its memory format."""
        for name, value in state.items():
            self.state[name].copy_(value)

    @contextmanager
    @torch.no_grad()
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model holds the average; afterwards its own weights again, bit for bit."""
        own = {k: v.detach().clone() for k, v in trained_state(model).items()}
        load_trained(model, self.state)
        try:
            yield
        finally:
            load_trained(model, own)
