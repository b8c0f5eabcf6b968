"""Kill the program at named points and at random times; the same command again must give what an unbroken run gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, metrics, recipe_values, run_command, tree_digest, write_recipe

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Path]:
    """A recipe, its unbroken store and its unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = write_recipe(folder / "recipe.yaml", recipe_values(tiny_teacher_folder, prompts_file))
    for arguments in (("simulate", recipe, "--out", folder / "store"), ("train", recipe, "--pairs", folder / "store", "--out", folder / "run")):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
    return {"recipe": recipe, "store": folder / "store", "run": folder / "run"}


def _kill_at(point: str, number: int, *arguments: object) -> None:
    killed = run_command(point, number, "--", *arguments, program=(str(ROOT / "tests" / "kill_at.py"),))
    assert killed.returncode == KILLED, f"{point} {number} was never reached: {killed.stderr}"


def _final_weights(run: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(run / "checkpoints" / "step-00000012.pt", weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in saved[part].items()}


def _assert_same_run(run: Path, unbroken: Path) -> None:
    ours, theirs = _final_weights(run), _final_weights(unbroken)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    strip = ("images_per_second",)
    assert [{k: v for k, v in r.items() if k not in strip} for r in metrics(run)] == [
        {k: v for k, v in r.items() if k not in strip} for r in metrics(unbroken)
    ]


# Renames of a simulation: settings, three shards, dataset_info, state, manifest.
@pytest.mark.parametrize(
    ("point", "number"),
    [("mid-shard", 1), ("mid-shard", 4), ("before-rename", 1), ("after-rename", 1), ("before-rename", 3), ("after-rename", 3)]
    + [(p, n) for p in ("before-rename", "after-rename") for n in (5, 6, 7)],
)
def test_simulate_killed_at(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    command = ("simulate", world["recipe"], "--out", tmp_path / "store")
    _kill_at(point, number, *command)
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert tree_digest(tmp_path / "store") == tree_digest(world["store"])


# Renames of a training: recipe, pairs.json, then pictures and checkpoints.
@pytest.mark.parametrize(
    ("point", "number"),
    [("step", 1), ("step", 5), ("step", 11), ("mid-write", 1), ("mid-write", 3), ("before-rename", 1), ("after-rename", 2), ("before-rename", 5), ("after-rename", 5)],
)
def test_train_killed_at(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    command = ("train", world["recipe"], "--pairs", world["store"], "--out", tmp_path / "run")
    _kill_at(point, number, *command)
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    _assert_same_run(tmp_path / "run", world["run"])
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("stage", ["simulate", "train"])
def test_killed_at_random_times(stage: str, tmp_path: Path, world: dict[str, Path]) -> None:
    """Five kills of one run, each after a random stretch of real work; every one must land before the end."""
    out = tmp_path / "out"
    command = ["simulate", world["recipe"], "--out", out] if stage == "simulate" else ["train", world["recipe"], "--pairs", world["store"], "--out", out]
    # Slowed down, so that there is a middle to be killed in on any machine.
    program = [sys.executable, str(ROOT / "tests" / "slow.py"), "0.15", *map(str, command)]
    watched = out.with_name("out.log.jsonl") if stage == "simulate" else out / "metrics.jsonl"
    chance = random.Random(7)
    for _ in range(5):
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert process.stderr is not None
        for line in process.stderr:  # the slowed program says when its work begins
            if b"slow: started" in line:
                break
        time.sleep(chance.uniform(0.02, 0.5))
        process.kill()
        assert process.wait() == KILLED, "the run had already ended"
        process.stderr.close()
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert watched.exists()
    if stage == "simulate":
        assert tree_digest(out) == tree_digest(world["store"])
    else:
        _assert_same_run(out, world["run"])


def test_two_torchrun_workers_make_the_same_store(tmp_path: Path, world: dict[str, Path]) -> None:
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffusion2gan")
    done = run_command("simulate", world["recipe"], "--out", tmp_path / "store", program=program)
    assert done.returncode == 0, done.stderr
    assert tree_digest(tmp_path / "store") == tree_digest(world["store"])


def test_terminate_saves_before_it_stops(tmp_path: Path, world: dict[str, Path]) -> None:
    run = tmp_path / "run"
    command = ["train", world["recipe"], "--pairs", world["store"], "--out", run]
    program = [sys.executable, str(ROOT / "tests" / "slow.py"), "0.15", *map(str, command)]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert process.stderr is not None
    for line in process.stderr:
        if b"slow: started" in line:
            break
    time.sleep(0.4)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"go on where it stopped" in errors
    steps = metrics(run)[-1]["step"]
    assert 0 < steps < 12
    assert (run / "checkpoints" / f"step-{steps:08d}.pt").exists()
    assert run_command(*command).returncode == 0
    _, unbroken = _final_weights(run), world["run"]
    for name, value in _final_weights(unbroken).items():
        assert torch.equal(value, _final_weights(run)[name]), name
