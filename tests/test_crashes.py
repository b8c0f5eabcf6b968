"""Kill the program at named points and at random times; the same command again must give what an unbroken run gives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, Command, metrics, recipe_values, run_command, tree_digest, write_recipe

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Path]:
    """A recipe, its unbroken store and its unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = write_recipe(folder / "recipe.yaml", recipe_values(tiny_teacher_folder, prompts_file))
    for arguments in (
        ("simulate", recipe, "--out", folder / "store"),
        ("train", recipe, "--pairs", folder / "store", "--out", folder / "run"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
    return {"recipe": recipe, "store": folder / "store", "run": folder / "run"}


def _kill_at(point: str, number: int, *arguments: object) -> None:
    killed = Command(*arguments, kill_at=(point, number)).wait()
    assert killed.returncode == KILLED, f"{point} {number} was never reached: {killed.stderr}"


def _start_slowly(*arguments: object) -> Command:
    """Starts a slowed command and returns when its work has begun."""
    command = Command(*arguments, slow=0.15)
    while "slow: started" not in command.stderr:
        time.sleep(0.01)
    return command


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
    [
        ("step", 1),
        ("step", 5),
        ("step", 11),
        ("mid-write", 1),
        ("mid-write", 3),
        ("before-rename", 1),
        ("after-rename", 2),
        ("before-rename", 5),
        ("after-rename", 5),
    ],
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
    command = (
        ["simulate", world["recipe"], "--out", out]
        if stage == "simulate"
        else ["train", world["recipe"], "--pairs", world["store"], "--out", out]
    )
    chance = random.Random(7)
    for _ in range(5):
        running = _start_slowly(*command)
        time.sleep(chance.uniform(0.02, 0.5))
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait().returncode == KILLED, "the run had already ended"
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    if stage == "simulate":
        assert tree_digest(out) == tree_digest(world["store"])
    else:
        _assert_same_run(out, world["run"])


def test_two_torchrun_workers_make_the_same_store(tmp_path: Path, world: dict[str, Path]) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffusion2gan"]
    # Enough work that neither worker is done before the other has begun.
    settings = ("--set", "pairs.count=64", "--set", "pairs.ode.steps=60")
    command = [*program, "simulate", str(world["recipe"]), "--out", str(tmp_path / "two"), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert run_command("simulate", world["recipe"], "--out", tmp_path / "one", *settings).returncode == 0
    assert tree_digest(tmp_path / "two") == tree_digest(tmp_path / "one")
    ranks = {json.loads(line)["rank"] for line in (tmp_path / "two.log.jsonl").read_text().splitlines()}
    assert ranks == {0, 1}


def test_terminate_saves_before_it_stops(tmp_path: Path, world: dict[str, Path]) -> None:
    run = tmp_path / "run"
    command = ["train", world["recipe"], "--pairs", world["store"], "--out", run]
    running = _start_slowly(*command)
    time.sleep(0.4)
    os.kill(running.pid, signal.SIGTERM)
    done = running.wait()
    assert done.returncode == 130, done.stderr
    assert "go on where it stopped" in done.stderr
    steps = metrics(run)[-1]["step"]
    assert 0 < steps < 12
    assert (run / "checkpoints" / f"step-{steps:08d}.pt").exists()
    assert run_command(*command).returncode == 0
    ours = _final_weights(run)
    for name, value in _final_weights(world["run"]).items():
        assert torch.equal(value, ours[name]), name
