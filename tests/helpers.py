"""Recipes, commands and kills for tests that run the program as its users do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def recipe_values(teacher: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
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


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def run_command(*arguments: Any, program: tuple[str, ...] = ("-m", "diffusion2gan"), env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, hidden ones included."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
