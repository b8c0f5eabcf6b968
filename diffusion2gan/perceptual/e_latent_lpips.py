"""E-LatentLPIPS, Eq. 3: LatentLPIPS under random augmentations that both inputs share."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augmentations import Augmentation, AugmentationParameters
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS


class ELatentLPIPS(nn.Module):
    """d_E-LatentLPIPS (Eq. 3): the mean over T of d_LatentLPIPS(T x0, T x1), (B,).

    The expectation is estimated by `ensemble` draws a call; the paper uses one. `letters` choose T (see `augmentations`):
    the paper names geometry and cutout ("go"), flips and turns are added here by default. The metric's L1 term, if it
    has one, compares the inputs as they came.
    """

    def __init__(self, metric: LatentLPIPS, letters: str = "bgo", ensemble: int = 1):
        super().__init__()
        if ensemble < 1:
            raise UserError(f"ensemble is {ensemble}, expected 1 or more: the draws averaged in one call")
        self.metric = metric
        self.augmentation = Augmentation(letters)
        self.ensemble = ensemble

    def draw(
        self,
        batch: int,
        shape: tuple[int, int, int] | torch.Size,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        uniform: Tensor | None = None,
    ) -> AugmentationParameters:
        """Parameters for `batch` samples of `shape` (C, H, W), as `Augmentation.draw`.

        Every tensor (and `uniform`) has batch x ensemble rows; those of one sample stand together.
        """
        return self.augmentation.draw(batch * self.ensemble, shape, generator, device, uniform)

    def forward(
        self, x0: Tensor, x1: Tensor, parameters: AugmentationParameters | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Distance of x0 from the target x1, both (B, C, H, W) scaled as the U-Net sees them -> (B,), 0 or more.

        `parameters` come from `draw`; without them they are drawn here (from `generator`). A call with parameters compiles
        as one graph. UserError if their rows are not B x ensemble.
        """
        batch = x0.shape[0]
        if parameters is None:
            parameters = self.draw(batch, x0.shape[1:], generator, x0.device)
        elif parameters.affine.shape[0] != batch * self.ensemble:
            rows = parameters.affine.shape[0]
            raise UserError(f"parameters have {rows} rows, expected {batch} x {self.ensemble}; draw them with this object's draw")
        many0, many1 = x0, x1
        if self.ensemble > 1:
            many0, many1 = x0.repeat_interleave(self.ensemble, dim=0), x1.repeat_interleave(self.ensemble, dim=0)
        distance = self.metric.distance(self.augmentation.apply(many0, parameters), self.augmentation.apply(many1, parameters))
        distance = distance.view(batch, self.ensemble).mean(dim=1)
        return distance + self.metric.l1_weight * self.metric.l1(x0, x1) if self.metric.l1_weight else distance

    @classmethod
    def from_pretrained(cls, folder: str | Path, letters: str = "bgo", ensemble: int = 1, clamp: bool = False) -> Self:
        """E-LatentLPIPS over the metric that `LatentLPIPS.save_pretrained` wrote to `folder`; errors as `LatentLPIPS.from_pretrained`."""
        return cls(LatentLPIPS.from_pretrained(folder, clamp), letters, ensemble)
