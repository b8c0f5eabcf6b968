"""The stages of a recipe, as the command line and the demo call them. Each reads only what the stage before wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from diffusion2gan.config import HOW_KEPT, settings_difference
from diffusion2gan.device import default_device, warn_of_slow_bf16
from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.embedded.weights import student_folder
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.accounting import Evaluations
from diffusion2gan.export import CardExtras, export_lora, export_single_file, export_student, hub_licence, licence_of
from diffusion2gan.files import disk_errors, json_object, lock, sweep_temporaries, write_bytes_atomic
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.lora import fused_weights, lora_layers
from diffusion2gan.pairs.dataset import PairDataset, canonical_json
from diffusion2gan.pairs.measure_solver import measure_recipe
from diffusion2gan.pairs.prompts import check_prompts, prompts_digest, read_prompts, source_is_here
from diffusion2gan.pairs.simulate import simulate, store_settings
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline
from diffusion2gan.plan import check_memory
from diffusion2gan.recipe import Recipe, check_pairs, check_same_experiment, dump_recipe, dump_training, load_recipe
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.folders import load_pipeline, stored_weights, weights_digest
from diffusion2gan.teachers.load import load_teacher, teacher_folder
from diffusion2gan.teachers.ode import SolverConfig, evaluations_per_pair
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import revision_of
from diffusion2gan.training.distance import Distance, build_distance
from diffusion2gan.training.sharding import with_whole_tensors
from diffusion2gan.training.state import checkpoint_path, checkpoint_step, checkpoints, last_step, load_state
from diffusion2gan.training.trainer import Trainer
from diffusion2gan.worker import Worker


def simulate_recipe(recipe: Recipe, store: Path, progress: bool = True, smaller: Path | None = None) -> dict[str, Any]:
    """Fills a pair store for `recipe`, with as many workers as torchrun started; `smaller` as `simulate` has it."""
    worker = Worker.from_environment()
    # A teacher may have to be fetched.
    check_prompts(recipe.pairs.prompts)
    if recipe.teacher.source != "embedded" and recipe.pairs.prompts.source == "embedded":
        warnings.warn(
            f"pairs of {recipe.teacher.source} for the captions of the emoji: pairs.prompts.source is `embedded`; name a list of your own",
            stacklevel=2,
        )
    teacher = load_teacher(recipe.teacher, default_device())
    if not (store / "manifest.json").exists():
        check_memory(recipe, "simulate", teacher.network, worker.world, teacher.device)
    return simulate(teacher, recipe.pairs, store, worker, progress, smaller, in_place=True)


def measure_solver_recipe(recipe: Recipe, out: Path, count: int) -> str:
    """Measures solvers for `recipe` into the folder `out`; returns the table."""
    return measure_recipe(load_teacher(recipe.teacher, default_device()), recipe.pairs, out, count)


def _check_run(recipe: Recipe, folder: Path) -> None:
    """Raises UserError unless `folder` is new, or a run of the same experiment. Writes nothing."""
    path = folder / "recipe.yaml"
    if path.exists():
        # A run that never came to train holds nothing that a mended recipe could spoil.
        if _begun(folder):
            saved = load_recipe(str(path))
            check_same_experiment(recipe, saved, folder)
            _check_lengths(recipe, saved, folder)
    elif folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise UserError(f"{folder}: not empty and no run (no recipe.yaml); choose a new --out")


def _begun(folder: Path) -> bool:
    return bool(checkpoints(folder / "checkpoints")) or (folder / "metrics.jsonl").exists()


def _check_lengths(recipe: Recipe, saved: Recipe, folder: Path) -> None:
    """Raises UserError when a phase that is already ending, or has ended, is to be of another length."""
    found = [checkpoint_step(p) for p in checkpoints(folder / "checkpoints")]
    if not found:
        return
    done, begins = max(found), 0
    for key in ("training", "adversarial"):
        ours, theirs = getattr(recipe, key), getattr(saved, key)
        if ours is None or theirs is None or ours.steps == theirs.steps:
            begins += theirs.steps if theirs is not None else 0
            continue
        ends = begins + theirs.steps
        if saved.adversarial is not None and key == "training" and done >= ends:
            why = "phase 2 has begun"
        elif theirs.decay_steps and done > ends - theirs.decay_steps:
            why = f"the learning rate is already falling (since {ends - theirs.decay_steps})"
        elif begins + ours.steps < done:
            why = "more is done already"
        elif begins + ours.steps - ours.decay_steps < done:
            why = f"the learning rate would jump: it would be falling since {begins + ours.steps - ours.decay_steps}"
        else:
            return
        raise UserError(
            f"{folder}: {key}.steps is {theirs.steps} there and {ours.steps} now, but at step {done} {why}; choose a new --out, or raise steps "
            "before that"
        )


def train_recipe(recipe: Recipe, store: Path, folder: Path, progress: bool = True, deadline: Callable[[], bool] | None = None) -> Trainer:
    """Trains `recipe` on the pairs of `store` in the run `folder`, going on from its last checkpoint."""
    # The first process writes checkpoints while the others wait: of large networks longer than the usual 10 minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    # Autocast would keep bf16 copies of what is gathered, of all weights at once, beyond the time that they are needed.
    autocast = AutocastKwargs(cache_enabled=not recipe.training.shard)
    precision = recipe.training.mixed_precision
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[patience, autocast])
    if recipe.training.mixed_precision == "bf16":
        warn_of_slow_bf16(accelerator.device, "training.mixed_precision=no")
    pairs = PairDataset(store, share=(accelerator.process_index, accelerator.num_processes))
    teacher = load_teacher(recipe.teacher, accelerator.device)
    last = len(teacher.alphas_cumprod) - 1
    if recipe.generator.timestep != last:
        raise UserError(
            f"generator.timestep is {recipe.generator.timestep}, expected {last}, where the teacher's schedule ends: no stock scheduler's one "
            "step begins elsewhere, and the student could not be exported"
        )
    settings = store_settings(teacher, recipe.pairs, _prompts_digest(recipe, pairs, accelerator))
    check_pairs(recipe, settings, pairs.manifest, store)
    done = last_step(folder / "checkpoints")
    check_memory(recipe, "train", teacher.network, accelerator.num_processes, accelerator.device, done)
    distance = build_distance(recipe.loss, teacher, accelerator.device)
    if distance.network is not None and recipe.loss.perceptual == "embedded" and recipe.teacher.source != "embedded":
        of_pixels = recipe.loss.distance == "lpips"
        better = "one of pixels (`perceptual train --vae pixels`)" if of_pixels else "one of its latents (sd15, sdxl, or your own)"
        warnings.warn(
            f"loss.perceptual is `embedded`, a network trained on the emoji, and the teacher is {recipe.teacher.source}; name {better}",
            stacklevel=2,
        )
    generator = OneStepGenerator.from_teacher(teacher, recipe.generator)
    # A run that goes on has its own weights, and those that it started from may be gone; a LoRA has changes of them alone.
    has_weights = bool(checkpoints(folder / "checkpoints")) and recipe.generator.lora_rank is None
    start = None if has_weights or recipe.generator.start is None else student_folder(recipe.generator.start)
    if start is not None:
        load_start(generator, generator_weights(start, recipe), recipe.generator)
    adversarial = recipe.adversarial
    with_d = adversarial is not None and adversarial.weight > 0
    if recipe.training.shard:
        # Each is whole on the device only while it is being split.
        generator.to("cpu")
    discriminator = build_discriminator(recipe.discriminator, teacher, recipe.training.seed) if with_d else None
    if recipe.training.shard and discriminator is not None:
        discriminator.to("cpu")
    teacher.give_up_network()
    with disk_errors(folder), ExitStack() as held:
        if accelerator.is_main_process:
            _check_run(recipe, folder)
            held.enter_context(_alone_in(folder))
            begun_from = None if start is None else (weights_digest(generator), _start_facts(start))
            inputs = _checked_inputs(folder, pairs, distance, teacher.decoder_digest(), begun_from)
            goes_on = _begun(folder)
            if not goes_on:
                _write_run(folder, recipe, inputs)
        accelerator.wait_for_everyone()
        trainer = Trainer(
            teacher,
            pairs,
            generator,
            distance,
            recipe.training,
            folder,
            accelerator,
            adversarial,
            discriminator,
            _experiment(recipe, pairs.manifest),
        )
        if accelerator.is_main_process and goes_on:
            # Only now: a command that is refused leaves a run as it was.
            _write_run(folder, recipe, inputs)
        trainer.run(progress, deadline)
    return trainer


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError while another process trains in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        lock(file.fileno(), f"{folder}: another process is training there; wait for it, end it, or choose a new --out")
        yield


def _write_run(folder: Path, recipe: Recipe, inputs: dict[str, Any]) -> None:
    sweep_temporaries(folder)
    write_bytes_atomic(folder / "recipe.yaml", dump_recipe(recipe).encode())
    write_bytes_atomic(folder / "inputs.json", canonical_json(inputs))


def _experiment(recipe: Recipe, pairs: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint is of; a run keeps these as long as it lives."""
    return {
        "teacher": pairs["teacher"]["weights"],
        "loss.distance": recipe.loss.distance,
        "generator.lora_rank": str(recipe.generator.lora_rank),
        "training.seed": str(recipe.training.seed),
    }


