"""Stable Diffusion 1.x and 2.x (and the embedded teacher, which is one): adapter over diffusers classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion2gan.errors import UserError
from diffusion2gan.teachers.protocol import PredictionType, TeacherConfig, TextCondition


def weights_digest(*modules: nn.Module) -> str:
    """sha256 over names, dtypes and bytes of all tensors: the same weights give the same digest wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Flattened in logical order: channels-last weights give the same digest.
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """diffusers and transformers draw a bar for every part they load; they are switched off here and on again."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    active = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, was_active in zip(loggers, active, strict=True):
            if was_active:
                logger.enable_progress_bar()


def load_pipeline(config: TeacherConfig, folder: str | Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A stock pipeline from a folder or hub id, safetensors only, without safety checker. Raises UserError when it isn't one."""
    try:
        with _no_loading_bars():
            return StableDiffusionPipeline.from_pretrained(
                folder,
                revision=config.revision,
                variant=config.variant,
                dtype=dtype,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"teacher.source: {folder} is not a Stable Diffusion folder or hub id ({reason}); name one that has model_index.json"
        ) from None


class StableDiffusionTeacher:
    """Implements `Teacher` for `StableDiffusionPipeline` folders; epsilon- and v-prediction."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ):
        self.network, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        schedule = DDIMScheduler.from_config(scheduler_config)
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the teacher predicts {schedule.config.prediction_type!r}, expected epsilon or v_prediction; choose another teacher"
            )
        self.scheduler_config = dict(schedule.config)
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type: PredictionType = schedule.config.prediction_type
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    @classmethod
    def from_pretrained(cls, config: TeacherConfig, folder: str | Path, device: str | torch.device = "cpu") -> StableDiffusionTeacher:
        """Loads a diffusers folder or hub repository (safetensors only). Raises UserError when it isn't one."""
        return cls.from_pipeline(load_pipeline(config, folder, getattr(torch, config.dtype)).to(device))

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline) -> StableDiffusionTeacher:
        """Wraps the parts of a pipeline; they are shared, not copied, and frozen."""
        return cls(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, dict(pipeline.scheduler.config))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def identity(self) -> dict[str, Any]:
        return {
            "family": "stable_diffusion",
            "weights": weights_digest(self.network, self.text_encoder),
            "prediction_type": self.prediction_type,
            "latent_scaling": float(self.vae.config.scaling_factor),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> embeddings (B, L, D), padded and cut to the tokenizer's length as the stock pipeline does."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return TextCondition(self.text_encoder(ids.to(self.device))[0].to(self.dtype))

    def evaluate(self, latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module | None = None) -> Tensor:
        return (network or self.network)(latent, timestep, encoder_hidden_states=condition.embeddings, return_dict=False)[0]

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
