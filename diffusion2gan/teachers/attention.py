"""Which form of attention a network computes by. The numbers are the same up to rounding, the speed is not."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

# Up to so many positions, two products and a softmax beat the CPU's fused attention: compiled, by a fifth of a whole
# evaluation at 64 positions; its backward by more. Beyond, the scores no longer fit into the cache.
SHORT_SEQUENCE = 1024


def plain_attention_on_cpu(network: Any, positions: int, device: torch.device) -> None:
    """Attention as two matrix products and a softmax where the CPU's fused kernel is slower: at most SHORT_SEQUENCE positions.

    `positions`: of the network's input, height x width. A network without diffusers' attention processors is left as it is.
    """
    if device.type == "cpu" and positions <= SHORT_SEQUENCE and hasattr(network, "set_attn_processor"):
        network.set_attn_processor(AttnProcessor())
