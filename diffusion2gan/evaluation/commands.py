"""What the commands `evaluate`, `compare` and `speed` run: names to models, models to folders of results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion2gan.benchmark import evaluate_student, evaluate_teacher, result_table
from diffusion2gan.device import default_device
from diffusion2gan.embedded.weights import student_folder
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.blocks import run_blocks
from diffusion2gan.evaluation.comparison import read_evaluation, write_comparison
from diffusion2gan.evaluation.emoji10k import PROTOCOL as EMOJI
from diffusion2gan.evaluation.evaluate import BLOCKS, FORMAT, Evaluation, describe, summary
from diffusion2gan.evaluation.models import (
    Model,
    ModelOptions,
    check_steps,
    load_model,
    model_kind,
    model_name,
    teacher_model,
    teacher_of_source,
)
from diffusion2gan.evaluation.protocols import PROTOCOLS
from diffusion2gan.evaluation.speed import decoded_lpips, latency, latency_line, loss_cost, train_throughput
from diffusion2gan.files import write_bytes_atomic, write_json
from diffusion2gan.images import at_smallest_side, grid, png_bytes
from diffusion2gan.perceptual import ELatentLPIPS, LatentLPIPS
from diffusion2gan.pipeline import STUDENT_FILE
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.ode import SolverConfig
from diffusion2gan.worker import Worker

LATENCY = "latency"
_MSE = ["loss.distance=mse", "loss.ensemble=1", "loss.l1_weight=0"]


def evaluate_command(
    spec: str,
    protocols: Sequence[str],
    out: Path,
    shared: Path | None,
    options: ModelOptions,
    *,
    data: Path,
    weights: Path | None,
    teacher: str | None,
    teacher_options: ModelOptions,
    count: int | None = None,
    preservation_count: int | None = None,
    list_name: str = "test",
    block: int = 0,
    blocks: int | None = None,
    save_pictures: bool = False,
    allow_unknown_weights: bool = False,
    coco17_captions: str = "first",
) -> str:
    """Runs the protocols and returns their table; with `blocks`, from so many noise blocks after `block`, each in OUT/block-K, and their
    means in OUT. Raises UserError at the end when any of them could not run."""
    known = [EMOJI, *PROTOCOLS, LATENCY]
    if not protocols or (unknown := [p for p in protocols if p not in known]):
        raise UserError(f"protocol {unknown[0] if protocols else ''!r}, expected some of {', '.join(known)}")
    check_steps([spec], options)
    asked = {
        "--captions": options.captions, "--save-pictures": save_pictures, "--teacher": teacher, "--teacher-steps": teacher_options.steps,
        "--teacher-guidance": teacher_options.guidance, "--count": count, "--preservation-count": preservation_count,
        "--list": None if list_name == "test" else list_name, "--block": block,
    }  # fmt: skip
    _refuse_unread(spec, protocols, [name for name, value in asked.items() if value not in (None, False, 0)])
    if EMOJI in protocols and options.quantiser != "round":
        raise UserError(f"--quantiser {options.quantiser}: {EMOJI} rounds; leave it out, or evaluate the other protocols by themselves")
    if coco17_captions != "first" and not any((PROTOCOLS[p].samples or "").startswith("coco17") for p in protocols if p in PROTOCOLS):
        raise UserError(f"--coco17-captions {coco17_captions}: no protocol of COCO 2017 is asked for; leave it out")
    if EMOJI in protocols and block:
        raise UserError(f"--block {block}: {EMOJI} has no noise blocks; leave it out, or evaluate the other protocols by themselves")
    if blocks is not None:
        _check_blocks(block, blocks, protocols)
    worker = Worker.from_environment()
    shared, parts, skipped = shared or out, [], {}
    if EMOJI in protocols:
        parts.append(_embedded_benchmark(spec, out, shared, options, list_name, count, preservation_count))
    others = [p for p in protocols if p in PROTOCOLS]
    if others:
        model = load_model(spec, options)
        if model.folder is not None and coco17_captions != "first":
            raise UserError(f"--coco17-captions {coco17_captions}: {spec} has captions of its own; leave it out, or name a model")
        their, why = None, ""
        if any(PROTOCOLS[p].teacher for p in others):
            their, why = _teacher_of(model, teacher, teacher_options)
        evaluation = Evaluation(
            model, out, shared, data, weights, their, why, count, block, options.device, save_pictures,
            allow_unknown_weights, coco17_captions, worker=worker,
        )  # fmt: skip
        skipped = evaluation.run(others) if blocks is None else run_blocks(evaluation, others, blocks)
        parts.append("" if worker.rank else summary(out, others))
        del model, their, evaluation
    if LATENCY in protocols and not worker.rank:
        parts.append(_latency_result(load_model(spec, replace(options, timed=True)), out))
    if worker.rank:
        return ""  # the first process speaks for all, and may still be scoring
    for protocol, reasons in skipped.items():
        for reason in dict.fromkeys(reasons):
            warnings.warn(f"{protocol}, {reason}", stacklevel=1)
    if skipped:
        print("\n".join(parts))
        raise UserError(f"{', '.join(skipped)}: not everything could run (see above); what could is in {out}")
    return "\n".join([*parts, f"wrote {out}"])


def _refuse_unread(spec: str, protocols: Sequence[str], asked: Sequence[str]) -> None:
    """Raises UserError for options that nothing of what is asked for reads: who gives one expects something of it."""
    published, of_pictures = [p for p in protocols if p in PROTOCOLS], model_kind(spec) == "pictures"
    scored, compared = any(p != LATENCY for p in protocols), any(PROTOCOLS[p].teacher for p in published)
    readers = {
        "--captions": (of_pictures and bool(published), "a folder of pictures"),
        "--save-pictures": (bool(published) and not of_pictures, "the published protocols, of models"),
        "--count": (scored, "protocols of pictures"),
        "--preservation-count": (EMOJI in protocols, EMOJI),
        "--list": (EMOJI in protocols, EMOJI),
        "--block": (scored, "the published protocols"),
    } | dict.fromkeys(("--teacher", "--teacher-steps", "--teacher-guidance"), (compared, "dreamsim5k, which compares with a teacher"))
    for name in asked:
        read, where = readers[name]
        if not read:
            raise UserError(f"{name}: is of {where}, and nothing asked for here ({spec}, {', '.join(protocols)}) reads it; leave it out")


def _check_blocks(block: int, blocks: int, protocols: Sequence[str]) -> None:
    alone = next((p for p in protocols if p not in PROTOCOLS), None)
    if alone:
        raise UserError(f"--blocks {blocks}: {alone} has no noise blocks; evaluate it by itself")
    if blocks < 2:
        raise UserError(f"--blocks {blocks}: one block needs no mean; expected 2 or more")
    if block < 0 or block + blocks > BLOCKS // 2:
        raise UserError(f"--block {block} --blocks {blocks}: expected blocks within 0 to {BLOCKS // 2 - 1}")


def _latency_result(model: Model, out: Path) -> str:
    describe(out, model.name, model.identity, part=LATENCY, look=True)
    result = latency(model)
    describe(out, model.name, model.identity, part=LATENCY)
    entries = [
        {"metric": f"seconds, {what}", "variant": "batch 1", "better": "lower", "value": result[key], "interval95": None}
        for what, key in (("end to end", "t_e2e"), ("network alone", "t_network"), ("with the host", "t_e2e_host"))
    ]
    whole = {
        "format": FORMAT,
        "protocol": LATENCY,
        "title": "Latency",
        "n": result["runs"],
        "partial": False,
        "results": entries,
        "notes": [],
    }
    write_json(out / "latency.json", whole | {"reference": result["machine"], "runs": result})
    return _latency_table([result])


def _embedded_benchmark(
    spec: str, out: Path, shared: Path, options: ModelOptions, list_name: str, count: int | None, preservation_count: int | None
) -> str:
    if options.resolution is not None:
        raise UserError(f"--resolution {options.resolution}: {EMOJI} is of pictures of 64 pixels; leave it out, or name other protocols")
    if options.dtype != "float32":
        raise UserError(f"--dtype {options.dtype}: {EMOJI} scores students in float32; leave it out, or name other protocols")
    if spec == "teacher:embedded":
        pairs = load_recipe("emoji").pairs
        pairs = pairs.model_copy(update={"ode": _with_options(pairs.ode, options)})
        result = evaluate_teacher(pairs, out, shared, list_name, count, preservation_count)
    else:
        student = student_folder(spec)
        if not (student / STUDENT_FILE).is_file():
            raise UserError(
                f"{spec}: {EMOJI} scores `embedded`, `teacher:embedded` or a student written by export; name one, or other protocols"
            )
        result = evaluate_student(student, out, shared, list_name, count, preservation_count)
    return result_table(result) if result else ""


def _with_options(ode: SolverConfig, options: ModelOptions) -> SolverConfig:
    """`ode` with the steps and guidance that were asked for."""
    changed = {k: v for k, v in (("steps", options.steps), ("guidance", options.guidance)) if v is not None}
    return SolverConfig.model_validate(ode.model_dump() | changed)


def _teacher_of(model: Model, named: str | None, options: ModelOptions) -> tuple[Model | None, str]:
    """The teacher that ODE preservation compares with, solved as the student's pairs were where `options` do not say otherwise; or why
    there is none. Not raised: other protocols need no teacher."""
    facts = model.facts
    source = (named or facts.get("teacher") or "").removeprefix("teacher:")
    if not source or source == "local folder":
        return None, "dreamsim5k compares with the teacher's pictures; name its folder or hub id by --teacher"
    try:
        ode = _with_options(SolverConfig.model_validate(facts.get("ode", {})), options)
        size = options.resolution or facts.get("resolution")
        revision, variant = (facts.get(key) if source == facts.get("teacher") else None for key in ("revision", "variant"))
        teacher = teacher_model(
            source, f"teacher:{source}", ode, options.dtype, options.device, options.batch_size, options.quantiser, size,
            facts.get("negative_prompt", ""), revision, variant,
        )  # fmt: skip
    except UserError as error:
        return None, str(error)
    if facts.get("teacher_weights") not in (None, teacher.facts["weights"]):
        return (
            None,
            f"{source} has weights {teacher.facts['weights'][:16]}, the student's teacher had {facts['teacher_weights'][:16]}; name that one",
        )
    return teacher, ""


_FILE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".html", ".md", ".json"}


# --- compare --------------------------------------------------------------------------------------------------------
def _named(subject: str) -> tuple[str | None, str]:
    """NAME=SUBJECT or SUBJECT, which may be a path with an equals sign in it."""
    if Path(subject).exists():
        return None, subject
    name, equals, rest = subject.partition("=")
    return (name, rest) if equals and name and rest and "/" not in name else (None, subject)


def compare_command(
    subjects: Sequence[str], prompts: Sequence[str], out: Path, options: ModelOptions, seed: int = 0, count: int = 4
) -> str:
    """Evaluation folders become a report in the folder `out`; models draw `prompts`, `count` noises each, into one grid (`out` if it
    ends in .png, else `out/prompts.png`). Raises UserError when there is nothing to do."""
    evaluated = [read_evaluation(Path(path), name) for name, path in map(_named, subjects) if (Path(path) / "model.json").is_file()]
    others = [s for s in subjects if not (Path(_named(s)[1]) / "model.json").is_file()]
    if out.suffix.lower() in _FILE_SUFFIXES - ({".png"} if not evaluated else set()):
        raise UserError(f"{out}: a report is a folder, expected a name without {out.suffix}" + ("" if evaluated else ", or a .png"))
    if others and not prompts:
        raise UserError(
            f"{others[0]}: holds no evaluation; run `diffusion2gan evaluate` on it first, or give --prompt to compare pictures alone"
        )
    check_steps([spec for _, spec in map(_named, others)], options)
    said = []
    if prompts:
        if not others:
            raise UserError("--prompt needs models to draw with, and these are folders of evaluations; name the models")
        names = [name or model_name(spec) for name, spec in map(_named, others)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{twice} is the name of two models; give them names of their own: NAME={others[0].rpartition('=')[2]}")
        # One after the other: two of SDXL's size do not fit together where one does.
        loaded = (replace(load_model(_named(spec)[1], options), name=name) for name, spec in zip(names, others, strict=True))
        picture, seconds = drawn_side_by_side(loaded, names, prompts, seed, count)
        path = out if out.suffix.lower() == ".png" else out / "prompts.png"
        write_bytes_atomic(path, picture)
        rows = [[name, s, seconds[0] / s] for name, s in zip(names, seconds, strict=True)]
        said.append(markdown_table(["model", "seconds a picture", "times as fast as the first"], rows) + f"\nwrote {path}")
    if evaluated:
        said.append(write_comparison(evaluated, out) + f"\nwrote {out / 'report.html'} and {out / 'report.md'}")
    return "\n".join(said)


def drawn_side_by_side(
    models: Iterable[Model], names: Sequence[str], prompts: Sequence[str], seed: int, count: int
) -> tuple[bytes, list[float]]:
    """A PNG with a row for each prompt and model, all from the same noises, and the seconds a picture took of each model. `models` are
    taken one by one, and let go."""
    texts = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    drawn, seconds = [], []
    learnt: dict[str, float] = {}
    solved: dict[str, float] = {}
    for model in models:
        model.draw(texts[:1], seeds[:1])  # untimed: the first call pays for more than itself
        started = time.perf_counter()
        drawn.append(model.draw(texts, seeds))
        seconds.append((time.perf_counter() - started) / len(texts))
        if ode := model.facts.get("ode"):
            (solved if "ode" in model.identity else learnt)[model.name] = ode["guidance"]
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    _warn_of_other_guidance(learnt, solved)
    drawn, side = at_smallest_side(drawn)
    rows = [d[i * count : (i + 1) * count] for i in range(len(prompts)) for d in drawn]
    labels = [f"{name}: {p}"[:36] if k == 0 else name for p in prompts for k, name in enumerate(names)]
    return png_bytes(grid(np.concatenate(rows), count, row_labels=labels, scale=max(1, 96 // side))), seconds


def _warn_of_other_guidance(learnt: Mapping[str, float], solved: Mapping[str, float]) -> None:
    """A teacher's pictures at another guidance than the pairs had are not what the student was to draw. By name, of students and of teachers."""
    for student, theirs in learnt.items():
        for teacher, ours in solved.items():
            if ours != theirs:
                warnings.warn(
                    f"{teacher} draws with guidance {ours:g}, and {student} was distilled with {theirs:g}; give --guidance {theirs:g}",
                    stacklevel=2,
                )


