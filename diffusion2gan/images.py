"""Pixels to pictures: quantisation, grids with captions, files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch import Tensor

from diffusion2gan.errors import UserError

Quantiser = Literal["round", "trunc"]
"""To the nearest level, or down to the next one, as DMD2's and GigaGAN's code has it: half a level darker on the average."""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of files that are read as pictures."""
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
"""Those whose pictures are not quite what was saved."""


def to_uint8(pixels: Tensor, quantiser: Quantiser = "round") -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8. Raises UserError for pixels that are not finite."""
    if not pixels.isfinite().all():
        raise UserError(
            "pictures have NaN or infinite pixels: the network that drew them is damaged, or its precision too low; try float32"
        )
    pixels = pixels.detach().float()
    scaled = (pixels + 1) * 127.5 if quantiser == "trunc" else (pixels * 127.5 + 127.5).round()
    return scaled.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(images: np.ndarray) -> Tensor:
    """The inverse of `to_uint8`: (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels-last."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def open_rgb(path: Path, remedy: str) -> Image.Image:
    """A picture file as RGB. Raises UserError, ending with `remedy`, for what is none."""
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); {remedy}") from None


def at_smallest_side(sets: Sequence[Sequence[np.ndarray] | np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Sets of square pictures, all at the side of the smallest, and that side: a larger picture would look better for its size alone."""
    side = min(p.shape[0] for pictures in sets for p in pictures)

    def resized(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))

    return [np.stack([p if p.shape[:2] == (side, side) else resized(p) for p in pictures]) for pictures in sets], side


def grid(
    images: np.ndarray, columns: int, captions: Sequence[str] | None = None, row_labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """One picture of (N, H, W, 3) uint8 images in rows of `columns`, with captions under them and labels left of the rows."""
    n, height, width = images.shape[:3]
    cell_h, cell_w = height * scale, width * scale
    pad, text = 4, 12 if captions else 0
    left = 8 * max((len(label) for label in row_labels), default=0) if row_labels else 0
    rows = -(-n // columns)
    canvas = Image.new("RGB", (left + columns * (cell_w + pad) + pad, rows * (cell_h + text + pad) + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = left + pad + column * (cell_w + pad), pad + row * (cell_h + text + pad)
        picture = Image.fromarray(image)
        canvas.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST) if scale > 1 else picture, (x, y))
        if captions:
            fit = max(1, cell_w // 6)
            label = captions[i] if len(captions[i]) <= fit else captions[i][: fit - 1] + "."
            draw.text((x, y + cell_h), label, fill="black", font_size=10)
    for row, label in enumerate(row_labels or ()):
        draw.text((4, pad + row * (cell_h + text + pad) + cell_h // 2 - 6), label, fill="black", font_size=12)
    return canvas


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
