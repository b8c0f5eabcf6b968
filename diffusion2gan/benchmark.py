"""The embedded benchmark for a student: what `diffusion2gan evaluate` runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion2gan.compare import teacher_pictures
from diffusion2gan.embedded.autoencoder import to_tensor
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.emoji10k import Subject, evaluate_emoji10k
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.images import to_uint8
from diffusion2gan.pipeline import STUDENT_FILE, Student
from diffusion2gan.report import markdown_table
from diffusion2gan.run import default_device
from diffusion2gan.teachers.load import teacher_folder
from diffusion2gan.teachers.ode import SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher, weights_digest


def teacher_subject(teacher: StableDiffusionTeacher, ode: SolverConfig) -> Subject:
    """The teacher with its solver."""
    name = hashlib.sha256(json.dumps([teacher.identity(), ode.model_dump()], sort_keys=True).encode()).hexdigest()[:16]
    return Subject(lambda prompts, seeds: teacher_pictures(teacher, prompts, seeds, ode), f"teacher {name}")


def student_subject(student: Student) -> Subject:
    """A student, named by its weights."""
    return Subject(lambda prompts, seeds: student.generate(prompts, seeds), f"student {weights_digest(student.generator)[:16]}")


def autoencode_with(teacher: StableDiffusionTeacher) -> Callable[[np.ndarray], np.ndarray]:
    """Pictures through the teacher's autoencoder and back: uint8 (B, h, w, 3) to the same."""

    @torch.inference_mode()
    def autoencode(images: np.ndarray) -> np.ndarray:
        return to_uint8(teacher.vae(to_tensor(images).to(teacher.device)).sample)

    return autoencode


def evaluate_student(
    folder: Path, out: Path, shared: Path, list_name: str = "test", count: int | None = None, preservation_count: int | None = None
) -> dict[str, Any]:
    """Protocol `emoji10k-v1` of a student of the embedded teacher, with the solver its pairs were made with."""
    config = TeacherConfig(source="embedded")
    device = default_device()
    student = Student.from_pretrained(folder, "float32", device)
    facts = json.loads((folder / STUDENT_FILE).read_text())
    ode = SolverConfig.model_validate(facts["ode"])
    teacher = StableDiffusionTeacher.from_pretrained(config, teacher_folder(config), device)
    if facts["teacher_weights"] != teacher.identity()["weights"]:
        raise UserError(
            f"{folder}: a student of teacher {facts['teacher_weights'][:16]}..., but the embedded teacher is {teacher.identity()['weights'][:16]}...; "
            "the protocol compares a student with its own teacher"
        )
    teacher.network.to(memory_format=torch.channels_last)
    generator = OneStepGenerator.from_teacher(teacher, GeneratorConfig(timestep=facts["timestep"])).requires_grad_(False).eval()
    untrained = Student(teacher, generator.to(memory_format=torch.channels_last))

    return evaluate_emoji10k(
        student_subject(student), teacher_subject(teacher, ode), student_subject(untrained), autoencode_with(teacher), out,
        shared=shared, list_name=list_name, count=count, preservation_count=preservation_count,
    )  # fmt: skip


def result_table(result: dict[str, Any]) -> str:
    """The headline numbers of a result as a Markdown table."""
    rows = [(key, json.dumps(value) if isinstance(value, dict | list) else value) for key, value in result.items()]
    return markdown_table(["measure", "value"], rows)
