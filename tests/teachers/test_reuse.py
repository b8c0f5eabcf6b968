"""What a guided solve computes once must be what the network would have computed again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D

from diffusion2gan.plan import count_flops
from diffusion2gan.teachers.reuse import joined_upsampling, remembered_text, shared_prefix, text_free_prefix, transposed_kernel
from tests.conftest import tiny_pipeline


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    latent = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cat([latent, latent]), torch.randn(6, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_same_prediction_with_less_work(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    unet = tiny_pipeline().unet.double().requires_grad_(False)
    latent, text = inputs
    plain = [unet(x, t, text, return_dict=False)[0] for x, t in ((latent, 900), (0.5 * latent, 400))]
    rows: list[int] = []
    calls: list[int] = []
    unet.conv_in.register_forward_hook(lambda _m, arguments, _o: rows.append(len(arguments[0])))
    cross = next(m for m in unet.modules() if getattr(m, "is_cross_attention", False))
    cross.to_k.register_forward_hook(lambda _m, _a, _o: calls.append(1))
    with remembered_text(unet), shared_prefix(unet, 6):
        reused = [unet(x, t, text, return_dict=False)[0] for x, t in ((latent, 900), (0.5 * latent, 400))]
        other = unet(latent, 900, 2 * text, return_dict=False)[0]
    for a, b in zip(plain, reused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert rows == [3, 3, 3]
    assert len(calls) == 2  # once for each of the two texts
    assert (other - plain[0]).abs().max() > 1e-6


def test_everything_is_put_back(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    unet = tiny_pipeline().unet.double()
    names = [n for n, _ in unet.named_modules()]
    with pytest.raises(RuntimeError), remembered_text(unet), shared_prefix(unet, 6):  # noqa: PT012
        assert [n for n, _ in unet.named_modules()] != names
        raise RuntimeError
    assert [n for n, _ in unet.named_modules()] == names
    # Unequal halves now give unequal results again.
    latent, text = inputs
    latent = torch.cat([latent[:3], -latent[:3]])
    same_text = torch.cat([text[:3], text[:3]])
    out = unet(latent, 900, same_text, return_dict=False)[0]
    assert (out[:3] - out[3:]).abs().max() > 1e-3


def test_the_prefix_ends_at_the_first_cross_attention() -> None:
    unet = tiny_pipeline().unet
    assert text_free_prefix(unet) == [unet.conv_in, unet.down_blocks[0], unet.down_blocks[1].resnets[0]]
    assert text_free_prefix(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3), (8, 8)])
def test_one_transposed_convolution_is_upsampling_and_convolution(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    found = F.conv_transpose2d(x, transposed_kernel(weight), bias, stride=2, padding=1)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


# 6 x 10: no multiple of the network's stride, so it asks for sizes that are not the double.
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_joined_upsampling_is_the_same_network(size: tuple[int, int]) -> None:
    unet = tiny_pipeline().unet.double().requires_grad_(False)
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = unet(x, 900, text, return_dict=False)[0]
    modules = list(unet.modules())
    assert any(isinstance(m, Upsample2D) for block in unet.up_blocks for m in block.upsamplers or ())
    with joined_upsampling(unet):
        assert not any(isinstance(m, Upsample2D) for block in unet.up_blocks for m in block.upsamplers or ())
        joined = unet(x, 900, text, return_dict=False)[0]
        fewer = count_flops(lambda: unet(x, 900, text, return_dict=False)[0])
    torch.testing.assert_close(joined, plain, atol=1e-12, rtol=0)
    assert list(unet.modules()) == modules
    if size == (8, 8):
        assert fewer < count_flops(lambda: unet(x, 900, text, return_dict=False)[0])
