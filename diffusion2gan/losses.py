"""The distances d of Eq. 1 that need no network: tensors in, one number a sample out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mse(x0: Tensor, x1: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, C, H, W) twice -> (B,). Table 1 "MSE" (section 4.1 calls the row L1)."""
    return (x0 - x1).square().flatten(1).mean(1)


def l1(x0: Tensor, x1: Tensor) -> Tensor:
    """Mean absolute error of each sample: (B, C, H, W) twice -> (B,)."""
    return (x0 - x1).abs().flatten(1).mean(1)


def pseudo_huber(x0: Tensor, x1: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||x0 - x1||^2 + c^2) - c of each sample, divided by sqrt(dimension): (B, C, H, W) twice -> (B,).

    Song & Dhariwal 2024, with their c = 0.00054 sqrt(dimension) unless given. The division makes it comparable
    between latent sizes and changes no minimiser.
    """
    difference = (x0 - x1).flatten(1)
    dimension = difference.shape[1]
    c = 0.00054 * math.sqrt(dimension) if c is None else c
    square = difference.square().sum(1)
    # sqrt(s + c^2) - c, written so that small differences do not cancel.
    return square / (torch.sqrt(square + c * c) + c) / math.sqrt(dimension)
