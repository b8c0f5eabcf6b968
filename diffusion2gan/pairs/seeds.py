"""A pair's noise from its seed: the one recipe of the project, for pairs, generation and evaluation alike.

Noise `philox-normal-1`: `numpy.random.Generator(Philox(key=seed)).standard_normal(shape, float32)` for a 64-bit seed.
It depends on nothing else: no batch, rank, order or device. A change of NumPy's stream would change the fingerprint,
which every manifest carries and every reader checks.

Seeds: bits 0-39 count within a store, bits 40-61 hold the store's own seed, bit 62 marks evaluation: `simulate`
can't draw those, so no picture that is scored was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from diffusion2gan.errors import UserError

NOISE_RECIPE = "philox-normal-1"
EVALUATION = 1 << 62
_INDEX_BITS = 40
MAX_STORE_SEED = (1 << 22) - 1


def pair_seed(store_seed: int, index: int) -> int:
    """The seed of pair `index` of a store: distinct for every (store seed, index). Raises UserError out of range."""
    if not 0 <= store_seed <= MAX_STORE_SEED:
        raise UserError(f"pairs.seed is {store_seed}, expected 0 to {MAX_STORE_SEED}: higher seeds are kept for evaluation")
    if not 0 <= index < 1 << _INDEX_BITS:
        raise UserError(f"pair index is {index}, expected 0 to {(1 << _INDEX_BITS) - 1}")
    return (store_seed << _INDEX_BITS) | index


def evaluation_seed(index: int) -> int:
    """Seed number `index` of the namespace that no store can hold."""
    return EVALUATION | index


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """z for each seed: (B, *shape) float32, standard normal."""
    out = np.empty((len(seeds), *shape), np.float32)
    for row, seed in zip(out, seeds, strict=True):
        np.random.Generator(np.random.Philox(key=int(seed))).standard_normal(dtype=np.float32, out=row)
    return out


def noise_fingerprint() -> str:
    """sha256 of four reference draws, rounded to 1e-6: differs when the recipe's stream has changed."""
    sample = draw_noise([0, 1, pair_seed(3, 7), evaluation_seed(5)], (4, 8, 8))
    return hashlib.sha256(np.round(sample * 1e6).astype("<i8").tobytes()).hexdigest()[:16]
