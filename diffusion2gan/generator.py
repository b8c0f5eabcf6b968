"""G: the teacher's network evaluated once, from noise and prompt to the picture's latent (paper section 3.1).

The network runs at the teacher's terminal timestep and its prediction is converted to x:

    epsilon-prediction   x = (z - sqrt(1 - abar) eps) / sqrt(abar)        1 / sqrt(abar) is 14.6 for SD at t = 999
    v-prediction         x = sqrt(abar) z - sqrt(1 - abar) v

Because of that factor the last layers and the conversion run in float32 whatever the rest runs in: rounding the
prediction to bf16 alone would put an error of 0.024 rms into x.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.config import Section
from diffusion2gan.errors import UserError
from diffusion2gan.lora import add_lora
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.protocol import PredictionType, Teacher, TextCondition

# How a teacher's family calls its network: (latent, timestep, condition, network) -> prediction.
Evaluate = Callable[[Tensor, Tensor, TextCondition, nn.Module], Tensor]


class GeneratorConfig(Section):
    """How the one-step generator reads its input."""

    timestep: int = Field(999, ge=0)
    """The timestep at which the network is evaluated, recorded in the student: the last of the teacher's schedule, or it cannot be exported."""
    gradient_checkpointing: bool = False
    """Computes activations twice instead of keeping them: less memory, slower."""
    lora_rank: int | None = Field(None, ge=1)
    """Trains low-rank changes of the teacher's weights instead of all of them: a tenth of the optimiser's memory or less. The frozen
    weights keep the precision of `teacher.dtype`."""
    lora_alpha: int | None = Field(None, ge=1)
    """The changes are scaled by lora_alpha / lora_rank; without a number, by 1."""
    start: str | None = None
    """A run's folder, which stands for the end of its phase 1, a student's, or `embedded` for the shipped one: the generator starts from
    its weights, not the teacher's."""


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 (or float64) under autocast and with half-precision weights. Same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        # A compiled graph takes what holds around it.
        exactly = no_tf32() if input.is_cuda and not torch.compiler.is_compiling() else nullcontext()
        with torch.autocast(input.device.type, enabled=False), exactly:
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.conv2d(input.to(dtype), self.weight.to(dtype), bias, self.stride, self.padding, self.dilation, self.groups)


class Float32GroupNorm(nn.GroupNorm):
    """A group norm that computes in float32 (or float64) under autocast and with half-precision weights. Same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input.to(dtype), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)


def _last_layers_in_float32(network: nn.Module) -> None:
    norm: Any = network.conv_norm_out
    convolution: Any = network.conv_out
    if type(norm) is nn.GroupNorm:
        replacement: nn.Module = Float32GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
        replacement.weight, replacement.bias = norm.weight, norm.bias
        network.conv_norm_out = replacement
    if type(convolution) is nn.Conv2d:
        size, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
        replacement = Float32Conv2d(convolution.in_channels, convolution.out_channels, size, stride, padding)  # type: ignore[arg-type]
        replacement.weight, replacement.bias = convolution.weight, convolution.bias
        network.conv_out = replacement


def _copy_in_training(teacher: Teacher) -> Any:
    """Of the teacher's network, without its dropout: the masks would differ between processes, and after a resume."""
    network = copy.deepcopy(teacher.network).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def trainable_copy(teacher: Teacher) -> Any:
    """The teacher's network to be trained: in float32 or better, for steps of 1e-5 and an average's 1e-3 would round away in half
    precision."""
    network = _copy_in_training(teacher).requires_grad_(True)
    # torch's own `to`: diffusers' warns of modules to be kept in float32 and names none.
    return nn.Module.to(network, torch.promote_types(teacher.dtype, torch.float32))


class OneStepGenerator(nn.Module):
    """G(z, c) -> x in one network evaluation. Untrained, it is the teacher's own one-step estimate.

    forward(noise (B, C, H, W) float32, condition of B rows) -> scaled latent (B, C, H, W) float32 (float64 for a float64 network).
    Raises UserError for a timestep outside the teacher's schedule.
    """

    def __init__(self, network: nn.Module, evaluate: Evaluate, prediction_type: PredictionType, alpha_cumprod: Tensor, timestep: int):
        super().__init__()
        self.network = network
        self._evaluate = evaluate
        self.prediction_type = prediction_type
        self.timestep = timestep
        # In float32, as diffusers' schedulers compute them: the exported pipeline then gives the very same x.
        alpha = alpha_cumprod.float()
        self.sqrt_alpha_cumprod, self.sigma = float(alpha**0.5), float((1 - alpha) ** 0.5)
        _last_layers_in_float32(network)

    @classmethod
    def from_teacher(cls, teacher: Teacher, config: GeneratorConfig | None = None) -> OneStepGenerator:
        """A student that starts as a copy of the teacher's network, trainable."""
        config = config or GeneratorConfig()
        if config.lora_rank is None:
            network = trainable_copy(teacher)
        else:
            network = _copy_in_training(teacher)
            add_lora(network, config.lora_rank, config.lora_alpha)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return cls.around(network, teacher, config.timestep)

    @classmethod
    def around(cls, network: nn.Module, teacher: Teacher, timestep: int) -> OneStepGenerator:
        """G of `network` itself, not of a copy, with `teacher`'s schedule and way of calling it."""
        steps = len(teacher.alphas_cumprod)
        if timestep >= steps:
            raise UserError(f"generator.timestep is {timestep}, expected 0 to {steps - 1}, the teacher's schedule")
        alpha = teacher.alphas_cumprod[timestep]
        if teacher.prediction_type == "epsilon" and alpha < 1e-6:
            raise UserError(
                f"generator.timestep is {timestep}: abar is {float(alpha):g} there, noise alone says nothing of x; choose an earlier one"
            )
        return cls(network, teacher.evaluate, teacher.prediction_type, alpha, timestep)

    def forward(self, noise: Tensor, condition: TextCondition) -> Tensor:
        """G(z, c): z (B, C, H, W) and c of B rows -> x (B, C, H, W), scaled latents, in float32 (float64 for a float64 network)."""
        dtype = next(self.network.parameters()).dtype
        timestep = torch.full((), self.timestep, device=noise.device)
        # The conversion takes the z that the network sees: what it does not see of it would be in x, 14.6 times as large.
        noise = noise.to(self._first_layers_dtype(noise, dtype))
        return self.to_x(noise, self._evaluate(noise.to(dtype), timestep, condition.to(dtype), self.network))

    @staticmethod
    def _first_layers_dtype(noise: Tensor, dtype: torch.dtype) -> torch.dtype:
        """What autocast, or weights of half precision, round z to."""
        kind = noise.device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return dtype

    def to_x(self, noise: Tensor, prediction: Tensor) -> Tensor:
        """The conversion above, in float32 or better."""
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        z, prediction = noise.to(dtype), prediction.to(dtype)
        if self.prediction_type == "v_prediction":
            return self.sqrt_alpha_cumprod * z - self.sigma * prediction
        return (z - self.sigma * prediction) / self.sqrt_alpha_cumprod
