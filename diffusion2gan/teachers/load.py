"""The one door through which a recipe's teacher comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

LoadedTeacher: TypeAlias = StableDiffusionTeacher | PixelTeacher
FAMILIES: dict[str, Any] = {kind.family: kind for kind in (StableDiffusionTeacher, SDXLTeacher, PixelTeacher)}


def teacher_folder(config: TeacherConfig) -> str | Path:
    """The diffusers folder or hub id behind a recipe's `teacher.source`."""
    return embedded_folder("teacher") if config.source == "embedded" else config.source


def load_teacher(config: TeacherConfig, device: str | torch.device = "cpu") -> LoadedTeacher:
    """Loads the teacher that a recipe names. Raises UserError when it cannot be found or is of another kind."""
    teacher: LoadedTeacher = FAMILIES[config.family].from_pretrained(config, teacher_folder(config), device)
    return teacher
