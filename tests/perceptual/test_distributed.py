"""The loss in two processes: under DDP and FSDP2 it gives the gradients of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffusion2gan.fit import FitConfig, fit
from diffusion2gan.perceptual import ELatentLPIPS, LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.augmentations import AugmentationParameters
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig

WORLD, BATCH = 2, 4


def _networks() -> tuple[nn.Module, ELatentLPIPS]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    return generator, ELatentLPIPS(LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=4, width=0.125))), "bgco").double()


def _data(loss: ELatentLPIPS) -> tuple[Tensor, Tensor, AugmentationParameters]:
    random = torch.Generator().manual_seed(1)
    z, x = torch.randn(2, BATCH, 4, 8, 8, generator=random, dtype=torch.float64)
    return z, x, loss.draw(BATCH, x.shape[1:], random)


def _gradients(generator: nn.Module, loss: ELatentLPIPS, rows: slice, cached: bool = False) -> list[Tensor]:
    z, x, parameters = _data(loss)
    drawn = parameters.rows(rows)
    target = {"features": loss.target_features(x[rows], drawn)} if cached else {"x1": x[rows]}
    loss(generator(z[rows]), parameters=drawn, **target).mean().backward()
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in generator.parameters()]  # type: ignore[union-attr,misc]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    generator, loss = _networks()
    ddp = _gradients(DistributedDataParallel(generator), loss, rows)
    generator, loss = _networks()
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(generator, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in loss.parameters())
    fsdp = _gradients(generator, loss, rows)
    generator.zero_grad()
    register_fsdp_forward_method(loss, "target_features")
    cached = _gradients(generator, loss, rows, cached=True)
    if rank == 0:
        torch.save({"ddp": ddp, "fsdp": fsdp, "fsdp, cached features": cached}, Path(folder) / "gradients.pt")
    dist.barrier()
    # Not through the interpreter's end: a gloo thread that lets go of a tensor there aborts the process, once in many runs.
    os._exit(0)


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=WORLD)
    expected = _gradients(*_networks(), slice(None))
    assert all(g.abs().max() > 1e-6 for g in expected)
    for kind, gradients in torch.load(tmp_path / "gradients.pt", weights_only=True).items():
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=kind)


def _one_of_two(rank: int, folder: str) -> None:
    """Trains a batch norm on data of another mean in each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

    def loss_of_step(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.from_numpy(rng.normal(10.0 * rank, 1.0, (8, 3)).astype(np.float32))
        return model(x).square().mean(), {}

    fit(model, loss_of_step, FitConfig(3, 16, 1e-3), Path(folder) / "run")
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


def test_batch_statistics_are_those_of_all_processes(tmp_path: Path) -> None:
    mp.spawn(_one_of_two, args=(str(tmp_path),), nprocs=WORLD)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    # After three steps with a momentum of 0.1: 27 % of the mean over both, 5.
    torch.testing.assert_close(ours["0.running_mean"], torch.full((3,), 0.271 * 5), atol=0.3, rtol=0)
