"""T of Eq. 3: every operation against its plain tensor counterpart, and the drawn distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.device import can_compile
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augmentations import Augmentation, AugmentationParameters, _edges_repeated, _smoothed

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


def test_distributions() -> None:
    """Each parameter is read back from draws in which the others are neutral or divided out."""
    n, height, width = 20_000, 16, 32
    generator = torch.Generator().manual_seed(0)
    b = Augmentation("b").draw(n, (4, height, width), generator).affine
    shift = torch.stack((b[:, 0, 2] * width / 2, b[:, 1, 2] * height / 2), 1)
    assert torch.equal(shift, shift.round())
    assert shift.abs().amax(0).tolist() == [4, 2] and shift.mean(0).abs().max() < 0.06
    assert b[:, 0, 0].unique().tolist() == [-1, 1] and abs(b[:, 0, 0].mean()) < 0.03 and abs(b[:, 1, 1].mean()) < 0.03
    square = Augmentation("b").draw(n, (4, 16, 16), generator).affine
    linear, count = square[:, :, :2].reshape(n, 4).unique(dim=0, return_counts=True)
    assert len(linear) == 8 and (count / n - 0.125).abs().max() < 0.015
    g = Augmentation("g").draw(n, (4, height, width), generator).affine
    pixels = g[:, :, :2] * torch.tensor([[1.0, width / height], [height / width, 1.0]])
    singular = torch.linalg.svdvals(pixels).log2()
    assert abs(singular.mean()) < 0.01 and abs(singular.mean(1).std() - 0.2) < 0.01  # isotropic
    half_gap = (singular[:, 0] - singular[:, 1]) / 2  # |N(0, 0.2)|
    assert abs(half_gap.square().mean().sqrt() - 0.2) < 0.01
    translation = -torch.linalg.solve(g[:, :, :2], g[:, :, 2]) / 2  # in sides
    assert translation.mean(0).abs().max() < 0.005 and (translation.std(0) - 0.125).abs().max() < 0.005
    angle = torch.atan2(pixels[:, 1, 0] - pixels[:, 0, 1], pixels[:, 0, 0] + pixels[:, 1, 1])
    histogram = torch.histc(angle, 8, -math.pi, math.pi) / n
    assert (histogram - 0.125).abs().max() < 0.015
    co = Augmentation("co").draw(n, (4, height, width), generator)
    low, high = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([0.5, 2.0, 1.5])
    assert (co.colour >= low).all() and (co.colour <= high).all()
    assert (co.colour.mean(0) - (low + high) / 2).abs().max() < 0.02 and (co.colour.std(0) - (high - low) / 12**0.5).abs().max() < 0.01
    assert (co.cutout >= 0).all() and (co.cutout < 1).all() and (co.cutout.mean(0) - 0.5).abs().max() < 0.01


def test_draws_are_functions_of_their_row() -> None:
    u = torch.rand(5, N, generator=torch.Generator().manual_seed(1))
    augmentation = Augmentation("bgco")
    every, alone = augmentation.draw(5, (4, 8, 8), uniform=u), augmentation.draw(1, (4, 8, 8), uniform=u[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(every, alone, strict=True))
    seeded = [augmentation.draw(5, (4, 8, 8), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*seeded, strict=True))
    # The letters share one layout: cutout is where it was when geometry is left out.
    assert torch.equal(every.cutout, Augmentation("o").draw(5, (4, 8, 8), uniform=u).cutout)
    edges = augmentation.draw(1, (4, 8, 8), uniform=torch.zeros(1, N))
    assert all(t.isfinite().all() for t in edges)


def test_rows_are_independent() -> None:
    x, augmentation = torch.randn(4, 4, 8, 12), Augmentation("bgco")
    parameters = augmentation.draw(4, x.shape[1:], torch.Generator().manual_seed(0))
    row = AugmentationParameters(*(t[2:3] for t in parameters))
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
    with pytest.raises(UserError, match="uniform has shape"):
        Augmentation().draw(2, (4, 8, 8), uniform=torch.rand(3, N))
