"""F of Eq. 2: the VGG16 with batch norm that reads latents.

B, C, H, W: batch, latent channels, height and width of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.checkpoint import load_weights, read_config, read_weights, save_folder

# The five blocks of VGG16: (channels at width 1, convolutions).
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


@dataclass(frozen=True)
class LatentVGGConfig:
    """Shape of a LatentVGG. The paper's: 4 channels, width 1, three poolings removed, batch norm."""

    in_channels: int = 4
    width: float = 1.0
    """Scales every block's channels; rounded to a multiple of 8."""
    kept_poolings: tuple[int, ...] = (4, 5)
    """Which of the poolings after blocks 1 to 5 are there. The released checkpoints keep 4 and 5; another reading of "three
    poolings removed" keeps 3 and 4. `pixels` keeps all five."""
    tap: str = "after"
    """Features are read "after" a block's pooling, as by the released checkpoints, or "before" it, as by LPIPS in pixels."""
    norm: str = "batch"
    """"batch" or "group"; group norm is for training with small batches and has no published weights."""

    def __post_init__(self) -> None:
        if not isinstance(self.in_channels, int) or self.in_channels < 1:
            raise UserError(f"in_channels is {self.in_channels!r}, expected a whole number of 1 or more: the latent channels")
        if not isinstance(self.width, int | float) or not 0 < self.width < math.inf:
            raise UserError(f"width is {self.width!r}, expected a number above 0; 1.0 is VGG16's own")
        kept = tuple(self.kept_poolings) if isinstance(self.kept_poolings, Iterable) else (None,)  # a list, when it comes from JSON
        if any(number not in range(1, len(BLOCKS) + 1) for number in kept):
            raise UserError(f"kept_poolings is {self.kept_poolings!r}, expected numbers of 1 to {len(BLOCKS)}; (4, 5) is the paper's")
        object.__setattr__(self, "kept_poolings", kept)
        if self.tap not in ("after", "before"):
            raise UserError(f"tap is {self.tap!r}, expected 'after' or 'before'")
        if self.norm not in ("batch", "group"):
            raise UserError(f"norm is {self.norm!r}, expected 'batch' or 'group'")

    @classmethod
    def pixels(cls, width: float = 1.0, norm: str = "batch") -> LatentVGGConfig:
        """LPIPS' own reading, of pixels: all five poolings, features before them."""
        return cls(3, width, (1, 2, 3, 4, 5), "before", norm)

    @property
    def channels(self) -> list[int]:
        """Channels of the five feature maps."""
        return [max(8, 8 * round(c * self.width / 8)) for c, _ in BLOCKS]

    @classmethod
    def from_dict(cls, values: object, source: str | Path) -> LatentVGGConfig:
        """The config in the JSON object `values` (from the folder `source`). UserError for an unknown key or a value that is not allowed."""
        allowed = ", ".join(cls.__dataclass_fields__)
        if not isinstance(values, dict):
            raise UserError(f"{source}: config.json: the network is {values!r}, expected an object with {allowed}; save it again")
        if values.keys() - cls.__dataclass_fields__.keys():
            raise UserError(f"{source}: keys are {', '.join(values)}, expected {allowed}; the file may be of a newer version")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: config.json: {error}") from None


class Pooling(nn.Module):
    """2 x 2 max pooling that leaves a side of 1 as it is.

    At sides of 2 and more this is plain `MaxPool2d(2)`, so published weights give the published features. `ceil_mode`
    would also survive a side of 1, but it changes every odd side.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, max(1, H // 2), max(1, W // 2))."""
        return F.max_pool2d(x, (min(2, x.shape[2]), min(2, x.shape[3])))


