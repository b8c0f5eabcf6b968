"""Work that a guided ODE solve need not do. Exact but for rounding: the same sums, with fewer multiplications.

- Keys and values of the text: cross-attention projects the same embeddings at every step; they are kept.
- The network's text-free prefix: both halves of a guidance batch hold the same latents, and differ only from the first
  cross-attention on; what comes before it runs on one half.
- Upsampling: a 3 x 3 convolution of a picture whose every pixel stands there four times is a transposed convolution of
  the small picture, with 4/9 of the multiplications.

All work on named places of a diffusers U-Net; a network without them is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
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


def transposed_kernel(weight: Tensor) -> Tensor:
    """The transposed convolution (stride 2, padding 1) that equals nearest upsampling by 2, then `weight` with padding 1.

    weight: (out, in, 3, 3). Returns (in, out, 4, 4) in its dtype, summed in at least float32.
    """
    kernel = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).transpose(0, 1).flip(2, 3)
    for axis in (2, 3):
        # What each of the two copies of a pixel gives, one output apart.
        nothing = torch.zeros_like(kernel.narrow(axis, 0, 1))
        kernel = torch.cat([kernel, nothing], axis) + torch.cat([nothing, kernel], axis)
    return kernel.to(weight.dtype).contiguous()


class _OneConvolution(nn.Module):
    """A diffusers `Upsample2D` as one transposed convolution; as it was where it is asked for another size than the double."""

    kernel: Tensor

    def __init__(self, upsampling: Upsample2D, convolution: nn.Conv2d):
        super().__init__()
        self.upsampling = upsampling
        self.bias = convolution.bias
        self.register_buffer("kernel", transposed_kernel(convolution.weight), persistent=False)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            wanted: Tensor = self.upsampling(x, output_size)
            return wanted
        return F.conv_transpose2d(x, self.kernel, self.bias, stride=2, padding=1)


def _convolution_after(module: nn.Module) -> nn.Conv2d | None:
    """The convolution of an `Upsample2D` that repeats pixels and then convolves 3 x 3; else None."""
    if not isinstance(module, Upsample2D) or module.norm is not None or not module.interpolate:
        return None
    convolution = getattr(module, "conv", None)
    if not isinstance(convolution, nn.Conv2d):
        return None
    usual = (convolution.kernel_size, convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
    return convolution if usual == ((3, 3), (1, 1), (1, 1), (1, 1), 1) else None


@contextmanager
def joined_upsampling(network: nn.Module) -> Iterator[None]:
    """Inside the block, the network's upsamplings multiply only what differs. Its weights must not change meanwhile.

    On a CPU, where it was measured; elsewhere the network is left as it is.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            convolution = _convolution_after(module)
            if convolution is not None and convolution.weight.device.type == "cpu":
                replaced.append((parent, name, module))
                setattr(parent, name, _OneConvolution(module, convolution))
    try:
        yield
    finally:
        for parent, name, module in replaced:
            setattr(parent, name, module)
