"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of parameters and buffers; early on it forgets faster: min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the weights after step number `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.state[name])
                values.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Copies a saved average in place, so that each tensor keeps its memory format."""
        for name, value in state.items():
            self.state[name].copy_(value)

    @contextmanager
    @torch.no_grad()
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model holds the average; afterwards its own weights again, bit for bit."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)
