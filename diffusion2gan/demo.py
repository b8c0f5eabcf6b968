"""`diffusion2gan demo`: the whole method, live and small, beside the student that ships with the package.

Simulates pairs of the embedded teacher on a handful of prompts, distils them for a few minutes, measures, and writes
one HTML page. The amounts follow from the machine's measured speed, so that the whole takes about the time asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion2gan.device import default_device, has_bf16
from diffusion2gan.embedded.weights import embedded_student, weights_root
from diffusion2gan.errors import UserError
from diffusion2gan.files import disk_errors, json_object, write_bytes_atomic
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import grid
from diffusion2gan.pairs.dataset import PairDataset, canonical_json
from diffusion2gan.pairs.seeds import draw_noise, evaluation_seed
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline, teacher_pictures
from diffusion2gan.recipe import Recipe, dump_recipe, load_recipe
from diffusion2gan.report import Page, curves
from diffusion2gan.run import export_run, simulate_recipe, train_recipe
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, evaluations_per_pair
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.state import last_step

if TYPE_CHECKING:
    from diffusion2gan.evaluation.scoring import ScoringNetwork

# Each has many right answers, so the noise decides which picture it is.
PROMPTS = ("noto face smiling", "fluent face affection", "twemoji heart", "noto animal mammal", "fluent food fruit", "twemoji country flag")
NOISES = 16
SHOWN = 6
# Start-up, export and the report; the rest of the time is shared out below.
_OVERHEAD_SECONDS = 60
_SIMULATE_SHARE = 0.35
_FEWEST_PAIRS, _MOST_PAIRS = 128, 8192
_OWN = {
    "recipe.yaml",
    "prompts.txt",
    "speed.json",
    "seconds.json",
    "pairs",
    "pairs.log.jsonl",
    "run",
    "student",
    "results.json",
    "report.html",
}
_FEWEST_STEPS, _MOST_STEPS = 20, 4000


@dataclass(frozen=True)
class Speed:
    """Of this machine: float32 network evaluations a second; training samples a second, in bf16 where that is faster."""

    evaluations: float
    training_samples: float
    bf16: bool = False


def measure_speed(teacher: StableDiffusionTeacher, batch: int = 32) -> Speed:
    """Times the embedded network after a warm-up: forward alone, then forward with backward in float32 and under bf16 autocast."""
    student = OneStepGenerator.from_teacher(teacher)
    student.to(memory_format=torch.channels_last)
    condition = teacher.encode_prompts([PROMPTS[0]] * batch)
    noise = torch.from_numpy(draw_noise(range(batch), teacher.latent_shape)).to(teacher.device)

    def forward() -> None:
        with torch.no_grad():
            student(noise, condition)

    def train(bf16: bool) -> None:
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16):
            x = student(noise, condition)
        x.square().mean().backward()

    rates = []
    acts: list[Callable[[], None]] = [forward, partial(train, False)]
    if has_bf16(teacher.device):
        acts.append(partial(train, True))
    for act in acts:
        act()
        _wait(teacher)
        started, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - started < 2:
            act()
            count += 1
        _wait(teacher)
        rates.append(batch * count / (time.perf_counter() - started))
    evaluations, full, *half = rates
    fastest = max([full, *half])
    return Speed(evaluations, fastest, fastest > full)


def _wait(teacher: StableDiffusionTeacher) -> None:
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)


def judging_seconds(evaluations: float, judged: SolverConfig) -> float:
    """How long the pictures that are scored take, at `evaluations` a second; each is also drawn by up to four students."""
    return len(PROMPTS) * NOISES * (evaluations_per_pair(judged) + 4) / evaluations


def plan(recipe: Recipe, speed: Speed, minutes: float, judged: SolverConfig) -> dict[str, int]:
    """How many pairs and steps fit into `minutes`, evaluation and report included."""
    evaluation = judging_seconds(speed.evaluations, judged)
    seconds = max(20.0, minutes * 60 - _OVERHEAD_SECONDS - evaluation)
    pairs = int(_SIMULATE_SHARE * seconds * speed.evaluations / evaluations_per_pair(recipe.pairs.ode))
    shard = recipe.pairs.shard_size
    return {
        "pairs": max(_FEWEST_PAIRS, min(_MOST_PAIRS, pairs // shard * shard)),
        "steps": steps_within((1 - _SIMULATE_SHARE) * seconds, recipe, speed),
    }


def steps_within(seconds: float, recipe: Recipe, speed: Speed) -> int:
    """Of training, as many as take so long."""
    # The perceptual loss and the optimiser come on top of the network's own forward and backward.
    steps = int(seconds * speed.training_samples * 0.6 / recipe.training.batch_size)
    return max(_FEWEST_STEPS, min(_MOST_STEPS, steps))


def speed_of(out: Path) -> float:
    """Network evaluations a second, as measured when the demo began."""
    return float(json.loads((out / "speed.json").read_text())["evaluations"])


def demo_recipe(out: Path, teacher: StableDiffusionTeacher, minutes: float, judged: SolverConfig) -> Recipe:
    """The recipe of this demo folder: made once, then read again, so that an interrupted demo goes on as it began."""
    path = out / "recipe.yaml"
    if path.exists():
        begun = load_recipe(str(path))
        print(f"demo: goes on as it began, {begun.pairs.count} pairs and {begun.training.steps} steps; another length needs another --out")
        return begun
    prompts = out / "prompts.txt"
    write_bytes_atomic(prompts, ("\n".join(PROMPTS) + "\n").encode())
    overrides = [f"pairs.prompts.source={json.dumps(str(prompts))}"]
    if not (weights_root() / "latent_vgg").is_dir():
        overrides.append("loss.distance=mse")
    recipe = load_recipe("demo", overrides)
    speed = measure_speed(teacher)
    write_bytes_atomic(out / "speed.json", canonical_json(asdict(speed)))
    if speed.bf16:
        overrides += ["pairs.precision=bfloat16", "training.mixed_precision=bf16"]
    amounts = plan(recipe, speed, minutes, judged)
    recipe = load_recipe("demo", [*overrides, f"pairs.count={amounts['pairs']}"])
    return _keep(recipe, amounts["steps"], path)


def _keep(recipe: Recipe, steps: int, path: Path) -> Recipe:
    """The recipe with so many steps of training, written to `path`."""
    training = recipe.training.model_copy(update={"steps": steps, "decay_steps": steps // 4})
    recipe = recipe.model_copy(update={"training": training})
    write_bytes_atomic(path, dump_recipe(recipe).encode())
    return recipe


def for_the_time_left(recipe: Recipe, out: Path, teacher: StableDiffusionTeacher, seconds: float) -> Recipe:
    """The recipe with as many steps as take `seconds` by the speed now, unless training has begun: the machine may have been busy when the
    demo began, or be so now."""
    if (out / "run").exists():
        return recipe
    return _keep(recipe, steps_within(seconds, recipe, measure_speed(teacher)), out / "recipe.yaml")


def run_demo(out: Path, minutes: float) -> Path:
    """Runs everything; returns the report's path. The same command goes on where an interrupted one stopped."""
    if not 3 <= minutes <= 24 * 60:
        raise UserError(f"--minutes is {minutes:g}, expected 3 to 1440: measuring alone takes about two")
    out = out.resolve()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in out.iterdir() if not p.name.startswith(".") and p.name not in _OWN]
    if foreign:
        raise UserError(f"{out}: holds {foreign[0]}, which is not of a demo; choose a new --out")
    from diffusion2gan.evaluation.scoring import ScoringNetwork

    # What is not installed is found now, not after all the work.
    scorer = ScoringNetwork()
    if (weights_root() / "student").is_dir():
        embedded_student()
    started = time.perf_counter()
    finish = started + 60 * minutes
    clock, emoji = _Clock(out), load_recipe("emoji")
    judged = emoji.pairs.ode
    with clock.counting("plan"):
        teacher = load_teacher(emoji.teacher, default_device())
        assert isinstance(teacher, StableDiffusionTeacher)
        recipe = demo_recipe(out, teacher, minutes, judged)
    # When the time was up before the last step, the same command trains on.
    clock.done &= last_step(out / "run" / "checkpoints") >= recipe.training.steps
    # What comes after training: export, measuring, the page.
    reserve = _OVERHEAD_SECONDS / 2 + judging_seconds(speed_of(out), judged)
    print("demo: simulate", flush=True)
    with clock.counting("simulate"):
        simulate_recipe(recipe, out / "pairs")
    with clock.counting("plan"):
        recipe = for_the_time_left(recipe, out, teacher, finish - reserve - _OVERHEAD_SECONDS / 2 - time.perf_counter())
    for name, stage in (
        ("train", lambda: train_recipe(recipe, out / "pairs", out / "run", deadline=lambda: time.perf_counter() > finish - reserve)),
        ("export", lambda: export_run(out / "run", out / "student")),
    ):
        print(f"demo: {name}", flush=True)
        with clock.counting(name):
            stage()
    print("demo: measure", flush=True)
    with clock.counting("measure"):
        results = measure(out, teacher, judged, scorer)
    write_bytes_atomic(out / "results.json", canonical_json(results["numbers"]))
    report = write_report(out, recipe, judged, results, clock.seconds)
    print(f"demo: {time.perf_counter() - started:.0f} s; open {report}")
    return report


