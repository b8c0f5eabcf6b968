"""The distances d of Eq. 1 that need no network, and the adversarial losses of Eq. 5-6: tensors in, one number a sample out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


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


# --- Adversarial: logits -> one number a sample ------------------------------------------------------------------------
#
# Every loss is computed at each location of each map and averaged over locations, then over maps: lambda does not change with
# the resolution or the number of read-outs.

Maps = Mapping[str, Tensor]
"""Logits (B, 1, h, w) by the name of their map."""


def mean_over_maps(maps: Iterable[Tensor]) -> Tensor:
    """The mean over maps of the mean over locations: (B, 1, h, w) each -> (B,)."""
    return torch.stack([m.flatten(1).mean(1) for m in maps]).mean(0)


def discriminator_loss(real: Maps, fake: Maps, kind: str = "logistic") -> Tensor:
    """D's part of Eq. 5: maps of logits of B real and B fake samples -> (B,).

    logistic: -log D(x) - log(1 - D(G)), D the sigmoid of a logit (Eq. 5). hinge: max(0, 1 - r) + max(0, 1 + f) (Lim & Ye 2017).
    relativistic: -log sigmoid(r - f), the fake against the real sample of the same row (RpGAN, as in Huang et al. 2024, R3GAN).
    """
    pairs = [(r, fake[name]) for name, r in real.items()]
    if kind == "logistic":
        return mean_over_maps(F.softplus(-r) + F.softplus(f) for r, f in pairs)
    if kind == "hinge":
        return mean_over_maps(F.relu(1 - r) + F.relu(1 + f) for r, f in pairs)
    if kind == "relativistic":
        return mean_over_maps(F.softplus(f - r) for r, f in pairs)
    raise ValueError(f"adversarial loss {kind!r}, expected logistic, hinge or relativistic")


def generator_loss(fake: Maps, kind: str = "logistic", real: Maps | None = None) -> Tensor:
    """G's part, L_GAN of Eq. 6: maps of logits of B generated samples -> (B,).

    logistic: -log D(G), non-saturating. hinge: -f. relativistic: -log sigmoid(f - r), which needs `real`, the maps of the same rows.
    """
    if kind == "logistic":
        return mean_over_maps(F.softplus(-f) for f in fake.values())
    if kind == "hinge":
        return mean_over_maps(-f for f in fake.values())
    if kind == "relativistic":
        if real is None:
            raise ValueError("the relativistic loss compares with real samples, expected their maps")
        return mean_over_maps(F.softplus(real[name] - f) for name, f in fake.items())
    raise ValueError(f"adversarial loss {kind!r}, expected logistic, hinge or relativistic")
