"""Stable Diffusion 1.x and 2.x (and the embedded teacher, which is one): adapter over diffusers classes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion2gan.errors import UserError
from diffusion2gan.teachers.folders import DiffusersTeacher, check_parts, decoded_at_once, token_ids, tokenizer_digest
from diffusion2gan.teachers.protocol import TextCondition


class StableDiffusionTeacher(DiffusersTeacher):
    """Implements `Teacher` for `StableDiffusionPipeline` folders; epsilon- and v-prediction.

    Raises UserError for a network that reads more than latent and text (inpainting, depth, upscaling), and for missing parts.
    """

    family = "stable_diffusion"
    tiny_decoder = "madebyollin/taesd"
    text_encoder: nn.Module

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ):
        check_parts(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        reads, gives, decodes = unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels
        if not reads == gives == decodes:
            raise UserError(
                f"the teacher's network reads {reads} channels and gives {gives}, its autoencoder has {decodes}, expected one number: "
                "a model that draws from text alone; choose another teacher"
            )
        if "sigma_data" in scheduler_config or "shift" in scheduler_config or getattr(vae.config, "latents_mean", None) is not None:
            raise UserError(
                "the teacher has another noise schedule than Stable Diffusion's betas, or an autoencoder with latents_mean (EDM, flow matching), "
                "expected Stable Diffusion's form; choose another teacher"
            )
        self.network, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        self._take_schedule(scheduler_config)
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline) -> StableDiffusionTeacher:
        return cls(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, dict(pipeline.scheduler.config))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "latent_scaling": float(self.vae.config.scaling_factor),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> embeddings (B, L, D)."""
        return TextCondition(self.text_encoder(token_ids(self.tokenizer, prompts).to(self.device))[0].to(self.dtype))

    def reads(self, prompts: Sequence[str]) -> list[Hashable]:
        """Their token ids."""
        return [tuple(ids) for ids in token_ids(self.tokenizer, prompts).tolist()]

    def encode_negative(self, prompt: str = "") -> TextCondition:
        """The unconditional branch's condition, one row."""
        return self.encode_prompts([prompt])

    def evaluate(self, latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module | None = None) -> Tensor:
        return (self.network if network is None else network)(
            latent,
            timestep,
            encoder_hidden_states=condition.embeddings,
            added_cond_kwargs=dict(condition.added) if condition.added else None,
            return_dict=False,
        )[0]

    def decode(self, latent: Tensor) -> Tensor:
        at_once = decoded_at_once(*latent.shape[2:])
        # diffusers' `vae.dtype` looks through every module first, for 0.2 ms.
        scaled = latent.to(next(self.vae.parameters()).dtype) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(part, return_dict=False)[0] for part in scaled.split(at_once)])
