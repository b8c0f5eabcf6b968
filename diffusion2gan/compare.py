"""Teacher and student from the same noise, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffusion2gan.images import grid, to_uint8
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import Student
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import Teacher


@torch.inference_mode()
def teacher_pictures(solver: OdeSolver, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """The teacher's pictures (B, h, w, 3) uint8, one for each prompt and seed."""
    teacher, parts = solver.teacher, []
    for start in range(0, len(prompts), solver.batch_size):
        stop = start + solver.batch_size
        x = solver.solve(draw_noise(seeds[start:stop], teacher.latent_shape), prompts[start:stop])
        parts.append(to_uint8(teacher.decode(x.to(teacher.dtype))))
    return np.concatenate(parts)


def compare_pictures(
    teacher: Teacher, student: Student, prompts: Sequence[str], seed: int, count: int, ode: SolverConfig
) -> tuple[Image.Image, tuple[float, float]]:
    """A grid with two rows a prompt, teacher above student, and the seconds a picture took of each."""
    # One untimed call each: neither pays for the first.
    teacher_pictures(OdeSolver(teacher, ode.model_copy(update={"steps": 2, "spacing": "trailing"})), prompts[:1], [seed])
    solver = OdeSolver(teacher, ode)
    student.generate(prompts[:1], [seed])
    everything = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    started = time.perf_counter()
    above = teacher_pictures(solver, everything, seeds)
    between = time.perf_counter()
    below = student.generate(everything, seeds)
    ended = time.perf_counter()
    rows = [part[i * count : (i + 1) * count] for i in range(len(prompts)) for part in (above, below)]
    labels = [label for p in prompts for label in (f"teacher {p}"[:28], "student")]
    picture = grid(np.concatenate(rows), count, row_labels=labels, scale=max(1, 96 // above.shape[1]))
    return picture, ((between - started) / len(everything), (ended - between) / len(everything))
