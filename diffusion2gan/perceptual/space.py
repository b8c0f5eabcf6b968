"""What belongs to a metric beside its network: the latents that it reads, and where its weights came from."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffusion2gan.errors import UserError


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class LatentSpace:
    """How an autoencoder's own latents become those that its diffusion model reads: (latent - shift) * scale.

    UserError for what is no finite number, and for a scale that is not above 0.
    """

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.scale) or not self.scale > 0:
            raise UserError(f"space.scale is {self.scale!r}, expected a number above 0: the autoencoder's scaling_factor")
        if not is_number(self.shift):
            raise UserError(f"space.shift is {self.shift!r}, expected a number: the autoencoder's shift_factor, or 0")

    def scaled(self, latent: Tensor) -> Tensor:
        """The autoencoder's latents (B, C, H, W), scaled, in float32 or better."""
        # In half precision the difference and the product would each be rounded.
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return (latent - self.shift) * self.scale if self.shift else latent * self.scale


@dataclass(frozen=True)
class Origin:
    """Which published file weights were taken from."""

    source: str
    """Repository and path on the hub, or the name of the file that was given."""
    sha256: str
    """Of that file, as it was loaded."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not isinstance(self.sha256, str):
            raise UserError(f"origin is {asdict(self)}, expected two texts: a file's name and its sha256")
