"""Which of several processes this one is. No communication: what they share are files."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Worker:
    """One of `world` processes that do one job together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Worker:
        """What torchrun says, or a single worker."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
