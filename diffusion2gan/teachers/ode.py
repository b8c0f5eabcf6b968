"""Solves the teacher's probability-flow ODE from z to x (paper section 3.1): DDIM with classifier-free guidance.

The solver's arithmetic is diffusers'; the loop is ours: both guidance branches in one batch, what they share computed
once, text projected once; DDIM and DPM-Solver++ get their timesteps from the host, so that no step waits for the device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from pydantic import Field
from torch import Tensor, nn

from diffusion2gan.config import Section
from diffusion2gan.device import compile_for_one_shape
from diffusion2gan.errors import UserError
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.attention import plain_attention_on_cpu
from diffusion2gan.teachers.protocol import Teacher, TextCondition
from diffusion2gan.teachers.reuse import joined_upsampling, remembered_text, shared_prefix

SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpmpp": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "use_karras_sigmas": False},
    ),
    "unipc": (UniPCMultistepScheduler, {"final_sigmas_type": "zero", "use_karras_sigmas": False}),
    "heun": (HeunDiscreteScheduler, {}),
}


class SolverConfig(Section):
    """How x is computed from z. The paper: DDIM, 50 steps, guidance 3 or 8; EDM teachers: Heun, 18 steps, linspace spacing, guidance 1."""

    solver: Literal["ddim", "dpmpp", "unipc", "heun"] = "ddim"
    """DDIM without added noise, DPM-Solver++ and UniPC of second order, Heun's method (two evaluations a step)."""
    steps: int = Field(50, ge=1, le=1000)
    """Steps of the solver."""
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    """Which timesteps, as diffusers' `timestep_spacing`: `trailing` begins at the last, `leading` a step before it."""
    guidance: float = Field(3.0, ge=1.0)
    """Classifier-free guidance scale; 1 evaluates the conditional branch alone."""


def can_solve(teacher: Teacher, solver: str) -> bool:
    """Whether `solver` has the teacher's noise schedule: not every one knows one that ends without signal."""
    rescaled = bool(teacher.scheduler_config.get("rescale_betas_zero_snr"))
    return not rescaled or "rescale_betas_zero_snr" in inspect.signature(SOLVERS[solver][0].__init__).parameters


def new_solver(teacher: Teacher, config: SolverConfig) -> Any:
    """The diffusers scheduler of `config` for this teacher, its timesteps set and on the host."""
    kind, options = SOLVERS[config.solver]
    base = {k: v for k, v in teacher.scheduler_config.items() if not k.startswith("_")}
    if not can_solve(teacher, config.solver):
        raise UserError(
            f"pairs.ode.solver is {config.solver}, which knows no schedule that ends without signal, as this teacher's does; use ddim"
        )
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


def solve_ode(
    teacher: Teacher,
    noise: Tensor,
    condition: TextCondition,
    negative: TextCondition | None,
    config: SolverConfig,
    network: nn.Module | None = None,
    reuse: bool = True,
) -> Tensor:
    """Integrates from z to x.

    noise: (B, C, H, W), unit variance. condition: c, B rows. negative: the empty prompt's condition, 1 or B rows;
    None without guidance.
    network: the teacher's in another precision, or compiled. reuse: compute once what the steps and both guidance branches
    share; a compiled network has to be called as it is.
    Returns x (B, C, H, W), scaled latents in noise's dtype (float32 or float64).
    Raises UserError for steps and spacing that do not start near the last timestep, and for guidance without `negative`.
    """
    guided = config.guidance > 1
    with torch.inference_mode(), ExitStack() as stack:
        if guided:
            if negative is None:
                raise UserError(
                    f"pairs.ode.guidance is {config.guidance} and there is no negative condition, expected the empty prompt's; "
                    "give teacher.encode_negative(), or set guidance 1"
                )
            condition = TextCondition.cat(negative.expand(len(noise)) if len(negative) == 1 else negative, condition)
        network = teacher.network if network is None else network
        if reuse:
            if guided:
                stack.enter_context(shared_prefix(network, 2 * len(noise)))
            stack.enter_context(remembered_text(network))
            stack.enter_context(joined_upsampling(network))
        x = _integrate(teacher, network, noise, condition, config, guided)
    # A plain tensor again: one made in inference mode could not be used in training.
    return x.clone()


