"""Runs the command line with a pause before each batch and each optimiser step: python tests/slow.py SECONDS arguments."""

from __future__ import annotations

import sys
import time
from typing import Any


def _slowed(function: Any, seconds: float) -> Any:
    def call(*arguments: Any) -> Any:
        print("slow: started", file=sys.stderr, flush=True)
        time.sleep(seconds)
        return function(*arguments)

    return call


if __name__ == "__main__":
    from diffusion2gan.pairs import simulate
    from diffusion2gan.training.trainer import Trainer

    pause = float(sys.argv[1])
    simulate.solve_batch = _slowed(simulate.solve_batch, pause)
    Trainer.train_step = _slowed(Trainer.train_step, pause)  # type: ignore[method-assign]
    from diffusion2gan.cli import main

    sys.exit(main(sys.argv[2:]))
