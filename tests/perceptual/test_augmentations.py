"""T of Eq. 3: every operation against its plain tensor counterpart, and the drawn distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from diffusion2gan.device import can_compile
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augmentations import Augmentation, AugmentationParameters, _edges_repeated, _gathered, _grid, _smoothed

torch.set_num_threads(1)
N = Augmentation.N_UNIFORM
FLIP, QUARTERS, INT_X, INT_Y = range(4)
SCALE, TURN_BEFORE, TURN_AFTER, ANISO, FRAC_X, FRAC_Y = range(4, 10)
BRIGHTNESS, SATURATION, CONTRAST, CUT_X, CUT_Y = range(10, N)


def neutral(batch: int, **values: float) -> Tensor:
    """Uniform numbers that draw the identity (but for cutout), with the named ones replaced."""
    u = torch.full((batch, N), 0.5, dtype=torch.float64)
    u[:, [FLIP, QUARTERS]] = 0.0
    for name, value in values.items():
        u[:, globals()[name]] = value
    return u


def augmented(letters: str, x: Tensor, **values: float) -> Tensor:
    augmentation = Augmentation(letters)
    return augmentation.apply(x, augmentation.draw(len(x), x.shape[1:], uniform=neutral(len(x), **values)))


@pytest.mark.parametrize("letters", ["", "b", "g", "c", "bg", "bgc", "bgco", "o"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (4, 12, 20), (16, 7, 5)])
def test_identity(letters: str, shape: tuple[int, int, int]) -> None:
    x = torch.randn(2, *shape)
    y = Augmentation(letters).apply(x, AugmentationParameters.identity(2))
    # Pixel centres of a side that is no power of two are not exact in float32.
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6 if shape[1] == 16 else 1e-5)
    if "o" not in letters:
        torch.testing.assert_close(augmented(letters, x.double()), x.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 9, 12)])
def test_flip_and_turns(shape: tuple[int, int, int]) -> None:
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(augmented("b", x, FLIP=0.5), x.flip(3))
    for k in range(4):
        square = shape[1] == shape[2]
        turns = k if square else 2 * (k // 2)
        torch.testing.assert_close(augmented("b", x, QUARTERS=k / 4), x.rot90(turns, (2, 3)))
        torch.testing.assert_close(augmented("b", x, QUARTERS=k / 4, FLIP=0.7), x.flip(3).rot90(turns, (2, 3)))


@pytest.mark.parametrize("when", ["TURN_BEFORE", "TURN_AFTER"])
def test_rotation_of_90_degrees_is_rot90(when: str) -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(augmented("g", x, **{when: 0.75}), x.rot90(1, (2, 3)))
    torch.testing.assert_close(augmented("g", x, **{when: 0.25}), x.rot90(-1, (2, 3)))
    torch.testing.assert_close(augmented("bg", x, **{when: 0.25}, QUARTERS=0.25, FLIP=0.5), x.flip(3))


def test_integer_translation() -> None:
    x = torch.randn(1, 4, 16, 32, dtype=torch.float64)
    y = augmented("b", x, INT_X=1.0, INT_Y=0.25)  # +4 and -1 pixels
    torch.testing.assert_close(y[..., 1:-1, 5:], x.roll((4, -1), (3, 2))[..., 1:-1, 5:])
    # Flip, then turn, then translation: the order of StyleGAN2-ADA.
    z = augmented("b", x, INT_X=1.0, FLIP=0.5)
    torch.testing.assert_close(z[..., 5:], x.flip(3).roll(4, 3)[..., 5:])


def test_translation_reflects_at_the_border() -> None:
    x = torch.arange(16.0, dtype=torch.float64).view(1, 1, 1, 16).expand(1, 1, 16, 16)
    torch.testing.assert_close(augmented("b", x, INT_X=1.0)[0, 0, 0, :4], torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))


def test_fractional_translation_and_scale() -> None:
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).view(1, 1, 1, 32).repeat(1, 1, 32, 1)
    one_sigma = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    step = 2 / 31
    inner = (..., slice(12, 20), slice(12, 20))
    torch.testing.assert_close(augmented("g", x, FRAC_X=one_sigma)[inner], x[inner] - 0.125 * 32 * step)  # a ramp, moved by 4 pixels
    # torch's bicubic kernel (a = -0.75) puts a point of a ramp up to a twentieth of a pixel off.
    close = partial(torch.testing.assert_close, rtol=0, atol=0.05 * step)
    close(augmented("g", x, SCALE=one_sigma)[inner], x[inner] / 2**0.2)
    close(augmented("g", x, ANISO=one_sigma)[inner], x[inner] / 2**0.2)
    close(augmented("g", x.mT, ANISO=one_sigma)[inner], x.mT[inner] * 2**0.2)


def test_blits_are_copies() -> None:
    """Every value of the output is one of the input's, to the last bit, and none is moved by less than a pixel."""
    x = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation("b")
    y = augmentation.apply(x, augmentation.draw(64, x.shape[1:], torch.Generator().manual_seed(1)))
    for before, after in zip(x, y, strict=True):
        assert torch.isin(after, before).all()


