"""The embedded `AutoencoderKL`: 64 x 64 pixels to a 16 x 16 x 4 latent and back.

Loss: L1 + L2 + L1 of the image gradient + 1e-3 x KL, all means (per pixel and channel, per latent element).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffusion2gan.device import bf16_autocast, compile_for_one_shape
from diffusion2gan.embedded.emoji import EmojiDataset
from diffusion2gan.fit import FitConfig, fit
from diffusion2gan.images import to_tensor

# name -> (block_out_channels, latent channels). "f8" lost the comparison in docs/reproduction.md, "The embedded teacher".
FORMS = {"f4": ((16, 32, 64), 4), "f8": ((16, 32, 64, 128), 16)}
CONFIG = FitConfig(steps=8000, batch_size=32, learning_rate=1e-3, decay_steps=2000, compile=True)
KL_WEIGHT = 1e-3


def new_autoencoder(form: str = "f4") -> AutoencoderKL:
    """An untrained `AutoencoderKL` of one of FORMS, channels-last."""
    channels, latent = FORMS[form]
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    return model.to(memory_format=torch.channels_last)


def _gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., :, 1:] - d[..., :, :-1]).abs().mean()


def psnr(model: AutoencoderKL, images: np.ndarray, batch: int = 64) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of `images` (uint8, range 255), latents at their mean."""
    error = 0.0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            x = to_tensor(images[start : start + batch])
            y = model.decode(model.encode(x).latent_dist.mode()).sample
            error += ((y.clamp(-1, 1) - x) * 127.5).double().square().mean().item() * len(x)
    return 10 * math.log10(255**2 / (error / len(images)))


def train(dataset: EmojiDataset, folder: Path, form: str = "f4", config: FitConfig = CONFIG) -> AutoencoderKL:
    """Trains in `folder`, resumably; returns the EMA model."""
    model = new_autoencoder(form)
    train_rows = dataset.indices("train")
    held_out = np.concatenate([dataset.indices("cell"), dataset.indices("concept")])[::4]
    validation = dataset.images[np.sort(held_out)]

    def objective(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().sum() / noise.numel()
        mse = (y - x).square().mean()
        return (y - x).abs().mean() + mse + _gradient_l1(y, x) + KL_WEIGHT * kl, mse, kl

    compiled = compile_for_one_shape(objective, torch.device("cpu"), "compile") if config.compile else objective
    latent = (FORMS[form][1], *(2 * [64 // 2 ** (len(FORMS[form][0]) - 1)]))

    def loss_of_step(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = np.sort(rng.choice(train_rows, config.batch_size))
        x = to_tensor(dataset.images[rows])
        noise = torch.randn((len(x), *latent), generator=generator)
        # 1.5x on a Zen 4.
        with bf16_autocast("cpu"):
            loss, mse, kl = compiled(x, noise)
        return loss, {"mse": mse.detach(), "kl": kl.detach()}

    average = new_autoencoder(form)

    def validate(state: dict[str, Tensor]) -> dict[str, float]:
        average.load_state_dict(state)
        return {"psnr": psnr(average, validation)}

    average.load_state_dict(fit(model, loss_of_step, config, folder, validate, validate_every=500))
    return average.eval()


@torch.no_grad()
def fold_latent_statistics(model: AutoencoderKL, images: np.ndarray, batch: int = 128) -> None:
    """Makes latents zero-mean and unit-variance per channel over `images`, inside the network.

    The stock pipeline knows one scaling factor and no shift, so the per-channel mean m and deviation s go into
    `quant_conv` (z -> (z - m) / s) and `post_quant_conv` (its inverse): reconstructions are unchanged.
    """
    latents = torch.cat([model.encode(to_tensor(images[i : i + batch])).latent_dist.mode() for i in range(0, len(images), batch)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    encode, decode = model.quant_conv, model.post_quant_conv
    encode.bias[:channels].sub_(mean).div_(deviation)
    encode.weight[:channels].div_(deviation.view(-1, 1, 1, 1))
    # The other half of quant_conv's output is the log-variance, which scales by 1 / s^2.
    encode.bias[channels:].sub_(2 * deviation.log())
    decode.bias.add_(decode.weight[:, :, 0, 0] @ mean)
    decode.weight.mul_(deviation.view(1, -1, 1, 1))
