"""Stable Diffusion 1.5's networks from their published configurations, with random weights: time and memory do not depend on them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher


def random_unet(device: torch.device | str) -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            cross_attention_dim=768, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )  # fmt: skip


def random_vae(device: torch.device | str, latent_channels: int = 4) -> AutoencoderKL:
    """4 channels: SD 1.5's; with 16 it has the size of Stable Diffusion 3's."""
    with torch.device(device):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=latent_channels,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.18215,
        )  # fmt: skip


def random_sd15(device: str) -> StableDiffusionTeacher:
    """Stable Diffusion 1.5 from its published configuration, random weights; the embedded tokenizer stands in for CLIP's."""
    with torch.device(device):
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, bos_token_id=0, eos_token_id=1
            )
        )
    embedded = StableDiffusionPipeline.from_pretrained(embedded_folder("teacher"), safety_checker=None)
    embedded.tokenizer.model_max_length = 77
    schedule = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionTeacher(random_unet(device), random_vae(device), text, embedded.tokenizer, dict(schedule.config))