@pytest.mark.parametrize("size", [(7, 7), (9, 5), (6, 11), (10, 16), (8, 8)])
def test_blits_by_position(size: tuple[int, int]) -> None:
    """Flip, turn and translation with reflected borders: every pixel comes from where plain indexing takes it."""
    height, width = size
    position = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    u = torch.rand(60, N, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation("b")
    moved = augmentation.apply(position.expand(60, 1, -1, -1), augmentation.draw(60, (1, *size), uniform=u))
    for row, y in zip(u, moved, strict=True):
        x = position[0, 0].numpy()
        x = x[:, ::-1] if row[FLIP] >= 0.5 else x
        x = np.rot90(x, int(4 * row[QUARTERS]) if height == width else 2 * int(2 * row[QUARTERS]))
        right, down = (round((2 * row[i].item() - 1) * side / 8) for i, side in ((INT_X, width), (INT_Y, height)))
        margin = max(abs(right), abs(down))
        padded = np.pad(x, margin, mode="symmetric")
        expected = padded[margin - down :, margin - right :][:height, :width]
        assert np.array_equal(y[0].numpy(), expected), (row[:4], right, down)


def _band_limited(count: int, size: int, highest: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Latents (count, 1, size, size) of 160 waves each, amplitude 1 / frequency up to `highest` cycles a pixel, and their value
    at any points (count, n, 2), in pixels from the centre."""
    generator = torch.Generator().manual_seed(0)
    radius = highest * torch.rand(count, 160, generator=generator).sqrt()
    angle, phase = (2 * math.pi * torch.rand(2, count, 160, generator=generator)).unbind()
    waves = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    amplitude = 1 / radius.clamp(min=1 / size)

    def value(points: Tensor) -> Tensor:
        return (amplitude[:, None] * torch.cos(2 * math.pi * (points @ waves.mT) + phase[:, None])).sum(-1)

    return value(_pixels(size).expand(count, -1, 2)).view(count, 1, size, size), value


def _pixels(size: int, step: float = 1.0) -> Tensor:
    """Pixel centres, and with a step of 1 / 2 the points between them, from the centre of the latent: (1, n, 2)."""
    i = torch.arange(int(size / step)) * step + 0.5 - size / 2
    y, x = torch.meshgrid(i, i, indexing="ij")
    return torch.stack((x, y), dim=-1).view(1, -1, 2)


def _half_band(x: Tensor) -> Tensor:
    """A low pass to half the band: 47 taps of a windowed sinc along each axis."""
    taps = torch.arange(-23.0, 24)
    kernel = torch.sinc(taps / 2) / 2 * torch.kaiser_window(47, periodic=False, beta=6.0)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    x = F.conv2d(F.pad(x, (23,) * 4, mode="reflect"), kernel)
    return F.conv2d(x, kernel.mT)


def _oversampled(x: Tensor, affine: Tensor) -> Tensor:
    """ADA's way: twice the resolution by a filter, resampling there, a filter back to the resolution."""
    count, _, size, _ = x.shape
    fine = torch.zeros(count, 1, 2 * size, 2 * size)
    fine[..., ::2, ::2] = 4 * x
    fine = _half_band(fine)
    points = (_pixels(size, 0.5) / (size / 2)) @ affine[:, :, :2].mT + affine[:, None, :, 2]
    # Sample 2 i of `fine` lies on pixel i of x: a quarter of a pixel from where `grid_sample` thinks.
    points = points - 0.5 / size
    y = F.grid_sample(fine, points.view(count, 2 * size, 2 * size, 2), mode="bicubic", padding_mode="reflection", align_corners=False)
    return _half_band(y)[..., ::2, ::2]


def _decibels(error: Tensor, signal: Tensor) -> float:
    inner = (..., slice(20, -20), slice(20, -20))
    return 10 * math.log10(signal[inner].var() / error[inner].square().mean())


def test_resampling_error() -> None:
    """Against the exact values, and against the twice oversampled and filtered path: 30 dB up to a quarter of a cycle a pixel."""
    x, value = _band_limited(32, 64, 0.25)
    augmentation = Augmentation("g")
    parameters = augmentation.draw(32, x.shape[1:], torch.Generator().manual_seed(0))
    y = augmentation.apply(x, parameters)
    points = (_pixels(64) / 32) @ parameters.affine[:, :, :2].mT + parameters.affine[:, None, :, 2]
    # Only samples that stay inside have exact values: elsewhere the latent is reflected.
    exact = value(points * 32).view_as(x)
    inside = (points.view(32, 64, 64, 2)[:, 20:-20, 20:-20].abs() < 0.9).all(dim=(1, 2, 3))
    assert inside.sum() > 16
    assert _decibels((y - exact)[inside], exact[inside]) > 30
    reference = _oversampled(x, parameters.affine)
    assert _decibels((reference - exact)[inside], exact[inside]) > 30
    assert _decibels((y - reference)[inside], reference[inside]) > 30
    bilinear = F.grid_sample(x, points.view(32, 64, 64, 2), padding_mode="reflection", align_corners=False)
    assert _decibels((bilinear - exact)[inside], exact[inside]) < 26


def test_shrinking_does_not_alias() -> None:
    """A wave that a latent shrunk to half its side could not carry is gone; one that it can is not."""
    augmentation = Augmentation("g")
    half = torch.eye(2, 3).expand(1, 2, 3) * 2
    parameters = AugmentationParameters.identity(1)._replace(affine=half)
    column = torch.arange(64.0)
    for frequency, low, high in ((0.4, 0.0, 0.35), (0.05, 0.9, 1.0)):
        wave = torch.cos(2 * math.pi * frequency * column).expand(1, 1, 64, 64)
        kept = augmentation.apply(wave, parameters)[..., 20:-20].std() / wave.std()
        assert low <= kept <= high
    # Nothing is smoothed where nothing shrinks.
    noise = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(augmented("g", noise, TURN_BEFORE=0.75), noise.rot90(1, (2, 3)))


def test_rotation_is_in_pixels() -> None:
    """Turned by 90 degrees, the centre of a non-square latent is the turned centre, not a stretched one."""
    x = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    y = augmented("g", x, TURN_BEFORE=0.75)
    torch.testing.assert_close(y[..., :, 4:12], x[..., :, 4:12].rot90(1, (2, 3)))


def test_colour() -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(augmented("c", x, BRIGHTNESS=0.75), x + 0.25)
    torch.testing.assert_close(augmented("c", x, SATURATION=0.0), grey.expand_as(x))
    torch.testing.assert_close(augmented("c", x, SATURATION=0.75), (x - grey) * 1.5 + grey)
    torch.testing.assert_close(augmented("c", x, CONTRAST=0.0), (x - mean) * 0.5 + mean)
    torch.testing.assert_close(augmented("c", x[:, :1], SATURATION=0.1), x[:, :1])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 12)])