class _Clock:
    """Seconds by stage, kept in the demo's folder: of one that is interrupted and goes on, all its parts. `done`: one that has its report and
    all its steps has had its time, and repeating it adds nothing."""

    def __init__(self, out: Path):
        self._path, self.done = out / "seconds.json", (out / "report.html").exists()
        self.seconds: dict[str, float] = json_object(self._path) if self._path.exists() else {}

    @contextmanager
    def counting(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            if not self.done:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun
                write_bytes_atomic(self._path, canonical_json(self.seconds))


def measure(out: Path, teacher: StableDiffusionTeacher, judged: SolverConfig, scorer: ScoringNetwork) -> dict[str, Any]:
    """Pictures of teacher and students for NOISES noises of each prompt, never used in training, and their scores."""
    prompts = [p for p in PROMPTS for _ in range(NOISES)]
    seeds = [evaluation_seed((1 << 52) + i) for i in range(len(prompts))]
    untrained = OneStepGenerator.from_teacher(teacher).requires_grad_(False).eval()
    students = {"one step of the teacher, untrained": OneStepPipeline(teacher, untrained.to(memory_format=torch.channels_last))}
    students["student of this run"] = OneStepPipeline.from_pretrained(out / "student", "float32", default_device())
    if (weights_root() / "student").is_dir():
        students["shipped student"] = OneStepPipeline.from_pretrained(embedded_student(), "float32", default_device())
    pictures, timing = {}, {}
    for name, sample in [("teacher", partial(teacher_pictures, OdeSolver(teacher, judged)))] + [
        (n, s.generate) for n, s in students.items()
    ]:
        sample(prompts[:1], seeds[:1])  # the first call of anything is slow
        begun = time.perf_counter()
        pictures[name] = sample(prompts, seeds)
        timing[name] = (time.perf_counter() - begun) / len(prompts)
    return {
        "pictures": pictures,
        "numbers": {name: {"seconds_per_image": timing[name]} | s for name, s in _scores(pictures, scorer).items()},
    }


def _scores(pictures: dict[str, np.ndarray], scorer: ScoringNetwork) -> dict[str, dict[str, float]]:
    """Each student against the teacher's pictures of the same noises, in the features of the scoring network (used in no loss)."""
    from diffusion2gan.evaluation.metrics import retrieval, within_prompt_diversity

    features = {name: scorer.features(images).reshape(len(PROMPTS), NOISES, -1) for name, images in pictures.items()}
    diversity = within_prompt_diversity(features["teacher"]).mean()
    scores = {}
    for name, own in features.items():
        kept = retrieval(own, features["teacher"])
        scores[name] = {
            "retrieval": kept.rate,
            "paired_to_control": kept.ratio,
            "diversity": float(within_prompt_diversity(own).mean() / diversity),
        }
    return scores


def write_report(out: Path, recipe: Recipe, judged: SolverConfig, results: dict[str, Any], seconds: dict[str, float]) -> Path:
    """The page: pictures first, then numbers, then how they were made. seconds: by stage."""
    page = Page("diffusion2gan demo", "A multi-step text-to-image diffusion model, distilled into one network evaluation, on this machine.")
    pictures, numbers = results["pictures"], results["numbers"]
    page.heading("The same noise, the same prompt")
    shipped = "shipped student" in pictures
    page.text(
        f"Teacher: the embedded emoji model, {judged.steps} steps of {judged.solver} with guidance {judged.guidance:g}. "
        + ("Shipped student: one step, distilled beforehand (how: below) and part of the package. " if shipped else "")
        + f"Student of this run: one step, distilled just now from {recipe.pairs.count} pairs of these {len(PROMPTS)} prompts. "
        + "Untrained: the teacher's own network asked for the picture in one step. None of these noises was used in training."
        + ("" if shipped else " This installation has no shipped student.")
    )
    order = [n for n in ("teacher", "shipped student", "student of this run", "one step of the teacher, untrained") if n in pictures]
    for index, prompt in enumerate(PROMPTS):
        rows = [pictures[name][index * NOISES : index * NOISES + SHOWN] for name in order]
        labels = [name.removeprefix("one step of the teacher, ") for name in order]
        page.picture(grid(np.concatenate(rows), SHOWN, row_labels=labels, scale=2), prompt)
    page.heading("Measured")
    page.table(
        ["", "seconds per image", "finds its own teacher picture", "distance to it / to another noise", "diversity / teacher's"],
        [
            [n, numbers[n]["seconds_per_image"], numbers[n]["retrieval"], numbers[n]["paired_to_control"], numbers[n]["diversity"]]
            for n in order
        ],
    )
    page.text(
        f"{len(PROMPTS)} prompts x {NOISES} noises. Second column of scores: how often a student's picture is, among the teacher's {NOISES} pictures of "
        f"the prompt, nearest to the one of its own noise (chance {1 / NOISES:.1%}). Features: EfficientNet-Lite0, ImageNet weights, used in no loss. "
        "These are small samples; the package's benchmark is protocol emoji10k-v1."
    )
    rows = read_scalars(out / "run" / "metrics.jsonl")
    page.heading("The run")
    loss = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held_out = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    series = {
        name: ([float(x) for x, _ in points], [y for _, y in points])
        for name, points in (("training", loss), ("held out (EMA)", held_out))
        if points
    }
    page.picture(curves(series, "step", recipe.loss.distance), "The regression loss of this run")
    pairs = PairDataset(out / "pairs")
    # What was done, not what was planned: the time budget may have ended the training early.
    trained = json.loads((out / "student" / STUDENT_FILE).read_text())["steps"]
    page.table(
        ["stage", "amount", "seconds"],
        [
            ["simulate", f"{len(pairs)} pairs, {recipe.pairs.ode.steps} steps of {recipe.pairs.ode.solver}", round(seconds["simulate"], 1)],
            ["train", f"{trained} steps of {recipe.training.batch_size}, {recipe.loss.distance}", round(seconds["train"], 1)],
            ["everything", "with measuring", round(sum(seconds.values()), 1)],
        ],
    )
    page.heading("Which recipe made what")
    page.text("Student of this run: recipe `demo`, resolved below. " + (f"Shipped student: {_shipped_facts()}." if shipped else ""))
    page.code(dump_recipe(recipe))
    path = out / "report.html"
    page.write(path)
    return path


def _shipped_facts() -> str:
    facts = json.loads((embedded_student() / STUDENT_FILE).read_text())
    return f"recipe `{facts['recipe']}`, {facts['pairs']} pairs, {facts['distance']}, {_history(facts)}"


def _history(facts: dict[str, Any]) -> str:
    """The steps behind a student, with those of the student that it started from."""
    in_phase_2 = facts.get("adversarial_steps", 0)
    parts = [_history(facts["start"])] if "start" in facts else []
    if facts["steps"] > in_phase_2:
        parts.append(f"{facts['steps'] - in_phase_2} steps of {facts['batch_size']}")
    if in_phase_2:
        of_d = " against the discriminator" if "lambda_GAN" in facts else ""
        parts.append(f"{in_phase_2} steps of {facts.get('adversarial_batch_size', facts['batch_size'])}{of_d}")
    return ", then ".join(p for p in parts if p)
