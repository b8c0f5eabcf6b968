"""Ways to stop a program where it hurts: SIGKILL of the own process at a named point, and pauses to be killed in."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from diffusion2gan.teachers.ode import OdeSolver
from diffusion2gan.training.trainer import Trainer


def _counted(number: int) -> Callable[[], None]:
    seen = 0

    def reached() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def kill_at(point: str, number: int) -> None:
    """Arms a kill at the `number`th time (from 1) that `point` is reached.

    before-rename, after-rename: of any file that is put in place atomically. before-move, after-move: of a folder. mid-shard: after a solved batch.
    mid-write: half of a checkpoint is on disk. step: after an optimiser step.
    """
    reached = _counted(number)
    if point in ("before-rename", "after-rename"):
        rename = os.replace

        def replace(*arguments: Any) -> None:
            if point == "before-rename":
                reached()
            rename(*arguments)
            if point == "after-rename":
                reached()

        os.replace = replace  # type: ignore[assignment]
    elif point in ("before-move", "after-move"):
        move = os.rename

        def moved(*arguments: Any, **named: Any) -> None:
            if point == "before-move":
                reached()
            move(*arguments, **named)
            if point == "after-move":
                reached()

        os.rename = moved  # type: ignore[assignment]
    elif point == "mid-shard":
        solve = OdeSolver.solve

        def solve_and_stop(*arguments: Any) -> Any:
            result = solve(*arguments)
            reached()
            return result

        OdeSolver.solve = solve_and_stop  # type: ignore[method-assign]
    elif point == "mid-write":
        save = torch.save

        def save_half(value: Any, file: Any) -> None:
            save(value, file)
            file.flush()
            size = file.tell()
            file.truncate(size // 2)
            reached()
            file.seek(0)
            save(value, file)

        torch.save = save_half
    elif point == "step":
        train_step = Trainer.train_step

        def step(*arguments: Any) -> Any:
            result = train_step(*arguments)
            reached()
            return result

        Trainer.train_step = step  # type: ignore[method-assign]
    else:
        raise ValueError(f"unknown point {point}")


def slow_down(seconds: float) -> None:
    """Pauses before each solved batch and each optimiser step, and says so, that there is a middle to be killed in."""

    def slowed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            print("slow: started", file=sys.stderr, flush=True)
            time.sleep(seconds)
            return function(*arguments)

        return call

    OdeSolver.solve = slowed(OdeSolver.solve)  # type: ignore[method-assign]
    Trainer.train_step = slowed(Trainer.train_step)  # type: ignore[method-assign]
