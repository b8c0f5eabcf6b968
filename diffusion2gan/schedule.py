"""The learning rate's course, for distillation and auxiliary networks alike."""

from __future__ import annotations


def warmup_and_decay(step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Factor of the learning rate at step number `step` (from 0) of `steps`: up linearly, constant, down to 0 over the last
    `decay_steps`. A function of the step alone, so that a resumed run follows the same course."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0)
