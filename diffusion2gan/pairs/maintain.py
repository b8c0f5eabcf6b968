"""`diffusion2gan pairs check | show | store-noise`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.files import sweep_temporaries, write_bytes_atomic
from diffusion2gan.images import grid, png_bytes, to_uint8
from diffusion2gan.pairs.dataset import (
    PairDataset,
    encode_shard,
    existing_shards,
    shard_count,
    shard_name,
    shard_rows,
    verify_shard,
    write_final_files,
)
from diffusion2gan.pairs.simulate import agree_on_settings
from diffusion2gan.teachers.protocol import Teacher


def check(folder: Path) -> dict[str, Any]:
    """Reads the whole store: checksums, seeds unique, latents finite. Raises UserError at the first fault; returns statistics."""
    store = PairDataset(folder, verify=False)
    for shard in tqdm(store.manifest["shards"], unit="shard", desc="check"):
        verify_shard(store.folder / shard["file"])
    if len(np.unique(store.seeds)) != len(store):
        raise UserError(f"{folder}: {len(store) - len(np.unique(store.seeds))} seeds appear twice; simulate the store again")
    total, square = 0.0, 0.0
    for start in range(0, len(store), 1024):
        x = store.latents(range(start, min(len(store), start + 1024))).astype(np.float64)
        if not np.isfinite(x).all():
            raise UserError(f"{folder}: a latent in pairs {start} to {start + len(x) - 1} is not finite; simulate the store again")
        total, square = total + x.sum(), square + np.square(x).sum()
    size = len(store) * int(np.prod(store.latent_shape))
    prompts = {store.prompt(i) for i in range(len(store))}
    return {
        "pairs": len(store),
        "prompts": len(prompts),
        "latent_mean": total / size,
        "latent_std": float(np.sqrt(square / size - (total / size) ** 2)),
        "fingerprint": store.manifest["fingerprint"],
    }


def show(folder: Path, teacher: Teacher, out: Path, count: int = 32) -> Image.Image:
    """Decodes the first `count` pairs into one picture at `out`."""
    import torch

    store = PairDataset(folder)
    if teacher.latent_shape != store.latent_shape:
        raise UserError(
            f"{folder}: latents of {store.latent_shape}, the recipe's teacher has {teacher.latent_shape}; name the store's own recipe"
        )
    theirs, ours = store.manifest["teacher"]["weights"], teacher.identity()["weights"]
    if theirs != ours:
        raise UserError(f"{folder}: pairs of teacher {theirs[:16]}..., the recipe's is {ours[:16]}...; name the store's own recipe")
    teacher.decoder_in_float32()
    rows = range(min(count, len(store)))
    with torch.inference_mode():
        pixels = teacher.decode(torch.from_numpy(store.latents(rows).astype(np.float32)).to(teacher.device))
    picture = grid(to_uint8(pixels), columns=8, captions=[store.prompt(i) for i in rows])
    write_bytes_atomic(out, png_bytes(picture))
    return picture


def store_noise(folder: Path, out: Path) -> dict[str, Any]:
    """Copies a store that draws its noise again into one that holds it (float32: the very bits the teacher saw)."""
    source = PairDataset(folder)
    if source.noise_dtype is not None:
        raise UserError(f"{folder}: already stores its noise ({source.noise_dtype}); nothing to do")
    settings = {k: v for k, v in source.manifest.items() if k not in ("shards", "fingerprint")} | {"noise_storage": "float32"}
    total = shard_count(settings["count"], settings["shard_size"])
    if out.resolve() == folder.resolve():
        raise UserError(f"{out}: is the store itself; choose a new folder")
    agree_on_settings(out, settings)
    sweep_temporaries(out)
    present = existing_shards(out, total)
    for index in tqdm(range(total), unit="shard", desc="store-noise"):
        if index in present:
            verify_shard(present[index])
            continue
        rows = shard_rows(index, settings["count"], settings["shard_size"])
        batch = source.batch(rows)
        data = encode_shard(batch.seeds.tolist(), batch.prompts, batch.latent, batch.noise)
        write_bytes_atomic(out / shard_name(index, total, hashlib.sha256(data).hexdigest()), data)
    return write_final_files(out, settings)
