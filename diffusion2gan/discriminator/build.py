"""The one door through which a recipe's discriminator comes in."""

from __future__ import annotations

import torch
from torch import nn

from diffusion2gan.discriminator.convolutional import ConvolutionalDiscriminator
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, MultiScaleDiscriminator
from diffusion2gan.teachers.protocol import Teacher


def build_discriminator(config: DiscriminatorConfig, teacher: Teacher, seed: int = 0) -> nn.Module:
    """The discriminator of `config`, new, on the teacher's device. Its own layers are drawn from `seed` alone.

    Raises UserError when it cannot be built around this teacher.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.kind == "scratch":
            return ConvolutionalDiscriminator.for_teacher(teacher, config)
        return MultiScaleDiscriminator.from_teacher(teacher, config)
