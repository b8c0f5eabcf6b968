"""LPIPS through a decoder (Eq. 2): what LatentLPIPS replaces, kept for Table 1 and Fig. 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion2gan.perceptual.latent_lpips import LatentLPIPS


class DecodedLPIPS(nn.Module):
    """d_LPIPS of Eq. 2: l(F(Decode(x0)), F(Decode(x1))), (B,).

    `decode` takes latents (B, C, h, w) to pixels (B, 3, H, W) in the range `metric` was trained on; gradients must flow
    through it. `metric` is a LatentLPIPS over a pixel network (`LatentVGGConfig.pixels()`).
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], metric: LatentLPIPS):
        super().__init__()
        # In a tuple, a decoder that is a module stays its owner's: not in this state dict, not moved or trained from here.
        self._decode = (decode,)
        self.metric = metric

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Distance of x0 from the target x1, latents (B, C, h, w) as `decode` takes them -> (B,), 0 or more."""
        (decode,) = self._decode
        with torch.set_grad_enabled(torch.is_grad_enabled() and x1.requires_grad):
            target = decode(x1)
        return self.metric(decode(x0), target)
