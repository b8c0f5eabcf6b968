"""Stable Diffusion 1.5 and SDXL from their published configurations, with random weights: time and memory do not depend on them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion2gan.embedded.text_to_image import new_scheduler
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.teachers.published import SD15, SDXL
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher


def random_unet(device: torch.device | str) -> UNet2DConditionModel:
    """SD 1.5's, 860 M parameters."""
    with torch.device(device):
        return UNet2DConditionModel(**SD15.unet)


def random_sdxl_unet(device: torch.device | str) -> UNet2DConditionModel:
    """SDXL's, 2,567 M parameters."""
    with torch.device(device):
        return UNet2DConditionModel(**SDXL.unet)


def random_vae(device: torch.device | str, latent_channels: int = 4, scaling_factor: float = 0.18215) -> AutoencoderKL:
    """4 channels: SD 1.5's and SDXL's; with 16 it has the size of Stable Diffusion 3's."""
    with torch.device(device):
        return AutoencoderKL(**{**SD15.vae, "latent_channels": latent_channels, "scaling_factor": scaling_factor})


def _text_config(hidden: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads, projection_dim=hidden,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """The embedded one stands in for CLIP's."""
    tokenizer = StableDiffusionPipeline.from_pretrained(embedded_folder("teacher"), safety_checker=None).tokenizer
    tokenizer.model_max_length = 77
    return tokenizer


def random_sd15_pipeline(device: str) -> StableDiffusionPipeline:
    with torch.device(device):
        text = CLIPTextModel(_text_config(768, 12, 12))
    return StableDiffusionPipeline(
        vae=random_vae(device), text_encoder=text, tokenizer=_tokenizer(), unet=random_unet(device), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def random_sdxl_pipeline(device: str) -> StableDiffusionXLPipeline:
    with torch.device(device):
        text, text_2 = CLIPTextModel(_text_config(768, 12, 12)), CLIPTextModelWithProjection(_text_config(1280, 32, 20))
    return StableDiffusionXLPipeline(
        vae=random_vae(device, scaling_factor=0.13025), text_encoder=text, text_encoder_2=text_2, tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(), unet=random_sdxl_unet(device), scheduler=new_scheduler(), add_watermarker=False,
    )  # fmt: skip


def random_sd15(device: str) -> StableDiffusionTeacher:
    return StableDiffusionTeacher.from_pipeline(random_sd15_pipeline(device))


def random_sdxl(device: str) -> SDXLTeacher:
    return SDXLTeacher.from_pipeline(random_sdxl_pipeline(device))
