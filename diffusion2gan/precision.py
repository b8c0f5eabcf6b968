"""Where float32 must mean float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def no_tf32() -> Iterator[None]:
    """Inside the block, CUDA convolutions and matrix products of float32 keep float32's mantissa.

    cuDNN may use TF32 for float32 convolutions by default, which rounds like float16.
    """
    kinds: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    older: tuple[str, bool] | None = None
    # torch refuses its older settings to a program that has set `fp32_precision`; to any other both have to say the same.
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            torch.backends.cudnn.allow_tf32 = older[1]
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value
