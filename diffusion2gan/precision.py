"""Where float32 must mean float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_tf32() -> Iterator[None]:
    """Inside the block, CUDA convolutions and matrix products of float32 keep float32's mantissa.

    cuDNN may use TF32 for float32 convolutions by default, which rounds like float16.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
