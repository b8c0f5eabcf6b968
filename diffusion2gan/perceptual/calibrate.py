"""LPIPS' linear calibration (Zhang et al. 2018) in any space: non-negative heads from two-alternative judgements.

A triplet is a reference and two distorted versions; its judgement is the share of people who found the second nearer.
The distance is linear in the heads: with the squared feature differences averaged over locations kept for every triplet,
a calibration is a regression on some thousand numbers and takes seconds, whatever the images cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS

# Reference, first, second: (B, 3, H, W) in [-1, 1]; judgement (B,) in [0, 1].
TripletBatch = tuple[Tensor, Tensor, Tensor, Tensor]
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judgements:
    """What is kept of N triplets: channel-wise differences of the reference from the first and from the second picture, each
    (N, D) with D the channels of the five maps together, and the judgements (N,)."""

    first: Tensor
    second: Tensor
    judgement: Tensor

    @staticmethod
    def cat(parts: Iterable[Judgements]) -> Judgements:
        """All rows of `parts`, in order."""
        columns = zip(*((p.first, p.second, p.judgement) for p in parts), strict=True)
        return Judgements(*(torch.cat(column) for column in columns))


@torch.no_grad()
def channel_differences(features0: Sequence[Tensor], features1: Sequence[Tensor]) -> Tensor:
    """`LatentLPIPS.target_features` of B pictures, twice -> (B, D): what the heads weigh. The distance is `head_vector` times it."""
    return torch.cat([(f0 - f1).square().mean(dim=(2, 3)) for f0, f1 in zip(features0, features1, strict=True)], dim=1)


def head_vector(metric: LatentLPIPS) -> Tensor:
    """The weights of all heads, (D,)."""
    return torch.cat([head.weight.flatten() for head in metric.lins])


@torch.no_grad()
def judge(metric: LatentLPIPS, batches: Iterable[TripletBatch], encode: Encode, total: int | None = None) -> Judgements:
    """Runs the backbone over triplets. `encode` takes pictures to what the metric reads."""
    parts = []
    for reference, first, second, judgement in tqdm(batches, total=total, desc="triplets", unit="batch", mininterval=1):
        target, f0, f1 = (metric.target_features(encode(x)) for x in (reference, first, second))
        parts.append(Judgements(channel_differences(target, f0).cpu(), channel_differences(target, f1).cpu(), judgement.float().cpu()))
    if not parts:
        raise UserError("no triplets were found, expected at least one; check the folder")
    return Judgements.cat(parts)


def two_afc(heads: Tensor, judgements: Judgements) -> float:
    """The 2AFC score: the mean share of people who agree with the metric (a tie counts half). heads (D,)."""
    d0, d1, judgement = judgements.first @ heads, judgements.second @ heads, judgements.judgement
    agree = torch.where(d0 < d1, 1 - judgement, torch.where(d1 < d0, judgement, torch.full_like(judgement, 0.5)))
    return agree.mean().item()


def best_possible(judgements: Judgements) -> float:
    """The score of a metric that always sides with the majority."""
    return torch.maximum(judgements.judgement, 1 - judgements.judgement).mean().item()


class RankingNetwork(nn.Module):
    """LPIPS' small network from two distances to the probability that the second picture is judged nearer; used in calibration alone."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, d0: Tensor, d1: Tensor) -> Tensor:
        """(B,) twice -> logits (B,)."""
        eps = 0.1
        return self.layers(torch.stack((d0, d1, d0 - d1, d0 / (d1 + eps), d1 / (d0 + eps)), dim=1))[:, 0]


def calibrate(
    metric: LatentLPIPS,
    judgements: Judgements,
    steps: int = 4000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    dropout: float = 0.5,
    seed: int = 0,
) -> LatentLPIPS:
    """Fits the heads of `metric` to `judgements`, in place, and returns it marked as calibrated.

    As LPIPS: cross entropy of the ranking network on the two distances, weights set back to 0 after each step where they
    fell below; the rate falls to 0 over the second half. Unlike LPIPS, whose dropout leaves out single locations of a channel
    and nearly averages out, dropout here leaves out whole channels of a triplet. The heads' scale is left as it was (mean 1),
    so that calibrated and uncalibrated distances are of one order. UserError for fewer than 100 triplets, and for differences
    that are all zero or not finite.
    """
    count = len(judgements.judgement)
    if count < 100:
        raise UserError(f"calibration has {count} triplets, expected at least 100; give more")
    generator = torch.Generator().manual_seed(seed)
    # The ranking network's constants are made for distances of order 1; the mean of channel differences is far below.
    size = judgements.first.sum(1).mean()
    if not 0 < size < torch.inf:
        raise UserError(
            f"the pictures called first differ from their references by {size:.3g} on average, expected a number above 0; "
            "check that the data set is not damaged and that the metric tells pictures apart"
        )
    scale = 1 / size
    first, second = judgements.first * scale, judgements.second * scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ranking = RankingNetwork()
    heads = nn.Parameter(torch.ones(first.shape[1]))
    optimizer = torch.optim.Adam([heads, *ranking.parameters()], lr=learning_rate, betas=(0.5, 0.999))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        rows = torch.randint(count, (batch_size,), generator=generator)
        kept = (torch.rand(2, batch_size, len(heads), generator=generator) >= dropout) / (1 - dropout)
        logits = ranking((first[rows] * kept[0]) @ heads, (second[rows] * kept[1]) @ heads)
        loss = F.binary_cross_entropy_with_logits(logits, judgements.judgement[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            heads.clamp_(min=0)
    with torch.no_grad():
        fitted = heads / heads.mean().clamp(min=1e-12)
        for head, part in zip(metric.lins, fitted.split([h.weight.numel() for h in metric.lins]), strict=True):
            head.weight.copy_(part.view_as(head.weight))
    metric.calibrated = True
    return metric
