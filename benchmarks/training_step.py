"""A training step of phase 1 (by E-LatentLPIPS, and by MSE) and of phase 2 (with the discriminator): time and memory, in one run.

    python benchmarks/training_step.py --batch 32 --r1-count 8 --repeats 3 --out benchmarks/results/training_step_cpu.json  # float32
    python benchmarks/training_step.py --batch 32 --r1-every 4 --r1-count 2 --precision bf16 --compile --repeats 5 --out ...  # as `emoji`
    python benchmarks/training_step.py --network sd15 --batch 8 --precision bf16 --out ...      # on a GPU

The trainer itself is measured, on pairs of a one-step solve; Stable Diffusion 1.5 and SDXL have random weights: time and memory
do not depend on them. Kinds of steps take turns, so that a drifting machine cancels out; times are medians of all but the first.
`memory`: what a step allocates beyond what was there; `resident`: weights, averages and optimiser states (GPU only). A step that
does not fit is recorded with its error.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_teachers import random_sd15, random_sdxl
from torch import nn

from diffusion2gan.device import default_device, out_of_memory
from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.evaluation.speed import device_name, extra_memory, synchronise
from diffusion2gan.files import write_json
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.pairs.simulate import PairsConfig, simulate
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.protocol import Teacher, TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.adversarial import AdversarialConfig
from diffusion2gan.training.distance import Distance, LossConfig, build_distance
from diffusion2gan.training.trainer import Trainer, TrainingConfig

R1_EVERY = 16


def load(network: str, device: str, folder: Path) -> tuple[Teacher, LossConfig]:
    """The teacher, and a full-width E-LatentLPIPS of its latent space."""
    if network == "embedded":
        return StableDiffusionTeacher.from_pretrained(TeacherConfig(), embedded_folder("teacher"), device), LossConfig()
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=4))).save_pretrained(folder / "vgg")
    return {"sd15": random_sd15, "sdxl": random_sdxl}[network](device), LossConfig(perceptual=str(folder / "vgg"))


def new_trainer(
    teacher: Teacher,
    loss: LossConfig,
    store: Path,
    folder: Path,
    config: TrainingConfig,
    checkpointing: bool,
    r1_count: int | None,
    r1_every: int = R1_EVERY,
) -> Trainer:
    """`r1_count`: samples of the batch that R1 looks at; None: there is no discriminator. Afterwards the teacher's network is in the host's
    memory: `train` gives it up, and the next trainer needs it again."""
    generator = OneStepGenerator.from_teacher(teacher, GeneratorConfig(gradient_checkpointing=checkpointing))
    adversarial = discriminator = None
    if r1_count is not None:
        # Its steps are timed, whatever they do: of pairs of one step an untrained student knows the answer, and any step is a change for the worse.
        adversarial = AdversarialConfig(steps=1000, r1_every=r1_every, r1_count=r1_count, stop_regression=1e30, stop_accuracy=(0, 1))
        discriminator = build_discriminator(DiscriminatorConfig(gradient_checkpointing=checkpointing), teacher)
    distance = build_distance(loss, teacher, teacher.device)
    weights = {name: value.cpu() for name, value in teacher.network.state_dict().items()}
    teacher.give_up_network()
    teacher.network = copy.deepcopy(teacher.network)
    teacher.network.load_state_dict(weights, assign=True)
    trainer = Trainer(teacher, PairDataset(store), generator, distance, config, folder, None, adversarial, discriminator)
    # Nobody goes on from these runs, and a checkpoint of each would fill a small disk.
    trainer._save = lambda: None  # type: ignore[method-assign]
    return trainer


def measure(trainer: Trainer, mse: Distance, repeats: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds and MB of each kind of step; and of those that do not fit, why. `mse`: the distance of one of the kinds."""
    trainer._enter_phase_2()
    assert trainer.adversarial is not None
    r1_every = trainer.adversarial.r1_every
    guard, batches, own = trainer.guard, trainer._load(1), trainer._distance_in_training

    def step(phase: int, at: int, distance: nn.Module = own) -> None:
        # A step is told by its number whether R1 is due.
        trainer.guard, trainer.step, trainer._distance_in_training = (guard if phase == 2 else None), at, distance
        with no_tf32():  # as in `Trainer.run`
            trainer.train_step(batches)
        synchronise(trainer.device)

    kinds: dict[str, tuple[Any, ...]] = {
        "phase 1, mse": (1, 1, mse), "phase 1": (1, 1), "phase 2": (2, 1), "phase 2, with R1": (2, r1_every)
    }  # fmt: skip
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    failed: dict[str, str] = {}
    for _ in range(repeats + 1):
        for kind, where in kinds.items():
            if kind in failed:
                continue
            started = time.perf_counter()
            try:
                step(*where)
            except RuntimeError as error:
                failed[kind] = why_it_does_not_fit(error)
                free(trainer.device.type)
            times[kind].append(time.perf_counter() - started)
    fits = {kind: where for kind, where in kinds.items() if kind not in failed}
    found = {
        kind: {"s": statistics.median(times[kind][1:]), "MB": extra_memory(lambda where=where: step(*where), trainer.device)}
        for kind, where in fits.items()
    }
    return found, failed


