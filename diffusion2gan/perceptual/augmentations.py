"""T of Eq. 3: random differentiable augmentations of latents with any number of channels.

Parameters are drawn apart from where they are applied, so that both inputs of the distance get the same ones:

    b   flip, turns by 90 degrees, translation by whole pixels
    g   isotropic scale, rotation, anisotropic scale, fractional translation
    c   brightness, saturation, contrast
    o   cutout

The distributions are those of StyleGAN2-ADA at p = 1 (b, g, o) and of DiffAugment (c); the paper names g and o.
Where ADA resamples at twice the resolution between two wavelet filters, geometry is one bicubic resampling here, after a
5 x 5 smoothing of those samples that are shrunk; blits alone are exact copies. u: a uniform number in [0, 1).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.errors import UserError

LETTERS = "bgco"


class AugmentationParameters(NamedTuple):
    """One draw of T for each of B samples; what the letters leave out has its neutral value."""

    affine: Tensor
    """(B, 2, 3), output to input in the normalised coordinates of `grid_sample` with `align_corners=False`."""
    colour: Tensor
    """(B, 3): added brightness, factor of saturation, factor of contrast."""
    cutout: Tensor
    """(B, 2): centre (x, y) of the erased rectangle; the latent spans 0 to 1."""
    letters: str | None = None
    """Those they were drawn for; None: they fit any."""
    size: tuple[int, int] | None = None
    """(H, W) they were drawn for; None: they fit any."""

    def rows(self, which: slice) -> AugmentationParameters:
        """The parameters of some of the rows: samples, but with an ensemble of n draws each sample has n rows, one after the other."""
        return self._replace(affine=self.affine[which], colour=self.colour[which], cutout=self.cutout[which])

    @staticmethod
    def identity(batch: int, device: torch.device | str | None = None) -> AugmentationParameters:
        """Parameters that change nothing, for any letters and size; the cutout lies outside the latent."""
        # Made on the device: a copy from the host would wait for it.
        where: dict[str, Any] = {"device": device, "dtype": torch.float32}
        affine = torch.eye(2, 3, **where).expand(batch, 2, 3)
        colour = torch.stack([torch.zeros(batch, **where), *[torch.ones(batch, **where)] * 2], dim=1)
        return AugmentationParameters(affine, colour, torch.full((batch, 2), -1.0, **where))


class Augmentation:
    """T of Eq. 3 for the given letters, a subset of "bgco"; "" (or None) is the identity. UserError for other letters."""

    N_UNIFORM: ClassVar[int] = 15
    """Uniform numbers one sample needs, whatever the letters: dropping a letter leaves the draws of the others as they are."""

    def __init__(self, letters: str | None = "bgo"):
        letters = "" if letters is None else letters
        if not isinstance(letters, str) or set(letters) - set(LETTERS) or len(set(letters)) != len(letters):
            raise UserError(f"augmentation is {letters!r}, expected letters of {LETTERS!r}, each at most once; the paper's set is 'go'")
        self.letters = letters

    def draw(
        self,
        batch: int,
        shape: tuple[int, int, int] | torch.Size,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        uniform: Tensor | None = None,
    ) -> AugmentationParameters:
        """Parameters for `batch` latents of `shape` (C, H, W), on `device`.

        They are a function of `uniform` (B, N_UNIFORM), numbers in [0, 1): a caller who fills row i from (seed, step, i)
        gets draws that do not depend on the batch. Without it the numbers come from `generator` (None: torch's own).
        UserError if `uniform` or `shape` has another shape.
        """
        if len(shape) != 3:
            raise UserError(f"shape is {tuple(shape)}, expected (C, H, W) of one latent; pass x.shape[1:]")
        _, height, width = shape
        if uniform is None:
            where = generator.device if generator is not None else device
            # In half precision some are 1, whatever torch's default is.
            uniform = torch.rand(batch, self.N_UNIFORM, generator=generator, device=where, dtype=torch.float32)
        elif uniform.shape != (batch, self.N_UNIFORM):
            raise UserError(f"uniform has shape {tuple(uniform.shape)}, expected {(batch, self.N_UNIFORM)}: one row for each sample")
        if device is not None:
            uniform = uniform.to(device, non_blocking=True)
        u = uniform.unbind(1)
        neutral = AugmentationParameters.identity(batch, uniform.device)
        affine, colour, cutout = (value.to(uniform.dtype) for value in neutral[:3])
        if "b" in self.letters or "g" in self.letters:
            affine = self._draw_affine(u[:10], height, width)
        if "c" in self.letters:
            # U(-0.5, 0.5), U(0, 2), U(0.5, 1.5)
            colour = torch.stack((u[10] - 0.5, 2 * u[11], u[12] + 0.5), dim=1)
        if "o" in self.letters:
            cutout = torch.stack((u[13], u[14]), dim=1)
        return AugmentationParameters(affine, colour, cutout, self.letters, (height, width))

    def _draw_affine(self, u: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """(B, 2, 3). Composed in pixels, origin at the centre: a rotation in normalised coordinates would shear a non-square latent.

        The map goes from output to input, so the first operation on the latent is the first factor from the left.
        """
        one, zero = torch.ones_like(u[0]), torch.zeros_like(u[0])
        linear = _matrix(one, zero, zero, one)
        offset = torch.stack((zero, zero), dim=1)
        if "b" in self.letters:
            linear = _matrix(1 - 2 * (u[0] * 2).floor(), zero, zero, one)
            # A quarter turn of a non-square latent would leave the canvas: only 0 and 180 degrees there.
            quarters = (u[1] * 4).floor() if height == width else 2 * (u[1] * 2).floor()
            # round: the cosine of 90 degrees must be 0, or a turned latent would be blurred.
            linear = _product(linear, _turn(quarters * (math.pi / 2), exact=True))
            shift = torch.stack((((2 * u[2] - 1) * 0.125 * width).round(), ((2 * u[3] - 1) * 0.125 * height).round()), dim=1)
            offset = offset - _product(linear, shift[..., None])[..., 0]
        if "g" in self.letters:
            shrink = torch.exp2(-0.2 * _normal(u[4]))
            squeeze = torch.exp2(-0.2 * _normal(u[7]))
            linear = _product(linear, _matrix(shrink, zero, zero, shrink))
            linear = _product(linear, _turn((2 * u[5] - 1) * math.pi))
            linear = _product(linear, _matrix(squeeze, zero, zero, 1 / squeeze))
            linear = _product(linear, _turn((2 * u[6] - 1) * math.pi))
            shift = torch.stack((0.125 * width * _normal(u[8]), 0.125 * height * _normal(u[9])), dim=1)
            offset = offset - _product(linear, shift[..., None])[..., 0]
        (xx, xy), (yx, yy) = (row.unbind(1) for row in linear.unbind(1))
        x, y = offset.unbind(1)
        # pixels = normalised * side / 2
        rows = torch.stack((xx, xy * (height / width), x * (2 / width), yx * (width / height), yy, y * (2 / height)), dim=1)
        return rows.view(-1, 2, 3)

    def apply(self, x: Tensor, parameters: AugmentationParameters) -> Tensor:
        """T(x): (B, C, H, W) -> the same shape and dtype, computed in float32 or better.

        Differentiable twice with respect to x; no host sync, so it compiles as one graph. UserError for parameters that were
        drawn for other letters or another size.
        """
        self._check_fits(x, parameters)
        dtype = x.dtype
        # A bf16 coordinate is off by a quarter of a pixel at 64 x 64.
        x = x.to(torch.promote_types(torch.promote_types(dtype, parameters.affine.dtype), torch.float32))
        affine, colour, cutout = (value.to(x.device, x.dtype) for value in parameters[:3])
        if "g" in self.letters:
            x = _sampled(_smoothed(x, _linear_in_pixels(affine, x)), _grid(affine, x), "bicubic")
        elif "b" in self.letters:
            # Whole pixels to whole pixels: a copy, to the last bit.
            x = _sampled(x, _grid(affine, x), "nearest")
        if "c" in self.letters:
            brightness, saturation, contrast = (value.view(-1, 1, 1, 1) for value in colour.unbind(1))
            # Brightness, saturation and contrast commute: each scales its own part of x = mean + grey + colour.
            grey = x.mean(dim=1, keepdim=True)
            mean = grey.mean(dim=(2, 3), keepdim=True)
            x = (x - grey) * (saturation * contrast) + (grey - mean) * contrast + mean + brightness
        if "o" in self.letters:
            in_x = (_centres(x.shape[3], x) - cutout[:, :1]).abs() < 0.25  # (B, W): half a side in all
            in_y = (_centres(x.shape[2], x) - cutout[:, 1:]).abs() < 0.25  # (B, H)
            x = torch.where((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0, x)
        return x.to(dtype)

    def _check_fits(self, x: Tensor, parameters: AugmentationParameters) -> None:
        letters, size = parameters.letters, parameters.size
        if letters is not None and set(letters) != set(self.letters):
            raise UserError(
                f"parameters were drawn for the letters {letters!r}, expected {self.letters!r}; draw them with this object's draw"
            )
        if size is not None and size != tuple(x.shape[2:]):
            was, now = (" x ".join(map(str, sides)) for sides in (size, x.shape[2:]))
            raise UserError(f"parameters were drawn for latents of {was}, the latent has {now}; draw them for the shape of the latent")


def _normal(u: Tensor) -> Tensor:
    """N(0, 1) by the inverse distribution function; clamped, because u may be 0."""
    # Not `special.ndtri`, which MPS lacks.
    return math.sqrt(2) * torch.erfinv(2 * u.clamp(2**-24, 1 - 2**-24) - 1)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Four (B,) -> (B, 2, 2), row by row."""
    return torch.stack((a, b, c, d), dim=1).view(-1, 2, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for (B, 2, 2) and (B, 2, n), without the matrix units, which would use TF32 or autocast's type."""
    return (a[..., None] * b[:, None]).sum(dim=2)


def _turn(angle: Tensor, exact: bool = False) -> Tensor:
    """(B,) radians -> (B, 2, 2), output to input of a turn to the left (`torch.rot90` at pi / 2). `exact`: multiples of 90 degrees."""
    cosine, sine = angle.cos(), angle.sin()
    if exact:
        cosine, sine = cosine.round(), sine.round()
    return _matrix(cosine, -sine, sine, cosine)


def _centres(size: int, like: Tensor) -> Tensor:
    """Pixel centres of one side, in (0, 1): (size,)."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size


def _linear_in_pixels(affine: Tensor, x: Tensor) -> Tensor:
    """The 2 x 2 part of `affine` for pixels instead of normalised coordinates: (B, 2, 2), output to input."""
    height, width = x.shape[2:]
    xx, xy, yx, yy = affine[:, 0, 0], affine[:, 0, 1], affine[:, 1, 0], affine[:, 1, 1]
    return _matrix(xx, xy * (width / height), yx * (height / width), yy)


# A pixel of the output is taken for a spot of this deviation: enough against aliasing at a shrinkage of 2, and 35 dB
# for latents without frequencies above a quarter of a cycle a pixel (tests/perceptual/test_augmentations.py).
_SPOT = 0.4
# The most an axis is smoothed, in units of _SPOT squared: a shrinkage of 2.4, three deviations of both scales together.
_LARGEST_SPREAD = 4.8


def _smoothed(x: Tensor, linear: Tensor) -> Tensor:
    """x (B, C, H, W) without what the map `linear` (B, 2, 2) would alias: smoothed along the directions that it shrinks.

    A round spot around an output pixel is an ellipse in the input. What that ellipse is wider than the spot is the
    covariance of a 5 x 5 kernel: none, and the kernel the identity, where nothing shrinks.
    """
    spread = _shrinking_part((linear[:, :, None] * linear[:, None]).sum(dim=3))
    # Two passes of a 3 x 3 kernel with half the covariance each.
    xx, yy, xy = (_SPOT**2 / 2 * value for value in (spread[:, 0, 0], spread[:, 1, 1], spread[:, 0, 1]))
    rows = (xy / 4, yy / 2, -xy / 4, xx / 2, 1 - xx - yy, xx / 2, -xy / 4, yy / 2, xy / 4)
    kernel = torch.stack(rows, dim=1).view(-1, 1, 3, 3).repeat_interleave(x.shape[1], dim=0)
    # One depthwise convolution. With a group a sample instead, that of a single sample is an ordinary one, whose backward takes 4 times as long.
    maps = x.reshape(1, -1, *x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(2):
            maps = F.conv2d(_edges_repeated(maps), kernel, groups=len(kernel))
    return maps.view(x.shape)


def _edges_repeated(x: Tensor) -> Tensor:
    """x with one more row and column on each side. Not `F.pad(mode="replicate")`: its backward, compiled, fails for channels-last x."""
    x = torch.cat((x[..., :1], x, x[..., -1:]), dim=-1)
    return torch.cat((x[..., :1, :], x, x[..., -1:, :]), dim=-2)


def _shrinking_part(square: Tensor) -> Tensor:
    """max(A - 1, 0) of symmetric matrices (B, 2, 2), eigenvalue by eigenvalue, at most _LARGEST_SPREAD."""
    xx, yy, xy = square[:, 0, 0] - 1, square[:, 1, 1] - 1, square[:, 0, 1]
    mean, half = (xx + yy) / 2, (xx - yy) / 2
    radius = (half.square() + xy.square()).sqrt()
    high, low = ((mean + sign * radius).clamp(0, _LARGEST_SPREAD) for sign in (1, -1))
    # high P + low (1 - P), P = (1 + (A - mean) / radius) / 2 the projection on the larger eigenvalue's direction
    centre, slope = (high + low) / 2, (high - low) / (2 * radius).clamp(min=1e-12)
    return _matrix(centre + slope * half, slope * xy, slope * xy, centre - slope * half)


def _grid(affine: Tensor, x: Tensor) -> Tensor:
    """`affine_grid` for x (B, C, H, W), written out: its matrix product would follow autocast to bf16. (B, H, W, 2)."""
    column = (2 * _centres(x.shape[3], x) - 1).view(1, 1, -1, 1)
    row = (2 * _centres(x.shape[2], x) - 1).view(1, -1, 1, 1)
    from_x, from_y, shift = affine[:, None, None].unbind(-1)  # each (B, 1, 1, 2)
    return column * from_x + row * from_y + shift


def _sampled(x: Tensor, grid: Tensor, mode: Literal["bicubic", "nearest"]) -> Tensor:
    """`grid_sample` with borders that are reflected, in whole pixels: x (B, C, H, W) at `grid` (B, H, W, 2)."""
    if x.device.type == "mps":  # which has neither the mode nor the borders
        return _gathered(x, grid, mode)
    return F.grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _gathered(x: Tensor, grid: Tensor, mode: Literal["bicubic", "nearest"]) -> Tensor:
    """The same from `gather` and arithmetic alone; 16 times as much memory traffic."""
    height, width = x.shape[2:]
    flat = x.flatten(2)

    def at(column: Tensor, row: Tensor) -> Tensor:
        index = (_reflected(row, height) * width + _reflected(column, width)).long().flatten(1)[:, None]
        return flat.gather(2, index.expand(-1, x.shape[1], -1)).view(x.shape)

    column, row = ((grid[..., i] + 1) * (side / 2) - 0.5 for i, side in enumerate((width, height)))
    if mode == "nearest":
        return at(_reflected(column, width).round(), _reflected(row, height).round())
    first_column, first_row = column.floor(), row.floor()
    of_columns, of_rows = _cubic_weights(column - first_column), _cubic_weights(row - first_row)
    total = torch.zeros_like(x)
    for i, of_row in enumerate(of_rows):
        line = torch.zeros_like(x)
        for j, of_column in enumerate(of_columns):
            line = line + of_column[:, None] * at(first_column + (j - 1), first_row + (i - 1))
        total = total + of_row[:, None] * line
    return total


def _reflected(at: Tensor, size: int) -> Tensor:
    """Pixel coordinates, mirrored at -1/2 and size - 1/2 as often as needed."""
    beyond = (at + 0.5).abs()
    times = (beyond / size).floor()
    rest = beyond - times * size
    return (torch.where(times % 2 == 0, rest, size - rest) - 0.5).clamp(0, size - 1)


def _cubic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the pixels at -1, 0, 1 and 2 for a point t in [0, 1): Keys' kernel with a = -0.75, as `grid_sample` has it."""
    a = -0.75

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return far(t + 1), near(t), near(1 - t), far(2 - t)
