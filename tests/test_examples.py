"""The SLURM examples, run whole: `srun`, which starts a job's tasks, and `scontrol` are played by stand-ins, two nodes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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


@contextlib.contextmanager
def _started(name: str, job: dict[str, Any], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A script of the examples in a job with these variables; whatever it started is gone afterwards."""
    with open(job["folder"] / "log", "ab") as log:
        script = ["bash", str(ROOT / "examples" / "slurm" / name)]
        process = subprocess.Popen(script, env=job["environment"] | variables, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_job_array_simulates(job: dict[str, Any]) -> None:
    """Both tasks of an array of two work at once, each as a worker of two, and leave the store of a single process."""
    folder, values = job["folder"], job["values"]
    # Enough work that neither is done before the other has begun.
    values["pairs"] |= {"count": 64, "ode": {"steps": 40, "guidance": 2.0}}
    write_recipe(folder / "recipe.yaml", values)
    with contextlib.ExitStack() as stack:
        tasks = [
            stack.enter_context(_started("simulate.sbatch", job, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2"))
            for task in ("0", "1")
        ]
        for task in tasks:
            assert task.wait(180) == 0, (folder / "log").read_text()
    ranks = {json.loads(line)["rank"] for line in (folder / "store.log.jsonl").read_text().splitlines()}
    assert ranks == {0, 1}
    assert run_command("simulate", folder / "recipe.yaml", "--out", folder / "one").returncode == 0
    assert tree_digest(folder / "store") == tree_digest(folder / "one")


def test_training_on_two_nodes_is_requeued_and_goes_on(job: dict[str, Any]) -> None:
    folder, values = job["folder"], job["values"]
    recipe = folder / "recipe.yaml"
    assert run_command("simulate", recipe, "--out", folder / "store").returncode == 0
    values["training"] |= {"steps": 100_000, "checkpoint_every": 5}
    write_recipe(recipe, values)
    number = str(random.randrange(10_000))
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": number, "WORKERS": "1"}
    with _started("train.sbatch", job, **variables) as first:
        deadline = time.monotonic() + 180
        while not checkpoints(folder / "run" / "checkpoints"):
            assert first.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)  # the time is nearly over
        first.wait(120)
    assert (folder / "requeued").read_text() == f"requeue {number}\n"
    saved = checkpoint_step(checkpoints(folder / "run" / "checkpoints")[-1])
    values["training"]["steps"] = saved + 2
    write_recipe(recipe, values)
    with _started("train.sbatch", job, **variables) as second:
        assert second.wait(180) == 0, (folder / "log").read_text()
    assert f"{saved + 2} steps done" in (folder / "log").read_text()
    assert [r["step"] for r in metrics(folder / "run") if "loss" in r] == [*range(1, saved + 3)]
