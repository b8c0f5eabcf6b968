"""Checkpoints of split runs, as files. That they train on: tests/test_crashes.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.training.sharding import Pieces
from diffusion2gan.training.state import TrainingState, load_state, new_save, part_names, save_part, save_state, sweep_parts

WEIGHT = torch.arange(14.0).reshape(7, 2)
CUTS = ((0, 3), (3, 6), (6, 7), (7, 7))  # seven rows over four processes
HERE: dict[str, str] = {}


def _state(rank: int, step: int, factor: float = 1.0) -> TrainingState:
    def rows() -> dict[str, torch.Tensor]:
        return {"rows of this process": factor * WEIGHT[slice(*CUTS[rank])]}

    of_all = 0.5 if rank == 0 else None
    optimizer = {"state": {0: {"exp_avg": rows(), "step": of_all}}, "param_groups": [{"betas": (of_all, of_all)}]}
    return TrainingState(step, {"w": rows()}, {"w": rows()}, optimizer, 1.0, HERE)


def _write(folder: Path, step: int, factor: float = 1.0, keep: int = 1) -> Path:
    names = part_names(step, new_save(), len(CUTS))
    for rank, name in enumerate(names, 1):
        save_part(_state(rank, step, factor), folder / name)
    return save_state(_state(0, step, factor), folder, keep, parts=names)


def test_rows_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    path = _write(tmp_path, 5)
    whole = load_state(path)
    assert whole.step == 5
    for found in (whole.model["w"], whole.ema["w"], whole.optimizer["state"][0]["exp_avg"]):
        assert torch.equal(found, WEIGHT)
    assert whole.optimizer["state"][0]["step"] == 0.5
    assert whole.optimizer["param_groups"] == [{"betas": (0.5, 0.5)}]
    assert whole.adversary is None
    pieces = load_state(path, in_pieces=True).model["w"]
    assert isinstance(pieces, Pieces)
    assert torch.equal(pieces.whole(), WEIGHT)


def test_files_go_with_their_checkpoint(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    path = _write(tmp_path, 6)
    assert len(list(tmp_path.iterdir())) == len(CUTS)
    # The same step again, as phase 2 does where it begins, broken off before the last file: the one before is whole.
    for rank, name in enumerate(part_names(6, new_save(), len(CUTS)), 1):
        save_part(_state(rank, 6, 2.0), tmp_path / name)
    assert torch.equal(load_state(path).model["w"], WEIGHT)
    assert len(list(tmp_path.iterdir())) == 2 * len(CUTS) - 1
    sweep_parts(tmp_path)  # as a run does before it goes on
    assert len(list(tmp_path.iterdir())) == len(CUTS)
    _write(tmp_path, 6, 3.0)
    assert torch.equal(load_state(path).model["w"], 3 * WEIGHT)
    assert len(list(tmp_path.iterdir())) == len(CUTS)


def test_a_missing_or_foreign_part_is_one_clear_line(tmp_path: Path) -> None:
    path = _write(tmp_path, 5)
    part = next(tmp_path.glob("rows-step-*-00002-of-00004.pt"))
    part.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match=f"its part {part.name} is missing; copy all files"):
        load_state(path)
    with pytest.raises(UserError, match="is not here; the run's folder must be one that all hosts share"):
        save_state(_state(0, 6), tmp_path, 1, parts=part_names(6, new_save(), 2))
    assert path.exists()
    (tmp_path / "elsewhere.pt").rename(part)
    other = next(tmp_path.glob("rows-step-*-00001-of-00004.pt"))
    kept = other.read_bytes()
    other.write_bytes(part.read_bytes())
    with pytest.raises(UserError, match=f"is '{part.name}', renamed; copy the right file"):
        load_state(path)
    other.write_bytes(kept)
    saved = torch.load(path, weights_only=True)
    for name in ("../elsewhere.pt", "elsewhere.pt", "step-00000005.pt", 3):
        torch.save(saved | {"parts": [name]}, path)
        with pytest.raises(UserError, match="names .* as a part of it, expected a file beside it"):
            load_state(path)
    torch.save(saved | {"ema": {"other": saved["ema"]["w"]}}, path)
    with pytest.raises(UserError, match="its parts do not fit together"):
        load_state(path)
