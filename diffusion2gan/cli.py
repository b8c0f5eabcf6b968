"""The `diffusion2gan` command: parse, build, call. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import argparse
import errno
import faulthandler
import gc
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from diffusion2gan import __version__
from diffusion2gan.errors import UserError, in_one_line


def _simulate(a: argparse.Namespace) -> None:
    from diffusion2gan.recipe import load_recipe
    from diffusion2gan.run import measure_solver_recipe, simulate_recipe

    if a.measure_solver:
        print(measure_solver_recipe(load_recipe(a.recipe, a.set), a.out, a.measure_count), end="")
        return
    manifest = simulate_recipe(load_recipe(a.recipe, a.set), a.out, smaller=a.extend)
    print(f"{a.out}: {manifest['count']} pairs in {len(manifest['shards'])} shards, fingerprint {manifest['fingerprint']}")


def _pairs_check(a: argparse.Namespace) -> None:
    from diffusion2gan.pairs.maintain import check

    for key, value in check(a.store).items():
        print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")


def _pairs_show(a: argparse.Namespace) -> None:
    from diffusion2gan.device import default_device
    from diffusion2gan.pairs.maintain import show
    from diffusion2gan.recipe import load_recipe
    from diffusion2gan.teachers.load import load_teacher

    show(a.store, load_teacher(load_recipe(a.recipe, a.set).teacher, default_device()), a.output, a.count)
    print(f"wrote {a.output}")


def _pairs_store_noise(a: argparse.Namespace) -> None:
    from diffusion2gan.pairs.maintain import store_noise

    manifest = store_noise(a.store, a.out)
    print(f"{a.out}: {manifest['count']} pairs with their noise, fingerprint {manifest['fingerprint']}")


def _train(a: argparse.Namespace) -> None:
    from diffusion2gan.recipe import load_recipe
    from diffusion2gan.run import train_recipe
    from diffusion2gan.run_report import write_run_report

    trainer = train_recipe(load_recipe(a.recipe, a.set), a.pairs, a.out)
    if not trainer.accelerator.is_main_process:
        return
    print(f"{a.out}: {trainer.step} steps done; next: diffusion2gan export {a.out} STUDENT")
    page = a.out / "report.html"
    try:
        write_run_report([a.out], page)
    except Exception as error:  # the training is done and saved, whatever becomes of its page
        warnings.warn(f"{page} could not be written ({in_one_line(error)})", stacklevel=1)
    else:
        print(f"look at {page}")


def _report(a: argparse.Namespace) -> None:
    from diffusion2gan.run_report import write_run_report

    out = a.output or (a.run[0] / "report.html" if len(a.run) == 1 else Path("report.html"))
    write_run_report(a.run, out)
    print(f"wrote {out}")


def _export(a: argparse.Namespace) -> None:
    from diffusion2gan.run import export_run

    if a.format == "single-file" and a.push_to_hub:
        raise UserError("--push-to-hub uploads a folder; export one without --format single-file")
    export_run(a.run, a.out, a.dtype, use_ema=not a.last, step=a.step, kind=a.format, results=a.results)
    said = {
        "folder": "an ordinary diffusers folder",
        "single-file": "one file in the original layout, for user interfaces",
        "lora": "a LoRA for the teacher's pipeline",
    }
    print(f"wrote {a.out}: {said[a.format]}; one step, guidance 1")
    if a.push_to_hub:
        from diffusion2gan.export import push_to_hub

        print(f"uploaded to {push_to_hub(a.out, a.push_to_hub, a.private)}")


def _generate(a: argparse.Namespace) -> None:
    from PIL import Image

    from diffusion2gan.files import write_bytes_atomic
    from diffusion2gan.images import grid, png_bytes
    from diffusion2gan.pipeline import OneStepPipeline

    if a.output.suffix.lower() != ".png":
        raise UserError(f"-o {a.output}: pictures are written as PNG, expected a name that ends in .png")
    student = OneStepPipeline.from_pretrained(a.student, a.dtype)
    prompts = [p for p in a.prompt for _ in range(a.count)]
    seeds = [a.seed + i for _ in a.prompt for i in range(a.count)]
    started = time.perf_counter()
    images = student.generate(prompts, seeds)
    seconds = time.perf_counter() - started
    columns = a.count if len(a.prompt) > 1 else min(a.count, 8)
    # One picture is written as it is drawn; several as a sheet on which small ones can be seen.
    picture = Image.fromarray(images[0]) if len(images) == 1 else grid(images, columns, scale=max(1, 128 // images.shape[1]))
    write_bytes_atomic(a.output, png_bytes(picture))
    print(f"wrote {a.output}: {len(images)} pictures, {seconds / len(images):.4f} s each, seeds {seeds[0]} to {seeds[-1]}")


def _model_options(a: argparse.Namespace):  # type: ignore[no-untyped-def]
    models = [*getattr(a, "subject", []), getattr(a, "model", "")]
    if a.resolution is not None and not getattr(a, "teacher", None) and not any("teacher:" in m for m in models):
        raise UserError(f"--resolution {a.resolution}: no teacher is named, and others draw at their own size; leave it out")
    from diffusion2gan.device import default_device
    from diffusion2gan.evaluation.models import ModelOptions

    return ModelOptions(
        a.steps,
        a.guidance,
        a.dtype,
        default_device(),
        a.batch_size,
        getattr(a, "captions", None),
        getattr(a, "quantiser", "round"),
        a.resolution,
    )


def _compare(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.commands import compare_command

    print(compare_command(a.subject, a.prompt, a.output, _model_options(a), a.seed, a.count))


def _evaluate(a: argparse.Namespace) -> None:
    from dataclasses import replace

    from diffusion2gan.evaluation.commands import evaluate_command

    options = _model_options(a)
    teacher_options = replace(options, steps=a.teacher_steps, guidance=a.teacher_guidance, captions=None)
    protocols = [p for text in a.protocol or ["emoji10k-v1"] for p in text.split(",") if p]
    said = (
        evaluate_command(
            a.model, protocols, a.out, a.shared, options, data=a.data, weights=a.weights, teacher=a.teacher, teacher_options=teacher_options,
            count=a.count, preservation_count=a.preservation_count, list_name=a.list, block=a.block, blocks=a.blocks,
            save_pictures=a.save_pictures, allow_unknown_weights=a.allow_unknown_weights, coco17_captions=a.coco17_captions,
        )
    )  # fmt: skip
    if said:
        print(said)


def _speed_latency(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.commands import speed_command

    steps, a.steps, a.batch_size = a.steps, None, max(a.batches)
    print(speed_command(a.model, _model_options(a), steps, a.batches, a.output, a.warmup, a.runs))


def _speed_loss(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.commands import loss_speed_command

    sizes = [(side, side) for side in a.side]
    print(loss_speed_command(a.metric, a.augment, sizes, a.batches, a.precision, a.output, a.decoder))


def _speed_training(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.commands import training_speed_command

    print(training_speed_command(a.recipe, a.set, a.pairs, a.warmup, a.steps, a.output, a.beside_mse))


def _by_name(texts: Sequence[str], what: str) -> dict[str, str]:
    """NAME=VALUE, several times. Raises UserError for anything else, or a name given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value) or name in found:
            raise UserError(f"{text}: expected NAME={what}, each name once")
        found[name] = value
    return found


