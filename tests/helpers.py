"""Recipes, commands and kills for tests that run the program as its users do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from diffusion2gan.recipe import parse_recipe
from diffusion2gan.run import simulate_recipe, train_recipe
from diffusion2gan.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


def recipe_values(teacher: Path, prompts: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe of the tiny teacher: 24 pairs in 3 shards, 12 training steps."""
    values: dict[str, Any] = {
        "name": "tiny",
        "teacher": {"source": str(teacher)},
        "pairs": {"count": 24, "prompts": {"source": str(prompts)}, "ode": {"steps": 4, "guidance": 2.0}, "batch_size": 4, "shard_size": 8},
        "loss": {"distance": "mse"},
        "training": {
            "steps": 12, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "checkpoint_every": 3, "validate_every": 6,
            "sample_every": 6, "sample_count": 2, "holdout": 4, "log_every": 1,
        },
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = values.get(section, {}) | {name: value}
        else:
            values[section] = value
    return values


def trained_from_scratch(values: dict[str, Any], folder: Path) -> Trainer:
    """Simulates the pairs of a recipe into FOLDER/store and trains it in FOLDER/run."""
    recipe = parse_recipe(values, values["name"])
    simulate_recipe(recipe, folder / "store", progress=False)
    return train_recipe(recipe, folder / "store", folder / "run", progress=False)


def compiled_whole(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """From here on `torch.compile` makes one graph or fails, and runs it as it is; returns what it was asked to compile."""
    real, compiled = torch.compile, []

    def compile_whole(module: torch.nn.Module, dynamic: bool) -> object:
        compiled.append(type(module))
        return real(module, dynamic=dynamic, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_whole)
    torch._dynamo.reset()
    return compiled


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


class Command:
    """One run of the command line in a process of its own, with one thread. Those of different `lane`s may run at once."""

    _servers: ClassVar[dict[int, subprocess.Popen[str]]] = {}

    def __init__(
        self,
        *arguments: Any,
        kill_at: tuple[str, int] | None = None,
        slow: float | None = None,
        environment: dict[str, str] | None = None,
        lane: int = 0,
    ):
        self._server = self._start_server(lane)
        self._folder = tempfile.mkdtemp(prefix="command-")
        self._out, self._err = Path(self._folder) / "out", Path(self._folder) / "err"
        order = {"argv": [str(a) for a in arguments], "kill_at": kill_at, "slow": slow, "out": str(self._out), "err": str(self._err)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order | {"environment": environment or {}}) + "\n")
        self._server.stdin.flush()
        self.pid: int = self._answer()["pid"]

    @classmethod
    def _start_server(cls, lane: int) -> subprocess.Popen[str]:
        if lane not in cls._servers or cls._servers[lane].poll() is not None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            cls._servers[lane] = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
        return cls._servers[lane]

    def _answer(self) -> dict[str, int]:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    @property
    def stderr(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = self._answer()["code"]
        done = subprocess.CompletedProcess([], code, self._out.read_text() if self._out.exists() else "", self.stderr)
        shutil.rmtree(self._folder)
        return done


def run_command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end."""
    return Command(*arguments).wait()


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, hidden ones included."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
