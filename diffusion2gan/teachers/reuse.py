"""Work that a guided ODE solve need not repeat. Exact: the same numbers, computed once instead of many times.

- Keys and values of the text: cross-attention projects the same embeddings at every step; they are kept.
- The network's text-free prefix: both halves of a guidance batch hold the same latents, and differ only from the first
  cross-attention on; what comes before it runs on one half.

Both work on named places of a diffusers U-Net; a network without them is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Remembering(nn.Module):
    """A projection that answers the same tensor with the same output."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._output is None or x is not self._input:
            self._input, self._output = x, self.projection(x)
        return self._output


@contextmanager
def remembered_text(network: nn.Module) -> Iterator[None]:
    """Inside the block, cross-attention computes keys and values of an embedding tensor once."""
    attentions: list[Any] = [m for m in network.modules() if getattr(m, "is_cross_attention", False)]
    for attention in attentions:
        attention.to_k, attention.to_v = _Remembering(attention.to_k), _Remembering(attention.to_v)
    try:
        yield
    finally:
        for attention in attentions:
            attention.to_k, attention.to_v = attention.to_k.projection, attention.to_v.projection


def text_free_prefix(network: Any) -> list[nn.Module]:
    """The modules that a U-Net runs before its first cross-attention, in order; empty for another kind of network."""
    blocks = getattr(network, "down_blocks", None)
    if blocks is None or not hasattr(network, "conv_in"):
        return []
    prefix = [network.conv_in]
    if getattr(network.config, "addition_embed_type", None) is not None:
        # SDXL's time embedding holds pooled text: everything after the first convolution has read it.
        return prefix
    for block in blocks:
        if getattr(block, "attentions", None):
            # `resnets[0]` runs before `attentions[0]`.
            return [*prefix, block.resnets[0]]
        prefix.append(block)
    return prefix


def _first_half(value: Any, batch: int) -> Any:
    return value[: batch // 2] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch else value


def _twice(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_twice(v) for v in value)
    return torch.cat([value, value]) if isinstance(value, Tensor) else value


@contextmanager
def shared_prefix(network: nn.Module, batch: int) -> Iterator[None]:
    """Inside the block, rows i and i + batch / 2 of every input must be equal in all but their text."""

    def halve(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_first_half(a, batch) for a in arguments), {k: _first_half(v, batch) for k, v in named.items()}

    def double(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return _twice(output)

    with ExitStack() as stack:
        for module in text_free_prefix(network):
            stack.callback(module.register_forward_pre_hook(halve, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(double).remove)
        yield
