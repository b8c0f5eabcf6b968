"""E-LatentLPIPS, Eq. 3: LatentLPIPS under random augmentations that both inputs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augmentations import Augmentation, AugmentationParameters
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS
from diffusion2gan.perceptual.space import LatentSpace


class ELatentLPIPS(nn.Module):
    """d_E-LatentLPIPS (Eq. 3): the mean over T of d_LatentLPIPS(T x0, T x1), (B,).

        loss = ELatentLPIPS.from_pretrained("sd15")
        loss(x0, x1).mean().backward()

    The expectation is estimated by `ensemble` draws a call; the paper uses one. `augment` chooses T (see `augmentations`):
    the paper names geometry and cutout ("go"), flips and turns are added here by default, "" (or None) is LatentLPIPS itself.
    The metric's L1 term, if it has one, compares the inputs as they came.
    """

    def __init__(self, metric: LatentLPIPS, augment: str | None = "bgo", ensemble: int = 1):
        super().__init__()
        if not isinstance(ensemble, int) or ensemble < 1:
            raise UserError(f"ensemble is {ensemble!r}, expected a whole number of 1 or more: the draws averaged in one call")
        self.metric = metric
        self.augmentation = Augmentation(augment)
        self.ensemble = ensemble

    def draw(
        self,
        batch: int,
        shape: tuple[int, int, int] | torch.Size,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        uniform: Tensor | None = None,
    ) -> AugmentationParameters:
        """Parameters for `batch` samples of `shape` (C, H, W), as `Augmentation.draw`; by default on the network's device.

        Every tensor (and `uniform`) has batch x ensemble rows; those of one sample stand together. UserError for a shape that is not
        (C, H, W).
        """
        device = next(self.metric.parameters()).device if device is None else device
        return self.augmentation.draw(batch * self.ensemble, shape, generator, device, uniform)

    def forward(
        self,
        x0: Tensor,
        x1: Tensor | None = None,
        parameters: AugmentationParameters | None = None,
        generator: torch.Generator | None = None,
        *,
        features: Sequence[Tensor] | None = None,
        raw: bool = False,
        spatial: bool = False,
    ) -> Tensor:
        """Distance of x0 from the target x1, both (B, C, H, W) scaled as the U-Net sees them -> (B,), 0 or more.

        `parameters` come from `draw`; without them they are drawn here (from `generator`). A call with parameters compiles
        as one graph. `features`: `target_features(x1, parameters)` of the same parameters. `raw`: the inputs are the
        autoencoder's own latents. `spatial`: (B, H, W) instead, a map in the coordinates of the augmented latents.
        UserError if the parameters were drawn for other letters, another H x W or other than B x ensemble rows, or a generator
        is beside them, and as `LatentLPIPS.forward`.
        """
        if generator is not None and parameters is not None:
            raise UserError("generator was given beside parameters, expected one of them: these are drawn already; leave generator away")
        if features is not None and parameters is None:
            raise UserError("features were given without the parameters they were computed with; pass both")
        if spatial and (self.ensemble > 1 or self.metric.l1_weight) and set(self.augmentation.letters) & set("bg"):
            raise UserError(
                "spatial=True gives a map in augmented coordinates, which other draws and the L1 term do not share; "
                "use ensemble=1 and l1_weight=0, or augment without b and g"
            )
        self.metric.check_unread(x1, features)
        x0, x1 = self.metric.checked(x0, x1, raw)
        parameters = self._checked_parameters(x0, parameters, generator)
        target = None if x1 is None or features is not None else self._augmented(x1, parameters)
        distance = self.metric.distance(self._augmented(x0, parameters), target, features=features, spatial=spatial)
        distance = distance.unflatten(0, (-1, self.ensemble)).mean(dim=1)
        return distance + self.metric.l1_weight * self.metric.l1(x0, x1, spatial) if self.metric.l1_weight else distance

    def target_features(self, x1: Tensor, parameters: AugmentationParameters, raw: bool = False) -> list[Tensor]:
        """Features of a target under `parameters`, for `features=` of calls with the same ones; as `LatentLPIPS.target_features`."""
        x1 = self.metric.checked(x1, None, raw, "x1")[0]
        return self.metric.features_of_target(self._augmented(x1, self._checked_parameters(x1, parameters, None)))

    def _checked_parameters(
        self, x0: Tensor, parameters: AugmentationParameters | None, generator: torch.Generator | None
    ) -> AugmentationParameters:
        if parameters is None:
            return self.draw(x0.shape[0], x0.shape[1:], generator, x0.device)
        rows = parameters.affine.shape[0]
        if rows != x0.shape[0] * self.ensemble:
            raise UserError(f"parameters have {rows} rows, expected {x0.shape[0]} x {self.ensemble}; draw them with this object's draw")
        return parameters

    def _augmented(self, x: Tensor, parameters: AugmentationParameters) -> Tensor:
        many = x.repeat_interleave(self.ensemble, dim=0) if self.ensemble > 1 else x
        return self.augmentation.apply(many, parameters)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the metric, as `LatentLPIPS.save_pretrained`; `augment` and `ensemble` belong to the loss and are chosen when it is loaded."""
        self.metric.save_pretrained(folder, dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        augment: str | None = "bgo",
        ensemble: int = 1,
        clamp: bool = True,
        l1_weight: float | None = None,
        space: LatentSpace | None = None,
        revision: str | None = None,
    ) -> Self:
        """E-LatentLPIPS over the metric of `source`: "sd15", "sd21", "sdxl", "sd3", "flux", "embedded", a folder, a file or a hub
        repository; see `LatentLPIPS.from_pretrained`."""
        return cls(LatentLPIPS._from_source(source, clamp, l1_weight, space, revision), augment, ensemble)
