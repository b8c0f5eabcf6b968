"""Synthetic 2AFC triplets of emoji, of known order: one distortion at two strengths, the weaker is the nearer.

They stand in for BAPPS' human judgements, which are of photographs: nobody was asked, and what they can teach is that a
distance must grow with the strength of a distortion, whatever its kind.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion2gan.embedded.emoji import EmojiDataset
from diffusion2gan.images import to_tensor, to_uint8
from diffusion2gan.perceptual.calibrate import TripletBatch

# (pictures (B, 3, H, W) in [-1, 1], strength (B,) in [0, 1], generator) -> distorted pictures
Distortion = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _noise(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return x + _wide(0.02 + 0.5 * strength) * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, strength: Tensor, _generator: torch.Generator) -> Tensor:
    offsets = torch.arange(-8.0, 9)
    kernels = torch.exp(-0.5 * (offsets / (0.3 + 3 * strength[:, None])) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True))[:, None, None]
    y = x.transpose(0, 1)
    for kernel, pad in ((kernels, (8, 8, 0, 0)), (kernels.mT, (0, 0, 8, 8))):
        y = F.conv2d(F.pad(y, pad, mode="replicate"), kernel, groups=len(x))
    return y.transpose(0, 1)


def _warp(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth random displacement field of up to about five pixels."""
    field = F.interpolate(torch.randn(len(x), 2, 5, 5, generator=generator), size=x.shape[2:], mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    grid = identity + (0.01 + 0.1 * strength).view(-1, 1, 1, 1) * field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _shift(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    angle = 2 * torch.pi * torch.rand(len(x), generator=generator)
    affine = torch.eye(2, 3).repeat(len(x), 1, 1)
    affine[:, :, 2] = (0.02 + 0.25 * strength)[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    return F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), padding_mode="border", align_corners=False)


def _colour(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    direction = F.normalize(torch.randn(len(x), 3, 1, 1, generator=generator), dim=1)
    return x + _wide(0.05 + 0.8 * strength) * direction


def _contrast(x: Tensor, strength: Tensor, _generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * _wide(1 - 0.05 - 0.8 * strength)


def _erase(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A grey square with its centre in the picture's middle half."""
    half = (0.06 + 0.44 * strength).view(-1, 1, 1)
    centre = 0.25 + 0.5 * torch.rand(len(x), 2, 1, 1, generator=generator)
    y = (torch.arange(x.shape[2]) + 0.5).view(1, -1, 1) / x.shape[2]
    column = (torch.arange(x.shape[3]) + 0.5).view(1, 1, -1) / x.shape[3]
    inside = ((y - centre[:, 0]).abs() < half / 2) & ((column - centre[:, 1]).abs() < half / 2)
    return torch.where(inside[:, None], torch.zeros(()), x)


def _jpeg(x: Tensor, strength: Tensor, _generator: torch.Generator) -> Tensor:
    parts = []
    for picture, s in zip(to_uint8(x), strength.tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=max(1, round(60 * (1 - s) ** 1.5)))
        parts.append(np.asarray(Image.open(file)))
    return to_tensor(np.stack(parts))


def _wide(strength: Tensor) -> Tensor:
    return strength.view(-1, 1, 1, 1)


DISTORTIONS: dict[str, Distortion] = {
    "noise": _noise,
    "blur": _blur,
    "warp": _warp,
    "shift": _shift,
    "colour": _colour,
    "contrast": _contrast,
    "erase": _erase,
    "jpeg": _jpeg,
}


def synthetic_triplets(dataset: EmojiDataset, split: str, kind: str, count: int, seed: int = 0, size: int = 64) -> Iterator[TripletBatch]:
    """`count` triplets of pictures of `split`, distorted by `kind` at two strengths; the judgement is 1 where the second is weaker.

    The two strengths differ by 0.05 to 0.3, so that the order is certain and not plain. The random part of a distortion
    (its noise, direction, place) is drawn for each of the two: they differ in more than strength.
    """
    rows = dataset.indices(split)
    numpy_generator = np.random.Generator(np.random.Philox(key=[seed, list(DISTORTIONS).index(kind)]))
    generator = torch.Generator().manual_seed(int(numpy_generator.integers(2**62)))
    for start in range(0, count, size):
        n = min(size, count - start)
        x = to_tensor(dataset.images[numpy_generator.choice(rows, n)])
        gap = 0.05 + 0.25 * torch.rand(n, generator=generator)
        weak = (1 - gap) * torch.rand(n, generator=generator)
        second_is_weak = torch.rand(n, generator=generator) < 0.5
        strengths = torch.where(second_is_weak, weak + gap, weak), torch.where(second_is_weak, weak, weak + gap)
        first, second = (DISTORTIONS[kind](x, s, generator).clamp(-1, 1) for s in strengths)
        yield x, first, second, second_is_weak.float()
