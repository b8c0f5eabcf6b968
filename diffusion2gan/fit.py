"""A small resumable training loop for auxiliary networks: the embedded models, perceptual backbones.

Distillation has its own trainer (`diffusion2gan.training`); this one knows a loss of one step and nothing else.
Every draw of step s comes from `step_generators(seed, s)`, so a run that was killed and resumed equals one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from diffusion2gan.ema import Ema
from diffusion2gan.errors import UserError
from diffusion2gan.files import disk_errors, sweep_temporaries, torch_load_safe, torch_save_atomic
from diffusion2gan.interrupt import stop_requests
from diffusion2gan.run_log import RunLog, mark_checkpointed, refuse_lost_checkpoint
from diffusion2gan.schedule import warmup_and_decay


@dataclass(frozen=True)
class FitConfig:
    """`steps` may be raised until the decay begins: the learning rate is constant after warm-up and falls to 0 over the last `decay_steps`."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    decay_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0
    compile: bool = False

    def rate(self, step: int) -> float:
        return self.learning_rate * warmup_and_decay(step, self.steps, self.warmup_steps, self.decay_steps)


def step_generators(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Random numbers of one training step, a function of (seed, step) alone."""
    numpy_generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return numpy_generator, torch.Generator().manual_seed(int(numpy_generator.integers(2**62)))


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _save(path: Path, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, config: FitConfig, step: int) -> None:
    torch_save_atomic(
        path,
        {"model": model.state_dict(), "ema": ema.state, "optimizer": optimizer.state_dict(), "step": step, "config": asdict(config)},
    )


def save_start(model: nn.Module, config: FitConfig, folder: Path, step: int) -> None:
    """Writes the checkpoint from which `fit` goes on at `step` with the weights of `model` and an optimiser that begins anew."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "checkpoint.pt", model, Ema(model, config.ema_decay), _optimizer(model, config), config, step)


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _mean_over_processes(tensors: list[Tensor]) -> None:
    """Replaces every tensor by its mean over all processes, in one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def fit(
    model: nn.Module,
    loss_of_step: Callable[[np.random.Generator, torch.Generator], tuple[Tensor, dict[str, Tensor]]],
    config: FitConfig,
    folder: Path,
    validate: Callable[[dict[str, Tensor]], dict[str, float]] | None = None,
    validate_every: int = 0,
) -> dict[str, Tensor]:
    """Trains `model` to `config.steps`, going on from `folder/checkpoint.pt` if there is one. Returns the EMA weights.

    SIGTERM and Ctrl-C finish the step, save and raise KeyboardInterrupt. Scalars go to `folder/metrics.jsonl`. In several
    processes each computes the loss of its own share of the batch; gradients and batch statistics are averaged, and the
    first process writes.
    """
    rank, world = process_rank()
    optimizer = _optimizer(model, config)
    ema = Ema(model, config.ema_decay)
    path = folder / "checkpoint.pt"
    start = _resume(path, model, ema, optimizer, config)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=config.steps, initial=start, desc=folder.name, mininterval=5, disable=rank != 0)
    log = RunLog(folder, rank == 0)
    log.rewind(start)
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    with disk_errors(folder), stop_requests() as stop, bar:
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            loss, scalars = loss_of_step(*step_generators(config.seed, step))
            loss.backward()
            told = torch.stack([loss.detach().float(), loss.new_tensor(float(stop()), dtype=torch.float32)])
            if world > 1:
                _mean_over_processes([*(p.grad for p in model.parameters() if p.grad is not None), *statistics, told])
            if not torch.isfinite(told[0]):
                raise UserError(f"{folder.name}: the loss is {told[0].item()} at step {step}; the last good weights are in {path}")
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            if not torch.isfinite(norm):
                raise UserError(
                    f"{folder.name}: the gradient's norm is {norm.item()} at step {step}; nothing was updated, the last weights are in {path}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model, step)
            bar.update()
            done = step + 1
            validating = validate is not None and validate_every > 0 and (done % validate_every == 0 or done == config.steps)
            if rank == 0 and (done % config.log_every == 0 or done == config.steps or validating):
                row = {"time": time.time(), "loss": told[0].item(), "gradient_norm": norm.item()}
                row |= {k: float(v) for k, v in scalars.items()}
                if validate is not None and validating:
                    row |= validate(ema.state)
                log.scalars(done, row)
                bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "time"})
            stopping = told[1].item() > 0
            if rank == 0 and (done % config.checkpoint_every == 0 or done == config.steps or stopping):
                _save(path, model, ema, optimizer, config, done)
                mark_checkpointed(folder)
            if stopping:
                if world > 1:
                    # A process that leaves now would have the others stopped before they have saved.
                    dist.barrier()
                raise KeyboardInterrupt
    return ema.state


def _resume(path: Path, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, config: FitConfig) -> int:
    """Loads a checkpoint, if there is one; returns the step to go on from. Raises UserError for one of other settings."""
    sweep_temporaries(path.parent)
    if not path.exists():
        refuse_lost_checkpoint(path.parent, path.name)
        return 0
    saved = torch_load_safe(path)
    if not isinstance(saved, dict) or not {"model", "ema", "optimizer", "step"} <= saved.keys():
        raise UserError(f"{path}: not a checkpoint of this training; move it away, or choose another folder")
    done, planned = saved["step"], saved.get("config", {})
    for key, value in planned.items():
        if key not in ("steps", "warmup_steps", "decay_steps", "checkpoint_every", "log_every", "compile") and value != asdict(config)[key]:
            raise UserError(f"{path}: trained with {key} {value}, now it is {asdict(config)[key]}; choose another folder")
    if done > config.steps:
        raise UserError(f"{path}: stands at step {done}, expected at most {config.steps}; ask for more steps")
    falling = planned.get("steps", config.steps) - planned.get("decay_steps", config.decay_steps)
    if done > falling and (config.steps, config.decay_steps) != (planned.get("steps"), planned.get("decay_steps")) and planned:
        raise UserError(
            f"{path}: at step {done} the learning rate is already falling towards step {planned['steps']}, expected the same steps as "
            f"before (now {config.steps}); train anew in another folder"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    ema.load(saved["ema"])
    return done
