"""Where a network that is trained lies, and how: G and D alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from diffusion2gan.teachers.attention import plain_attention_on_cpu
from diffusion2gan.training.optimizer import OptimizerName
from diffusion2gan.training.sharding import shard


@dataclass(frozen=True)
class Placement:
    """`sharded`: split over the `world` processes (FSDP2), else whole in each. `flat`: another library keeps the weights one after the
    other (DeepSpeed)."""

    device: torch.device
    world: int
    sharded: bool
    optimizer: OptimizerName
    flat: bool = False

    @property
    def memory_format(self) -> Literal["split", "channels_last", "contiguous"]:
        """Of the weights. The 8-bit optimiser keeps those it trains contiguous."""
        return "split" if self.sharded else "channels_last" if self.optimizer == "adamw" and not self.flat else "contiguous"

    def place(self, module: nn.Module, network: nn.Module | None, latent_shape: tuple[int, ...]) -> None:
        """Moves `module` there, in place. network: the part of it with the teacher's attention, if any; latent_shape: (C, H, W)."""
        module.to(self.device)
        if network is not None:
            plain_attention_on_cpu(network, latent_shape[1] * latent_shape[2], self.device)
        if self.sharded:
            shard(module, self.device, self.world)
        elif self.memory_format == "channels_last":
            module.to(memory_format=torch.channels_last)
