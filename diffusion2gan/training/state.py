"""Everything an exact resume needs, saved and loaded as one file."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffusion2gan.errors import UserError
from diffusion2gan.files import sweep_temporaries, torch_load_safe, torch_save_atomic

FORMAT = "diffusion2gan-state-1"


def environment(compiled: bool, world: int, memory_format: str = "channels_last") -> dict[str, str]:
    """What "identical" depends on beside the settings: threads, versions, memory format, compilation, processes."""
    names = ("torch", "numpy", "diffusers", "transformers", "accelerate")
    found = {name: version(name) for name in names}
    return found | {
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "memory_format": memory_format,
        "compile": str(compiled),
        "processes": str(world),
    }


@dataclass
class TrainingState:
    """`step` optimiser steps are done; `gradient_scale` is the running gradient norm that clipping is relative to."""

    step: int
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    gradient_scale: float
    environment: dict[str, str]
    adversary: dict[str, Any] | None = None
    """D, its optimiser and statistics; None before phase 2, and in one without D."""
    guard: dict[str, Any] | None = None
    """None before phase 2."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def checkpoint_step(path: Path) -> int:
    """The number of optimiser steps behind a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_state(state: TrainingState, folder: Path, keep: int, also_keep: Sequence[int] = ()) -> Path:
    """Writes a checkpoint atomically, then deletes all but the newest `keep` and those of the steps `also_keep`."""
    path = checkpoint_path(folder, state.step)
    torch_save_atomic(path, {"format": FORMAT, **state.__dict__})
    for old in checkpoints(folder)[:-keep]:
        if checkpoint_step(old) not in also_keep:
            old.unlink(missing_ok=True)
    sweep_temporaries(folder)
    return path


def load_state(path: Path, here: dict[str, str] | None = None, by_page: bool = False) -> TrainingState:
    """Reads a checkpoint (no pickled code is run). Warns, naming each, of differences between its environment and `here`.

    by_page: tensors are read when they are used, so that several processes of a host don't each hold the whole file.
    """
    saved = torch_load_safe(path, by_page)
    if not isinstance(saved, dict) or saved.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}; delete it to go on from the one before")
    state = TrainingState(**saved)
    for key, value in (here or {}).items():
        if state.environment.get(key) != value:
            warnings.warn(
                f"resumed run: {key} was {state.environment.get(key)} and is {value} now; the result will not be bit-identical",
                stacklevel=2,
            )
    return state