# --- speed ----------------------------------------------------------------------------------------------------------
def _latency_table(results: Sequence[dict]) -> str:  # type: ignore[type-arg]
    rows = [
        [
            r["model"]["name"], r["evaluations"], r["batch"], 1000 * r["t_e2e"], f"{1000 * r['t_e2e_p10']:.4g} to {1000 * r['t_e2e_p90']:.4g}",
            1000 * r["t_network"], 1000 * r["t_e2e_host"], r["images_per_second"],
        ]
        for r in results
    ]  # fmt: skip
    columns = ["model", "evaluations", "batch", "end to end, ms", "10 to 90 %", "network, ms", "with the host, ms", "img/s"]
    return markdown_table(columns, rows)


def speed_command(
    spec: str, options: ModelOptions, steps: Sequence[int], batches: Sequence[int], out: Path | None, warmup: int, runs: int
) -> str:
    """Latency of a model at each batch size, and of a teacher or pipeline at each number of steps with the line through them."""
    results = []
    several: list[int | None] = list(steps) or [options.steps]
    check_steps([spec], replace(options, steps=several[0]))
    for count in several:
        model = load_model(spec, replace(options, steps=count, batch_size=max(batches), timed=True))
        results += [latency(model, batch, warmup, runs) for batch in batches]
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    text = _latency_table(results)
    found: dict[str, object] = {"results": results}
    singles = [(r["evaluations"], r["t_e2e"]) for r in results if r["batch"] == 1]
    if len({n for n, _ in singles}) > 1:
        line = latency_line(singles)
        found["line"] = line
        text += f"\n{1000 * line['fixed']:.4g} ms fixed + {1000 * line['per_step']:.4g} ms an evaluation of the network\n"
    if out:
        write_json(out, found)
        text += f"\nwrote {out}"
    return text


