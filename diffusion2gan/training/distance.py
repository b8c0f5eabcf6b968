"""Builds the distance d of Eq. 1 that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffusion2gan import losses
from diffusion2gan.config import Section
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import Augmentation, DecodedLPIPS, ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.checkpoint import read_config
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.released import SPACES
from diffusion2gan.teachers.protocol import Teacher

DistanceName = Literal["mse", "l1", "pseudo_huber", "lpips", "latent_lpips", "e_latent_lpips"]


class LossConfig(Section):
    """The regression loss: a row of Table 1."""

    distance: DistanceName = "e_latent_lpips"
    """d of Eq. 1. `lpips` is of decoded pictures (Eq. 2); `latent_lpips` is Eq. 3 without augmentation."""
    perceptual: str = "embedded"
    """Weights of the perceptual network: `embedded`, or what `LatentLPIPS.from_pretrained` takes: sd15, sd21, sdxl, sd3, flux (released by
    the paper's authors, non-commercial), a folder, a released file, a hub repository."""
    augment: str = Field("bgo", pattern="^[bgco]*$")
    """Augmentation letters of E-LatentLPIPS: b blit, g geometry, c colour, o cutout. The paper's set is `go`."""
    ensemble: int = Field(1, ge=1)
    """Draws of E-LatentLPIPS that are averaged for a sample, at so many times its time and memory; the paper takes one."""
    l1_weight: float = Field(0.0, ge=0)
    """Weight of mean |x0 - x1| added to a perceptual distance (0: Eq. 3), whatever the folder of the network says."""
    pseudo_huber_c: float | None = Field(None, gt=0)
    """c of sqrt(|x0 - x1|^2 + c^2) - c, with the norm over all of a latent; without a number 0.00054 sqrt(its dimension)."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.ensemble > 1 and (self.distance != "e_latent_lpips" or not self.augment):
            of = f"loss.distance {self.distance}" if self.distance != "e_latent_lpips" else "loss.augment without letters"
            raise ValueError(f"loss.ensemble is {self.ensemble} with {of}, expected 1: without augmentation all draws are the same")
        return self


class Distance(nn.Module):
    """d(x0, x1): (B, C, H, W) twice -> (B,). `n_uniform` random numbers a sample in [0, 1) decide its augmentations."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor], n_uniform: int = 0, network: nn.Module | None = None):
        super().__init__()
        self._function = function
        self.n_uniform = n_uniform
        self.network = network

    @property
    def settings(self) -> dict[str, Any] | None:
        """All there is to the perceptual network beside its weights."""
        return next((module.settings for module in self.modules() if isinstance(module, LatentLPIPS)), None)

    def forward(self, x0: Tensor, x1: Tensor, uniform: Tensor | None = None) -> Tensor:
        return self._function(x0, x1, uniform)


def _source(config: LossConfig) -> str | Path:
    if config.perceptual != "embedded":
        return config.perceptual
    return embedded_folder("pixel_vgg" if config.distance == "lpips" else "latent_vgg")


def _check_channels(config: LossConfig, found: int, latent_channels: int) -> None:
    expected = 3 if config.distance == "lpips" else latent_channels
    if found != expected:
        raise UserError(
            f"loss.perceptual: {config.perceptual} reads {found} channels, expected {expected}; name a network of this latent space"
        )


def _perceptual(config: LossConfig, latent_channels: int) -> LatentLPIPS:
    metric = LatentLPIPS.from_pretrained(_source(config), l1_weight=config.l1_weight)
    _check_channels(config, metric.net.config.in_channels, latent_channels)
    metric.check_values = False
    return metric


def perceptual_network(config: LossConfig, latent_channels: int) -> LatentVGGConfig | None:
    """The network of `config`'s distance, its weights not read; of one that is not in a folder here, as the released ones are. None: the
    distance has none. Raises UserError for a folder that holds none, or one of another latent space."""
    if config.distance in ("mse", "l1", "pseudo_huber"):
        return None
    folder = Path(_source(config))
    if config.perceptual in SPACES or not folder.is_dir():
        return LatentVGGConfig.pixels() if config.distance == "lpips" else LatentVGGConfig(in_channels=latent_channels)
    found = LatentVGGConfig.from_dict(read_config(folder, "LatentLPIPS").get("net"), folder)
    _check_channels(config, found.in_channels, latent_channels)
    return found


def build_distance(config: LossConfig, teacher: Teacher, device: torch.device | str = "cpu") -> Distance:
    """The distance of `config`, on `device`. Raises UserError when its network is missing or of another latent space."""
    name = config.distance
    if name == "mse":
        return Distance(lambda a, b, _: losses.mse(a, b))
    if name == "l1":
        return Distance(lambda a, b, _: losses.l1(a, b))
    if name == "pseudo_huber":
        return Distance(lambda a, b, _: losses.pseudo_huber(a, b, config.pseudo_huber_c))
    if name == "lpips":
        # A pixel's part of the gradient is below float16's smallest number.
        teacher.decoder_in_float32()
        pixel = DecodedLPIPS(teacher.decode, _perceptual(config, teacher.latent_shape[0]).to(device))
        return Distance(lambda a, b, _: pixel(a, b), network=pixel)
    metric = _perceptual(config, teacher.latent_shape[0]).to(device)
    if name == "latent_lpips":
        return Distance(lambda a, b, _: metric(a, b), network=metric)
    ensembled = ELatentLPIPS(metric, config.augment, config.ensemble)

    def e_latent_lpips(a: Tensor, b: Tensor, uniform: Tensor | None) -> Tensor:
        rows = None if uniform is None else uniform.reshape(-1, Augmentation.N_UNIFORM)
        return ensembled(a, b, parameters=ensembled.draw(len(a), a.shape[1:], uniform=rows, device=a.device))

    return Distance(e_latent_lpips, config.ensemble * Augmentation.N_UNIFORM, ensembled)
