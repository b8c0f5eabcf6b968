"""What a training step reads: pairs of the ODE, and for D the fakes that mix-and-match makes of them.

Legend: B batch, C latent channels, H and W latent size, K random numbers of an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion2gan.discriminator.regularization import OTHER_LATENT, OTHER_NOISE, OTHER_TEXT
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.dataset import PairDataset


@dataclass(frozen=True)
class BatchShare:
    """How a global batch of `size` samples goes through the network in each process: `accumulation` micro-batches of `micro`."""

    size: int
    micro: int
    accumulation: int

    @property
    def per_process(self) -> int:
        return self.accumulation * self.micro

    @classmethod
    def of(cls, size: int, micro: int | None, world: int, key: str) -> BatchShare:
        """`key` names the recipe's setting. Raises UserError for a batch that the processes can't share."""
        micro = micro or max(1, size // world)
        if size % (world * micro):
            raise UserError(f"{key} is {size}, expected a multiple of processes x micro_batch_size ({world} x {micro})")
        return cls(size, micro, size // (world * micro))


@dataclass(frozen=True)
class MixedFakes:
    """D's fakes of a micro-batch: real latents in a wrong company, except where `kind` is GENERATED; there G's own latent belongs."""

    kind: Tensor
    """(B,) int64: GENERATED, OTHER_LATENT, OTHER_TEXT or OTHER_NOISE."""
    noise: Tensor
    """z that D sees with it, (B, C, H, W)."""
    prompts: list[str]
    """c that D sees with it."""
    latent: Tensor
    """x (B, C, H, W); of a GENERATED row the row's own, to be replaced by G's."""


@dataclass(frozen=True)
class OdePairBatch:
    """Pairs of Eq. 1 on the device: z (B, C, H, W), the prompts, x (B, C, H, W), and the augmentation's random numbers (B, K)."""

    noise: Tensor
    prompts: list[str]
    latent: Tensor
    uniform: Tensor | None
    mixed: MixedFakes | None = None


def _on_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, copy=False)).to(device).contiguous(memory_format=torch.channels_last)


def pair_batch(pairs: PairDataset, rows: np.ndarray, uniform: np.ndarray | None, device: torch.device) -> OdePairBatch:
    """The pairs `rows`, with their augmentation's random numbers."""
    arrays = pairs.batch(rows)
    return OdePairBatch(
        noise=_on_device(arrays.noise, device),
        prompts=arrays.prompts,
        latent=_on_device(arrays.latent, device),
        uniform=None if uniform is None else torch.from_numpy(uniform).to(device),
    )


def mixed_fakes(own: OdePairBatch, pairs: PairDataset, kind: np.ndarray, partner_rows: np.ndarray) -> MixedFakes:
    """What mix-and-match makes of a micro-batch: `kind` (B,), and the pair (B,) that lends its latent, text or noise."""
    noise, latent, prompts = own.noise.clone(), own.latent.clone(), list(own.prompts)
    for which, mine, theirs in ((OTHER_LATENT, latent, pairs.latents), (OTHER_NOISE, noise, pairs.noises)):
        swapped = np.flatnonzero(kind == which)
        if len(swapped):
            mine[torch.from_numpy(swapped).to(mine.device)] = _on_device(theirs(partner_rows[swapped]), mine.device)
    for i in np.flatnonzero(kind == OTHER_TEXT):
        prompts[i] = pairs.prompt(int(partner_rows[i]))
    return MixedFakes(torch.from_numpy(kind).to(noise.device), noise, prompts, latent)