def test_cutout(shape: tuple[int, int, int]) -> None:
    x = torch.ones(2, *shape)
    expected = x.clone()
    expected[..., 2:6, shape[2] // 4 : 3 * shape[2] // 4] = 0
    assert torch.equal(augmented("o", x), expected)
    corner = augmented("o", x, CUT_X=0.0, CUT_Y=0.0)
    assert torch.equal(corner[..., :2, : shape[2] // 4], torch.zeros(2, shape[0], 2, shape[2] // 4)) and corner.sum() == x.sum() * 15 / 16


# Of the tests of distributions: draws, and the chance at which a right implementation fails with another seed.
DRAWS, ALPHA = 20_000, 1e-3


def _ks_distance(sample: Tensor, law: Any) -> float:
    """Kolmogorov-Smirnov: the largest distance of the sample's distribution function from that of `law`, which may have atoms."""
    at, count = np.unique(sample.double().numpy(), return_counts=True)
    share = count / len(sample)
    just_below = np.nextafter(at, -np.inf)
    return max(np.abs(share.cumsum() - law.cdf(at)).max(), np.abs(share.cumsum() - share - law.cdf(just_below)).max())


def _follows(sample: Tensor, law: Any) -> bool:
    # For a law with atoms the bound is wider than need be: a right sample fails more rarely still.
    return _ks_distance(sample, law) < stats.kstwo.ppf(1 - ALPHA, len(sample))


def _whole(sides: int) -> Any:
    """round(U(-sides, sides)): half as often at the ends."""
    values = np.arange(-sides, sides + 1)
    return stats.rv_discrete(values=(values, np.where(np.abs(values) == sides, 0.25, 0.5) / sides))


def _in_pixels(affine: Tensor, height: int, width: int) -> Tensor:
    return affine[:, :, :2].double() * torch.tensor([[1.0, width / height], [height / width, 1.0]], dtype=torch.float64)


def _read_back(u: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """What was drawn from u (n, N), from the maps alone: each parameter by its name, angles in turns."""
    shape = (4, height, width)
    b, g, co = (Augmentation(letters).draw(len(u), shape, uniform=u) for letters in ("b", "g", "co"))
    both = Augmentation("bgco").draw(len(u), shape, uniform=u)
    corner = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(u), 1, 3)
    composed = torch.cat((b.affine, corner), dim=1) @ torch.cat((g.affine, corner), dim=1)
    torch.testing.assert_close(both.affine, composed[:, :2], rtol=1e-4, atol=1e-5)
    assert torch.equal(both.colour, co.colour) and torch.equal(both.cutout, co.cutout)
    # The map goes from output to input: what moves the latent is its inverse.
    integer, fraction = (-torch.linalg.solve(p.affine[:, :, :2], p.affine[:, :, 2]).double() / 2 for p in (b, g))
    turned, linear = _in_pixels(b.affine, height, width), _in_pixels(g.affine, height, width)
    squares = linear @ linear.mT
    singular = torch.linalg.svdvals(linear).log2()
    return {
        "flip": turned.det(),
        "quarters": torch.atan2(turned[:, 1, 0], turned[:, 1, 1]) / (math.pi / 2),
        "whole x": integer[:, 0] * width,
        "whole y": integer[:, 1] * height,
        "scale": -linear.det().log2() / 2,
        "aspect": (singular[:, 0] - singular[:, 1]) / 2,
        "turn": torch.atan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1]) / (2 * math.pi),
        # Of the longer axis, which the first turn alone decides, in quarter turns: the longer may be either.
        "axis": torch.atan2(2 * squares[:, 0, 1], squares[:, 0, 0] - squares[:, 1, 1]) / math.pi % 1,
        "fraction x": fraction[:, 0],
        "fraction y": fraction[:, 1],
        **dict(zip(("brightness", "saturation", "contrast"), co.colour.double().unbind(1), strict=True)),
        **dict(zip(("cutout x", "cutout y"), co.cutout.double().unbind(1), strict=True)),
    }


def test_distributions() -> None:
    """Each parameter against its law: Kolmogorov-Smirnov at DRAWS and ALPHA."""
    height, width = 16, 32
    found = _read_back(torch.rand(DRAWS, N, generator=torch.Generator().manual_seed(0)), height, width)
    laws = {
        "flip": stats.rv_discrete(values=((-1, 1), (0.5, 0.5))),
        "quarters": stats.rv_discrete(values=((0, 2), (0.5, 0.5))),
        "whole x": _whole(4),
        "whole y": _whole(2),
        "scale": stats.norm(0, 0.2),
        "aspect": stats.halfnorm(0, 0.2),
        "turn": stats.uniform(-0.5, 1),
        "axis": stats.uniform(0, 1),
        "fraction x": stats.norm(0, 0.125),
        "fraction y": stats.norm(0, 0.125),
        "brightness": stats.uniform(-0.5, 1),
        "saturation": stats.uniform(0, 2),
        "contrast": stats.uniform(0.5, 1),
        "cutout x": stats.uniform(0, 1),
        "cutout y": stats.uniform(0, 1),
    }
    for name in ("flip", "quarters", "whole x", "whole y"):
        assert (found[name] - found[name].round()).abs().max() < 1e-4, name
        found[name] = found[name].round().abs() if name == "quarters" else found[name].round()
    assert found.keys() == laws.keys()
    assert [name for name, law in laws.items() if not _follows(found[name], law)] == []
    square = _read_back(torch.rand(DRAWS, N, generator=torch.Generator().manual_seed(1)), 16, 16)["quarters"].round() % 4
    assert _follows(square, stats.randint(0, 4))
    # The test sees a law that is off by a twentieth of its width.
    assert not _follows(1.05 * found["scale"] + 0.01, laws["scale"]) and not _follows(found["whole x"].clamp(-3, 3), laws["whole x"])


@pytest.mark.parametrize("name", ["ANISO", "TURN_BEFORE", "TURN_AFTER", "SCALE"])
def test_distributions_of_what_others_hide(name: str) -> None:
    """Alone, with the others neutral: the aspect in both directions, each of the two turns, the scale of both axes."""
    u = neutral(DRAWS)
    u[:, globals()[name]] = torch.rand(DRAWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    linear = _in_pixels(Augmentation("g").draw(DRAWS, (4, 16, 32), uniform=u).affine, 16, 32)
    if name.startswith("TURN"):
        assert _follows(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]) / (2 * math.pi), stats.uniform(-0.5, 1))
        return
    wide, high = -linear[:, 0, 0].log2(), -linear[:, 1, 1].log2()
    assert _follows(wide, stats.norm(0, 0.2)) and _follows(high, stats.norm(0, 0.2))
    torch.testing.assert_close(wide, high if name == "SCALE" else -high)


