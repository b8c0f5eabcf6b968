"""Reading speed of the pair store at SD 1.5 size, shuffled, one worker, from the page cache.

    python benchmarks/pair_store.py --pairs 8192

Writes a store of random latents (no teacher is needed: the reader does not care), then reads it in random order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.files import write_json
from diffusion2gan.pairs import maintain
from diffusion2gan.pairs.dataset import (
    FORMAT,
    PairDataset,
    canonical_json,
    encode_shard,
    shard_count,
    shard_name,
    shard_rows,
    write_final_files,
)
from diffusion2gan.pairs.seeds import NOISE_RECIPE, draw_noise, noise_fingerprint, pair_seed

SHAPE = (4, 64, 64)
BATCH = 64


def write_store(folder: Path, pairs: int, shard_size: int = 256) -> None:
    """A finished store of `pairs` random latents."""
    settings: dict[str, Any] = {
        "format": FORMAT, "teacher": {}, "precision": "float32", "latent_shape": list(SHAPE), "ode": {}, "negative_prompt": "",
        "prompts_sha256": "", "count": pairs, "seed": 0, "batch_size": 1, "shard_size": shard_size,
        "noise_recipe": {"name": NOISE_RECIPE, "fingerprint": noise_fingerprint()}, "noise_storage": "none",
    }  # fmt: skip
    folder.mkdir()
    (folder / "settings.json").write_bytes(canonical_json(settings))
    total = shard_count(pairs, shard_size)
    for index in range(total):
        rows = shard_rows(index, pairs, shard_size)
        latent = draw_noise([(1 << 61) + i for i in rows], SHAPE).astype("<f2")
        data = encode_shard([pair_seed(0, i) for i in rows], [f"a photograph of thing number {i} on a table" for i in rows], latent, None)
        (folder / shard_name(index, total, hashlib.sha256(data).hexdigest())).write_bytes(data)
    write_final_files(folder, settings)


def rate(read: Callable[[np.ndarray], Any], pairs: int, seconds: float) -> float:
    """Rows a second of `read(rows)` over shuffled batches, after one pass over a part to warm the page cache."""
    order = np.random.default_rng(0).permutation(pairs)
    batches = [order[i : i + BATCH] for i in range(0, pairs - BATCH + 1, BATCH)]
    for batch in batches[: len(batches) // 4]:
        read(batch)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        read(batches[done % len(batches)])
        done += 1
    return done * BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plain, stored = Path(scratch) / "plain", Path(scratch) / "stored"
        write_store(plain, arguments.pairs)
        maintain.store_noise(plain, stored)
        drawn, kept = PairDataset(plain), PairDataset(stored)
        result = {
            "shape": list(SHAPE),
            "pairs": arguments.pairs,
            "batch": BATCH,
            "latents_per_second": rate(drawn.latents, arguments.pairs, arguments.seconds),
            "pairs_per_second_redrawn_noise": rate(drawn.batch, arguments.pairs, arguments.seconds),
            "pairs_per_second_stored_noise": rate(kept.batch, arguments.pairs, arguments.seconds),
            "machine": f"{platform.machine()}, one process",
        }
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