def why_it_does_not_fit(error: RuntimeError) -> str:
    """In one line. Raises the error again when it is not of memory."""
    if out_of_memory(error) is None:
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("embedded", "sd15", "sdxl"), default="embedded")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--r1-count", type=int, default=1, help="samples of the batch that R1 looks at")
    parser.add_argument("--r1-every", type=int, default=R1_EVERY)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    device = default_device()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, loss = load(a.network, device, folder)
        pairs = {
            "count": 2 * a.batch,
            "batch_size": a.batch,
            "shard_size": a.batch,
            "ode": {"steps": 1, "spacing": "trailing", "guidance": 1.0},
        }
        simulate(teacher, PairsConfig.model_validate(pairs), folder / "store", progress=False)
        config = TrainingConfig(steps=0, batch_size=a.batch, mixed_precision=a.precision, holdout=a.batch, compile=a.compile)
        for checkpointing in (False, True):
            row: dict[str, Any] = {"gradient checkpointing": checkpointing}
            try:
                run = folder / f"run-{checkpointing}"
                trainer = new_trainer(teacher, loss, folder / "store", run, config, checkpointing, a.r1_count, a.r1_every)
                if device == "cuda":
                    row["resident, MB"] = torch.cuda.memory_allocated() / 2**20
                found, failed = measure(trainer, build_distance(LossConfig(distance="mse"), teacher, teacher.device), a.repeats)
            except RuntimeError as error:
                rows.append(row | {"error": why_it_does_not_fit(error)})
                continue
            finally:
                trainer = None  # type: ignore[assignment]
                teacher.network.to(device)
                free(device)
            row |= {f"{kind}, {unit}": value for kind, values in found.items() for unit, value in values.items()}
            row |= {f"{kind}, peak MB": row["resident, MB"] + values["MB"] for kind, values in found.items() if "resident, MB" in row}
            row |= {f"{kind}, error": why for kind, why in failed.items()}
            if not failed:
                lazy = ((a.r1_every - 1) * found["phase 2"]["s"] + found["phase 2, with R1"]["s"]) / a.r1_every
                row |= {
                    "phase 1 : mse, images/s": found["phase 1, mse"]["s"] / found["phase 1"]["s"],
                    "phase 1, images/s": a.batch / found["phase 1"]["s"],
                    "phase 2 : phase 1, time": lazy / found["phase 1"]["s"],
                    "R1's share of phase 2": 1 - found["phase 2"]["s"] / lazy,
                }
            rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(markdown_table(columns, [[row.get(c) for c in columns] for row in rows]))
    if a.out:
        result = {
            "device": device_name(device),
            "network": a.network,
            "batch": a.batch,
            "r1_count": a.r1_count,
            "r1_every": a.r1_every,
            "precision": a.precision,
            "compile": a.compile,
        }
        write_json(a.out, result | {"rows": rows})


if __name__ == "__main__":
    main()
