"""Gradients cut relative to their own running norm, so that no loss is favoured by its scale."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from diffusion2gan.training.sharding import whole


class RelativeClip:
    """Cuts a gradient to `factor` times the running mean of its (cut) norm, which forgets over about `memory` steps.

    `scale`: that mean; nan before the first step.
    """

    def __init__(self, factor: float, memory: int = 100):
        self.factor, self.memory, self.scale = factor, memory, math.nan
        self._parameters: list[nn.Parameter] = []
        self._norm = torch.zeros(())

    def measure(self, parameters: Iterable[nn.Parameter]) -> float:
        """The norm of the gradients that are there; nothing is changed yet. Every process has to call this."""
        self._parameters = [p for p in parameters if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return whole(self._norm).item()

    def apply(self, norm: float) -> None:
        """Cuts what `measure` measured as `norm`, and remembers it."""
        if not math.isnan(self.scale):
            limit = self.factor * self.scale
            self._cut(limit)
            norm = min(norm, limit)
        self.scale = norm if math.isnan(self.scale) else self.scale + (norm - self.scale) / self.memory
        self._parameters = []

    def _cut(self, limit: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self._norm)
