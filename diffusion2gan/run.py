"""The stages of a recipe, as the command line and the demo call them. Each reads only what the stage before wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusion2gan.config import settings_difference
from diffusion2gan.device import warn_of_slow_bf16
from diffusion2gan.errors import UserError
from diffusion2gan.files import disk_errors, sweep_temporaries, write_bytes_atomic
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset, canonical_json
from diffusion2gan.pairs.prompts import prompts_digest, read_prompts
from diffusion2gan.pairs.simulate import Worker, simulate, store_settings
from diffusion2gan.pipeline import export_student
from diffusion2gan.recipe import Recipe, check_pairs, check_same_experiment, dump_recipe, load_recipe
from diffusion2gan.teachers.load import load_teacher, teacher_folder
from diffusion2gan.teachers.stable_diffusion import load_pipeline, stored_weights, weights_digest
from diffusion2gan.training.distance import Distance, build_distance
from diffusion2gan.training.state import checkpoint_step, checkpoints, load_state
from diffusion2gan.training.trainer import Trainer


def simulate_recipe(recipe: Recipe, store: Path, progress: bool = True) -> dict[str, Any]:
    """Fills a pair store for `recipe`, with as many workers as torchrun started."""
    worker = Worker.from_environment()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return simulate(load_teacher(recipe.teacher, device), recipe.pairs, store, worker, progress)


def open_run(recipe: Recipe, folder: Path) -> None:
    """Makes the run folder, or checks that it belongs to the same experiment. Raises UserError."""
    path = folder / "recipe.yaml"
    if path.exists():
        saved = load_recipe(str(path))
        check_same_experiment(recipe, saved, folder)
        decay_began = saved.training.steps - saved.training.decay_steps
        done = max((checkpoint_step(p) for p in checkpoints(folder / "checkpoints")), default=0)
        if recipe.training.steps != saved.training.steps and saved.training.decay_steps and done > decay_began:
            raise UserError(
                f"{folder}: training.steps is {saved.training.steps} there and {recipe.training.steps} now, but at step {done} the learning rate "
                f"is already falling (since {decay_began}); choose a new --out, or raise steps before the fall"
            )
    elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"{folder}: not empty and no run (no recipe.yaml); choose a new --out")
    sweep_temporaries(folder)
    write_bytes_atomic(path, dump_recipe(recipe).encode())


def train_recipe(recipe: Recipe, store: Path, folder: Path, progress: bool = True, deadline: Callable[[], bool] | None = None) -> Trainer:
    """Trains `recipe` on the pairs of `store` in the run `folder`, going on from its last checkpoint."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=recipe.training.mixed_precision)
    if recipe.training.mixed_precision == "bf16":
        warn_of_slow_bf16(accelerator.device, "training.mixed_precision=no")
    pairs = PairDataset(store)
    teacher = load_teacher(recipe.teacher, accelerator.device)
    settings = store_settings(teacher, recipe.pairs, _prompts_digest(recipe, pairs))
    check_pairs(recipe, settings, pairs.manifest, store)
    distance = build_distance(recipe.loss, teacher, accelerator.device)
    with disk_errors(folder):
        if accelerator.is_main_process:
            open_run(recipe, folder)
            _check_inputs(folder, pairs, distance)
        accelerator.wait_for_everyone()
        generator = OneStepGenerator.from_teacher(teacher, recipe.generator)
        trainer = Trainer(teacher, pairs, generator, distance, recipe.training, folder, accelerator)
        trainer.run(progress, deadline)
    return trainer


def _check_inputs(folder: Path, pairs: PairDataset, distance: Distance) -> None:
    """Writes what the run was fed with to `RUN/inputs.json`, or raises UserError when it was fed with something else before."""
    perceptual = None if distance.network is None else weights_digest(distance.network)
    inputs = {
        "pairs": {k: v for k, v in pairs.manifest.items() if k != "shards"},
        "perceptual_weights": perceptual,
        "perceptual_settings": distance.settings,
    }
    written = canonical_json(inputs)
    path = folder / "inputs.json"
    if path.exists():
        # The same pairs may be kept otherwise: noise stored or not, shards of another size.
        kept = (
            "pairs.fingerprint",
            "pairs.noise_storage",
            "pairs.noise_recipe.fingerprint",
            "pairs.shard_size",
            "pairs.batch_size",
            "pairs.precision",
            "pairs.text_precision",
            "pairs.compile",
        )
        for key, ours, theirs in settings_difference(json.loads(written), json.loads(path.read_text())):
            if key not in kept:
                raise UserError(f"{folder}: this run was begun with {key} {theirs!r}, now it is {ours!r}; choose a new --out")
    write_bytes_atomic(path, written)


def _prompts_digest(recipe: Recipe, pairs: PairDataset) -> str:
    """Of the recipe's prompts; a store that was moved to a machine without the prompt file vouches for itself."""
    source = recipe.pairs.prompts.source
    if source != "embedded" and not Path(source).exists():
        return pairs.manifest["prompts_sha256"]
    return prompts_digest(read_prompts(recipe.pairs.prompts, recipe.pairs.count, recipe.pairs.seed))


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
    pairs = json.loads((folder / "inputs.json").read_text())["pairs"]
    weights = stored_weights(recipe.teacher, teacher_folder(recipe.teacher))
    if weights != pairs["teacher"]["weights"]:
        raise UserError(
            f"{folder}: trained for teacher weights {pairs['teacher']['weights'][:16]}..., but {recipe.teacher.source} now has "
            f"{weights[:16]}...; restore that teacher, or train again"
        )
    facts = {
        "recipe": recipe.name,
        "teacher": "local folder" if Path(recipe.teacher.source).exists() else recipe.teacher.source,
        "teacher_weights": pairs["teacher"]["weights"],
        "pairs": pairs["count"],
        "pairs_fingerprint": pairs["fingerprint"],
        "ode": pairs["ode"],
        "precision": pairs["precision"],
        "compile": pairs.get("compile", False),
        "distance": recipe.loss.distance,
        "steps": state.step,
        "batch_size": recipe.training.batch_size,
        "weights": "ema" if use_ema else "last",
    }
    export_student(pipeline, state.ema if use_ema else state.model, recipe.generator.timestep, out, facts, getattr(torch, dtype))
