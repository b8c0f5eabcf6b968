"""The one door through which a recipe's teacher comes in."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

FAMILIES: dict[str, type[StableDiffusionTeacher]] = {kind.family: kind for kind in (StableDiffusionTeacher, SDXLTeacher)}


def teacher_folder(config: TeacherConfig) -> str | Path:
    """The diffusers folder or hub id behind a recipe's `teacher.source`."""
    return embedded_folder("teacher") if config.source == "embedded" else config.source


def load_teacher(config: TeacherConfig, device: str | torch.device = "cpu") -> StableDiffusionTeacher:
    """Loads the teacher that a recipe names. Raises UserError when it cannot be found or is of another kind."""
    return FAMILIES[config.family].from_pretrained(config, teacher_folder(config), device)
