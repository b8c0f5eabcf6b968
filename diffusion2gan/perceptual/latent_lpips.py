"""LatentLPIPS: l(F(x0), F(x1)) of Eq. 2 without the decoder, the calibrated distance of features.

B, C, H, W: batch, latent channels, height and width of the latent. No augmentation here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.checkpoint import load_weights, read_config, read_weights, save_folder
from diffusion2gan.perceptual.gradient_scale import computes_in_float16, with_scaled_gradients
from diffusion2gan.perceptual.latent_vgg import LatentVGG, LatentVGGConfig
from diffusion2gan.perceptual.released import LICENCE, LicenceNotice, resolve
from diffusion2gan.perceptual.space import LatentSpace, Origin, is_number

# The released metric's, inside the root: features of zero stay zero, and their gradient is finite.
EPS = 1e-8

Record = TypeVar("Record", LatentSpace, Origin)


def unit_normalized(features: Tensor) -> Tensor:
    """f / sqrt(|f|^2 + 1e-8) along the channels of (B, C, h, w), in float32 or better."""
    # The distance of two close inputs is a difference of nearly equal numbers: bf16 would leave nothing of it.
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    return f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + EPS)


class Head(nn.Module):
    """One linear head: a 1 x 1 convolution to one channel without bias, as a named weight (`model.1.weight`)."""

    def __init__(self, channels: int):
        super().__init__()
        # Index 0 is LPIPS' dropout. It belongs to calibration; in a loss it would make d(x, x) a matter of luck.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
        nn.init.ones_(self.weight)

    @property
    def weight(self) -> Tensor:
        """(1, C, 1, 1), not negative unless it was loaded so."""
        convolution = self.model[1]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight


class LatentLPIPS(nn.Module):
    """d_LatentLPIPS of section 3.2: (x0, x1) -> (B,), never negative, 0 for equal inputs, symmetric.

    Five feature maps are normalised to unit length along the channels; their squared difference is weighted per channel
    by a non-negative head, averaged over locations and summed over maps. `l1_weight` adds mean |x0 - x1|, which is in
    the released package and not in the paper: 0 by default. Heads of ones are the uncalibrated distance.
    `space` says how raw latents are scaled, for `raw=True`; None where that is not known. `licence` and `origin`: of weights
    that are not this project's; they are saved with them, and the licence is shown whenever they are loaded.

    State-dict names are those of the released checkpoints (`net.slice1.0.weight`, `lin0.model.1.weight`).
    """

    def __init__(
        self,
        net: LatentVGG,
        l1_weight: float = 0.0,
        calibrated: bool = False,
        space: LatentSpace | None = None,
        licence: str | None = None,
        origin: Origin | None = None,
    ):
        super().__init__()
        self.net = net
        self.l1_weight = _checked_l1_weight(l1_weight)
        self.calibrated = calibrated
        self.space = space
        self.licence = licence
        self.origin = origin
        self.check_values = True
        """Whether inputs are looked at for NaN and for missing scaling; a trainer, which looks at the loss, switches it off."""
        self._found_finite = self._deviation_settled = False
        for i, channels in enumerate(net.channels):
            self.add_module(f"lin{i}", Head(channels).requires_grad_(False))

    @property
    def settings(self) -> dict[str, Any]:
        """All there is beside the weights, as it is saved."""
        space = self.space and asdict(self.space)
        own = {"l1_weight": self.l1_weight, "calibrated": self.calibrated, "space": space, "net": asdict(self.net.config)}
        return own | ({"licence": self.licence} if self.licence else {}) | ({"origin": asdict(self.origin)} if self.origin else {})

    def extra_repr(self) -> str:
        """What is no module: the settings beside the network's."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings.items() if key != "net")

    @property
    def lins(self) -> list[Head]:
        """The five heads in order."""
        return [self.get_submodule(f"lin{i}") for i in range(len(self.net.channels))]  # type: ignore[misc]

    def target_features(self, x1: Tensor, raw: bool = False) -> list[Tensor]:
        """Unit-normalised features of a target (B, C, H, W), for `features=`: five maps (B, channels[i], h_i, w_i).

        `raw`: the target is the autoencoder's own latent.

        They carry no graph unless `x1` wants gradients (or the network is being trained): a target is data, and its half
        of the pass then keeps nothing for the backward pass.
        """
        x1 = self.checked(x1, None, raw, "x1")[0]
        return self.features_of_target(x1)

    def features_of_target(self, x1: Tensor) -> list[Tensor]:
        """`target_features` of a target that was checked and scaled."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and (x1.requires_grad or self.net.trainable)):
            return self._features(x1)

    def _features(self, x: Tensor) -> list[Tensor]:
        weight = next(self.net.parameters())
        scale = torch.is_grad_enabled() and not weight.requires_grad and computes_in_float16(weight.dtype, x.device)
        return [unit_normalized(f) for f in (with_scaled_gradients(self.net, x) if scale else self.net(x))]

    def forward(
        self, x0: Tensor, x1: Tensor | None = None, *, features: Sequence[Tensor] | None = None, raw: bool = False, spatial: bool = False
    ) -> Tensor:
        """Distance of x0 from the target x1, both (B, C, H, W) scaled as the U-Net sees them -> (B,), or (B, H, W) if `spatial`.

        `features` are `target_features(x1)` computed before; with them x1 is for the L1 term alone, and refused without
        one. `raw`: the inputs are the autoencoder's own latents and are scaled here. The result is float32, or float64 if
        the network is.
        UserError if the shapes differ, neither x1 nor features are given, or an input cannot be a latent.
        """
        self.check_unread(x1, features)
        x0, x1 = self.checked(x0, x1, raw)
        distance = self.distance(x0, x1, features=features, spatial=spatial)
        return distance + self.l1_weight * self.l1(x0, x1, spatial) if self.l1_weight else distance

    def check_unread(self, x1: Tensor | None, features: Sequence[Tensor] | None) -> None:
        """UserError for an x1 that nothing would read."""
        if x1 is not None and features is not None and not self.l1_weight:
            raise UserError("x1 was given beside features, expected one of them: without an L1 term x1 is not read; leave x1 away")

    def checked(self, x0: Tensor, x1: Tensor | None, raw: bool, name: str = "x0") -> tuple[Tensor, Tensor | None]:
        """The inputs, scaled if `raw`. UserError for integers, empty batches, a wrong number of channels, different shapes, NaN
        or infinity, and for raw latents of an unknown scale.

        What needs the values is looked at in every call on the CPU, and on another device, which would have to be waited
        for, in the first; not inside a compiled graph.
        """
        channels = self.net.config.in_channels
        for which, x in ((name, x0), ("x1", x1)):
            if x is None:
                continue
            if not isinstance(x, Tensor):
                raise UserError(f"{which} is a {type(x).__name__}, expected a torch.Tensor (B, {channels}, H, W)")
            if x.ndim != 4 or x.shape[1] != channels:
                packed = x.ndim == 3 and x.shape[2] == 4 * channels
                remedy = "unpack these 2 x 2 patches" if packed else "use the checkpoint of this autoencoder's latents"
                if x.ndim == 5:
                    remedy = "of video give each frame as a latent: x.transpose(1, 2).flatten(0, 1)"
                raise UserError(f"{which} has shape {tuple(x.shape)}, expected (B, {channels}, H, W); {remedy}")
            if x.numel() == 0:
                raise UserError(f"{which} has shape {tuple(x.shape)}, expected at least one latent; leave empty batches out")
            if not x.is_floating_point():
                raise UserError(f"{which} is of {x.dtype}, expected floating-point latents; pass what the autoencoder's encode gives")
        if x1 is not None:
            _check_shapes(x0, x1)
        if raw:
            if self.space is None:
                raise UserError(
                    "raw=True, but the scale of this metric's latents is not known; scale them, "
                    "or load it with from_pretrained(..., space=diffusion2gan.perceptual.LatentSpace(scale, shift))"
                )
            x0, x1 = self.space.scaled(x0), None if x1 is None else self.space.scaled(x1)
        if self.check_values and not torch.compiler.is_compiling():
            if x0.device.type == "cpu" or not self._found_finite:
                self._check_finite({name: x0} if x1 is None else {name: x0, "x1": x1})
                self._found_finite = True
            target = x0 if name == "x1" else x1
            # Said once. On a CPU a later call may be the first that forgets the scaling.
            if not self._deviation_settled and target is not None:
                self._deviation_settled = not self._looks_plausible(target, raw) or x0.device.type != "cpu"
        return x0, x1

    @torch.no_grad()
    def _check_finite(self, inputs: Mapping[str, Tensor]) -> None:
        for name, x in inputs.items():
            if not x.isfinite().all():
                raise UserError(f"{name} has NaN or infinite values, expected finite latents; look where they come from")

    @torch.no_grad()
    def _looks_plausible(self, target: Tensor, raw: bool) -> bool:
        """Whether the target's deviation is that of scaled latents; if not, warns."""
        deviation = target.float().std(correction=0).item()
        # Scaled latents of real pictures have about 1, those of a flat colour less; unscaled ones 1 / scale, those scaled twice scale. The
        # limits lie between, where there is a between: not for a scale near 1.
        scale = self.space.scale if self.space else 1.0
        apart = scale <= 0.4
        if deviation > (min(2.5, scale**-0.7) if apart else 2.5) and not raw:
            found, advice = "", "these look like unscaled latents; multiply them by the autoencoder's scaling_factor, or pass raw=True"
        elif apart and deviation < max(0.3, scale**0.7) and raw:
            found, advice = " once scaled", "these look like scaled latents; leave raw=True away"
        else:
            return True
        warnings.warn(f"x1 has a standard deviation of {deviation:.2f}{found}, expected about 1: {advice}", stacklevel=5)
        return False

    def l1(self, x0: Tensor, x1: Tensor | None, spatial: bool = False) -> Tensor:
        """mean |x0 - x1| over channels and locations, (B,), or over channels, (B, H, W)."""
        if x1 is None:
            raise UserError(f"no x1 was given, expected it beside its features as l1_weight is {self.l1_weight}; pass x1 or set that to 0")
        _check_shapes(x0, x1)
        work = torch.promote_types(x0.dtype, torch.float32)
        return (x0.to(work) - x1.to(work)).abs().mean(dim=1 if spatial else (1, 2, 3))

    def distance(self, x0: Tensor, x1: Tensor | None = None, *, features: Sequence[Tensor] | None = None, spatial: bool = False) -> Tensor:
        """`forward` without the L1 term: the part of Eq. 3 that is inside the expectation."""
        if features is None:
            if x1 is None:
                raise UserError("neither x1 nor features were given, expected one of them: the target of the distance")
            _check_shapes(x0, x1)
            features = self.features_of_target(x1)
        total: Tensor | None = None
        for f0, f1, head in zip(self._features(x0), features, self.lins, strict=True):
            if f0.shape != f1.shape:
                shapes = f"{tuple(f1.shape)}, expected {tuple(f0.shape)}"
                raise UserError(f"cached features have shape {shapes}; compute them with target_features of this metric")
            # Not a convolution: autocast would take the small differences down to bf16.
            layer = ((f0 - f1).square() * head.weight.to(f0.dtype)).sum(dim=1)  # (B, h, w)
            if spatial:
                layer = F.interpolate(layer[:, None], size=x0.shape[2:], mode="bilinear", align_corners=False)[:, 0]
            else:
                layer = layer.mean(dim=(1, 2))
            total = layer if total is None else total + layer
        assert total is not None
        return total

    def load_weights(self, state: Mapping[str, Tensor], source: str | Path, clamp: bool = True) -> None:
        """Loads network and heads from a state dict, ours or a released one (whose heads are there twice, as `lin0.` and `lins.0.`).

        Negative head weights would reward a difference: `clamp` sets them to 0, without it they stay; either way a warning
        says how many there are. UserError for tensors that are missing or do not fit. `source` is the name used in messages.
        """
        kept = {name: value for name, value in state.items() if not name.startswith("lins.")}
        for name, value in kept.items():
            if not value.isfinite().all():
                remedy = "calibrate the heads again" if name.startswith("lin") else "download or train it again"
                raise UserError(f"{source}: {name} has NaN or infinite values, expected finite numbers; {remedy}")
        negative = total = 0
        for i in range(len(self.lins)):
            name = f"lin{i}.model.1.weight"
            if name in kept:
                bad = ~(kept[name] >= 0)
                negative, total = negative + int(bad.sum()), total + bad.numel()
                kept[name] = kept[name].clamp(min=0) if clamp else kept[name]
        load_weights(self, kept, source)
        if negative:
            now = "and are now 0" if clamp else "and stay so: the distance can be negative, and fall without end as a loss"
            warnings.warn(f"{source}: {negative} of {total} head weights were negative {now}", stacklevel=2)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes network, heads and config to one folder (convolutions as `dtype`, if given)."""
        save_folder(self, {"class": "LatentLPIPS", **self.settings}, folder, dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        clamp: bool = True,
        l1_weight: float | None = None,
        space: LatentSpace | None = None,
        revision: str | None = None,
    ) -> Self:
        """The frozen float32 metric of a source, on the CPU:

        - "embedded": the one of the embedded teacher's latents, which is part of the package,
        - a folder that `save_pretrained` wrote, or a hub repository (`owner/name`) of such files,
        - "sd15", "sd21", "sdxl", "sd3" or "flux": the checkpoint released by the paper's first author, whose licence
          (CC BY-NC 4.0) is shown as a warning; it is downloaded once into the hub's cache,
        - the path of such a checkpoint (`*_latest_vgg16_tuned.pth`).

        `clamp`: see `load_weights`. `l1_weight` and `space` replace what is stored; the space of a released checkpoint is known
        from its name, and not known under another. `revision`: branch, tag or commit of a hub repository; without one the newest.
        UserError for anything that cannot be loaded.
        """
        return cls._from_source(source, clamp, l1_weight, space, revision)

    @classmethod
    def _from_source(
        cls, source: str | Path, clamp: bool, l1_weight: float | None, space: LatentSpace | None, revision: str | None
    ) -> Self:
        """For a `from_pretrained`, at whose caller its warning points."""
        resolved = resolve(source, revision)
        if resolved.state is not None:
            first = resolved.state["net.slice1.0.weight"]
            if first.ndim != 4:
                raise UserError(f"{source}: net.slice1.0.weight has shape {tuple(first.shape)}, expected (64, C, 3, 3); download it again")
            channels = first.shape[1]
            net = LatentVGG(LatentVGGConfig(in_channels=channels))
            metric = cls(net, calibrated=True, space=resolved.space, licence=LICENCE, origin=resolved.origin)
            metric.load_weights(resolved.state, source, clamp)
        else:
            metric = cls._from_folder(resolved.folder, clamp)
        if metric.licence:
            warnings.warn(f"{Path(source).name}: these weights are not this project's ({metric.licence})", LicenceNotice, stacklevel=3)
        if l1_weight is not None:
            metric.l1_weight = _checked_l1_weight(l1_weight)
        if not isinstance(space, LatentSpace | None):
            raise UserError(f"space is {space!r}, expected diffusion2gan.perceptual.LatentSpace(scale, shift)")
        if space is not None:
            metric.space = space
        return metric

    @classmethod
    def _from_folder(cls, folder: Path, clamp: bool) -> Self:
        config = read_config(folder, "LatentLPIPS")
        if not {"l1_weight", "calibrated", "net"} <= config.keys() <= {"l1_weight", "calibrated", "net", "space", "licence", "origin"}:
            raise UserError(
                f"{folder}: config.json lacks or adds a key, expected class, l1_weight, calibrated, space, net "
                "(and licence and origin of weights that are others'); save the metric again"
            )
        net = LatentVGG(LatentVGGConfig.from_dict(config["net"], folder))
        try:
            if not isinstance(config["calibrated"], bool):
                raise UserError(f"calibrated is {config['calibrated']!r}, expected true or false")
            licence = config.get("licence")
            if not isinstance(licence, str | None):
                raise UserError(f"licence is {licence!r}, expected text or null")
            space = _record(LatentSpace, config["space"], "space") if "space" in config else LatentSpace()
            origin = _record(Origin, config.get("origin"), "origin")
            metric = cls(net, config["l1_weight"], config["calibrated"], space, licence, origin)
        except UserError as error:
            raise UserError(f"{folder}: config.json: {error}; save the metric again") from None
        metric.load_weights(read_weights(folder), folder, clamp)
        return metric


def _record(kind: type[Record], values: object, name: str) -> Record | None:
    """A dataclass from its JSON object, None from null."""
    if values is None:
        return None
    keys = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or values.keys() != set(keys):
        raise UserError(f"{name} is {values!r}, expected null or {' and '.join(keys)}")
    return kind(**values)


def _checked_l1_weight(value: float) -> float:
    if not is_number(value) or value < 0:
        raise UserError(f"l1_weight is {value!r}, expected a number of 0 or more; 0 is Eq. 3")
    return value


def _check_shapes(x0: Tensor, x1: Tensor) -> None:
    if x0.shape != x1.shape:
        raise UserError(f"x0 has shape {tuple(x0.shape)} and x1 {tuple(x1.shape)}, expected equal shapes (B, C, H, W)")