class LatentVGG(nn.Module):
    """F of Eq. 2: (B, C, H, W) latents to five feature maps.

    Names and shapes of the weights are those of the released checkpoints: `slice1` to `slice5`, whose members are
    numbered as in torchvision's `vgg16_bn().features`.

    The network is a fixed measure: its parameters want no gradients, `train()` leaves it in evaluation mode (batch norm
    uses its stored statistics), and it says so itself instead of trusting every owner to remember. `for_training()` is
    the way out, for the code that trains the classifier.
    """

    def __init__(self, config: LatentVGGConfig | None = None):
        super().__init__()
        self.config = config or LatentVGGConfig()
        self.trainable = False
        before, index = self.config.in_channels, 0
        for number, (channels, (_, convolutions)) in enumerate(zip(self.config.channels, BLOCKS, strict=True)):
            block = nn.Sequential()
            for _ in range(convolutions):
                for layer in (nn.Conv2d(before, channels, 3, padding=1), self._norm(channels), nn.ReLU(inplace=True)):
                    block.add_module(str(index), layer)
                    index += 1
                before = channels
            block.add_module(str(index), Pooling() if number + 1 in self.config.kept_poolings else nn.Identity())
            index += 1
            self.add_module(f"slice{number + 1}", block)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self.freeze()

    def _norm(self, channels: int) -> nn.Module:
        # Channels are multiples of 8: two or more in each of at most 32 groups.
        return nn.BatchNorm2d(channels) if self.config.norm == "batch" else nn.GroupNorm(math.gcd(32, channels // 2), channels)

    @property
    def channels(self) -> list[int]:
        """Channels of the five feature maps."""
        return self.config.channels

    @property
    def slices(self) -> list[nn.Sequential]:
        """The five blocks in order."""
        return [self.get_submodule(f"slice{i + 1}") for i in range(len(BLOCKS))]  # type: ignore[misc]

    def freeze(self) -> Self:
        """Back to the fixed measure: evaluation mode, no gradients for the weights."""
        self.trainable = False
        self.requires_grad_(False)
        return self.eval()

    def for_training(self) -> Self:
        """Makes this an ordinary trainable backbone: `train()` works and the weights want gradients."""
        self.trainable = True
        self.requires_grad_(True)
        return self.train()

    def train(self, mode: bool = True) -> Self:
        """Does nothing, unless `for_training()` was called."""
        return super().train(mode and self.trainable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Latents (B, C, H, W), scaled as the U-Net sees them, H and W of 1 or more -> five maps (B, channels[i], H_i, W_i).

        A block's map is read where `config.tap` says. UserError if C is not `in_channels`.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise UserError(
                f"the input of LatentVGG has shape {tuple(x.shape)}, expected (B, {self.config.in_channels}, H, W); "
                "use the network of this latent space"
            )
        # Autocast casts all but float64.
        if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(self.parameters()).dtype)
        features = []
        for block in self.slices:
            x = block[:-1](x) if self.trainable or self.config.norm == "group" else _frozen_layers(block, x)
            pooled = block[-1](x)
            features.append(pooled if self.config.tap == "after" else x)
            x = pooled
        return features

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `model.safetensors` (convolutions as `dtype`, if given) to `folder`."""
        save_folder(self, {"class": "LatentVGG", **asdict(self.config)}, folder, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The frozen float32 network of a folder that `save_pretrained` wrote. UserError if files are missing or do not fit."""
        model = cls(LatentVGGConfig.from_dict(read_config(folder, "LatentVGG"), folder))
        load_weights(model, read_weights(folder), folder)
        return model


def _frozen_layers(block: nn.Sequential, x: Tensor) -> Tensor:
    """`block(x)` up to its pooling, with each batch norm, which stored statistics make an affine map per channel, done in place.

    A convolution's input is not kept, as its weights want no gradient, nor is what the affine map is given: of each layer there is one
    tensor for the backward pass. (Folded into the weights, the map would cost a copy of all of them in each pass, kept as well.)
    """
    layers = list(block)
    for i in range(0, len(layers) - 1, 3):
        conv, norm = layers[i], layers[i + 1]
        assert isinstance(conv, nn.Conv2d)
        # A trainer may make SyncBatchNorm of every batch norm that it finds.
        assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        scale, shift = _affine(conv, norm)
        x = F.conv2d(x, conv.weight, None, padding=1).mul_(scale).add_(shift).relu_()
    return x


def _affine(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, 1, 1), of a convolution's bias and the batch norm after it: norm(y + bias) = scale y + shift."""
    assert conv.bias is not None and norm.running_mean is not None and norm.running_var is not None
    # At least float32: 1 / sqrt(var + eps) in bf16 would put its own error on every channel.
    work = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = norm.weight.to(work) * torch.rsqrt(norm.running_var.to(work) + norm.eps)
    shift = (conv.bias.to(work) - norm.running_mean.to(work)) * scale + norm.bias.to(work)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)
