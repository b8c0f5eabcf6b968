"""FSDP2 in two processes over gloo, through the trainer's own way. Equal runs: tests/test_crashes.py."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig
from diffusion2gan.errors import UserError
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.recipe import load_recipe
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.training.adversarial import AdversarialConfig
from diffusion2gan.training.distance import LossConfig, build_distance
from diffusion2gan.training.optimizer import adamw
from diffusion2gan.training.sharding import split_optimizer_state
from diffusion2gan.training.trainer import Trainer, TrainingConfig
from tests.conftest import tiny_sdxl_pipeline, tiny_store

WORLD = 2


def _worker(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    # As one would train SDXL: recomputed activations, bf16.
    teacher = SDXLTeacher.from_pipeline(tiny_sdxl_pipeline())
    config = TrainingConfig(steps=1, batch_size=8, micro_batch_size=2, holdout=8, shard=True, sample_count=2, warmup_steps=0)
    adversarial = AdversarialConfig(steps=1, r1="finite_difference", r1_every=1)
    d = build_discriminator(DiscriminatorConfig(gradient_checkpointing=True), teacher)
    g = OneStepGenerator.from_teacher(teacher, GeneratorConfig(gradient_checkpointing=True))
    size = {n: sum(p.numel() for p in m.parameters()) for n, m in (("g", g), ("d", d))}
    distance = build_distance(LossConfig(distance="mse"), teacher)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    trainer = Trainer(teacher, PairDataset(Path(store)), g, distance, config, Path(folder) / "run", accelerator, adversarial, d)
    assert trainer.placement.sharded
    trainer.run(progress=False)
    adversary = trainer.adversary
    assert adversary is not None
    assert trainer.step == 2
    for name, module, optimizer in (
        ("g", trainer.bare_generator, trainer.descent.raw_optimizer),
        ("d", adversary.bare, adversary.descent.raw_optimizer),
    ):
        parameters = list(module.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        # The moments are split as the weights are, and nothing is left behind by the other network's step.
        assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in parameters)
        assert all(p.grad is None for p in parameters)
        mine = torch.tensor(sum(p.to_local().numel() for p in parameters))
        dist.all_reduce(mine)
        assert mine == size[name]
    assert all(isinstance(v, DTensor) for v in trainer.ema.state.values())
    dist.barrier()
    # Not through the interpreter's end: a gloo thread that lets go of a tensor there aborts the process, once in many runs.
    os._exit(0)


def test_everything_of_both_networks_is_split(tmp_path: Path, prompts_file: Path) -> None:
    teacher = SDXLTeacher.from_pipeline(tiny_sdxl_pipeline())
    store = tiny_store(tmp_path / "store", prompts_file, teacher=teacher, count=32, shard_size=16)
    mp.spawn(_worker, args=(str(store), str(tmp_path)), nprocs=WORLD)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert (tmp_path / "run" / "samples" / "held-out-00000002.png").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.compile=true"], "training.compile is true with training.shard, expected false"),
        (["training.compile=false", "training.ema_on_cpu=true"], "training.ema_on_cpu is True with training.shard, expected False"),
        (["training.compile=false", "training.optimizer=adamw_8bit"], "training.optimizer is adamw_8bit with training.shard"),
        (["training.compile=false", "generator.lora_rank=4"], "generator.lora_rank is set with training.shard"),
        (["training.compile=false", "adversarial={steps: 2}"], "adversarial.r1 is exact with training.shard, expected finite_difference"),
    ],
)
def test_what_split_weights_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("emoji", ["training.shard=true", *overrides])


def test_moments_of_another_memory_layout_take_the_parameters() -> None:
    """A run that was split goes on whole, in channels_last: a fused AdamW would pair each weight with another one's moments."""
    torch.manual_seed(0)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    x = torch.randn(2, 8, 4, 4)
    model = torch.nn.Conv2d(8, 8, 3)
    optimizer = adamw("adamw", model.parameters(), 1e-2, (0.9, 0.99), 0.0)
    steps(model, optimizer, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    steps(model, optimizer, 3)
    other = torch.nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    other.load_state_dict(weights)
    resumed = adamw("adamw", other.parameters(), 1e-2, (0.9, 0.99), 0.0)
    resumed.load_state_dict(split_optimizer_state(state, resumed))
    assert resumed.state[other.weight]["exp_avg"].stride() == other.weight.stride() != model.weight.stride()
    steps(other, resumed, 3)
    torch.testing.assert_close(other.weight, model.weight, atol=1e-5, rtol=1e-5)
