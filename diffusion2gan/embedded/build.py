"""The stages that make the embedded models, in order; each resumes where it stopped.

    data -> autoencoder -> teacher (text encoder and U-Net) -> perceptual networks -> pack

`diffusion2gan embedded STAGE` runs one; everything it makes lies under one work folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffusion2gan.embedded import autoencoder, emoji, text_to_image


def build_autoencoder(work: Path, steps: int | None = None, decay_steps: int | None = None) -> Path:
    """Trains the autoencoder, folds the latent statistics in, writes `work/vae`. Returns that folder."""
    dataset = emoji.load()
    config = replace(autoencoder.CONFIG, steps=steps or autoencoder.CONFIG.steps, decay_steps=autoencoder.CONFIG.decay_steps if decay_steps is None else decay_steps)
    vae = autoencoder.train(dataset, work / "ae_f4", "f4", config)
    autoencoder.fold_latent_statistics(vae, dataset.images[emoji.reference_indices(dataset)])
    vae.save_pretrained(work / "vae")
    return work / "vae"


def build_teacher(work: Path, steps: int | None = None) -> Path:
    """Trains text encoder and U-Net on the latents of `work/vae`, writes the pipeline folder `work/teacher`."""
    dataset = emoji.load()
    vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last).eval()
    config = replace(text_to_image.CONFIG, steps=steps or text_to_image.CONFIG.steps)
    model = text_to_image.train(dataset, vae, work / "unet", config)
    text_to_image.save_pipeline(model, CLIPTokenizer.from_pretrained(work / "unet" / "tokenizer"), vae, work / "teacher")
    return work / "teacher"
