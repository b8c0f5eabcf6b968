"""AdamW of G and of D, with moments of 32 or of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from diffusion2gan.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit"]


def adamw(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser `name`. Raises UserError when what it needs is not installed."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("training.optimizer is adamw_8bit, which needs bitsandbytes: pip install 'diffusion2gan[8bit]'") from None
    return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def rate_groups(network: nn.Module, output_rate: float) -> list[dict[str, Any]]:
    """The trained parameters of a U-Net for `adamw`: with `rate_factor` `output_rate` those of its last up block, `conv_norm_out` and
    `conv_out`, with 1 the rest. One group where there is no difference."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if output_rate == 1:
        return [{"params": trained, "rate_factor": 1.0}]
    layers = [network.up_blocks[-1], network.conv_norm_out, network.conv_out]  # type: ignore[index]
    last = {id(p) for layer in layers for p in layer.parameters()}  # type: ignore[union-attr]
    return [
        {"params": [p for p in trained if id(p) not in last], "rate_factor": 1.0},
        {"params": [p for p in trained if id(p) in last], "rate_factor": output_rate},
    ]
