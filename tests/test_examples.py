"""The SLURM examples, run whole: `srun`, which starts a job's tasks, and `scontrol` are played by stand-ins, two nodes on this machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion2gan.training.state import checkpoint_step, checkpoints
from tests.helpers import ROOT, metrics, recipe_values, run_command, tree_digest, write_recipe

SRUN = f"""#!{sys.executable}
# Starts the command on each of SLURM_NNODES nodes, and hands on the signal to end.
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:]) for _ in range(int(os.environ.get("SLURM_NNODES", "1")))]
signal.signal(signal.SIGTERM, lambda *_: [t.terminate() for t in tasks])
sys.exit(max(abs(t.wait()) for t in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >>"$STAND_IN_LOG"; fi
"""


@pytest.fixture
def job(tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Any]:
    """A recipe, and the environment of a job."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    values = recipe_values(tiny_teacher_folder, prompts_file)
    environment = os.environ | {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RECIPE": str(tmp_path / "recipe.yaml"),
        "STORE": str(tmp_path / "store"),
        "RUN": str(tmp_path / "run"),
        "STAND_IN_LOG": str(tmp_path / "requeued"),
        "OMP_NUM_THREADS": "1",
    }
    write_recipe(tmp_path / "recipe.yaml", values)
    return {"values": values, "environment": environment, "folder": tmp_path}


def _script(name: str) -> list[str]:
    return ["bash", str(ROOT / "examples" / "slurm" / name)]


def test_a_job_array_simulates(job: dict[str, Any]) -> None:
    """Both tasks of an array of two end well, and leave the store of a single process."""
    for task in ("0", "1"):
        environment = job["environment"] | {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        done = subprocess.run(_script("simulate.sbatch"), env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    folder = job["folder"]
    assert run_command("simulate", folder / "recipe.yaml", "--out", folder / "one").returncode == 0
    assert tree_digest(folder / "store") == tree_digest(folder / "one")


def test_training_on_two_nodes_is_requeued_and_goes_on(job: dict[str, Any]) -> None:
    folder, values = job["folder"], job["values"]
    recipe = folder / "recipe.yaml"
    assert run_command("simulate", recipe, "--out", folder / "store").returncode == 0
    values["training"] |= {"steps": 100_000, "checkpoint_every": 5}
    write_recipe(recipe, values)
    number = str(random.randrange(10_000))
    environment = job["environment"] | {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": number, "WORKERS": "1"}
    with open(folder / "first.log", "w") as log:
        first = subprocess.Popen(_script("train.sbatch"), env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 180
    while not checkpoints(folder / "run" / "checkpoints"):
        assert first.poll() is None and time.monotonic() < deadline, (folder / "first.log").read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # the time is nearly over
    first.wait(120)
    assert (folder / "requeued").read_text() == f"requeue {number}\n"
    saved = checkpoint_step(checkpoints(folder / "run" / "checkpoints")[-1])
    values["training"]["steps"] = saved + 2
    write_recipe(recipe, values)
    second = subprocess.run(_script("train.sbatch"), env=environment, capture_output=True, text=True, timeout=180)
    assert second.returncode == 0, second.stderr
    assert f"{saved + 2} steps done" in second.stdout
    assert [r["step"] for r in metrics(folder / "run") if "loss" in r] == [*range(1, saved + 3)]