def _integrate(teacher: Teacher, network: nn.Module, noise: Tensor, condition: TextCondition, config: SolverConfig, guided: bool) -> Tensor:
    scheduler = new_solver(teacher, config)
    dtype = next((p.dtype for p in network.parameters()), teacher.dtype)
    condition = condition.to(dtype)
    latent = noise * scheduler.init_noise_sigma
    host_steps = scheduler.timesteps.tolist()
    device_steps = scheduler.timesteps.to(noise.device)
    for step, timestep in zip(host_steps, device_steps, strict=True):
        network_input = scheduler.scale_model_input(torch.cat([latent, latent]) if guided else latent, step)
        prediction = teacher.evaluate(network_input.to(dtype), timestep, condition, network).to(latent.dtype)
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + config.guidance * (conditional - unconditional)
        # The step index comes from the host's copy: indexing the schedule with a device tensor would wait for the device.
        latent = scheduler.step(prediction, step, latent, return_dict=False)[0]
    return latent


def evaluations_per_pair(config: SolverConfig) -> int:
    """Network evaluations that one pair costs (guidance counts twice)."""
    steps = 2 * config.steps - 1 if config.solver == "heun" else config.steps
    return steps * (2 if config.guidance > 1 else 1)


class OdeSolver:
    """One teacher's ODE under fixed settings, solved batch after batch.

    precision: dtype of the network while it solves (default: the teacher's own); text and the state of the ODE keep theirs.
    compiled: compiles the network for batches of `batch_size`; smaller ones are padded. Costs a minute at the first batch.
    negative_prompt: the unconditional branch's prompt. in_place: the teacher's own network is rounded or compiled instead of a copy,
    for whoever has no other use for it: one network in memory, not two. Raises UserError when compiling on a CPU without a C++ compiler.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: SolverConfig,
        batch_size: int = 32,
        precision: str | None = None,
        compiled: bool = False,
        negative_prompt: str = "",
        in_place: bool = False,
    ):
        self.teacher, self.config, self.batch_size, self.compiled = teacher, config, batch_size, compiled
        self.negative = teacher.encode_negative(negative_prompt) if config.guidance > 1 else None
        teacher.network.to(memory_format=torch.channels_last)
        self.network: nn.Module | None = None
        self._state = torch.float64 if teacher.dtype == torch.float64 else torch.float32
        dtype = teacher.dtype if precision is None else getattr(torch, precision)
        if dtype == teacher.dtype and not compiled:
            return
        network = teacher.network if in_place else copy.deepcopy(teacher.network)
        # torch's own `to`: diffusers' warns of modules to be kept in float32 and names none.
        nn.Module.to(network, dtype)
        if compiled:
            plain_attention_on_cpu(network, teacher.latent_shape[1] * teacher.latent_shape[2], teacher.device)
            # For as long as it lives: a compiled network keeps what it was compiled with.
            self._reuse = ExitStack()
            self._reuse.enter_context(joined_upsampling(network))
            if config.guidance > 1:
                self._reuse.enter_context(shared_prefix(network, 2 * batch_size))
            network = compile_for_one_shape(network, teacher.device, "pairs.compile")
        self.network = network

    def solve(self, noise: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """x for host noise (B, C, H, W) and B prompts, on the teacher's device, any B; float64 for a float64 teacher, else float32."""
        parts = [
            self._solve(noise[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in range(0, len(noise), self.batch_size)
        ]
        return torch.cat(parts)

    def _solve(self, noise: np.ndarray, prompts: Sequence[str]) -> Tensor:
        count = len(noise)
        if self.compiled and count < self.batch_size:
            # Another shape would be compiled anew; the last row is repeated instead.
            missing = self.batch_size - count
            noise, prompts = np.concatenate([noise, noise[-1:].repeat(missing, 0)]), [*prompts, *[prompts[-1]] * missing]
        z = torch.from_numpy(noise).to(self.teacher.device, self._state).contiguous(memory_format=torch.channels_last)
        # What the manifest calls float32 is float32, on a GPU as on a CPU.
        with no_tf32():
            x = solve_ode(
                self.teacher, z, self.teacher.encode_prompts(prompts), self.negative, self.config, self.network, not self.compiled
            )
        return x[:count]
