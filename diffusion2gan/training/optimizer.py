"""AdamW of G and of D, with moments of 32 or of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from diffusion2gan.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit"]


def adamw(
    name: OptimizerName, parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser `name`. Raises UserError when what it needs is not installed."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("training.optimizer is adamw_8bit, which needs bitsandbytes: pip install 'diffusion2gan[8bit]'") from None
    return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)
