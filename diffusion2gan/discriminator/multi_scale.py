"""D(c, z, x) of paper section 3.3 and Figure 5: the teacher's network, fine-tuned to tell real latents from generated ones.

Legend: B batch, C latent channels, H and W latent size; a map of logits is (B, 1, h, w), one for each read-out.

- Weights begin as the teacher's; text enters by the teacher's own cross-attention.
- z enters by one zero-initialised convolution beside the input convolution.
- Every encoder resolution below the first receives the latent resized to it, by a zero-initialised projection.
- Every decoder resolution has three read-outs; each gives a map of logits.

So at the beginning the features are the teacher's, exactly, and each addition grows from nothing.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.config import Section
from diffusion2gan.discriminator.unet_taps import READOUTS, UNetTaps
from diffusion2gan.errors import UserError
from diffusion2gan.generator import Evaluate, trainable_copy
from diffusion2gan.losses import Maps, mean_over_maps
from diffusion2gan.teachers.attention import checkpoint_as_computed
from diffusion2gan.teachers.protocol import Teacher, TextCondition


class DiscriminatorConfig(Section):
    """Which discriminator, and which of its parts: the rows of Table 2."""

    kind: Literal["diffusion", "scratch"] = "diffusion"
    """`diffusion`: the teacher's network. `scratch`: a convolutional one in GigaGAN's manner, Table 2's baseline."""
    noise: bool = True
    """Whether D sees z, the noise that G was given."""
    multi_scale: bool = True
    """Resized latents into every encoder resolution and read-outs at every decoder resolution; otherwise one of each."""
    timestep: int = Field(0, ge=0)
    """The timestep at which the teacher's network reads latents: 0, they carry no noise."""
    head_channels: int = Field(128, ge=1)
    """Channels between the two convolutions of a read-out, at most; never more than its feature has."""
    gradient_checkpointing: bool = False
    """Computes activations twice instead of keeping them: less memory, slower."""

    @model_validator(mode="after")
    def _checkpointing(self) -> DiscriminatorConfig:
        if self.kind == "scratch" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is true with kind scratch, expected false: only the teacher's network has it")
        return self


class Discriminator(Protocol):
    """What the trainer needs of a discriminator."""

    config: DiscriminatorConfig
    map_names: list[str]
    """Of the maps that it returns, in their order."""

    def __call__(self, latent: Tensor, noise: Tensor, condition: TextCondition) -> dict[str, Tensor]:
        """x (B, C, H, W), z (B, C, H, W), c of B rows -> maps of logits (B, 1, h, w) by name, in float32 or better."""
        ...


def resized(latent: Tensor, size: torch.Size) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), antialiased."""
    return F.interpolate(latent, size=tuple(size), mode="bilinear", antialias=True)


class Readout(nn.Module):
    """A feature (B, C, h, w) -> a map of logits (B, 1, h, w)."""

    def __init__(self, channels: int, hidden: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups if channels % groups == 0 else 1, channels)
        self.conv = nn.Conv2d(channels, min(hidden, channels), 3, padding=1)
        self.out = nn.Conv2d(min(hidden, channels), 1, 1)
        # Small, so that D begins undecided; not zero, or nothing before it would learn at the first step.
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.constant_(self.out.get_parameter("bias"), 0.0)

    def forward(self, feature: Tensor) -> Tensor:
        logits = self.out(F.silu(self.conv(F.silu(self.norm(feature)))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _zero_convolution(in_channels: int, out_channels: int, size: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


class MultiScaleDiscriminator(nn.Module):
    """The discriminator of Figure 5 around `network`, whose weights it trains.

    forward(latent (B, C, H, W), noise (B, C, H, W), condition of B rows) -> maps of logits by name, `RESOLUTION.READOUT`, resolution 0
    the lowest. Twelve maps for SD 1.5, nine for SDXL; without `multi_scale` the one of the last decoder block's output.
    Raises UserError for a network that is no U-Net and for a timestep outside the teacher's schedule.
    """

    def __init__(self, network: Any, evaluate: Evaluate, config: DiscriminatorConfig):
        super().__init__()
        self.network = network
        self.config = config
        self._evaluate = evaluate
        self._taps = UNetTaps(network)
        # The last feature is read, not converted to a prediction: parameters without a gradient would stall DDP.
        network.conv_norm_out = network.conv_out = nn.Identity()
        channels = network.conv_in.in_channels
        self.noise_in = _zero_convolution(channels, self._taps.input_channels(), 3) if config.noise else None
        encoder = self._taps.encoder_channels() if config.multi_scale else []
        self.latent_in = nn.ModuleList(_zero_convolution(channels, c, 1) for c in encoder)
        decoder = self._taps.decoder_channels()
        last = f"{len(decoder) - 1}.joined"
        # A module's name may not hold a point.
        self._maps = [(i, name) for i in range(len(decoder)) for name in READOUTS if config.multi_scale or f"{i}.{name}" == last]
        self.map_names = [f"{i}.{name}" for i, name in self._maps]
        groups = getattr(network.config, "norm_num_groups", None) or 1
        self.readouts = nn.ModuleList(Readout(decoder[i][name], config.head_channels, groups) for i, name in self._maps)

    @classmethod
    def from_teacher(cls, teacher: Teacher, config: DiscriminatorConfig | None = None) -> MultiScaleDiscriminator:
        """A discriminator that starts as a copy of the teacher's network, trainable, in float32 or better."""
        config = config or DiscriminatorConfig()
        if config.timestep >= len(teacher.alphas_cumprod):
            raise UserError(
                f"discriminator.timestep is {config.timestep}, expected 0 to {len(teacher.alphas_cumprod) - 1}, the teacher's schedule"
            )
        network = trainable_copy(teacher)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpoint_as_computed)
        return cls(network, teacher.evaluate, config).to(teacher.device, network.dtype)

    def forward(self, latent: Tensor, noise: Tensor, condition: TextCondition) -> dict[str, Tensor]:
        dtype = next(self.network.parameters()).dtype
        latent, noise, condition = latent.to(dtype), noise.to(dtype), condition.to(dtype)
        timestep = torch.full((), self.config.timestep, device=latent.device)

        def feed(block: int, hidden: Tensor) -> Tensor:
            return hidden + self.latent_in[block - 1](resized(latent, hidden.shape[2:]))

        features = self._taps.run(
            lambda: self._evaluate(latent, timestep, condition, self.network),
            None if self.noise_in is None else self.noise_in(noise),
            feed if self.config.multi_scale else None,
        )
        logits = [head(features[i][name]) for (i, name), head in zip(self._maps, self.readouts, strict=True)]
        return dict(zip(self.map_names, logits, strict=True))


def score(maps: Maps) -> Tensor:
    """s of each sample: the mean over maps of the mean over locations, (B,). Positive: taken for real."""
    return mean_over_maps(maps.values())
