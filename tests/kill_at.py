"""Runs the command line and kills its own process, with SIGKILL, at a named point: the test's stand-in for a power cut.

    python tests/kill_at.py POINT NUMBER -- diffusion2gan arguments

POINT: before-rename, after-rename (of any file that is put in place atomically), mid-shard (after a solved batch),
mid-write (half of a checkpoint is on disk), step (after an optimiser step). NUMBER counts from 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _counted(number: int) -> Callable[[], None]:
    seen = 0

    def reached() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            _die()

    return reached


def _arm(point: str, number: int) -> None:
    reached = _counted(number)
    if point in ("before-rename", "after-rename"):
        rename = os.replace

        def replace(*arguments: Any, **options: Any) -> None:
            if point == "before-rename":
                reached()
            rename(*arguments, **options)
            if point == "after-rename":
                reached()

        os.replace = replace  # type: ignore[assignment]
    elif point == "mid-shard":
        from diffusion2gan.pairs import simulate

        solve = simulate.solve_batch

        def solve_batch(*arguments: Any) -> Any:
            result = solve(*arguments)
            reached()
            return result

        simulate.solve_batch = solve_batch
    elif point == "mid-write":
        import torch

        save = torch.save

        def save_half(value: Any, path: Any) -> None:
            save(value, path)
            size = os.path.getsize(path)
            os.truncate(path, size // 2)
            reached()
            save(value, path)

        torch.save = save_half
    elif point == "step":
        from diffusion2gan.training.trainer import Trainer

        train_step = Trainer.train_step

        def step(self: Any, batches: Any) -> Any:
            result = train_step(self, batches)
            reached()
            return result

        Trainer.train_step = step  # type: ignore[method-assign]
    else:
        raise SystemExit(f"unknown point {point}")


if __name__ == "__main__":
    _arm(sys.argv[1], int(sys.argv[2]))
    from diffusion2gan.cli import main

    sys.exit(main(sys.argv[4:]))