def test_parameters_are_independent() -> None:
    """No two are correlated, nor their squares, by more than chance does to independent ones: of m correlations of DRAWS samples,
    each of deviation 1 / sqrt(DRAWS), the largest stays below z / sqrt(DRAWS), P(|N(0, 1)| > z) = ALPHA / m."""
    found = _read_back(torch.rand(DRAWS, N, generator=torch.Generator().manual_seed(3)), 16, 16)
    columns: list[tuple[str, Tensor]] = []
    for name, value in found.items():
        if name in ("quarters", "turn", "axis"):  # on a circle
            angle = value * (math.pi / 2 if name == "quarters" else 2 * math.pi)
            columns += [(name, angle.cos()), (name, angle.sin()), (name, (2 * angle).cos()), (name, (2 * angle).sin())]
        else:
            columns += [(name, value), (name, (value - value.mean()).square())]
    kept = [(name, value) for name, value in columns if value.std() > 1e-3]  # the sine of whole half turns is nothing
    names = np.array([name for name, _ in kept])
    others = np.triu(names[:, None] != names[None])
    correlations = np.corrcoef(torch.stack([value for _, value in kept]).numpy())[others]
    assert np.abs(correlations).max() < stats.norm.isf(ALPHA / len(correlations) / 2) / math.sqrt(DRAWS)


