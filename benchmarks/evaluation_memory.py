"""Peak memory of an evaluation against the number of its pictures: it must not grow with them.

    python benchmarks/evaluation_memory.py --counts 5000 50000 --out benchmarks/results/evaluation_memory_cpu.json

Each count runs in a process of its own: 32 x 32 pictures are drawn from noise and go through FID-50k's own path (shards, extractor,
features on disk, moments in one pass), with a network of random weights in the place of Inception: its arithmetic does not matter to
memory, and is all that would take hours here. `peak`: the process' largest resident size; `at rest`: after its imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusion2gan.evaluation import evaluate
from diffusion2gan.evaluation.evaluate import Evaluation, SampleSet
from diffusion2gan.evaluation.extractors import Network, Pictures
from diffusion2gan.evaluation.models import Model
from diffusion2gan.evaluation.speed import device_name
from diffusion2gan.files import write_json
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.report import markdown_table

FEATURES = 2048


def _random_network() -> Network:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3 * 64, FEATURES)).astype(np.float32))

    def features(pictures: Pictures, captions: Sequence[str]) -> np.ndarray:
        x = torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 255
        return (torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) @ weight).relu().numpy()

    return Network("inception-tf", features, {"weights": "random"})


class _Noise:
    """Pictures of noise, as reference."""

    name = "noise"
    identity = "noise"

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def pictures(self, start: int, stop: int) -> np.ndarray:
        return _pictures(list(range(start, stop)))


def _pictures(seeds: Sequence[int]) -> np.ndarray:
    return (draw_noise(list(seeds), (32, 32, 3)) * 40 + 128).clip(0, 255).astype(np.uint8)


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(count: int) -> dict[str, float]:
    """Evaluates `count` pictures in this process."""
    at_rest, started = _megabytes(), time.perf_counter()
    evaluate.build_network = lambda *_: _random_network()  # type: ignore[assignment]
    old = evaluate.SAMPLES["cifar10"]
    chosen = SampleSet(count, old.prompts, lambda _: _Noise(count), count, side=32)
    evaluate.SAMPLES = {**evaluate.SAMPLES, "cifar10": chosen}  # type: ignore[misc]
    model = Model("noise", {"subject": "noise"}, lambda prompts, seeds: _pictures(seeds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        skipped = Evaluation(model, folder / "out", folder / "shared", folder, count=count, progress=False).run(["fid50k_cifar10"])
        assert not skipped, skipped
    return {"pictures": count, "at rest, MB": at_rest, "peak, MB": _megabytes(), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(one(a.one)))
        return
    rows = []
    for count in a.counts:
        done = subprocess.run([sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    if a.out:
        write_json(a.out, {"device": device_name("cpu"), "features": FEATURES, "rows": rows})


if __name__ == "__main__":
    main()
