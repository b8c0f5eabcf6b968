"""What depends on the machine."""

from __future__ import annotations

import warnings

import pytest

from diffusion2gan import device


def test_slow_bf16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _device: False)
    with pytest.warns(UserWarning, match=r"training.mixed_precision asks for bfloat16.* --set training.mixed_precision=no"):
        device.warn_of_slow_bf16("cpu", "training.mixed_precision=no")
    monkeypatch.setattr(device, "has_bf16", lambda _device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.warn_of_slow_bf16("cpu", "training.mixed_precision=no")