def _equal(a: AugmentationParameters, b: AugmentationParameters) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


def test_draws_are_functions_of_their_row() -> None:
    u = torch.rand(5, N, generator=torch.Generator().manual_seed(1))
    augmentation = Augmentation("bgco")
    every, alone = augmentation.draw(5, (4, 8, 8), uniform=u), augmentation.draw(1, (4, 8, 8), uniform=u[3:4])
    assert _equal(every.rows(slice(3, 4)), alone)
    seeded = [augmentation.draw(5, (4, 8, 8), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert _equal(*seeded)
    # The letters share one layout: cutout is where it was when geometry is left out.
    assert torch.equal(every.cutout, Augmentation("o").draw(5, (4, 8, 8), uniform=u).cutout)
    edges = augmentation.draw(1, (4, 8, 8), uniform=torch.zeros(1, N))
    assert all(t.isfinite().all() for t in edges[:3])


def test_rows_are_independent() -> None:
    x, augmentation = torch.randn(4, 4, 8, 12), Augmentation("bgco")
    parameters = augmentation.draw(4, x.shape[1:], torch.Generator().manual_seed(0))
    row = parameters.rows(slice(2, 3))
    torch.testing.assert_close(augmentation.apply(x, parameters)[2:3], augmentation.apply(x[2:3], row), rtol=0, atol=1e-6)


def test_differentiable_twice() -> None:
    augmentation = Augmentation("bgco")
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = augmentation.draw(2, x.shape[1:], uniform=uniform)
    assert torch.autograd.gradcheck(lambda v: augmentation.apply(v, parameters), (x,))
    assert torch.autograd.gradgradcheck(lambda v: augmentation.apply(v, parameters).pow(2), (x,))


def test_precision_and_autocast() -> None:
    augmentation, x = Augmentation("bgo"), torch.randn(2, 4, 64, 64)
    parameters = augmentation.draw(2, x.shape[1:], torch.Generator().manual_seed(0))
    expected = augmentation.apply(x, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmentation.apply(x, parameters), expected)
        again = augmentation.draw(2, x.shape[1:], torch.Generator().manual_seed(0))
    assert torch.equal(again.affine, parameters.affine)
    low = augmentation.apply(x.bfloat16(), parameters)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, augmentation.apply(x.bfloat16().float(), parameters).bfloat16())


def test_compiles_as_one_graph() -> None:
    augmentation = Augmentation("bgco")
    u = torch.rand(2, N)

    def both(x: Tensor, u: Tensor) -> Tensor:
        return augmentation.apply(x, augmentation.draw(2, (4, 8, 8), uniform=u))

    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x, u), both(x, u))


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_the_smoothing_compiles_for_channels_last() -> None:
    """By inductor itself, backward too: the layout that its kernels give must be the one that they promise."""
    x = torch.randn(2, 3, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    linear = torch.tensor([[[1.5, 0.3], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    weight = torch.randn(2, 3, 6, 7)

    def loss(x: Tensor) -> Tensor:
        return (_smoothed(x, linear) * weight).sum()

    (expected,), (found,) = (torch.autograd.grad(f(x), x) for f in (loss, torch.compile(loss, fullgraph=True, dynamic=False)))
    torch.testing.assert_close(found, expected)


def test_edges_are_repeated_as_replicate_padding_repeats_them() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(_edges_repeated(x), torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"))


def test_errors() -> None:
    for letters in ("x", "bb", "bgn"):
        with pytest.raises(UserError, match="bgco"):
            Augmentation(letters)
    with pytest.raises(UserError, match="bgco"):
        Augmentation(["b"])  # type: ignore[arg-type]
    assert Augmentation(None).letters == ""
    parameters = Augmentation("bg").draw(1, (4, 8, 12))
    for letters, size, message in (("g", (8, 12), "letters 'bg', expected 'g'"), ("bg", (12, 8), "of 8 x 12, the latent has 12 x 8")):
        with pytest.raises(UserError, match=message):
            Augmentation(letters).apply(torch.zeros(1, 4, *size), parameters)
    with pytest.raises(UserError, match="uniform has shape"):
        Augmentation().draw(2, (4, 8, 8), uniform=torch.rand(3, N))


@pytest.mark.parametrize("letters", ["b", "g", "bg"])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (12, 20)])
def test_resampling_without_grid_sample_is_the_same(letters: str, size: tuple[int, int]) -> None:
    """The path of MPS, run on the CPU: values and gradients, also far beyond the borders."""
    augmentation = Augmentation(letters)
    mode: Any = "bicubic" if "g" in letters else "nearest"
    x = torch.randn(40, 3, *size, dtype=torch.float64, requires_grad=True)
    affine = augmentation.draw(40, x.shape[1:], torch.Generator().manual_seed(0)).affine.double()
    affine[20:, :, 2] *= 9
    grid = _grid(affine, x)
    direction = torch.randn(x.shape, dtype=torch.float64)
    found = []
    for sampled in (
        F.grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False),
        _gathered(x, grid, mode),
    ):
        (gradient,) = torch.autograd.grad(sampled, x, direction)
        found.append((sampled, gradient))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
