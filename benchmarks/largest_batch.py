"""The largest batch that one GPU of a given size trains at once, and how fast: regression by MSE and by E-LatentLPIPS, and the full GAN.

    python benchmarks/largest_batch.py --network sd15 --precision bf16 --limit 80 --out ...   # a GPU with 80 GiB or more; random weights
    python benchmarks/largest_batch.py --limit 0.2 --most 16 --out ...                        # CPU: of what a step allocates

Batches double until a step does not fit, then the gap is halved until it is a sixteenth. On a GPU the limit is the process' own
(`set_per_process_memory_fraction`), weights and optimisers included; on a CPU only what a step allocates is counted. Gradient
checkpointing is on, unless --no-checkpointing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_step import R1_EVERY, free, load, new_trainer

from diffusion2gan.device import default_device, out_of_memory
from diffusion2gan.evaluation.speed import device_name, extra_memory, synchronise
from diffusion2gan.files import write_json
from diffusion2gan.pairs.simulate import PairsConfig, simulate
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.protocol import Teacher
from diffusion2gan.training.distance import LossConfig
from diffusion2gan.training.trainer import Trainer, TrainingConfig


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, to a sixteenth; 0 if one sample does not."""
    low, high = 0, 1
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Tries:
    """Steps of one kind of training at several batch sizes."""

    def __init__(self, teacher: Teacher, loss: LossConfig, adversarial: bool, store: Path, folder: Path, a: argparse.Namespace):
        self.teacher, self.loss, self.adversarial, self.store, self.folder, self.a = teacher, loss, adversarial, store, folder, a
        self.rate = 0.0
        """Images a second of the largest batch that fitted so far."""
        self._count = 0

    def fits(self, batch: int) -> bool:
        device, seconds = torch.device(self.teacher.device), [0.0]
        self._count += 1
        try:
            trainer = self._trainer(batch)
            batches = trainer._load(1)
            if self.adversarial:
                trainer._enter_phase_2()

            def step(at: int) -> None:
                started = time.perf_counter()
                trainer.step = at
                with no_tf32():  # as in `Trainer.run`
                    trainer.train_step(batches)
                synchronise(device)
                seconds.append(time.perf_counter() - started)

            # The first with R1, which takes most.
            extra = extra_memory(lambda: step(R1_EVERY), device)
            for _ in range(self.a.repeats):
                step(1)
        except RuntimeError as error:
            if out_of_memory(error) is None:
                raise
            return False
        finally:
            trainer = None  # type: ignore[assignment]
            self.teacher.network.to(device)
            # Every batch is compiled for itself, and dynamo gives up after a few shapes.
            torch._dynamo.reset()
            free(device.type)
        if device.type == "cpu" and extra > 1024 * self.a.limit:
            return False
        self.rate = batch / statistics.median(seconds[2:])
        return True

    def _trainer(self, batch: int) -> Trainer:
        a = self.a
        config = TrainingConfig(steps=0, batch_size=batch, mixed_precision=a.precision, holdout=1, compile=a.compile)
        r1_count = 1 if self.adversarial else None
        return new_trainer(self.teacher, self.loss, self.store, self.folder / str(self._count), config, not a.no_checkpointing, r1_count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("embedded", "sd15", "sdxl"), default="embedded")
    parser.add_argument("--limit", type=float, default=80.0, help="GiB")
    parser.add_argument("--most", type=int, default=1024, help="batches beyond this are not tried")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    device = default_device()
    if device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, a.limit * 2**30 / total))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, loss = load(a.network, device, folder)
        pairs = {"count": a.most + 1, "batch_size": 16, "shard_size": 64, "ode": {"steps": 1, "spacing": "trailing", "guidance": 1.0}}
        simulate(teacher, PairsConfig.model_validate(pairs), folder / "store", progress=False)
        for kind, of_kind, adversarial in (
            ("mse", LossConfig(distance="mse"), False),
            ("e_latent_lpips", loss, False),
            ("full GAN", loss, True),
        ):
            tries = Tries(teacher, of_kind, adversarial, folder / "store", folder / kind, a)
            found = largest(tries.fits, a.most)
            # At the cap it says only that so many fit.
            rows.append({"training": kind, "largest batch": found, "and more": found == a.most, "images/s there": tries.rate})
            print(rows[-1], flush=True)
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    if a.out:
        settings = {k: getattr(a, k) for k in ("network", "limit", "most", "precision", "compile", "no_checkpointing")}
        write_json(a.out, {"device": device_name(device), **settings, "rows": rows})


if __name__ == "__main__":
    main()
