"""The stages of a recipe, as the command line and the demo call them. Each reads only what the stage before wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusion2gan.errors import UserError
from diffusion2gan.files import disk_errors, write_bytes_atomic
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset, canonical_json
from diffusion2gan.pairs.prompts import read_prompts
from diffusion2gan.pairs.simulate import Worker, simulate, store_settings
from diffusion2gan.pipeline import export_student
from diffusion2gan.recipe import Recipe, check_pairs, check_same_experiment, dump_recipe, load_recipe
from diffusion2gan.teachers.load import load_teacher, teacher_folder
from diffusion2gan.teachers.stable_diffusion import load_pipeline
from diffusion2gan.training.distance import build_distance
from diffusion2gan.training.state import checkpoints, load_state
from diffusion2gan.training.trainer import Trainer


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def simulate_recipe(recipe: Recipe, store: Path, progress: bool = True) -> dict[str, Any]:
    """Fills a pair store for `recipe`, with as many workers as torchrun started."""
    worker = Worker.from_environment()
    device = f"cuda:{worker.rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return simulate(load_teacher(recipe.teacher, device), recipe.pairs, store, worker, progress)


def open_run(recipe: Recipe, folder: Path) -> None:
    """Makes the run folder, or checks that it belongs to the same experiment. Raises UserError."""
    path = folder / "recipe.yaml"
    if path.exists():
        check_same_experiment(recipe, load_recipe(str(path)), folder)
    elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"{folder}: not empty and no run (no recipe.yaml); choose a new --out")
    for leftover in folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    write_bytes_atomic(path, dump_recipe(recipe).encode())


def train_recipe(recipe: Recipe, store: Path, folder: Path, progress: bool = True, deadline: Callable[[], bool] | None = None) -> Trainer:
    """Trains `recipe` on the pairs of `store` in the run `folder`, going on from its last checkpoint."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=recipe.training.mixed_precision)
    pairs = PairDataset(store)
    teacher = load_teacher(recipe.teacher, accelerator.device)
    prompts = read_prompts(recipe.pairs.prompts, recipe.pairs.count, recipe.pairs.seed)
    check_pairs(recipe, store_settings(teacher, recipe.pairs, prompts), pairs.manifest, store)
    with disk_errors(folder):
        if accelerator.is_main_process:
            open_run(recipe, folder)
            write_bytes_atomic(folder / "pairs.json", canonical_json({k: v for k, v in pairs.manifest.items() if k != "shards"}))
        accelerator.wait_for_everyone()
        generator = OneStepGenerator.from_teacher(teacher, recipe.generator)
        distance = build_distance(recipe.loss, teacher, accelerator.device)
        trainer = Trainer(teacher, pairs, generator, distance, recipe.training, folder, accelerator)
        trainer.run(progress, deadline)
    return trainer


def export_run(folder: Path, out: Path, dtype: str = "float16", use_ema: bool = True) -> None:
    """Writes the student of a run's last checkpoint as a diffusers folder."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: no run here (no recipe.yaml); name a folder written by `diffusion2gan train`")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: no checkpoint yet; run `diffusion2gan train` with this --out first")
    state = load_state(found[-1])
    pipeline = load_pipeline(recipe.teacher, teacher_folder(recipe.teacher), torch.float32)
    pairs = json.loads((folder / "pairs.json").read_text())
    facts = {
        "recipe": recipe.name,
        "teacher": "local folder" if Path(recipe.teacher.source).exists() else recipe.teacher.source,
        "teacher_weights": pairs["teacher"]["weights"],
        "pairs": pairs["count"],
        "pairs_fingerprint": pairs["fingerprint"],
        "ode": pairs["ode"],
        "distance": recipe.loss.distance,
        "steps": state.step,
        "batch_size": recipe.training.batch_size,
        "weights": "ema" if use_ema else "last",
    }
    export_student(pipeline, state.ema if use_ema else state.model, recipe.generator.timestep, out, facts, getattr(torch, dtype))
