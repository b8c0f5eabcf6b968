"""One-step text-to-image generation by distillation: an open implementation of Diffusion2GAN (Kang et al., ECCV 2024).

Public names are loaded on first use; importing the package does no work.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "ELatentLPIPS": "diffusion2gan.perceptual",
    "LatentLPIPS": "diffusion2gan.perceptual",
    "OneStepGenerator": "diffusion2gan.generator",
    "PairDataset": "diffusion2gan.pairs.dataset",
    "Recipe": "diffusion2gan.recipe",
    "OneStepPipeline": "diffusion2gan.pipeline",
    "Trainer": "diffusion2gan.training.trainer",
    "UserError": "diffusion2gan.errors",
    "load_recipe": "diffusion2gan.recipe",
    "simulate": "diffusion2gan.pairs.simulate",
    "solve_ode": "diffusion2gan.teachers.ode",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffusion2gan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