def generator_weights(start: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The weights at which a generator starts: the average at the end of a run's phase 1, or those of an exported student.

    Raises UserError when `start` is neither, or was made for another teacher, latent space or timestep.
    """
    if not start.is_dir():
        raise UserError(f"generator.start: {start}: no such folder; name the run or the student that the generator starts from")
    if (start / "recipe.yaml").exists():
        found = checkpoints(start / "checkpoints")
        if not found:
            raise UserError(f"generator.start: {start} has no checkpoint yet; run `diffusion2gan train` with that --out first")
        if not (start / "inputs.json").exists():
            raise UserError(f"generator.start: {start} has no inputs.json, which says for what it was trained; copy the whole run")
        begun_with = load_recipe(str(start / "recipe.yaml"))
        timestep = begun_with.generator.timestep
        teacher_weights = json_object(start / "inputs.json")["pairs"]["teacher"]["weights"]
        at = found[-1]
        if begun_with.adversarial is not None and checkpoint_step(at) > begun_with.training.steps:
            if begun_with.training.steps == 0:
                raise UserError(
                    f"generator.start: {start} stands for the end of its phase 1, and had none (training.steps is 0); export its student and name that"
                )
            at = checkpoint_path(start / "checkpoints", begun_with.training.steps)
            if at not in found:
                raise UserError(
                    f"generator.start: {start} has no checkpoint of the end of its phase 1 ({at.name}); name an exported student"
                )
        weights = with_whole_tensors(load_state(at, in_pieces=True).ema)
        if begun_with.generator.lora_rank is not None:
            raise UserError(f"generator.start: {start} trained a LoRA; export its student and name that folder")
    else:
        student = OneStepPipeline.from_pretrained(start, "float32", "cpu")
        timestep, teacher_weights = student.generator.timestep, student.facts.get("teacher_weights")
        weights = student.generator.state_dict()
    ours = stored_weights(recipe.teacher, teacher_folder(recipe.teacher))
    for what, theirs, expected in (("teacher weights", teacher_weights, ours), ("timestep", timestep, recipe.generator.timestep)):
        if theirs != expected:
            raise UserError(f"generator.start: {start} was trained with {what} {theirs}, this recipe has {expected}; name another start")
    return weights


def load_start(generator: OneStepGenerator, weights: dict[str, Tensor], config: GeneratorConfig) -> None:
    """Lets `generator` start from a whole student's weights; one of LoRA changes those."""
    if config.lora_rank is None:
        generator.load_state_dict(weights)
        return
    own = generator.state_dict()
    # Under a change, a layer's weights have another name.
    renamed = {k if k in own else f"{k.rpartition('.')[0]}.base_layer.{k.rpartition('.')[2]}": v for k, v in weights.items()}
    missing = generator.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys


def _start_facts(start: Path) -> dict[str, Any]:
    """What the run or student that a generator starts from had behind it: recipe, steps, batch size."""
    if not (start / "recipe.yaml").exists():
        facts = json_object(start / STUDENT_FILE)
        return {k: facts[k] for k in ("recipe", "steps", "batch_size", *_PHASE_2_FACTS, "start") if k in facts}
    recipe = load_recipe(str(start / "recipe.yaml"))
    steps = min(checkpoint_step(checkpoints(start / "checkpoints")[-1]), recipe.training.steps)
    before = json_object(start / "inputs.json").get("start")
    return {"recipe": recipe.name, "steps": steps, "batch_size": recipe.training.batch_size} | ({"start": before} if before else {})


def _checked_inputs(
    folder: Path, pairs: PairDataset, distance: Distance, decoder: str | None, start: tuple[str, dict[str, Any]] | None
) -> dict[str, Any]:
    """What the run is fed with, for `RUN/inputs.json`. Raises UserError when it was fed with something else before."""
    perceptual = None if distance.network is None else weights_digest(distance.network)
    inputs: dict[str, Any] = {
        "pairs": {k: v for k, v in pairs.manifest.items() if k != "shards"},
        "perceptual_weights": perceptual,
        "perceptual_settings": distance.settings,
        # The teacher's identity is of what draws latents.
        "decoder_weights": decoder,
    }
    path = folder / "inputs.json"
    saved = json_object(path) if path.exists() and _begun(folder) else None
    # Of a run that goes on with weights of its own, only the record tells where it started.
    weights, facts = start if start is not None else ((saved or {}).get("start_weights"), None)
    inputs["start_weights"] = weights
    if saved is not None:
        written = json.loads(canonical_json(inputs))
        # The same pairs may be kept otherwise: noise stored or not, shards of another size.
        kept = {f"pairs.{key}" for key in HOW_KEPT} | {"pairs.fingerprint", "pairs.noise_recipe.fingerprint", "pairs.teacher.source"}
        for key, ours, theirs in settings_difference(written, {k: v for k, v in saved.items() if k != "start"}):
            if key not in kept and not (key == "decoder_weights" and theirs is None):
                raise UserError(f"{folder}: this run was begun with {key} {theirs!r}, now it is {ours!r}; choose a new --out")
    return inputs | {"start": facts if facts is not None else (saved or {}).get("start")}


def _prompts_digest(recipe: Recipe, pairs: PairDataset, accelerator: Accelerator) -> str:
    """Of the recipe's prompts; a store that was moved to a machine without the prompt file vouches for itself. Millions of prompts are read
    by the first process alone."""
    config, said = recipe.pairs, [pairs.manifest["prompts_sha256"]]
    if accelerator.is_main_process and source_is_here(config.prompts):
        said = [prompts_digest(read_prompts(config.prompts, config.count, config.seed))]
    return str(broadcast_object_list(said)[0])


def export_run(
    folder: Path,
    out: Path,
    dtype: str | None = None,
    use_ema: bool = True,
    step: int | None = None,
    kind: Literal["folder", "single-file", "lora"] = "folder",
    results: Path | None = None,
) -> None:
    """Writes the student of a run's last checkpoint, or that of `step`: a diffusers folder, one file in the original layout, or, of
    a LoRA run, a folder with the LoRA alone.

    `dtype`: of the stored weights; None: float16, or float32 where the student's output is multiplied by too much for it. `results`: a
    Markdown file of measurements for the card.
    """
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: no run here (no recipe.yaml); name a folder written by `diffusion2gan train`")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: no checkpoint yet; run `diffusion2gan train` with this --out first")
    if step is not None and step not in map(checkpoint_step, found):
        raise UserError(f"{folder}: no checkpoint of step {step}; there are {', '.join(str(checkpoint_step(p)) for p in found)}")
    # By page: of all that a checkpoint holds, one set of weights is wanted.
    path = found[-1] if step is None else checkpoint_path(folder / "checkpoints", step)
    state = load_state(path, in_pieces=True)
    pipeline = load_pipeline(recipe.teacher, teacher_folder(recipe.teacher), torch.float32)
    inputs = json_object(folder / "inputs.json")
    pairs = inputs["pairs"]
    state.check_experiment(_experiment(recipe, pairs), path)
    stored = stored_weights(recipe.teacher, teacher_folder(recipe.teacher))
    if stored != pairs["teacher"]["weights"]:
        raise UserError(
            f"{folder}: trained for teacher weights {pairs['teacher']['weights'][:16]}..., but {recipe.teacher.source} now has "
            f"{stored[:16]}...; restore that teacher, or train again"
        )
    facts = {
        "recipe": recipe.name,
        "teacher": "local folder" if Path(recipe.teacher.source).exists() else recipe.teacher.source,
        "teacher_weights": pairs["teacher"]["weights"],
        **_hub_options(recipe.teacher),
        **({"resolution": pairs["teacher"]["resolution"]} if "resolution" in pairs["teacher"] else {}),
        "pairs": pairs["count"],
        "pairs_fingerprint": pairs["fingerprint"],
        "ode": pairs["ode"],
        **({"negative_prompt": pairs["negative_prompt"]} if pairs["negative_prompt"] else {}),
        "precision": pairs["precision"],
        "compile": pairs.get("compile", False),
        "distance": recipe.loss.distance,
        "steps": state.step,
        "batch_size": recipe.training.batch_size,
        **_adversarial_facts(recipe, state.step),
        **({"start": inputs["start"]} if inputs.get("start") else {}),
        "weights": "ema" if use_ema else "last",
        "evaluations": _evaluations(recipe, pairs, state.step).by_role,
    }
    weights = with_whole_tensors(state.ema if use_ema else state.model)
    stored_in = None if dtype is None else getattr(torch, dtype)
    rank, alpha = recipe.generator.lora_rank, recipe.generator.lora_alpha
    extras = _card_extras(recipe, folder, state.step, results)
    if kind == "lora":
        if rank is None:
            raise UserError(f"{folder}: no LoRA was trained here (generator.lora_rank is not set); export a folder or a single file")
        if recipe.generator.start is not None:
            raise UserError(f"{folder}: its LoRA changes {recipe.generator.start}, not the teacher; export a folder or a single file")
        layers = lora_layers(pipeline.unet.float(), weights, rank, alpha)
        export_lora(pipeline, layers, recipe.generator.timestep, out, facts, stored_in, extras, getattr(torch, recipe.teacher.dtype))
        return
    if rank is not None:
        if recipe.generator.start is not None:
            pipeline.unet.load_state_dict(_frozen_weights(recipe, folder))
        # The changes were trained on the frozen weights as the teacher's precision has them.
        frozen = torch.nn.Module.to(pipeline.unet, getattr(torch, recipe.teacher.dtype))
        weights = fused_weights(torch.nn.Module.to(frozen, torch.float32), weights, rank, alpha)
    student = (pipeline, weights, recipe.generator.timestep, out, facts, stored_in)
    if kind == "single-file":
        export_single_file(*student)
    else:
        export_student(*student, extras)


