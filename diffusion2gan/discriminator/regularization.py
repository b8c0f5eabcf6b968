"""What keeps D honest (paper section 3.3): single-sample R1 and mix-and-match. Functions; no optimiser.

Legend: B batch, C latent channels, H and W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

GENERATED, OTHER_LATENT, OTHER_TEXT, OTHER_NOISE = range(4)
KINDS = ("generated", "other_latent", "other_text", "other_noise")
"""What a fake of D's step is: G's own, or a real latent whose latent, text or noise is another row's."""


def r1_penalty(score: Callable[[Tensor], Tensor], latent: Tensor) -> Tensor:
    """|d s / d x|^2 of each sample, exactly: latent (B, C, H, W) -> (B,), differentiable to D's weights (Mescheder et al. 2018).

    score: (B, C, H, W) -> (B,), each sample's own. Needs operations that have a double backward: plain or math attention, not
    compiled.
    """
    latent = latent.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(latent).sum(), latent, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def r1_finite_difference(score: Callable[[Tensor], Tensor], latent: Tensor, direction: Tensor, sigma: float) -> Tensor:
    """(s(x + sigma e) - s(x))^2 / sigma^2 of each sample: in expectation over e ~ N(0, I), |d s / d x|^2 as sigma goes to 0.

    One direction a sample: its standard deviation is sqrt(2) times the penalty. Needs no double backward, so it works sharded
    (FSDP2) and compiled. Lin et al. 2025 (Seaweed-APT) take |D(x) - D(x + sigma e)|^2; it is divided by sigma^2 here,
    so that gamma means the same in both forms.
    """
    latent = latent.detach()
    difference = score(latent + sigma * direction) - score(latent)
    return difference.square() / sigma**2


def r1_samples(generator: np.random.Generator, batch: int, count: int) -> np.ndarray:
    """Which `count` samples of a step's whole batch R1 looks at: one of each `count` equal parts, (count,) int64.

    So each process of any number that divides `count` has the same number of them. Raises ValueError unless `count` divides `batch`.
    """
    if batch % count:
        raise ValueError(f"{count} R1 samples of a batch of {batch}, expected a divisor")
    part = batch // count
    return np.arange(count) * part + generator.integers(part, size=count)


def mix_and_match(
    uniform: np.ndarray, shares: Sequence[float], rows: np.ndarray, texts: Sequence[Hashable], noise_is_seen: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Which fakes of a batch are real latents in a wrong company, and whose.

    uniform: (B, 2) in [0, 1). shares: of OTHER_LATENT, OTHER_TEXT and OTHER_NOISE. rows: (B,) the pair of each sample; texts: what the teacher
    reads of its prompt (`Teacher.reads`).
    noise_is_seen: whether D sees z; to one that does not, another latent of the same text is no mismatch.
    Returns kind (B,) of KINDS and partner (B,): the sample that lends its latent, text or noise. A partner is never the same
    pair, and for OTHER_TEXT never of the same text; a sample that finds no such partner stays GENERATED, with itself.
    """
    edges = np.cumsum(shares)
    drawn = np.searchsorted(edges, uniform[:, 0], side="right")  # 0, 1, 2: a swap; 3: none
    kinds = np.full(len(rows), GENERATED)
    partners = np.arange(len(rows))
    numbers: dict[Hashable, int] = {}
    text = np.array([numbers.setdefault(t, len(numbers)) for t in texts])
    for i in np.flatnonzero(drawn < len(shares)):
        kind = OTHER_LATENT + int(drawn[i])
        allowed = rows != rows[i]
        if kind == OTHER_TEXT or not noise_is_seen:
            allowed &= text != text[i]
        candidates = np.flatnonzero(allowed)
        if len(candidates):
            kinds[i], partners[i] = kind, candidates[int(uniform[i, 1] * len(candidates))]
    return kinds, partners
