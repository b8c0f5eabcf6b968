"""Keeps gradients inside float16's range while they pass through a network that computes in it.

A distance averaged over locations and batch sends gradients of 1e-8 into the network, where float16 ends. They are
multiplied by a power of two on the way in, in float32, and divided by it on the way out: the result is the same, and the
user needs no loss scaling. This holds for frozen networks alone, as the gradients of weights would stay multiplied, and
once: a second derivative, parts of which would leave without having entered, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The largest gradient that enters becomes 16 to 32: 2,000 times below float16's largest number, 2^18 times above the
# smallest of full precision.
_PEAK = 4


def computes_in_float16(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a network with weights of `dtype` does its convolutions in float16 here."""
    return (torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype) == torch.float16


def with_scaled_gradients(network: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> list[Tensor]:
    """`network(x)`, its outputs in float32 or better; the same values, and the gradient to x that does not underflow."""
    x, token = _Entrance.apply(x)
    return list(_Exit.apply(token, *network(x)))


class _Entrance(torch.autograd.Function):
    """x -> x and a token. The token's gradient is the factor that `_Exit` put on the gradients: here it is taken off again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtype = x.dtype
        return x.view_as(x), x.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, factor: Tensor) -> Tensor:
        return (gradient.to(torch.promote_types(ctx.dtype, torch.float32)) / factor).to(ctx.dtype)


class _Exit(torch.autograd.Function):
    """Token and features -> the features, in float32 or better. Their gradients get one power of two as a factor."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [f.dtype for f in features]
        return tuple(f.to(torch.promote_types(f.dtype, torch.float32)) for f in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        largest = torch.stack([torch.linalg.vector_norm(g, torch.inf).float() for g in gradients]).amax()
        # Clamped: without any gradient the logarithm is -inf. NaN and infinity stay what they are.
        factor = torch.exp2((_PEAK - largest.log2().floor()).clamp(-100, 100))
        return factor, *((g * factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
