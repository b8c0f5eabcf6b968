"""Which form of attention a network computes by. The numbers are the same up to rounding, the speed is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# Up to so many positions, two products and a softmax beat the CPU's fused attention: compiled, by a fifth of a whole
# evaluation at 64 positions; its backward by more. Beyond, the scores no longer fit into the cache.
SHORT_SEQUENCE = 1024


def plain_attention_on_cpu(network: Any, positions: int, device: torch.device) -> None:
    """Attention as two matrix products and a softmax where the CPU's fused kernel is slower: at most SHORT_SEQUENCE positions.

    `positions`: of the network's input, height x width. A network without diffusers' attention processors is left as it is.
    """
    if device.type == "cpu" and positions <= SHORT_SEQUENCE and hasattr(network, "set_attn_processor"):
        network.set_attn_processor(AttnProcessor())


_twice_differentiable: ContextVar[bool] = ContextVar("twice_differentiable", default=False)


@contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    """Inside the block `scaled_dot_product_attention` computes by products and a softmax, which have a double backward.

    The fused kernels have none. A backward outside the block keeps to it, with `checkpoint_as_computed` also where it recomputes.
    """
    token = _twice_differentiable.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _twice_differentiable.reset(token)


class _AsInForward:
    """Enters the forward's kind of attention, as often as there is something to recompute."""

    def __init__(self) -> None:
        self._twice_differentiable = _twice_differentiable.get()
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(twice_differentiable_attention() if self._twice_differentiable else nullcontext())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def checkpoint_as_computed(module: nn.Module, *arguments: Any) -> Any:
    """Gradient checkpointing, for `enable_gradient_checkpointing`, whose recomputation has the attention that the forward had."""
    if torch.compiler.is_compiling():
        # Nothing that is compiled has a double backward, and a graph takes no context of ours.
        return checkpoint(module, *arguments, use_reentrant=False)
    return checkpoint(module, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _AsInForward()))
