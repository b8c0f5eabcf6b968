"""Figure 3's experiment: a random latent is moved towards one target by a distance alone. Does it arrive?

A distance that is blind to something leaves it as it was: LatentLPIPS alone stops at latents that look nothing like the
target and yet are near to it, which is why the paper averages it over augmentations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion2gan import losses
from diffusion2gan.files import disk_errors, write_bytes_atomic, write_json
from diffusion2gan.images import grid, png_bytes, to_uint8
from diffusion2gan.perceptual.e_latent_lpips import ELatentLPIPS
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS
from diffusion2gan.perceptual.lpips import DecodedLPIPS
from diffusion2gan.report import curves, markdown_table

LETTER_SETS = ("b", "g", "bg", "go", "bgo", "bgc", "bgco")
# (x0, x1, generator of this step's draws) -> (B,)
StepDistance = Callable[[Tensor, Tensor, torch.Generator], Tensor]
_POINTS = 50


@dataclass(frozen=True)
class Reconstruction:
    """Of one distance: where the latents arrived, and root mean square errors to the target on the way, per latent element."""

    latent: Tensor
    steps: list[int]
    errors: list[float]


def reconstruct(distance: StepDistance, target: Tensor, steps: int = 1000, learning_rate: float = 0.05, seed: int = 0) -> Reconstruction:
    """Moves a normal latent towards each row of `target` (B, C, H, W) by Adam on `distance` alone; the rate falls to 0 by a cosine.

    The start is the same for every distance. Rows do not influence each other.
    """
    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed)).to(target.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=learning_rate)
    at, errors = [], []
    for step in range(steps + 1):
        if step % max(1, steps // _POINTS) == 0 or step == steps:
            at.append(step)
            errors.append((x.detach() - target).square().mean().sqrt().item())
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.zero_grad()
        distance(x, target, torch.Generator().manual_seed(seed + 1 + step)).sum().backward()
        optimizer.step()
    return Reconstruction(x.detach(), at, errors)


def distances_of_figure_3(
    latent: LatentLPIPS, pixel: LatentLPIPS | None, decode: Callable[[Tensor], Tensor], letter_sets: tuple[str, ...] = LETTER_SETS
) -> dict[str, StepDistance]:
    """MSE, LPIPS through the decoder (with a pixel network), LatentLPIPS, and E-LatentLPIPS with each letter set."""
    rows: dict[str, StepDistance] = {"mse": lambda a, b, _: losses.mse(a, b)}
    if pixel is not None:
        decoded = DecodedLPIPS(decode, pixel)
        rows["lpips (decoded)"] = lambda a, b, _: decoded(a, b)
    rows["latent_lpips"] = lambda a, b, _: latent(a, b)

    def ensembled(letters: str) -> StepDistance:
        metric = ELatentLPIPS(latent, letters)
        return lambda a, b, generator: metric(a, b, metric.draw(len(a), a.shape[1:], generator, a.device))

    return rows | {f"e_latent_lpips {letters}": ensembled(letters) for letters in letter_sets}


def run_experiment(
    distances: Mapping[str, StepDistance], target: Tensor, decode: Callable[[Tensor], Tensor], out: Path, steps: int, seed: int = 0
) -> str:
    """Every distance on the same targets; writes OUT/pictures.png, curves.png, table.md and table.json. Returns the table.

    PSNR is of decoded pixels in [-1, 1] against the decoded target.
    """
    # A folder that cannot be written is found now, not after all the work.
    with disk_errors(out):
        write_json(out / "table.json", [])
    with torch.no_grad():
        wanted = decode(target)
    rows, pictures, series = [], [to_uint8(wanted)], {}
    for name, distance in tqdm(distances.items(), desc="reconstruct", unit="distance"):
        found = reconstruct(distance, target, steps, seed=seed)
        with torch.no_grad():
            pixels = decode(found.latent)
        psnr = 10 * torch.log10(4 / (pixels.clamp(-1, 1) - wanted.clamp(-1, 1)).square().mean()).item()
        rows.append({"distance": name, "latent RMSE": found.errors[-1], "PSNR, dB": psnr, "steps": steps, "targets": len(target)})
        pictures.append(to_uint8(pixels))
        series[name] = ([float(s) for s in found.steps], found.errors)
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    size = wanted.shape[-1]
    picture = grid(np.concatenate(pictures), len(target), row_labels=["target", *distances], scale=max(1, 96 // size))
    write_bytes_atomic(out / "pictures.png", png_bytes(picture))
    write_bytes_atomic(out / "curves.png", png_bytes(curves(series, "step", "latent RMSE", log_y=True)))
    write_bytes_atomic(out / "table.md", table.encode())
    write_json(out / "table.json", rows)
    return table
