"""Solves the teacher's probability-flow ODE from z to x (paper section 3.1): DDIM with classifier-free guidance.

The solver's arithmetic is diffusers'; the loop is ours: both guidance branches in one batch, what they share computed
once, text projected once; DDIM and DPM-Solver++ get their timesteps from the host, so that no step waits for the device.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pydantic import Field
from torch import Tensor

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError
from diffusion2gan.teachers.protocol import Teacher, TextCondition
from diffusion2gan.teachers.reuse import remembered_text, shared_prefix

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}),
    "unipc": (UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
}


class SolverConfig(Section):
    """How x is computed from z. The paper: DDIM, 50 steps, guidance 3 or 8."""

    solver: Literal["ddim", "dpmpp", "unipc"] = "ddim"
    steps: int = Field(50, ge=1, le=1000)
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    guidance: float = Field(3.0, ge=1.0)
    """Classifier-free guidance scale; 1 evaluates the conditional branch alone."""


def new_solver(teacher: Teacher, config: SolverConfig) -> Any:
    """The diffusers scheduler of `config` for this teacher, its timesteps set and on the host."""
    kind, options = SOLVERS[config.solver]
    base = {k: v for k, v in teacher.scheduler_config.items() if not k.startswith("_")}
    scheduler = kind.from_config(base | options | {"timestep_spacing": config.spacing})
    scheduler.set_timesteps(config.steps)
    first, last = int(scheduler.timesteps.max()), len(teacher.alphas_cumprod) - 1
    # "leading" rounds the stride down: 400 steps of 1,000 would start at 799, where the noise is no longer all there is.
    if not last - max(100, 2 * ((last + 1) // config.steps)) <= first <= last:
        raise UserError(
            f"pairs.ode: {config.steps} steps with {config.spacing} spacing start at timestep {first}, expected about {last}; "
            f"use a divisor of {last + 1}, or trailing spacing"
        )
    return scheduler


def solve_ode(teacher: Teacher, noise: Tensor, condition: TextCondition, negative: TextCondition, config: SolverConfig) -> Tensor:
    """Integrates from z to x.

    noise: (B, C, H, W), unit variance. condition: c, B rows. negative: the empty prompt's condition, 1 or B rows.
    Returns x (B, C, H, W), scaled latents in noise's dtype (float32 or float64).
    """
    guided = config.guidance > 1
    with torch.inference_mode(), ExitStack() as stack:
        if guided:
            condition = TextCondition.cat(negative.expand(len(noise)) if len(negative) == 1 else negative, condition)
            stack.enter_context(shared_prefix(teacher.network, 2 * len(noise)))
        stack.enter_context(remembered_text(teacher.network))
        x = _integrate(teacher, noise, condition, config, guided)
    # A plain tensor again: one made in inference mode could not be used in training.
    return x.clone()


def _integrate(teacher: Teacher, noise: Tensor, condition: TextCondition, config: SolverConfig, guided: bool) -> Tensor:
    scheduler = new_solver(teacher, config)
    latent = noise * scheduler.init_noise_sigma
    host_steps = scheduler.timesteps.tolist()
    device_steps = scheduler.timesteps.to(noise.device)
    for step, timestep in zip(host_steps, device_steps, strict=True):
        network_input = scheduler.scale_model_input(torch.cat([latent, latent]) if guided else latent, step)
        prediction = teacher.evaluate(network_input.to(teacher.dtype), timestep, condition).to(latent.dtype)
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + config.guidance * (conditional - unconditional)
        # The step index comes from the host's copy: indexing the schedule with a device tensor would wait for the device.
        latent = scheduler.step(prediction, step, latent, return_dict=False)[0]
    return latent


def evaluations_per_pair(config: SolverConfig) -> int:
    """Network evaluations that one pair costs (guidance counts twice)."""
    return config.steps * (2 if config.guidance > 1 else 1)
