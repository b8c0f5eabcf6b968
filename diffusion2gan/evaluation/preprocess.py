"""From a uint8 RGB picture to what a scoring network is given. Every step is on the CPU and by Pillow, as in the published protocols.

The order matters and so does each rounding: two resizers in one paper are two protocols.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image


def _centre_crop(image: Image.Image, side: int) -> Image.Image:
    """An odd margin is halved as torchvision's `center_crop` halves it (3 to 2, half to even)."""
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle."""
    return _centre_crop(image, min(image.size))


def centre_patch(image: Image.Image, side: int) -> Image.Image:
    """The middle `side` x `side` pixels as they are, or the whole picture when a side of it is shorter: DMD2's patch-FID."""
    return _centre_crop(image, side) if min(image.size) >= side else image


def lanczos_square(image: Image.Image, side: int) -> Image.Image:
    """Centre square, Lanczos to `side`, uint8: GigaGAN's and DMD2's step before every COCO metric, for real and generated alike."""
    return centre_square(image).resize((side, side), Image.Resampling.LANCZOS)


def bicubic_squash(image: Image.Image, side: int) -> Image.Image:
    """The whole picture to a square by bicubic (antialiased), uint8: DreamSim's and DINOv2's input."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def prepared(pictures: Sequence[np.ndarray] | np.ndarray, step: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """`step` of every picture, in order, on all cores: Pillow lets go of the interpreter while it resizes."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return np.stack(list(pool.map(lambda p: step(Image.fromarray(p)), pictures)))
