"""The embedded benchmark, of a student or of the teacher itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion2gan.device import can_compile, default_device, has_bf16
from diffusion2gan.embedded import emoji
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.emoji10k import PROTOCOL, Subject, drawn_prompt_list, evaluate_emoji10k, noise_seeds
from diffusion2gan.evaluation.evaluate import SHOWN, describe, keep_samples, refuse_fewer
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.images import to_tensor, to_uint8
from diffusion2gan.pairs.simulate import PairsConfig
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline, teacher_pictures
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import cell, markdown_table
from diffusion2gan.teachers.folders import weights_digest
from diffusion2gan.teachers.load import teacher_folder
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

_TEACHER_BATCH = 64


def teacher_subject(
    teacher: StableDiffusionTeacher, ode: SolverConfig, precision: str | None = None, compiled: bool = False, negative_prompt: str = ""
) -> Subject:
    """The teacher with its solver, in the precision that its pairs are made in, where the machine has it."""
    if precision == "bfloat16" and not has_bf16(teacher.device):
        precision = None  # in software it would take many times as long; the name tells the two apart
    # A compiled network gives the same pictures; where it cannot be compiled, they take longer.
    compiled = compiled and can_compile(teacher.device)
    own = str(teacher.dtype).removeprefix("torch.")
    # The store's identity of a teacher has no autoencoder: latents do not depend on it, pictures do.
    settings = [teacher.identity(), weights_digest(teacher.vae), ode.model_dump(), precision or own]
    settings += [negative_prompt] if negative_prompt else []
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    solver = OdeSolver(teacher, ode, _TEACHER_BATCH, precision, compiled, negative_prompt)
    how = f"{precision or own}, compiled" if compiled else precision or own
    return Subject(partial(teacher_pictures, solver), f"teacher {name}", how)


def student_subject(student: OneStepPipeline) -> Subject:
    """A student, named by its weights."""
    return Subject(lambda prompts, seeds: student.generate(prompts, seeds), f"student {weights_digest(student.generator)[:16]}")


def autoencoder_name(teacher: StableDiffusionTeacher) -> str:
    """By its weights: features of R_rec are the same whatever solves the teacher."""
    return f"autoencoder {weights_digest(teacher.vae)[:16]}"


def autoencode_with(teacher: StableDiffusionTeacher) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures through the teacher's autoencoder and back: uint8 (B, h, w, 3) to the same."""

    @torch.inference_mode()
    def autoencode(images: np.ndarray) -> np.ndarray:
        with no_tf32():
            return to_uint8(teacher.vae(to_tensor(images).to(teacher.device)).sample)

    return autoencode


def evaluate_student(
    folder: Path, out: Path, shared: Path, list_name: str = "test", count: int | None = None, preservation_count: int | None = None
) -> dict[str, Any]:
    """Protocol `emoji10k-v1` of a student of the embedded teacher, with the solver and precision its pairs were made with."""
    teacher = _embedded_teacher()
    student = OneStepPipeline.from_pretrained(folder, "float32", str(teacher.device))
    facts = json.loads((folder / STUDENT_FILE).read_text())
    if facts["teacher_weights"] != teacher.identity()["weights"]:
        raise UserError(
            f"{folder}: a student of teacher {facts['teacher_weights'][:16]}..., but the embedded teacher is {teacher.identity()['weights'][:16]}...; "
            "the protocol compares a student with its own teacher"
        )
    ode, negative = SolverConfig.model_validate(facts["ode"]), facts.get("negative_prompt", "")
    sampler = teacher_subject(teacher, ode, facts.get("precision"), facts.get("compile", False), negative)
    return _evaluate(
        student_subject(student), folder.name, sampler, teacher, facts["timestep"], out, shared, list_name, count, preservation_count
    )


def evaluate_teacher(
    pairs: PairsConfig, out: Path, shared: Path, list_name: str = "test", count: int | None = None, preservation_count: int | None = None
) -> dict[str, Any]:
    """The same of the embedded teacher itself, solved as `pairs` are: what a perfect student of them would score."""
    teacher = _embedded_teacher()
    sampler = teacher_subject(teacher, pairs.ode, pairs.precision, pairs.compile, pairs.negative_prompt)
    timestep = len(teacher.alphas_cumprod) - 1
    return _evaluate(sampler, "embedded teacher", sampler, teacher, timestep, out, shared, list_name, count, preservation_count)