def _hub_options(teacher: TeacherConfig) -> dict[str, str]:
    """`revision` and `variant`: what it takes beside a hub id to find these weights again. Of a folder, nothing."""
    if Path(teacher_folder(teacher)).is_dir():
        return {}
    named = {"revision": revision_of(teacher.source, teacher.revision), "variant": teacher.variant}
    return {key: value for key, value in named.items() if value is not None}


def _frozen_weights(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """The weights that a LoRA run with `generator.start` froze, under the network's names. Raises UserError when they are others now."""
    weights = generator_weights(student_folder(recipe.generator.start or ""), recipe)
    generator = OneStepGenerator.from_teacher(load_teacher(recipe.teacher), recipe.generator)
    load_start(generator, weights, recipe.generator)
    if weights_digest(generator) != json_object(folder / "inputs.json")["start_weights"]:
        raise UserError(f"{folder}: started from other weights than {recipe.generator.start} holds now; restore that student")
    return {k.removeprefix("network."): v for k, v in weights.items()}


def _card_extras(recipe: Recipe, folder: Path, step: int, results: Path | None) -> CardExtras:
    """The run's last pictures up to `step`, the measurements and the teacher's licence."""
    pictures = sorted(p for p in (folder / "samples").glob("held-out-*.png") if int(p.stem.rpartition("-")[2]) <= step)
    try:
        measured = None if results is None else results.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--results {results}: cannot be read ({error}), expected a Markdown file") from None
    source, options = Path(teacher_folder(recipe.teacher)), _hub_options(recipe.teacher)
    of_validation = [r for r in read_scalars(folder / "metrics.jsonl") if "validation_loss" in r and r["step"] <= step]
    held_out = None
    if of_validation:
        last = of_validation[-1]
        held_out = (
            f"On {recipe.training.holdout} pairs that were never trained on, at step {last['step']}: {recipe.loss.distance} loss "
            f"{last['validation_loss']:.4g}, squared error {last['validation_mse']:.4g}."
        )
    return CardExtras(
        picture=pictures[-1].read_bytes() if pictures else None,
        results=measured,
        held_out=held_out,
        recipe=dump_training(recipe),
        licence=licence_of(source) if source.is_dir() else hub_licence(recipe.teacher.source, options.get("revision")),
        metric_licence=(json_object(folder / "inputs.json").get("perceptual_settings") or {}).get("licence"),
        teacher="" if source.is_dir() else recipe.teacher.source,
        teacher_options=options,
    )


def _evaluations(recipe: Recipe, pairs: dict[str, Any], steps: int) -> Evaluations:
    """What this run cost, as Table 6 counts it: the teacher's for the pairs, one of its own a training sample. What a
    `generator.start` cost is in its own card."""
    counted = Evaluations()
    counted.add("data_teacher", pairs["count"] * evaluations_per_pair(SolverConfig.model_validate(pairs["ode"])))
    counted.add("student", recipe.samples(steps))
    return counted


_PHASE_2_FACTS = ("adversarial_steps", "adversarial_batch_size", "lambda_GAN", "discriminator")


def _adversarial_facts(recipe: Recipe, step: int) -> dict[str, Any]:
    """What a student's card says of phase 2, if it came so far."""
    if recipe.adversarial is None or step <= recipe.training.steps:
        return {}
    facts = {"adversarial_steps": step - recipe.training.steps, "adversarial_batch_size": recipe.phase_2_batch_size}
    if not recipe.adversarial.weight:
        return facts
    return facts | {
        "lambda_GAN": recipe.adversarial.weight,
        "discriminator": recipe.discriminator.model_dump(include={"kind", "noise", "multi_scale"}),
    }
