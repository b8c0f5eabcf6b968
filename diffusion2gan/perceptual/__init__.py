"""Perceptual distances that read latents (section 3.2): F, LatentLPIPS (Eq. 2 without the decoder) and E-LatentLPIPS (Eq. 3).

The trainer needs `ELatentLPIPS` alone; the others are what it is made of.
"""

from diffusion2gan.perceptual.augmentations import Augmentation
from diffusion2gan.perceptual.e_latent_lpips import ELatentLPIPS
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS
from diffusion2gan.perceptual.latent_vgg import LatentVGG
from diffusion2gan.perceptual.lpips import DecodedLPIPS
from diffusion2gan.perceptual.space import LatentSpace

__all__ = ["Augmentation", "DecodedLPIPS", "ELatentLPIPS", "LatentLPIPS", "LatentSpace", "LatentVGG"]
