"""Diffusion models of pixels: `UNet2DModel`, trained as DDPM (an alpha-bar schedule) or with EDM's preconditioning.

An EDM network F reads c_in x and ln(sigma) / 4 and gives D(x; sigma) = c_skip x + c_out F (Karras et al. 2022, Table 1). Written
with data divided by sigma_data and abar = sigma_data^2 / (sigma^2 + sigma_data^2), that is a v-prediction, v = -F, of the latent
c_in x, which has unit variance. So it needs neither a solver nor a generator of its own: latents are pixels / sigma_data, and the
schedule is 1,000 noise levels with rho = 7 between sigma_min and sigma_max. Between two of them ln(sigma) is linear in t.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.errors import UserError
from diffusion2gan.teachers.folders import DiffusersTeacher, student_scheduler
from diffusion2gan.teachers.protocol import TextCondition


def is_preconditioned(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler (`EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`) says that its network is EDM's."""
    return type(scheduler).__name__.startswith("EDM")


def _edm_schedule(config: dict[str, Any]) -> dict[str, Any]:
    """EDM's noise levels as the configuration of a scheduler with alpha-bar. Raises UserError for other preconditionings."""
    if config.get("sigma_schedule", "karras") != "karras" or config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the teacher's scheduler has sigma_schedule {config.get('sigma_schedule')!r} and prediction_type {config.get('prediction_type')!r}, "
            "expected karras and epsilon or v_prediction; choose another teacher"
        )
    rho, steps = config.get("rho", 7.0), config.get("num_train_timesteps", 1000)
    low, high = config["sigma_min"] ** (1 / rho), config["sigma_max"] ** (1 / rho)
    sigma = (low + np.arange(steps) / (steps - 1) * (high - low)) ** rho / config["sigma_data"]
    alpha = 1 / (1 + sigma**2)
    betas = 1 - alpha / np.concatenate([[1.0], alpha[:-1]])
    return {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "prediction_type": "v_prediction",
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


class PixelTeacher(DiffusersTeacher):
    """Implements `Teacher` for `DDPMPipeline` and `DDIMPipeline` folders; unconditional, or conditioned on a class.

    c of an unconditional network is empty, whatever the prompts; of a conditional one a prompt is the number of its class, and c holds
    it one-hot, (B, 1, classes). There is no unconditional branch: guidance has to be 1.
    Raises UserError for networks that read something else.
    """

    family = "pixel"
    task = "unconditional-image-generation"
    network_class = UNet2DModel
    has_vae = False

    def __init__(self, unet: UNet2DModel, scheduler_config: dict[str, Any], preconditioned: bool = False):
        config = unet.config
        if config.time_embedding_type != "positional":
            raise UserError(
                f"the teacher's network embeds time as {config.time_embedding_type!r}, expected 'positional'; choose another teacher"
            )
        if unet.class_embedding is not None and not isinstance(unet.class_embedding, nn.Embedding):
            raise UserError(
                f"the teacher's network embeds classes as {config.class_embed_type!r}, expected class numbers; choose another teacher"
            )
        if config.in_channels != config.out_channels:
            raise UserError(
                f"the teacher's network gives {config.out_channels} channels for {config.in_channels}, expected as many: one that learns its "
                "variance has no ODE of its own; choose another teacher"
            )
        if config.in_channels != 3 or config.sample_size is None:
            raise UserError(
                f"the teacher's network draws {config.in_channels} channels of size {config.sample_size}, expected 3 of a fixed size; choose another"
            )
        self.network = unet
        unet.requires_grad_(False).eval()
        self._data_deviation = float(scheduler_config["sigma_data"]) if preconditioned else 1.0
        # diffusers' "v_prediction" of an EDM scheduler has the other sign.
        self._sign = -1.0 if preconditioned and scheduler_config.get("prediction_type", "epsilon") == "epsilon" else 1.0
        self._take_schedule(_edm_schedule(scheduler_config) if preconditioned else scheduler_config)
        # Heun's steps then lie where EDM places them; the others keep to whole timesteps.
        self.scheduler_config["use_karras_sigmas"] = preconditioned
        alpha = self.alphas_cumprod.double()
        # ln(sigma) of the schedule, in the data's own scale.
        self._log_sigma = 0.5 * torch.log((1 - alpha) / alpha) + math.log(self._data_deviation) if preconditioned else None
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (config.in_channels, height, width)
        self._classes = 0 if unet.class_embedding is None else unet.class_embedding.num_embeddings

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> PixelTeacher:
        return cls(pipeline.unet, dict(pipeline.scheduler.config), is_preconditioned(pipeline.scheduler))

    @classmethod
    def one_step_pipeline(cls, pipeline: Any) -> Any:
        """A `DDIMPipeline`; an EDM network's own pipeline, which only this package draws one step with: no stock one has its schedule."""
        if is_preconditioned(pipeline.scheduler):
            return pipeline
        return DDIMPipeline(pipeline.unet, student_scheduler(dict(pipeline.scheduler.config)))

    @classmethod
    def one_step_usage(cls, pipeline: Any) -> str:
        classes = pipeline.unet.class_embedding is not None
        if classes or is_preconditioned(pipeline.scheduler):
            # No stock pipeline passes a class, or has EDM's schedule.
            return (
                "from diffusion2gan import OneStepPipeline\n"
                'pipeline = OneStepPipeline.from_pretrained("this folder")\n'
                f'images = pipeline("{7 if classes else ""}", images_per_prompt=16)'
            )
        return (
            "from diffusers import DDIMPipeline\n"
            'pipeline = DDIMPipeline.from_pretrained("this folder")\n'
            "images = pipeline(batch_size=16, num_inference_steps=1).images"
        )

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "preconditioned": self._log_sigma is not None,
            "latent_scaling": 1 / self._data_deviation,
        }

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> (B, 1, classes) one-hot, or (B, 1, 1) zeros. Raises UserError for a prompt that is no class number."""
        if not self._classes:
            return TextCondition(torch.zeros(len(prompts), 1, 1, dtype=self.dtype, device=self.device))
        labels = torch.tensor([self._class(p) for p in prompts], device=self.device)
        return TextCondition(F.one_hot(labels, self._classes)[:, None].to(self.dtype))

    def _class(self, prompt: str) -> int:
        if not prompt.isdecimal() or int(prompt) >= self._classes:
            raise UserError(f"prompt {prompt!r}: expected the number of a class, 0 to {self._classes - 1}: the teacher reads nothing else")
        return int(prompt)

    def reads(self, prompts: Sequence[str]) -> list[Hashable]:
        """Their classes; None, whatever the prompt, where there are no classes. Raises UserError as `encode_prompts` does."""
        return [self._class(prompt) if self._classes else None for prompt in prompts]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if self._classes:
            for number, prompt in enumerate(prompts, 1):
                try:
                    self._class(prompt)
                except UserError as error:
                    raise UserError(f"pair {number} of {len(prompts)}: {error}") from None

    def encode_negative(self, prompt: str = "") -> TextCondition:
        """Raises UserError: there is no unconditional branch."""
        raise UserError("pairs.ode.guidance is above 1, expected 1: a network of pixels has no unconditional branch here")

    def evaluate(self, latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module | None = None) -> Tensor:
        labels = condition.embeddings[:, 0].argmax(-1) if self._classes else None
        time = timestep if self._log_sigma is None else self._noise_level(timestep.to(latent.device))
        output = (self.network if network is None else network)(latent, time, class_labels=labels, return_dict=False)[0]
        return self._sign * output

    def _noise_level(self, timestep: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 at a timestep, which may lie between two."""
        assert self._log_sigma is not None
        # Float64 knows a schedule of thousands of steps to the last digit; MPS has no such numbers.
        dtype = torch.float32 if timestep.device.type == "mps" else torch.float64
        if self._log_sigma.device != timestep.device:
            self._log_sigma = self._log_sigma.to(timestep.device, dtype)
        low = timestep.floor().long().clamp(0, len(self._log_sigma) - 2)
        weight = (timestep.to(dtype) - low).reshape(-1)
        # Not by brackets: an index of no dimensions would be fetched to the host.
        between = torch.lerp(self._log_sigma.index_select(0, low.reshape(-1)), self._log_sigma.index_select(0, low.reshape(-1) + 1), weight)
        return between.reshape(timestep.shape) / 4

    def decode(self, latent: Tensor) -> Tensor:
        return latent * self._data_deviation
