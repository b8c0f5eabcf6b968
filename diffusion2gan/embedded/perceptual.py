"""The embedded perceptual networks: VGG16 at quarter width, classifying the emoji in latent space and in pixels.

Four heads (concept, subcategory, style, tone), pictures bent and tinted at random before they are encoded. The latent
network keeps two of VGG's poolings, the pixel network (for the LPIPS row of Table 1) all five. Heads of the distance are
ones until they are calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from diffusion2gan.embedded.emoji import STYLES, TONES, EmojiDataset
from diffusion2gan.fit import FitConfig
from diffusion2gan.images import to_tensor
from diffusion2gan.perceptual import LatentLPIPS, LatentSpace
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.train import train_classifier

WIDTH = 0.25
CONFIG = FitConfig(
    steps=4000,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=200,
    decay_steps=2000,
    weight_decay=0.05,
    ema_decay=0.998,
)


def labels_of(dataset: EmojiDataset) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Classes of each head and the labels (N,) of every picture; a concept that training has not seen is -1."""
    train_concepts = sorted({r.concept for r in dataset.records if r.split == "train"})
    concept = {c: i for i, c in enumerate(train_concepts)}
    subcategory = {s: i for i, s in enumerate(sorted({r.subcategory for r in dataset.records}))}
    rows = [(concept.get(r.concept, -1), subcategory[r.subcategory], STYLES.index(r.style), TONES.index(r.tone)) for r in dataset.records]
    sizes = {"concept": len(concept), "subcategory": len(subcategory), "style": len(STYLES), "tone": len(TONES)}
    return sizes, dict(zip(sizes, torch.tensor(rows).unbind(1), strict=True))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, each turned by up to 20 degrees, scaled by 0.75 to 1.25, moved by up to an
    eighth, its colours scaled and shifted; what comes in from outside is white."""
    n = len(images)
    u = torch.rand(n, 10, generator=generator) * 2 - 1
    angle, scale = u[:, 0] * 0.35, 1 + 0.25 * u[:, 1]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    affine = torch.stack([torch.stack([cos, -sin, 0.25 * u[:, 2]], 1), torch.stack([sin, cos, 0.25 * u[:, 3]], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # Zero padding of "distance from white" is white padding.
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1
    contrast, tint = 1 + 0.2 * u[:, 4:7], 0.1 * u[:, 7:10]
    return (moved * contrast[:, :, None, None] + tint[:, :, None, None]).clamp(-1, 1)


def encoder(vae: AutoencoderKL | None) -> Callable[[Tensor], Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] to what the network reads: scaled latents, or without a `vae` the pictures themselves."""
    if vae is None:
        return lambda x: x
    factor = vae.config.scaling_factor
    return lambda x: vae.encode(x).latent_dist.mode() * factor


def train(
    dataset: EmojiDataset, vae: AutoencoderKL | None, folder: Path, config: FitConfig = CONFIG, device: str = "cpu"
) -> tuple[LatentLPIPS, dict[str, float]]:
    """Trains the latent network, or with `vae=None` the pixel network, in `folder`. Returns the uncalibrated distance and the
    accuracies on the held-out (concept, style) cells."""
    encode = encoder(vae)
    shape = LatentVGGConfig.pixels(WIDTH) if vae is None else LatentVGGConfig(in_channels=vae.config.latent_channels, width=WIDTH)
    sizes, labels = labels_of(dataset)

    def batches(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = dataset.draw_training_rows(rng, config.batch_size)
        with torch.no_grad():
            x = encode(distort(to_tensor(dataset.images[rows]), generator).to(device).contiguous(memory_format=torch.channels_last))
        return x.float(), {k: v[rows].to(device) for k, v in labels.items()}

    held_out = dataset.indices("cell")
    parts = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
    with torch.no_grad():
        inputs = [encode(to_tensor(dataset.images[rows]).to(device)) for rows in parts]
    truth = [{k: v[rows].to(device) for k, v in labels.items()} for rows in parts]
    backbone, accuracy = train_classifier(shape, sizes, batches, config, folder, lambda: zip(inputs, truth, strict=True), device)
    # The autoencoder's statistics are folded into it: its own latents are the scaled ones.
    return LatentLPIPS(backbone.cpu(), space=LatentSpace()), accuracy
