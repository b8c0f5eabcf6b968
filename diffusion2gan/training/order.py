"""Every random draw of a training step, as a function of (seed, step, global sample index) and nothing else.

No process keeps a generator: that alone makes a resumed run equal to an unbroken one, and two processes to one.
"""

from __future__ import annotations

import numpy as np

_ORDER, _AUGMENTATION, _MIX, _R1 = 1, 2, 3, 4  # streams: the upper half of the Philox key


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 48) | number]))


class SampleOrder:
    """Which pair is global sample number n: every epoch a fresh permutation of `size` pairs, drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Pair indices of `count` global samples from number `first` on, (count,) int64."""
        return np.array([self._row(n) for n in range(first, first + count)], np.int64)

    def _row(self, number: int) -> int:
        epoch, position = divmod(number, self.size)
        if epoch != self._epoch:
            self._permutation = _generator(self.seed, _ORDER, epoch).permutation(self.size)
            self._epoch = epoch
        return int(self._permutation[position])


def augmentation_uniforms(seed: int, step: int, batch: int, width: int) -> np.ndarray:
    """(batch, width) float32 in [0, 1): row i decides the augmentation of the step's i-th sample."""
    return _generator(seed, _AUGMENTATION, step).random((batch, width), dtype=np.float32)


def mix_uniforms(seed: int, step: int, batch: int) -> np.ndarray:
    """(batch, 2) in [0, 1): row i decides the mix-and-match of the step's i-th sample."""
    return _generator(seed, _MIX, step).random((batch, 2))


def r1_generator(seed: int, step: int) -> np.random.Generator:
    """Draws which samples of a step R1 looks at, and in which direction if by finite differences."""
    return _generator(seed, _R1, step)
