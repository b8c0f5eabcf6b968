"""The main loop. Phase 1 is ODE distillation (Eq. 1 and 4): the regression loss alone.

run            steps from the last checkpoint to the end, with logs, pictures and checkpoints between
train_step     one optimiser step over the global batch
generator_step forward and backward of one micro-batch
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from diffusion2gan.config import Section
from diffusion2gan.device import compile_for_one_shape
from diffusion2gan.ema import Ema
from diffusion2gan.errors import UserError
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import grid, to_uint8
from diffusion2gan.interrupt import stop_requests
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.run_log import RunLog, refuse_lost_checkpoint
from diffusion2gan.schedule import warmup_and_decay
from diffusion2gan.teachers.attention import plain_attention_on_cpu
from diffusion2gan.teachers.protocol import Teacher
from diffusion2gan.training.distance import Distance
from diffusion2gan.training.order import SampleOrder, augmentation_uniforms
from diffusion2gan.training.state import TrainingState, checkpoints, environment, load_state, save_state


class TrainingConfig(Section):
    """Phase 1. The paper's settings are not public; docs/reproduction.md gives the reason of each default."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    """Global: over all processes and accumulated micro-batches."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that go through the network at once in one process; the rest of its share is accumulated."""
    learning_rate: float = Field(3e-4, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int = Field(0, ge=0)
    """The learning rate falls linearly to 0 over the last so many steps."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    gradient_clip: float = Field(2.0, gt=0)
    """Relative: the gradient is cut to this many times its running norm, so that no loss is favoured by its scale."""
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    holdout: int = Field(256, ge=1)
    """The last so many pairs of the store are never trained on: validation loss and sample grids use them."""
    first_pairs: int | None = Field(None, ge=1)
    """Trains on only the first so many pairs of the store: how much do more pairs help?"""
    sample_every: int = Field(500, ge=1)
    sample_count: int = Field(16, ge=1)
    seed: int = Field(0, ge=0, lt=1 << 62)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_no(cls, value: object) -> object:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainingConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, expected a multiple of micro_batch_size ({self.micro_batch_size})")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, a function of the step alone."""
        return self.learning_rate * warmup_and_decay(step, self.steps, self.warmup_steps, self.decay_steps)


@dataclass(frozen=True)
class OdePairBatch:
    """Pairs of Eq. 1 on the device: z (B, C, H, W), the prompts, x (B, C, H, W), and the augmentation's random numbers (B, K)."""

    noise: Tensor
    prompts: list[str]
    latent: Tensor
    uniform: Tensor | None


# The gradient norm's running mean forgets over about 100 steps.
_NORM_DECAY = 0.99


class Trainer:
    """Distils `teacher` into `generator` on `pairs`; everything it writes lies in `folder`.

    Raises UserError for a batch that the processes can't share, too few pairs, a non-finite loss, a folder it can't write.
    """

    def __init__(
        self,
        teacher: Teacher,
        pairs: PairDataset,
        generator: OneStepGenerator,
        distance: Distance,
        config: TrainingConfig,
        folder: Path,
        accelerator: Accelerator | None = None,
    ):
        self.teacher, self.pairs, self.distance, self.config, self.folder = teacher, pairs, distance, config, folder
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)
        if len(pairs) <= config.holdout:
            raise UserError(f"training.holdout is {config.holdout} but the store has {len(pairs)} pairs; simulate more, or hold out fewer")
        world = self.accelerator.num_processes
        self.micro = config.micro_batch_size or max(1, config.batch_size // world)
        if config.batch_size % (world * self.micro):
            raise UserError(
                f"training.batch_size is {config.batch_size}, expected a multiple of processes x micro_batch_size ({world} x {self.micro})"
            )
        self.accumulation = config.batch_size // (world * self.micro)
        available = len(pairs) - config.holdout
        if config.first_pairs is not None and config.first_pairs > available:
            raise UserError(
                f"training.first_pairs is {config.first_pairs}, expected at most {available} ({len(pairs)} pairs, {config.holdout} held out)"
            )
        self.order = SampleOrder(config.first_pairs or available, config.seed)
        generator.to(self.device).to(memory_format=torch.channels_last)
        plain_attention_on_cpu(generator.network, teacher.latent_shape[1] * teacher.latent_shape[2], self.device)
        self.ema = Ema(generator, config.ema_decay)
        self.bare_generator = generator
        optimizer = torch.optim.AdamW(
            generator.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        trained: nn.Module = generator
        self._distance_in_training: nn.Module = distance
        if config.compile:
            trained = compile_for_one_shape(generator, self.device, "training.compile")
            # A distance without a network of its own is too small to compile.
            if distance.network is not None:
                self._distance_in_training = compile_for_one_shape(distance, self.device, "training.compile")
        self.generator, self.optimizer = self.accelerator.prepare(trained, optimizer)
        self.step = 0
        self.stopping = False
        self.gradient_scale = math.nan
        self.log = RunLog(folder, self.accelerator.is_main_process)
        self._resume()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # --- One step ---------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[OdePairBatch], stop: bool = False) -> dict[str, float]:
        """One optimiser step over this process' share of the global batch.

        `stop` travels with the loss, so that all processes learn in the same step that one of them was asked to stop.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(micro_batches):
            # Gradients are exchanged once, with the last micro-batch.
            with self.accelerator.no_sync(self.generator) if number + 1 < len(micro_batches) else nullcontext():
                loss += self.generator_step(micro_batch)
        loss, stops = self.accelerator.reduce(torch.stack([loss, loss.new_tensor(float(stop))]), "mean")
        norm = self._clip(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.bare_generator, self.step)
        self.step += 1
        self.stopping = stops.item() > 0
        return {"loss": loss.item(), "gradient_norm": norm, "learning_rate": self.config.rate(self.step - 1)}

    def generator_step(self, pairs: OdePairBatch) -> Tensor:
        """Forward and backward of d(G(z, c), x); returns this micro-batch's share of the mean."""
        condition = self.teacher.encode_prompts(pairs.prompts)
        fake = self.generator(pairs.noise, condition)
        with self.accelerator.autocast():
            distance = self._distance_in_training(fake, pairs.latent, pairs.uniform)
        loss = distance.float().mean() / self.accumulation
        self.accelerator.backward(loss)
        return loss.detach()

    def _clip(self, loss: Tensor) -> float:
        """Cuts the gradient to `gradient_clip` times its running norm. Raises UserError before anything non-finite is applied."""
        parameters = [p for p in self.bare_generator.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value, scale = norm.item(), self.gradient_scale
        if not math.isfinite(loss.item()) or not math.isfinite(value):
            last = checkpoints(self.folder / "checkpoints")
            raise UserError(
                f"step {self.step}: the regression loss is {loss.item()} and its gradient norm {value}, expected finite numbers; nothing was updated, "
                f"the last good state is {last[-1] if last else 'the start'}; start again in a new --out with a lower training.learning_rate"
            )
        if not math.isnan(scale):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip * scale, norm)
            value = min(value, self.config.gradient_clip * scale)
        self.gradient_scale = value if math.isnan(scale) else _NORM_DECAY * scale + (1 - _NORM_DECAY) * value
        return norm.item()

    # --- Data -------------------------------------------------------------------------------------------------------

    def _load(self, step: int) -> list[OdePairBatch]:
        """This process' micro-batches of a step. Runs in a thread one step ahead; it draws nothing that depends on when it runs."""
        rows = self.order.rows(step, self.config.batch_size)
        share = self.accumulation * self.micro
        first = self.accelerator.process_index * share
        return self._micro_batches(rows, step, range(first, first + share, self.micro))

    def _micro_batches(self, rows: np.ndarray, step: int, starts: range) -> list[OdePairBatch]:
        """The micro-batches of `rows` that begin at `starts`, augmented by the draws of `step`."""
        width = self.distance.n_uniform
        uniform = augmentation_uniforms(self.config.seed, step, len(rows), width) if width else None
        return [self._batch(rows[i : i + self.micro], None if uniform is None else uniform[i : i + self.micro]) for i in starts]

    def _batch(self, rows: np.ndarray, uniform: np.ndarray | None) -> OdePairBatch:
        arrays = self.pairs.batch(rows)
        return OdePairBatch(
            noise=torch.from_numpy(arrays.noise).to(self.device).contiguous(memory_format=torch.channels_last),
            prompts=arrays.prompts,
            latent=torch.from_numpy(arrays.latent.astype(np.float32)).to(self.device).contiguous(memory_format=torch.channels_last),
            uniform=None if uniform is None else torch.from_numpy(uniform).to(self.device),
        )

    # --- The run ----------------------------------------------------------------------------------------------------

    def run(self, progress: bool = True, deadline: Callable[[], bool] | None = None) -> None:
        """Trains from where the folder stands to `config.steps`. Ctrl-C and SIGTERM save first, then raise KeyboardInterrupt.

        `deadline` may end the run early (the demo's time budget); what was trained is saved.
        """
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not progress or not self.accelerator.is_main_process,
            mininterval=1,
        )
        if self.step == 0:
            self._sample()
        with stop_requests() as stop, ThreadPoolExecutor(1) as loader, bar:
            upcoming: Future[list[OdePairBatch]] = loader.submit(self._load, self.step)
            while self.step < config.steps and not self.stopping:
                started = time.perf_counter()
                micro_batches = upcoming.result()
                if self.step + 1 < config.steps:
                    upcoming = loader.submit(self._load, self.step + 1)
                scalars = self.train_step(micro_batches, stop() or bool(deadline and deadline()))
                done = self.step == config.steps
                if self.step % config.log_every == 0 or done:
                    rate = config.batch_size / (time.perf_counter() - started)
                    self.log.scalars(self.step, scalars, images_per_second=round(rate, 2))
                    bar.set_postfix(loss=f"{scalars['loss']:.4f}", img_s=f"{rate:.0f}")
                bar.update()
                if self.stopping:
                    # Before anything that takes time: who asks for a stop may not wait long.
                    self._save()
                if self.step % config.validate_every == 0 or done:
                    self.log.scalars(self.step, self.validate())
                if self.step % config.sample_every == 0 or done:
                    self._sample()
                # Last of a step: what is resumed from has all its rows and pictures.
                if (self.step % config.checkpoint_every == 0 or done) and not self.stopping:
                    self._save()
            if self.stopping and stop():
                raise KeyboardInterrupt

    def _held_out(self, count: int) -> list[OdePairBatch]:
        first = len(self.pairs) - self.config.holdout
        rows = np.arange(first, first + min(count, self.config.holdout))
        # A step that no training reaches: always the same draws.
        return self._micro_batches(rows, 1 << 40, range(0, len(rows), self.micro))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The EMA student on held-out pairs: the loss that is trained, and the mean squared error for every loss alike."""
        total, square, count = 0.0, 0.0, 0
        with self.ema.applied_to(self.bare_generator):
            for pairs in self._held_out(self.config.holdout):
                with self.accelerator.autocast():  # as in training, compiled or not
                    fake = self.bare_generator(pairs.noise, self.teacher.encode_prompts(pairs.prompts))
                total += self.distance(fake, pairs.latent, pairs.uniform).sum().item()
                square += (fake - pairs.latent).square().flatten(1).mean(1).sum().item()
                count += len(fake)
        return {"validation_loss": total / count, "validation_mse": square / count}

    @torch.no_grad()
    def _sample(self) -> None:
        """A grid of held-out pairs: the teacher's picture above the EMA student's, column by column."""
        if not self.accelerator.is_main_process:
            return
        targets, fakes, prompts = [], [], []
        with self.ema.applied_to(self.bare_generator):
            for pairs in self._held_out(self.config.sample_count):
                with self.accelerator.autocast():
                    fake = self.bare_generator(pairs.noise, self.teacher.encode_prompts(pairs.prompts))
                fakes.append(self.teacher.decode(fake.to(self.teacher.dtype)))
                targets.append(self.teacher.decode(pairs.latent.to(self.teacher.dtype)))
                prompts += pairs.prompts
        images = np.concatenate([to_uint8(torch.cat(targets)), to_uint8(torch.cat(fakes))])
        picture = grid(images, columns=len(prompts), captions=prompts + [""] * len(prompts), row_labels=["teacher", "student"])
        self.log.picture(self.step, "held-out", picture)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            here = environment(self.config.compile, self.accelerator.num_processes)
            state = TrainingState(
                self.step, self.bare_generator.state_dict(), self.ema.state, self.optimizer.state_dict(), self.gradient_scale, here
            )
            save_state(state, self.folder / "checkpoints", self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoints(self.folder / "checkpoints")
        if found:
            state = load_state(found[-1], environment(self.config.compile, self.accelerator.num_processes))
            self.bare_generator.load_state_dict(state.model)
            self.ema.load(state.ema)
            self.optimizer.load_state_dict(state.optimizer)
            self.step, self.gradient_scale = state.step, state.gradient_scale
        else:
            refuse_lost_checkpoint(self.folder, "checkpoints/step-*.pt", self.config.checkpoint_every)
        self.log.rewind(self.step)
