"""The BAPPS data set of 2AFC judgements (Zhang et al. 2018), as it is unpacked:

    DIR/2afc/{train,val}/SUBSET/{ref,p0,p1}/NNNNNN.png and judge/NNNNNN.npy

A judgement is the share of people who found p1 nearer to the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.images import open_rgb, to_tensor
from diffusion2gan.perceptual.calibrate import TripletBatch

PARTS = ("ref", "p0", "p1")


class TripletFolder:
    """One subset folder, with `ref`, `p0`, `p1` and `judge`. Raises UserError for files that are missing or no pictures."""

    def __init__(self, folder: Path, resolution: int = 64):
        self.folder, self.resolution = folder, resolution
        # 64 at 128 x 128, fewer of what an autoencoder holds many megabytes of.
        self.batch = max(1, 64 * 128**2 // max(128, resolution) ** 2)
        for part in (*PARTS, "judge"):
            if not (folder / part).is_dir():
                raise UserError(f"{folder}: has no folder {part}, expected ref, p0, p1 and judge; name an unpacked BAPPS 2afc subset")
        self.names = sorted(p.stem for p in (folder / "judge").glob("*.npy"))
        unjudged = sorted({p.stem for part in PARTS for p in (folder / part).glob("*.png")} - set(self.names))
        if unjudged:
            raise UserError(f"{folder / 'judge' / unjudged[0]}.npy: is missing, expected one for each picture; unpack the data set again")
        for part in PARTS:
            missing = next((n for n in self.names if not (folder / part / f"{n}.png").is_file()), None)
            if missing is not None:
                raise UserError(f"{folder / part / missing}.png: is missing, expected one for each judgement; unpack the data set again")

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int | None = None) -> Iterator[TripletBatch]:
        """Triplets in order, `size` (default: `batch`) at a time."""
        size = size or self.batch
        for start in range(0, len(self.names), size):
            names = self.names[start : start + size]
            first, second, third = (to_tensor(np.stack([self._picture(part, n) for n in names])) for part in PARTS)
            yield first, second, third, torch.tensor([self._judgement(n) for n in names])

    def _picture(self, part: str, name: str) -> np.ndarray:
        picture = open_rgb(self.folder / part / f"{name}.png", "unpack the data set again")
        if picture.size != (self.resolution, self.resolution):
            picture = picture.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)
        return np.asarray(picture)

    def _judgement(self, name: str) -> float:
        path = self.folder / "judge" / f"{name}.npy"
        try:
            value = float(np.load(path, allow_pickle=False).reshape(-1)[0])
        except (ValueError, OSError, IndexError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error}); unpack the data set again") from None
        if not 0 <= value <= 1:
            raise UserError(f"{path}: holds {value}, expected a share between 0 and 1; unpack the data set again")
        return value


def subsets(root: Path, split: str, resolution: int = 64) -> dict[str, TripletFolder]:
    """Every subset of `split` ("train" or "val") in an unpacked BAPPS folder, by name. Raises UserError if there is none."""
    base = next((p for p in (root / "2afc" / split, root / split) if p.is_dir()), None)
    folders = [] if base is None else sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {p.name: TripletFolder(p, resolution) for p in folders}
    if not found:
        raise UserError(f"{root}: has no 2afc/{split}/SUBSET/judge, expected an unpacked BAPPS data set; see docs/e_latent_lpips.md")
    return found
