"""What a guided solve computes once must be what the network would have computed again."""

from __future__ import annotations

import pytest
import torch

from diffusion2gan.teachers.reuse import remembered_text, shared_prefix, text_free_prefix
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
