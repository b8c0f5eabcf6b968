"""Peak memory of an evaluation against the number of its pictures: it must not grow with them.

    python benchmarks/evaluation_memory.py --counts 5000 50000 --out benchmarks/results/evaluation_memory_cpu.json
    python benchmarks/evaluation_memory.py --emoji --counts 1000 10000 --out benchmarks/results/evaluation_memory_emoji_cpu.json

Each count runs in a process of its own: 32 x 32 pictures are drawn from noise and go through FID-50k's own path (shards, extractor,
features on disk, moments in one pass, KID), with a network of random weights in the place of Inception: its arithmetic does not matter to
memory, and is all that would take hours here. `peak`: the most memory the process had of its own at any time, which the kernel
cannot take back as it can pages of files; `at rest`: after its imports. With --emoji it is the shipped student through emoji10k-v1,
teacher's pictures, real pictures and scoring network included; with --shared, what is there already is not drawn again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from diffusion2gan.benchmark import evaluate_student
from diffusion2gan.embedded.weights import embedded_student
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
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


class _Peak(threading.Thread):
    """Looks a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes = 0.0

    def run(self) -> None:
        while True:
            self.megabytes = max(self.megabytes, _megabytes())
            time.sleep(0.01)


def one(count: int, run: Callable[[int], None]) -> dict[str, float]:
    """`run` of `count` pictures in this process."""
    at_rest, started = _megabytes(), time.perf_counter()
    peak = _Peak()
    peak.start()
    run(count)
    return {"pictures": count, "at rest, MB": at_rest, "peak, MB": peak.megabytes, "seconds": time.perf_counter() - started}


def emoji(count: int, shared: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        evaluate_student(embedded_student(), Path(name) / "out", shared or Path(name) / "shared", "test", count, max(2, count // 50))


def cifar(count: int) -> None:
    evaluate.build_network = lambda *_: _random_network()  # type: ignore[assignment]
    old = evaluate.SAMPLES["cifar10"]
    chosen = SampleSet(count, old.prompts, lambda _: _Noise(count), count, side=32)
    evaluate.SAMPLES = {**evaluate.SAMPLES, "cifar10": chosen}  # type: ignore[misc]
    model = Model("noise", {"subject": "noise"}, lambda prompts, seeds: _pictures(seeds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        skipped = Evaluation(model, folder / "out", folder / "shared", folder, count=count, progress=False).run(["fid50k_cifar10"])
        assert not skipped, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5_000, 50_000])
    parser.add_argument("--emoji", action="store_true", help="emoji10k-v1 (half an hour for 10,000)")
    parser.add_argument("--shared", type=Path, default=None, help="features of the teacher that an evaluation left, or leaves, there")
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(one(a.one, (lambda count: emoji(count, a.shared)) if a.emoji else cifar)))
        return
    rows = []
    for count in a.counts:
        command = [
            sys.executable,
            __file__,
            "--one",
            str(count),
            *(["--emoji"] if a.emoji else []),
            *(["--shared", str(a.shared)] if a.shared else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    if a.out:
        write_json(a.out, {"device": device_name("cpu"), "what": "emoji10k-v1" if a.emoji else "FID-50k's path", "rows": rows})


if __name__ == "__main__":
    main()