def loss_speed_command(
    metric: str,
    augment: str,
    shapes: Sequence[tuple[int, ...]],
    batches: Sequence[int],
    precisions: Sequence[str],
    out: Path | None,
    decoder: str | None = None,
) -> str:
    """Time and memory of one evaluation of E-LatentLPIPS with its gradient, at each shape of latents (H, W); beside it that of LPIPS
    through the decoder of the teacher `decoder` (Figure 2)."""
    device = torch.device(default_device())
    latent = LatentLPIPS.from_pretrained(metric)
    channels = latent.net.config.in_channels
    ensembled = ELatentLPIPS(latent, augment).to(device).to(memory_format=torch.channels_last)
    distances: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Module]]] = {"e_latent_lpips": (ensembled, [ensembled])}
    if decoder is not None:
        teacher = teacher_of_source(decoder, "float32", str(device))
        if teacher.latent_shape[0] != channels:
            raise UserError(f"--decoder {decoder}: decodes {teacher.latent_shape[0]} channels, expected the metric's {channels}")
        distances["decode + lpips"] = decoded_lpips(teacher)
    results = [
        {"distance": name} | loss_cost(distance, (channels, *shape), device, p, b, modules=modules)
        for shape in shapes
        for b in batches
        for p in precisions
        for name, (distance, modules) in distances.items()
    ]
    if out:
        write_json(out, {"metric": metric, "augment": augment, "decoder": decoder, "results": results})
    rows = [
        [
            r["distance"], "x".join(map(str, r["shape"])), r["batch"], r["precision"], r["ms"], r["extra_activation_mb"], r["weight_mb"],
        ]
        for r in results
    ]  # fmt: skip
    columns = ["distance", "latents", "batch", "precision", "ms, forward and backward", "extra memory, MB", "weights, MB"]
    return markdown_table(columns, rows)