def _embedded_teacher() -> StableDiffusionTeacher:
    config = TeacherConfig(source="embedded")
    return StableDiffusionTeacher.from_pretrained(config, teacher_folder(config), default_device())


def _evaluate(
    subject: Subject,
    name: str,
    sampler: Subject,
    teacher: StableDiffusionTeacher,
    timestep: int,
    out: Path,
    shared: Path,
    list_name: str,
    count: int | None,
    preservation_count: int | None,
) -> dict[str, Any]:
    dataset = emoji.load()  # that it is missing is told before anything is drawn
    weights = subject.identity if subject is not sampler else f"teacher {teacher.identity()['weights'][:16]}"
    describe(out, name, {"subject": weights, "sampler": sampler.identity}, part=PROTOCOL)
    refuse_fewer(out / f"{PROTOCOL}.json", len(drawn_prompt_list(list_name, count)), list_name)
    # Before all else, so that there is something to look at.
    prompts = [p.prompt for p in drawn_prompt_list(list_name, SHOWN)]
    if not (out / "samples" / list_name).exists():
        keep_samples(out / "samples" / list_name, subject.sample(prompts, noise_seeds(list_name, "A", SHOWN)), prompts, 0)
    generator = OneStepGenerator.from_teacher(teacher, GeneratorConfig(timestep=timestep)).requires_grad_(False).eval()
    untrained = OneStepPipeline(teacher, generator.to(memory_format=torch.channels_last))
    return evaluate_emoji10k(
        subject, sampler, student_subject(untrained), autoencode_with(teacher), out,
        autoencoder=autoencoder_name(teacher), shared=shared, list_name=list_name, count=count, preservation_count=preservation_count,
        dataset=dataset,
    )  # fmt: skip


def result_table(result: dict[str, Any]) -> str:
    """The numbers of a result as a Markdown table, a column for each stratum, the floors under it."""
    scores = result["scores"]
    names = [n for n in ("all", "coarse", "middle", "fine") if n in scores]

    def row(label: str, pick: Callable[[dict[str, Any]], Any]) -> list[Any]:
        return [label, *(pick(scores[n]) for n in names)]

    rows = [
        row("pictures", lambda s: s["n"]),
        row("gap closed", lambda s: s["gap_closed"]),
        row("FD-EffNet(student, T_B)", lambda s: s["fd_student_TB"]),
        row("FD-EffNet(T_A, T_B), the floor", lambda s: s["fd_TA_TB"]),
        row("FD-EffNet(untrained, T_B)", lambda s: s["fd_untrained_TB"]),
        row("FD_inf to R_rec, teacher", lambda s: s.get("fd_inf_Rrec_teacher", {}).get("fd_inf")),
        row("FD_inf to R_rec, student", lambda s: s.get("fd_inf_Rrec_student", {}).get("fd_inf")),
        row("their ratio", lambda s: s.get("fd_inf_ratio")),
        row("precision, teacher / student", lambda s: f"{s['precision_teacher']:.3f} / {s['precision_student']:.3f}"),
        row("recall, teacher / student", lambda s: f"{s['recall_teacher']:.3f} / {s['recall_student']:.3f}"),
        *(
            [f"prompt agreement, {who}", *(scores[n]["prompt_agreement"][who]["mean"] for n in names)]
            for who in ("R_rec", "teacher", "student")
        ),
    ]
    kept, floors, seconds, how = result["preservation"], result["floors"], result["seconds_per_image"], result["sampled_in"]
    single = [
        ["retrieval of the own noise (chance)", f"{kept['retrieval']['mean']:.3f} ({kept['chance']:.3f})"],
        ["distance to own / other noise", kept["ratio"]],
        ["diversity within a prompt, student / teacher", result["diversity"]["ratio"]],
        [
            f"seconds per image, teacher ({how['teacher']}) / student ({how['student']})",
            f"{cell(seconds.get('teacher'))} / {cell(seconds.get('student'))}",
        ],
        *([f"floor {name} (n = {entry['n']})", entry["fd"]] for name, entry in floors.items()),
    ]
    partial = "\nPARTIAL: fewer pictures than the protocol's.\n" if result["partial"] else ""
    return markdown_table([result["protocol"], *names], rows) + "\n" + markdown_table(["", "value"], single) + partial
