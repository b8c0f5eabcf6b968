"""Gradients cut relative to their own running norm, so that no loss is favoured by its scale."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from diffusion2gan.training.sharding import whole


class RelativeClip:
    """Cuts a gradient to `factor` times the running geometric mean of its norm, which forgets over about `memory` steps; while there are
    fewer, it is the mean of all.

    Of the logarithm of the norm as it was measured: one spike hardly moves it, and a norm that stays higher is followed. (A mean of cut norms grows by
    1 % a step at most, so a network that begins with small gradients, as a discriminator does, would be cut for hundreds of steps.)
    `scale`: that mean, nan before the first step. `seen`: steps in it. A gradient of 0 says nothing, and is passed over.
    """

    def __init__(self, factor: float, memory: int = 100):
        self.factor, self.memory, self.scale, self.seen = factor, memory, math.nan, 0
        self._parameters: list[nn.Parameter] = []
        self._norm = torch.zeros(())

    def measure(self, parameters: Iterable[nn.Parameter]) -> float:
        """The norm of the gradients that are there; nothing is changed yet. Every process has to call this."""
        self._parameters = [p for p in parameters if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return whole(self._norm).item()

    def apply(self, norm: float) -> None:
        """Cuts what `measure` measured as `norm`, and remembers it."""
        if norm > 0:
            if self.seen:
                self._cut(self.factor * self.scale)
            self.seen += 1
            self.scale = norm if self.seen == 1 else self.scale * (norm / self.scale) ** (1 / min(self.seen, self.memory))
        self._parameters = []

    @property
    def state(self) -> tuple[float, int]:
        """`scale` and `seen`, to go on exactly."""
        return self.scale, self.seen

    @state.setter
    def state(self, state: tuple[float, int]) -> None:
        scale, seen = state
        self.scale, self.seen = scale, seen if scale > 0 else 0

    def _cut(self, limit: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self._norm)