def _preference_make(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.preference import StudyConfig
    from diffusion2gan.evaluation.preference_make import make_study

    pairs = tuple((first, second) for first, _, second in (p.partition(":") for p in a.pair)) or None
    try:
        consent = None if a.consent is None else a.consent.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--consent {a.consent}: cannot be read ({error}), expected a text file") from None
    config = StudyConfig(
        pairs=pairs, votes=a.votes, questions=tuple(a.question or ("realism", "alignment")), trials_per_rater=a.trials,
        checks_from=a.checks_from, count=a.count, jpeg_quality=a.jpeg_quality, consent=consent, seed=a.seed,
    )  # fmt: skip
    models = {name: Path(folder) for name, folder in _by_name(a.model, "FOLDER").items()}
    study = make_study(models, a.out, config, a.prompts)
    print(f"{a.out}: {len(study.raters)} sheets in {a.out / 'pages'}; hand them out, or: diffusion2gan preference serve {a.out}")


def _preference_serve(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.preference_server import serve_study

    serve_study(a.study, a.host, a.port)


def _preference_analyse(a: argparse.Namespace) -> None:
    from diffusion2gan.evaluation.preference_analysis import analyse_study

    analyse_study(a.study, a.out, a.votes, _by_name(a.published, "PUBLISHED") if a.published is not None else None)
    print(f"wrote {a.out}")


def _demo(a: argparse.Namespace) -> None:
    from diffusion2gan.demo import run_demo

    run_demo(a.out, a.minutes)


def _plan(a: argparse.Namespace) -> None:
    from diffusion2gan.plan import plan_table
    from diffusion2gan.recipe import load_recipe

    print(plan_table(load_recipe(a.recipe, a.set), a.gpu, a.count, a.utilisation))


def _recipes(_: argparse.Namespace) -> None:
    from diffusion2gan.recipe import builtin_recipes, load_recipe

    for name in builtin_recipes():
        recipe = load_recipe(name)
        phases = [(recipe.training.steps, recipe.training.batch_size)]
        if recipe.adversarial is not None:
            phases.append((recipe.adversarial.steps, recipe.phase_2_batch_size))
        steps = ", then ".join(f"{count} steps of {batch}" for count, batch in phases if count)
        print(f"{name:34} {recipe.pairs.count:>9} pairs  {recipe.loss.distance:16} {steps}")


def _embedded(a: argparse.Namespace) -> None:
    from diffusion2gan.embedded import build

    build.run_stage(a.stage, a.work, a.steps)


def _perceptual_train(a: argparse.Namespace) -> None:
    from diffusion2gan.perceptual.commands import train_command

    accuracy = train_command(
        a.vae, a.data, a.out, a.resolution, a.crops, a.limit, a.width, a.norm, a.reading, a.epochs, a.batch_size, a.learning_rate,
        a.compile, a.encode_batch, a.encode_dtype,
    )  # fmt: skip
    print(f"wrote {a.out / 'metric'} (heads of ones); " + ", ".join(f"{k} {v:.4f}" for k, v in accuracy.items()))


def _perceptual_calibrate(a: argparse.Namespace) -> None:
    from diffusion2gan.perceptual.commands import calibrate_command

    scores = calibrate_command(a.metric, a.vae, a.bapps, a.out, a.resolution)
    print(f"wrote {a.out}; 2AFC on the training triplets: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))


def _perceptual_score(a: argparse.Namespace) -> None:
    from diffusion2gan.perceptual.commands import score_command

    print(score_command(a.metric, a.vae, a.bapps, a.resolution, not a.no_clamp), end="")


_PRECISIONS = ("float64", "float32", "float16", "bfloat16")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _command(commands: Commands, name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(function=function)
    return sub


def _recipe_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", help="a built-in recipe (see `diffusion2gan recipes`) or a YAML file")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting of the recipe")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion2gan", description="Distil a multi-step text-to-image diffusion model into a one-step generator."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = _command(commands, "demo", _demo, "Distil the embedded teacher live, beside the shipped student, and write one HTML report")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--minutes", type=float, default=9, help="about how long the whole may take (default 9)")
    _add_stages(commands)
    _add_pairs(commands)
    _add_student(commands)
    _add_evaluation(commands)
    _add_preference(commands)
    _add_perceptual(commands)
    sub = _command(commands, "plan", _plan, "What a recipe will take: evaluations, FLOPs, GPU-days, disk, memory")
    _recipe_arguments(sub)
    sub.add_argument("--gpu", default="h100", help="a100, h100, h200, rtx4090, ... (default h100)")
    sub.add_argument("--count", type=_positive, default=1, help="how many of them")
    sub.add_argument("--utilisation", type=float, default=0.3, help="share of their matrix rate that is really used (default 0.3)")
    _command(commands, "recipes", _recipes, "List the built-in recipes")
    _add_embedded(commands)
    return parser


def _add_stages(commands: Commands) -> None:
    text = "Make the teacher's pairs of a recipe (runs under torchrun too; the same command goes on where it stopped)"
    sub = _command(commands, "simulate", _simulate, text)
    _recipe_arguments(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder of the pair store")
    sub.add_argument(
        "--extend", type=Path, default=None, metavar="STORE", help="a smaller store of the same settings, whose pairs are taken over"
    )

    text = "instead of a store, write to OUT how far solvers and numbers of steps are from a reference of 200 steps"
    sub.add_argument("--measure-solver", action="store_true", help=text)
    sub.add_argument("--measure-count", type=_positive, default=64, help="pairs for --measure-solver (default 64)")

    text = "Distil: train the one-step generator on a pair store (the same command goes on where it stopped)"
    sub = _command(commands, "train", _train, text)
    _recipe_arguments(sub)
    sub.add_argument("--pairs", type=Path, required=True, help="folder of the pair store")
    sub.add_argument("--out", type=Path, required=True, help="run folder")

    text = "Put training runs on one page: curves, pictures of held-out pairs, settings (of a run that goes on, too)"
    sub = _command(commands, "report", _report, text)
    sub.add_argument("run", nargs="+", type=Path, help="run folders; several are drawn into the same curves")
    text = "the page (default: report.html in the run's folder, or of several runs here)"
    sub.add_argument("-o", "--output", type=Path, default=None, help=text)

    text = "Write a run's student: an ordinary diffusers folder, one file in Stable Diffusion's original layout, or a LoRA"
    sub = _command(commands, "export", _export, text)
    sub.add_argument("run", type=Path)
    sub.add_argument("out", type=Path, help="a folder; with --format single-file a name that ends in .safetensors")
    sub.add_argument("--format", choices=("folder", "single-file", "lora"), default="folder")
    sub.add_argument("--results", type=Path, default=None, metavar="FILE", help="measurements for the model card, Markdown")
    sub.add_argument("--push-to-hub", default=None, metavar="USER/NAME", help="upload the folder to this repository of the hub")
    sub.add_argument("--private", action="store_true", help="make that repository private")
    text = "of the stored weights (default float16, or float32 where the card says to run in it)"
    sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=None, help=text)
    sub.add_argument("--last", action="store_true", help="the last weights instead of their average")
    sub.add_argument("--step", type=int, default=None, help="of the checkpoint after so many steps instead of the last")


def _add_pairs(commands: Commands) -> None:
    pairs = commands.add_parser("pairs", help="Check, show or convert a pair store").add_subparsers(required=True, metavar="COMMAND")
    sub = _command(pairs, "check", _pairs_check, "Read a whole store: checksums, seeds, finite latents")
    sub.add_argument("store", type=Path)
    sub = _command(pairs, "show", _pairs_show, "Decode the first pairs into one picture")
    sub.add_argument("store", type=Path)
    _recipe_arguments(sub)
    sub.add_argument("-n", "--count", type=_positive, default=32)
    sub.add_argument("-o", "--output", type=Path, default=Path("pairs.png"))
    text = "Copy a store into one that holds its noise (faster to read, three times the disk)"
    sub = _command(pairs, "store-noise", _pairs_store_noise, text)
    sub.add_argument("store", type=Path)
    sub.add_argument("--out", type=Path, required=True)


def _add_student(commands: Commands) -> None:
    sub = _command(commands, "generate", _generate, "Draw pictures with a student, one step each")
    sub.add_argument("student", help="`embedded` or a folder written by export")
    sub.add_argument("prompt", nargs="+")
    text = "of each prompt's first picture, the next ones have the next numbers: the same seeds for every prompt (default 0)"
    sub.add_argument("--seed", type=_seed, default=0, help=text)
    sub.add_argument("-n", "--count", type=_positive, default=1, help="pictures a prompt")
    sub.add_argument("-o", "--output", type=Path, default=Path("out.png"), help="a .png: one picture as it is, several as a sheet")
    sub.add_argument("--dtype", choices=_PRECISIONS, default=None, help="of the network (default float32, on a GPU float16 where it may)")


_MODEL = "`embedded`, a student folder, `teacher:SOURCE`, a diffusers folder or hub id, sdxl-turbo, sdxl-lightning, lcm, instaflow"


def _model_arguments(sub: argparse.ArgumentParser, steps: bool = True) -> None:
    if steps:
        text = "of a teacher (DDIM, default 50; under emoji10k-v1 the solver and steps of `emoji`) or a diffusers pipeline"
        sub.add_argument("--steps", type=_positive, default=None, help=text)
    sub.add_argument("--guidance", type=float, default=None, help="of a teacher (default 3) or a diffusers pipeline")
    sub.add_argument("--resolution", type=_positive, default=None, help="of a teacher, in pixels (default: its own)")
    sub.add_argument("--dtype", choices=_PRECISIONS, default="float32")
    # `speed latency`, which has its own --steps, takes the largest of --batches.
    sub.add_argument("--batch-size", type=_positive, default=32, help="pictures drawn at once" if steps else "not read: see --batches")


def _add_evaluation(commands: Commands) -> None:
    text = (
        "Score a model by published protocols, or a student of the embedded teacher by emoji10k-v1 (goes on where it stopped; torchrun too)"
    )
    sub = _command(commands, "evaluate", _evaluate, text)
    sub.add_argument("model", help=f"{_MODEL}, or a folder of pictures")
    sub.add_argument(
        "--protocol", action="append", default=None, help="one or several, by commas: see docs/evaluation.md (default emoji10k-v1)"
    )
    sub.add_argument("--out", type=Path, required=True, help="folder of the results, one for each model")
    sub.add_argument("--shared", type=Path, default=None, help="where features of teacher and reference are kept for all models")
    sub.add_argument("--data", type=Path, default=Path("data"), help="folder of COCO or CIFAR-10 as their publishers pack them")
    sub.add_argument("--weights", type=Path, default=None, help="folder of the scoring networks' weights (default: $DIFFUSION2GAN_WEIGHTS)")
    sub.add_argument("--captions", type=Path, default=None, help="of a folder of pictures: one a line (default: captions.txt inside)")
    sub.add_argument(
        "--coco17-captions", choices=("first", "amd"), default="first", help="of COCO 2017: the first of each picture, or AMD's list"
    )
    sub.add_argument(
        "--quantiser", choices=("round", "trunc"), default="round", help="pixels to uint8: round, or cut off as DMD2's and GigaGAN's code"
    )
    sub.add_argument("--teacher", default=None, help="whose pictures dreamsim5k compares with (default: a student's own teacher)")
    sub.add_argument("--teacher-steps", type=_positive, default=None)
    sub.add_argument("--teacher-guidance", type=float, default=None)
    sub.add_argument("--count", type=_positive, default=None, help="only the first so many prompts; marks the result partial")
    sub.add_argument("--preservation-count", type=_positive, default=None, help="the same for emoji10k-v1's prompts of ODE preservation")
    sub.add_argument(
        "--list", choices=("test", "validation"), default="test", help="prompts of emoji10k-v1; settings are chosen on validation"
    )
    sub.add_argument("--block", type=int, default=0, help="noise block, 0 to 127: other noises, same prompts")
    sub.add_argument(
        "--blocks", type=_positive, default=None, help="mean, standard deviation and best over so many noise blocks (papers take three)"
    )
    sub.add_argument("--save-pictures", action="store_true", help="keep every picture as a PNG")
    sub.add_argument("--allow-unknown-weights", action="store_true", help="scoring networks of other digests too; the result says so")
    _model_arguments(sub)

    text = "Put evaluated models side by side in one report, or what models draw from the same noises into one grid"
    sub = _command(commands, "compare", _compare, text)
    sub.add_argument("subject", nargs="+", help=f"folders written by evaluate; with --prompt, models: {_MODEL}. NAME=... names one")
    sub.add_argument("--prompt", nargs="+", default=[], help="prompts to draw")
    sub.add_argument("--seed", type=_seed, default=0, help="of the first noise, the next ones have the next numbers (default 0)")
    sub.add_argument("-n", "--count", type=_positive, default=4, help="noises a prompt")
    sub.add_argument("-o", "--output", type=Path, default=Path("comparison"), help="folder of the report, or a .png for the grid alone")
    _model_arguments(sub)

    speed = commands.add_parser("speed", help="Time a model, a loss or a training").add_subparsers(required=True, metavar="COMMAND")
    sub = _command(speed, "latency", _speed_latency, "Time a model end to end, and fit the line of fixed time and time a step")
    sub.add_argument("model", help=_MODEL)
    sub.add_argument("--steps", type=_positive, nargs="+", default=[], help="of a teacher or pipeline; several give the line")
    sub.add_argument("--warmup", type=_positive, default=10)
    sub.add_argument("--runs", type=_positive, default=50)
    _model_arguments(sub, steps=False)
    loss = _command(speed, "loss", _speed_loss, "Time and memory of E-LatentLPIPS, forward and backward")
    loss.add_argument("metric", help="`embedded`, a folder, file, hub repository, or sd15, sd21, sdxl, sd3, flux")
    loss.add_argument("--augment", default="bgo", help="letters of the ensemble")
    loss.add_argument(
        "--decoder", default=None, help="teacher through whose decoder LPIPS is timed beside it: `embedded`, folder or hub id"
    )
    loss.add_argument("--side", type=_positive, nargs="+", default=[64], help="of the latents")
    loss.add_argument("--precision", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    training = _command(speed, "training", _speed_training, "Images a second of a recipe's training (torchrun too)")
    _recipe_arguments(training)
    training.add_argument("--pairs", type=Path, required=True, help="folder of the pair store")
    training.add_argument("--warmup", type=int, default=50)
    training.add_argument("--steps", type=_positive, default=200)
    training.add_argument("--beside-mse", action="store_true", help="also with the squared error, and the recipe's distance against it")
    for part in (sub, loss, training):
        part.add_argument("-o", "--output", type=Path, default=None, help="also as JSON")
        if part is not training:
            part.add_argument("--batches", type=_positive, nargs="+", default=[1], help="batch sizes to time (default 1)")


def _add_preference(commands: Commands) -> None:
    text = "A study of human preference: make its sheets, collect votes, count them (Figure 6; docs/preference.md)"
    verbs = commands.add_parser("preference", help=text).add_subparsers(required=True, metavar="COMMAND")
    sub = _command(verbs, "make", _preference_make, "Make a study: one offline page a rater")
    sub.add_argument("model", nargs="+", help="NAME=FOLDER of a model's pictures, sorted by name; picture i of each is prompt i")
    sub.add_argument("--out", type=Path, required=True, help="folder of the study")
    sub.add_argument("--prompts", type=Path, default=None, help="one a line (default: captions.txt in the first folder)")
    sub.add_argument("--pair", action="append", default=[], metavar="A:B", help="models to compare, several times (default: all pairs)")
    sub.add_argument("--votes", type=_positive, default=5, help="of each pair, prompt and question, by as many raters")
    sub.add_argument("--question", action="append", choices=("realism", "alignment"), default=None, help="default: both")
    sub.add_argument("--trials", type=_positive, default=64, help="asked of one rater, attention checks not counted")
    sub.add_argument("--checks-from", default=None, help="model whose pictures are the right answers of attention checks: the teacher, say")
    sub.add_argument("--count", type=_positive, default=None, help="only the first so many prompts")
    sub.add_argument("--jpeg-quality", type=_positive, default=None, help="smaller pages (default: PNG)")
    sub.add_argument("--consent", type=Path, default=None, help="text file that a rater agrees to first")
    sub.add_argument("--seed", type=_seed, default=0)
    sub = _command(verbs, "serve", _preference_serve, "Collect votes by a small web server on this machine")
    sub.add_argument("study", type=Path)
    sub.add_argument("--host", default="127.0.0.1", help="another one makes it reachable from outside")
    sub.add_argument("--port", type=int, default=8000)
    sub = _command(verbs, "analyse", _preference_analyse, "Win rates with intervals, tests and ranking")
    sub.add_argument("study", type=Path)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--votes", type=Path, nargs="+", default=[], help="files that raters sent, beside the study's own votes.jsonl")
    sub.add_argument(
        "--published", nargs="*", default=None, metavar="NAME=PUBLISHED", help="put Figure 6 beside it, joined for the models named"
    )


def _perceptual_reconstruct(a: argparse.Namespace) -> None:
    from diffusion2gan.perceptual.commands import reconstruct_command

    print(reconstruct_command(a.out, a.metric, a.vae, a.pixel_metric, a.images, a.prompt, a.steps, a.seed), end="")
    print(f"wrote {a.out / 'pictures.png'} and {a.out / 'curves.png'}")


def _add_perceptual(commands: Commands) -> None:
    text = "Train, calibrate, score and try a latent perceptual distance of any autoencoder"
    verbs = commands.add_parser("perceptual", help=text).add_subparsers(required=True, metavar="COMMAND")
    text = "Encode labelled images once and train a LatentVGG on them (runs under torchrun too; goes on where it stopped)"
    sub = _command(verbs, "train", _perceptual_train, text)
    sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    sub.add_argument(
        "--vae", required=True, help="folder or hub id of an AutoencoderKL, or of a pipeline that has one; `pixels` for a metric of pixels"
    )
    sub.add_argument("--data", required=True, help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or a hub data set")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--resolution", type=_positive, default=256, help="side of the encoded images in pixels")
    sub.add_argument("--crops", type=_positive, default=4, help="random crops encoded of each training image")
    sub.add_argument("--limit", type=_positive, default=None, help="only so many images of each split, spread evenly")
    sub.add_argument("--width", type=float, default=1.0, help="of VGG16's channels")
    sub.add_argument("--norm", choices=("batch", "group"), default="batch")
    sub.add_argument("--reading", choices=("released", "before"), default="released", help="which three poolings are removed")
    sub.add_argument("--epochs", type=_positive, default=90)
    sub.add_argument("--batch-size", type=_positive, default=256, help="over all processes")
    sub.add_argument("--learning-rate", type=float, default=1e-3)
    sub.add_argument("--compile", action="store_true")
    sub.add_argument("--encode-batch", type=_positive, default=32, help="pictures that go through the autoencoder at once")
    sub.add_argument("--encode-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    for name, function, text in (
        ("calibrate", _perceptual_calibrate, "Fit the heads of a metric to BAPPS' training judgements, non-negative"),
        ("score", _perceptual_score, "2AFC of a metric on each validation subset of BAPPS"),
    ):
        sub = _command(verbs, name, function, text)
        sub.add_argument("metric", help="folder, file, hub repository, or sd15, sd21, sdxl, sd3, flux, embedded")
        sub.add_argument("--vae", required=True, help="the metric's autoencoder, or `pixels` for a metric that reads pixels")
        sub.add_argument("--bapps", type=Path, required=True, help="the unpacked data set, with 2afc/{train,val}")
        text = "side of the encoded pictures in pixels (default: the autoencoder's own, at most 512; 64 of `pixels`)"
        sub.add_argument("--resolution", type=_positive, default=None, help=text)
        if name == "calibrate":
            sub.add_argument("--out", type=Path, required=True)
        else:
            sub.add_argument("--no-clamp", action="store_true", help="keep negative head weights, as the released metric does")

    text = "Move a random latent towards a picture by each distance alone (Figure 3)"
    sub = _command(verbs, "reconstruct", _perceptual_reconstruct, text)
    sub.add_argument("--metric", default="embedded", help="`embedded`, a folder, file, hub repository, or sd15, sd21, sdxl, sd3, flux")
    sub.add_argument("--vae", default="embedded", help="the metric's autoencoder")
    sub.add_argument("--pixel-metric", default=None, help="a metric that reads pixels, for LPIPS through the decoder")
    sub.add_argument("--images", type=Path, nargs="+", default=[], help="pictures to reconstruct")
    sub.add_argument("--prompt", nargs="+", default=[], help="pictures of the embedded teacher to reconstruct")
    sub.add_argument("--steps", type=_positive, default=1000)
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--out", type=Path, required=True)


def _add_embedded(commands: Commands) -> None:
    text = (
        "Make the embedded teacher and its networks from the public emoji (data, autoencoder, teacher, perceptual, calibrate), "
        "measure it (progress, gate), ship it (pack), train the shipped one further (unpack)"
    )
    stages = ("data", "autoencoder", "teacher", "perceptual", "calibrate", "progress", "gate", "pack", "unpack")
    sub = _command(commands, "embedded", _embedded, text)
    sub.add_argument("stage", choices=stages)
    sub.add_argument("--work", type=Path, default=Path("work"), help="folder of checkpoints; the same command goes on where it stopped")
    sub.add_argument("--steps", type=_positive, default=None, help="train to this many steps instead of the recipe's")


_OF_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _positive(text: str) -> int:
    value = _whole_number(text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value


def _seed(text: str) -> int:
    value = _whole_number(text)
    if value is None or not 0 <= value < 1 << 62:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to 2^62 - 1")
    return value


_GOES_ON = (_demo, _simulate, _train, _evaluate, _pairs_store_noise, _preference_serve, _perceptual_train, _embedded)


def _goes_on(arguments: argparse.Namespace) -> bool:
    """Whether the command keeps its parts, and the same again does only the rest."""
    at_once = getattr(arguments, "measure_solver", False) or getattr(arguments, "stage", "") in ("calibrate", "unpack", "pack")
    return arguments.function in _GOES_ON and not at_once


def _leave_process_group() -> None:
    """Ends a torchrun's process group while the interpreter is whole: a gloo thread that still holds a tensor at its end aborts
    the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a trainer in a reference cycle would keep the group's threads alive
        distributed.destroy_process_group()


def _less_memory(arguments: argparse.Namespace) -> str:
    """What to do about too little memory, by the settings that the command has."""
    if hasattr(arguments, "recipe"):
        return (
            "lower pairs.batch_size or training.micro_batch_size, or set generator.gradient_checkpointing=true; "
            "`diffusion2gan plan RECIPE --gpu NAME` estimates what is needed"
        )
    if hasattr(arguments, "encode_batch"):
        return "lower --encode-batch while it encodes, or --batch-size while it trains, or set --encode-dtype bfloat16"
    name = next((n for n in ("batches", "batch_size", "resolution", "images", "count") if hasattr(arguments, n)), None)
    what = {"images": "give fewer or smaller --images"}.get(name or "", f"lower --{name}".replace("_", "-"))
    return "use a device that has more" if name is None else what


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for what the user must mend (one line on stderr), 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    # transformers says at import which torchvision classes it replaces; nothing here uses them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What cannot be fetched is said once, at the end, not at every attempt.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # On a CPU bitsandbytes misses at import kernels of 4 bits that nothing here uses either.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument", category=UserWarning)  # diffusers still gives it
    # One line that says what is the matter, not where in the code it was noticed.
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"diffusion2gan: warning: {message}\n"
    try:
        arguments.function(arguments)
        _leave_process_group()
    except UserError as error:
        print(f"diffusion2gan: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        print(f"diffusion2gan: {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; run the same command again to go on where it stopped" if _goes_on(arguments) else ""
        print(f"\ndiffusion2gan: interrupted{more}", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        from diffusion2gan.device import out_of_memory

        where = out_of_memory(error)
        if where is None:
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        print(
            f"diffusion2gan: out of {where} memory{f' ({asked[1]} more were asked for)' if asked else ''}; {_less_memory(arguments)}",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Of a file, by its name: one that may not be read, a name that is too long, links in a circle.
        if error.filename is None or error.errno not in _OF_PATHS:
            raise
        print(f"diffusion2gan: {error.filename}: {(error.strerror or '').lower()}; check the path and your rights there", file=sys.stderr)
        return 2
    return 0


def entry() -> None:
    """The program: the console script and `python -m diffusion2gan`."""
    # Where a library crashes, it crashes without a word.
    faulthandler.enable()
    sys.exit(main())
