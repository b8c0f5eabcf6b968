"""Pixels to whole numbers and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.images import Quantiser, to_tensor, to_uint8


@pytest.mark.parametrize(
    ("quantiser", "expected"),
    [("round", [0, 0, 0, 1, 128, 254, 255, 255]), ("trunc", [0, 0, 0, 0, 127, 253, 255, 255])],
)
def test_known_levels(quantiser: Quantiser, expected: list[int]) -> None:
    levels = [-9.0, 0.0, 0.4, 0.9, 127.8, 253.7, 255.0, 300.0]
    pixels = (torch.tensor(levels).view(1, 1, 1, -1) / 127.5 - 1).expand(1, 3, 1, -1)
    assert to_uint8(pixels, quantiser)[0, 0, :, 0].tolist() == expected


def test_rounding_undoes_to_tensor_at_every_level() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_uint8(to_tensor(images)), images)


def test_cutting_off_is_half_a_level_darker() -> None:
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    rounded, cut = (to_uint8(pixels, q).astype(float).mean() for q in ("round", "trunc"))
    assert rounded - cut == pytest.approx(0.5, abs=0.02)


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
