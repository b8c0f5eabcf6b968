"""Everything an exact resume needs, saved and loaded as one file, or, of a run whose weights are split, as one a process.

step-00000100.pt                                  a checkpoint; of a split run, what the first process has, and the others' names
rows-step-00000100-SAVE-00001-of-00004.pt         the second process' rows
"""

from __future__ import annotations

import platform
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffusion2gan.errors import UserError
from diffusion2gan.files import sweep_temporaries, torch_load_safe, torch_save_atomic
from diffusion2gan.training.sharding import joined, with_whole_tensors

FORMAT, SPLIT_FORMAT = "diffusion2gan-state-1", "diffusion2gan-split-state-1"


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


LONG = 1 << 30
"""Steps in a running norm of a checkpoint that does not say: it was made before they were counted."""


@dataclass
class TrainingState:
    """`step` optimiser steps are done; `gradient_scale` is the running gradient norm that clipping is relative to, `gradients_seen` how many
    steps are in it."""

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
    gradients_seen: int = LONG
    experiment: dict[str, str] | None = None
    """What the run was about, by name, for a checkpoint of another run to be told; None in one from before it was written."""

    def check_experiment(self, here: Mapping[str, str], path: Path) -> None:
        """Raises UserError for a checkpoint of a run that was about something else than `here`."""
        for key, theirs in (self.experiment or {}).items():
            if here.get(key, theirs) != theirs:
                raise UserError(
                    f"{path}: is of another run, with {key} {theirs} where this one has {here[key]}; put this run's own back, or delete it to go "
                    "on from the one before"
                )


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def checkpoint_step(path: Path) -> int:
    """The number of optimiser steps behind a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def last_step(folder: Path) -> int:
    """The number of optimiser steps behind the newest checkpoint; 0 without one."""
    return max(map(checkpoint_step, checkpoints(folder)), default=0)


_PART = re.compile(r"rows-step-\d{8}-[0-9a-f]{8}-\d{5}-of-\d{5}\.pt")


def new_save() -> str:
    """A name for one save, which no other of the same step has: a file of an earlier one is never replaced while it is in use."""
    return secrets.token_hex(4)


def part_names(step: int, save: str, world: int) -> list[str]:
    """The files beside the checkpoint of a split run, of the processes after the first."""
    return [f"rows-step-{step:08d}-{save}-{rank:05d}-of-{world:05d}.pt" for rank in range(1, world)]


# What of a state may be split.
_SPLIT = ("model", "ema", "optimizer", "adversary")


def save_part(state: TrainingState, path: Path) -> None:
    """Writes the rows of a process other than the first."""
    torch_save_atomic(path, {"format": SPLIT_FORMAT, "part": path.name, **{name: getattr(state, name) for name in _SPLIT}})


def save_state(state: TrainingState, folder: Path, keep: int, also_keep: Sequence[int] = (), parts: Sequence[str] = ()) -> Path:
    """Writes a checkpoint atomically, then deletes all but the newest `keep` and those of the steps `also_keep`.

    parts: the files, already written, with the other processes' rows. Raises UserError, and deletes nothing, when one is not there.
    """
    path = checkpoint_path(folder, state.step)
    for name in parts:
        if not (folder / name).exists():
            raise UserError(f"{folder}: another process' part {name} is not here; the run's folder must be one that all hosts share")
    kind = {"format": SPLIT_FORMAT, "parts": list(parts)} if parts else {"format": FORMAT}
    torch_save_atomic(path, kind | state.__dict__)
    for old in checkpoints(folder)[:-keep]:
        if checkpoint_step(old) not in also_keep:
            old.unlink(missing_ok=True)
    sweep_parts(folder)
    sweep_temporaries(folder)
    return path


def save_split_state(state: TrainingState, folder: Path, keep: int, also_keep: Sequence[int], accelerator: Accelerator) -> None:
    """The same of a run whose weights are split, `state` being what each process has of it. To be called by every process."""
    (save,) = broadcast_object_list([new_save()])
    parts = part_names(state.step, save, accelerator.num_processes)
    if not accelerator.is_main_process:
        save_part(state, folder / parts[accelerator.process_index - 1])
    # The first process' file comes last: with it, the checkpoint is there.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_state(state, folder, keep, also_keep, parts)


def last_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, the same for every process, each of which has to call this; None where there is none."""
    if accelerator.is_main_process:
        sweep_parts(folder)
    # The first process says which: another host may not see the newest file yet.
    (name,) = broadcast_object_list([max((p.name for p in checkpoints(folder)), default=None)])
    return folder / name if name else None


def sweep_parts(folder: Path) -> None:
    """Deletes parts that no checkpoint names: of one that is gone, or of a save that was broken off."""
    found = {p for p in folder.glob("rows-step-*.pt") if _PART.fullmatch(p.name)}
    if not found:
        return
    try:
        named = {name for path in checkpoints(folder) for name in _read(path, True).get("parts", [])}
    except UserError:
        return  # which parts a damaged checkpoint had is not known
    for part in found:
        if part.name not in named:
            part.unlink(missing_ok=True)


def load_state(path: Path, here: dict[str, str] | None = None, in_pieces: bool = False) -> TrainingState:
    """Reads a checkpoint (no pickled code is run). Warns, naming each, of differences between its environment and `here`.

    in_pieces: tensors are read when they are used, so that several processes of a host don't each hold all of them, and those whose
    rows lie in several files stay `Pieces`. Raises UserError for a file that is missing, damaged or another's.
    """
    saved = _read(path, in_pieces)
    names = saved.pop("parts", [])
    if names:
        others = [_read_part(path, name) for name in names] if isinstance(names, list) else []
        try:
            for key in _SPLIT:
                value = joined([saved[key], *(part[key] for part in others)])
                saved[key] = value if in_pieces else with_whole_tensors(value)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: its parts do not fit together ({error}); delete it to go on from the one before") from None
    state = TrainingState(**saved)
    for key, value in (here or {}).items():
        if state.environment.get(key) != value:
            warnings.warn(
                f"resumed run: {key} was {state.environment.get(key)} and is {value} now; the result will not be bit-identical",
                stacklevel=2,
            )
    return state


def _read(path: Path, by_page: bool) -> dict[str, Any]:
    saved = torch_load_safe(path, by_page)
    if not isinstance(saved, dict) or saved.pop("format", None) not in (FORMAT, SPLIT_FORMAT):
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}; delete it to go on from the one before")
    return saved


def _read_part(path: Path, name: str) -> dict[str, Any]:
    if not isinstance(name, str) or not _PART.fullmatch(name):
        raise UserError(f"{path}: names {name!r} as a part of it, expected a file beside it; delete it to go on from the one before")
    part = path.with_name(name)
    if not part.exists():
        raise UserError(f"{path}: its part {name} is missing; copy all files of the checkpoint, or delete it to go on from the one before")
    saved = _read(part, True)
    if saved.get("part") != name:
        raise UserError(
            f"{part}: is {saved.get('part')!r}, renamed; copy the right file, or delete {path.name} to go on from the one before"
        )
    return saved