def training_speed_command(
    recipe: str, settings: Sequence[str], store: Path, warmup: int, steps: int, out: Path | None, beside_mse: bool = False
) -> str:
    """Images a second of a recipe's training (Table 1's column), and with `beside_mse` what its distance costs in a step: the same
    training of the squared error in the same run."""
    recipes = [load_recipe(recipe, [*settings, *changed]) for changed in ([_MSE] if beside_mse else []) + [[]]]
    results = [train_throughput(r, store, warmup, steps) for r in recipes]
    found: dict[str, object] = {"results": results}
    columns = [
        "recipe",
        "distance",
        "batch",
        "processes",
        "mixed_precision",
        "compile",
        "images_per_second",
        "seconds_per_step",
        "step_memory_mb",
    ]
    text = markdown_table(columns, [[r[c] for c in columns] for r in results])
    if beside_mse:
        mse, own = results
        found["in_step"] = in_step = {
            "images_per_second_of_mse": own["images_per_second"] / mse["images_per_second"],
            "extra_memory_mb": own["step_memory_mb"] - mse["step_memory_mb"],
        }
        text += (
            f"\n{own['distance']} in a step: {in_step['images_per_second_of_mse']:.3f} of the squared error's images a second, "
            f"{in_step['extra_memory_mb']:.4g} MB more\n"
        )
    if out:
        write_json(out, found)
    return text
