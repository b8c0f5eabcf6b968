"""The main loop. Phase 1 is ODE distillation (Eq. 1 and 4): the regression loss alone. In phase 2 D joins (Eq. 5-6).

run            steps from the last checkpoint to the end, with logs, pictures and checkpoints between
train_step     one optimiser step over the global batch; in phase 2 D's, then G's
generator_step forward and backward of one micro-batch
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from diffusion2gan.config import Section
from diffusion2gan.device import compile_for_one_shape, out_of_memory
from diffusion2gan.discriminator.regularization import mix_and_match
from diffusion2gan.ema import Ema, load_trained, trained_state
from diffusion2gan.errors import TrainingStoppedError, UserError, in_one_line
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import grid, to_uint8
from diffusion2gan.interrupt import stop_requests
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import discriminator_picture
from diffusion2gan.run_log import RunLog, mark_checkpointed, read_scalars, refuse_lost_checkpoint
from diffusion2gan.schedule import warmup_and_decay
from diffusion2gan.teachers.protocol import Teacher, TextCondition
from diffusion2gan.training.adversarial import AdversarialConfig, Adversary, Guard
from diffusion2gan.training.batches import BatchShare, OdePairBatch, mixed_fakes, pair_batch
from diffusion2gan.training.descent import Descent, WholeOrSplit
from diffusion2gan.training.distance import Distance
from diffusion2gan.training.optimizer import OptimizerName, adamw
from diffusion2gan.training.order import SampleOrder, augmentation_uniforms, mix_uniforms
from diffusion2gan.training.placement import Placement
from diffusion2gan.training.sharding import own_rows, split_like
from diffusion2gan.training.state import (
    TrainingState,
    checkpoint_path,
    checkpoints,
    environment,
    last_checkpoint,
    load_state,
    save_split_state,
    save_state,
)
from diffusion2gan.training.zero import ZeroDescent


class TrainingConfig(Section):
    """Phase 1, and what both phases share. The paper's settings are not public; docs/reproduction.md gives the reason of each default."""

    steps: int = Field(ge=0)
    """Of phase 1; 0 goes straight to phase 2."""
    batch_size: int = Field(64, ge=1)
    """Global: over all processes and accumulated micro-batches."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that go through the network at once in one process; the rest of its share is accumulated."""
    learning_rate: float = Field(3e-4, gt=0)
    """Of phase 1."""
    warmup_steps: int = Field(100, ge=0)
    """The learning rate rises linearly from 0 over the first so many steps."""
    decay_steps: int = Field(0, ge=0)
    """The learning rate falls linearly to 0 over the last so many steps."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Of G's Adam."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's, of G and D: each step takes learning_rate x weight_decay of the weights away."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Of the generator's average, which is what is validated and exported. Early in phase 1 it forgets faster, so that the start weighs nothing."""
    gradient_clip: float = Field(2.0, gt=0)
    """Relative: the gradient is cut to this many times its running norm, so that no loss is favoured by its scale."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16`: autocast, of a perceptual loss's network too; weights, optimiser, average and the losses' differences and sums stay in float32."""
    compile: bool = False
    """Compiles G, D and a distance that has a network: minutes at the start, faster steps then. R1 is computed without."""
    optimizer: OptimizerName = "adamw"
    """Of G and D. `adamw_8bit` (bitsandbytes) keeps its moments in 2 bytes a parameter instead of 8; tensors under 4,096 elements as before."""
    ema_on_cpu: bool = False
    """Keeps the average in the host's memory: 4 bytes a parameter less on the GPU, one copy of the weights to the host a step."""
    zero: Literal[0, 1, 2] = 0
    """Phase 1 by DeepSpeed's ZeRO: 1 splits the optimiser's state over the processes, 2 also the gradients; the weights stay whole."""
    zero_offload: bool = False
    """With it, the optimiser and its state are on the hosts: 12 bytes a parameter less on the GPUs, and a slower step."""
    shard: bool = False
    """FSDP2: weights, gradients, optimisers and average of G and D are split over the processes, instead of copied to each."""
    checkpoint_every: int = Field(500, ge=1)
    """Optimiser steps, as all of these."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many, and the last good one of phase 2."""
    log_every: int = Field(10, ge=1)
    """A line of metrics.jsonl: losses and norms of that step, speed and the discriminator's statistics of all steps since the last."""
    validate_every: int = Field(500, ge=1)
    """The average's loss and squared error on the pairs held out."""
    holdout: int = Field(256, ge=1)
    """The last so many pairs of the store are never trained on: validation loss and sample grids use them."""
    first_pairs: int | None = Field(None, ge=1)
    """Trains on only the first so many pairs of the store: how much do more pairs help?"""
    sample_every: int = Field(500, ge=1)
    """A picture: the pairs that are held out, the average beside them."""
    sample_count: int = Field(16, ge=1)
    """Pairs in it."""
    seed: int = Field(0, ge=0, lt=1 << 62)
    """Of the order of the pairs and of all that training draws; the pairs have `pairs.seed`."""

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


# A step at which an average forgets as slowly as it ever does.
_LATE = 1 << 40


class Trainer:
    """Distils `teacher` into `generator` on `pairs`; everything it writes lies in `folder`.

    adversarial: phase 2, with `discriminator` unless its weight is 0. experiment: what checkpoints of another run are told by. Raises
    UserError for a batch that the processes can't share, too few pairs, a non-finite loss, a phase 2 that has gone wrong, a folder it can't
    write, a checkpoint of another run.
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
        adversarial: AdversarialConfig | None = None,
        discriminator: nn.Module | None = None,
        experiment: dict[str, str] | None = None,
    ):
        self.teacher, self.pairs, self.distance, self.config, self.folder = teacher, pairs, distance, config, folder
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)
        device = self.accelerator.device
        # A GPU without a number is another one in the loader's thread, which has a current device of its own.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
        known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self.accelerator.distributed_type not in known:
            kind = str(self.accelerator.distributed_type).rpartition(".")[2]
            raise UserError(
                f"training by {kind} is asked for and not supported; use `torchrun -m diffusion2gan train`, with training.shard=true for FSDP2 or "
                "training.zero for DeepSpeed"
            )
        if len(pairs) <= config.holdout:
            raise UserError(f"training.holdout is {config.holdout} but the store has {len(pairs)} pairs; simulate more, or hold out fewer")
        world = self.accelerator.num_processes
        self._phase_1 = self._phase_2 = BatchShare.of(config.batch_size, config.micro_batch_size, world, "training.batch_size")
        if adversarial is not None and adversarial.batch_size is not None:
            self._phase_2 = BatchShare.of(adversarial.batch_size, config.micro_batch_size, world, "adversarial.batch_size")
        available = len(pairs) - config.holdout
        if config.first_pairs is not None and config.first_pairs > available:
            raise UserError(
                f"training.first_pairs is {config.first_pairs}, expected at most {available} ({len(pairs)} pairs, {config.holdout} held out)"
            )
        self.order = SampleOrder(config.first_pairs or available, config.seed)
        self.placement = Placement(self.device, world, config.shard and world > 1, config.optimizer, flat=config.zero > 0)
        self.placement.place(generator, generator.network, teacher.latent_shape)
        self.ema = Ema(generator, config.ema_decay, torch.device("cpu") if config.ema_on_cpu else None)
        self.bare_generator = generator
        parameters = [p for p in generator.parameters() if p.requires_grad]
        optimizer = adamw(config.optimizer, parameters, config.learning_rate, config.betas, config.weight_decay)
        trained: nn.Module = generator
        self._distance_in_training: nn.Module = distance
        if config.compile:
            trained = compile_for_one_shape(generator, self.device, "training.compile")
            # A distance without a network of its own is too small to compile.
            if distance.network is not None:
                self._distance_in_training = compile_for_one_shape(distance, self.device, "training.compile")
        if config.zero:
            micro = self._phase_1.micro
            self.descent: Descent = ZeroDescent(
                generator, optimizer, config.gradient_clip, self.accelerator, micro, config.zero, config.zero_offload
            )
        else:
            self.descent = WholeOrSplit(generator, trained, optimizer, config.gradient_clip, self.accelerator)
        self.adversarial, self.adversary = adversarial, self._adversary(adversarial, discriminator)
        self.guard: Guard | None = None
        self.experiment = experiment
        self.total_steps = config.steps + (adversarial.steps if adversarial else 0)
        self.step = 0
        self.stopping = False
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self.log = RunLog(folder, self.accelerator.is_main_process)
        self._resume()

    def _adversary(self, adversarial: AdversarialConfig | None, discriminator: nn.Module | None) -> Adversary | None:
        if adversarial is None or not adversarial.weight:
            return None
        if discriminator is None:
            raise ValueError(f"adversarial.weight is {adversarial.weight} and there is no discriminator")
        config = self.config
        return Adversary(
            discriminator,
            self.teacher,
            adversarial,
            self.accelerator,
            self._phase_2,
            self.placement,
            seed=config.seed,
            weight_decay=config.weight_decay,
            compiled=config.compile,
        )

    @property
    def in_phase_2(self) -> bool:
        return self.guard is not None

    def share(self, step: int) -> BatchShare:
        """How the batch of step `step` of the run is split."""
        return self._phase_1 if step < self.config.steps else self._phase_2

    def rate(self, step: int) -> float:
        """G's learning rate at step `step` of the run."""
        if self.adversarial is not None and step >= self.config.steps:
            return self.adversarial.learning_rate * self.adversarial.schedule(step - self.config.steps)
        return self.config.rate(step)

    # --- One step ---------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[OdePairBatch], stop: Callable[[], bool] = bool) -> dict[str, float]:
        """One optimiser step over this process' share of the global batch: D's first, in phase 2, then G's.

        `stop` says whether this process was asked to stop. It is asked late in the step, and the answer travels with the loss, so that all
        processes learn in the same step that one of them was.
        """
        adversary = self.adversary if self.in_phase_2 else None
        conditions = [self.teacher.encode_prompts(m.prompts) for m in micro_batches]
        fakes: list[Tensor | None] = [None] * len(micro_batches)
        if adversary is not None:
            fakes = self._discriminator_step(adversary, micro_batches, conditions)
        told = torch.zeros(3 + self.teacher.latent_shape[0], device=self.device)
        with adversary.frozen() if adversary is not None else nullcontext():
            for number, (micro_batch, condition, fake) in enumerate(zip(micro_batches, conditions, fakes, strict=True)):
                # Gradients are exchanged once, with the last micro-batch.
                with self.descent.exchanging(number + 1 == len(micro_batches)):
                    told[1:] += self.generator_step(micro_batch, condition, fake, adversary)
        told[0] = float(stop())
        told = self.accelerator.reduce(told, "mean")
        (stops, loss, adversarial_loss), offset = told[:3], told[3:]
        norm = self.descent.norm()
        self._check({"regression loss": loss.item(), "adversarial loss": adversarial_loss.item(), "gradient norm": norm})
        self.descent.step(self.rate(self.step), norm)
        # Phase 2 begins from a good average, and an average that forgets quickly would lose it.
        decay = self.adversarial.ema_decay if self.in_phase_2 and self.adversarial else None
        self.ema.update(self.bare_generator, _LATE if self.in_phase_2 else self.step, decay)
        self.step += 1
        self.stopping = stops.item() > 0
        scalars = {"loss": loss.item(), "gradient_norm": norm, "learning_rate": self.rate(self.step - 1)}
        scalars["offset"] = offset.square().mean().sqrt().item()
        return scalars | ({"adversarial_loss": adversarial_loss.item(), **adversary.told} if adversary is not None else {})

    def _discriminator_step(
        self, adversary: Adversary, micro_batches: list[OdePairBatch], conditions: list[TextCondition]
    ) -> list[Tensor | None]:
        """D's update; returns G's latents where they can still be used for G's own."""
        assert self.guard is not None
        # Of several micro-batches, not all can be held with their graph: G's step computes them again.
        whole_batch = len(micro_batches) == 1
        with torch.set_grad_enabled(whole_batch), self.accelerator.autocast():
            fakes = [self.descent.trained(p.noise, c) for p, c in zip(micro_batches, conditions, strict=True)]
        wrong = adversary.update(micro_batches, conditions, fakes, self.step, self.config.steps, self.guard)
        if wrong:
            raise self._stopped(wrong)
        return fakes if whole_batch else [None] * len(fakes)

    def generator_step(
        self, pairs: OdePairBatch, condition: TextCondition, fake: Tensor | None = None, adversary: Adversary | None = None
    ) -> Tensor:
        """Forward and backward of d(G(z, c), x) + lambda_GAN L_GAN. Returns this micro-batch's share of means, (2 + C,): of both losses, and of
        G(z, c) - x by channel, what all pictures are shifted by alike."""
        with self.accelerator.autocast():
            if fake is None:
                fake = self.descent.trained(pairs.noise, condition)
            distance = self._distance_in_training(fake, pairs.latent, pairs.uniform)
        accumulation = self.share(self.step).accumulation
        regression = distance.float().mean() / accumulation
        adversarial = torch.zeros_like(regression)
        if adversary is not None:
            adversarial = adversary.config.weight * adversary.generator_term(fake, pairs, condition).mean() / accumulation
        self.descent.backward(regression + adversarial)
        offset = (fake.detach() - pairs.latent).float().mean(dim=(0, 2, 3)) / accumulation
        return torch.cat([torch.stack([regression, adversarial]).detach(), offset])

    def _stopped(self, wrong: str) -> TrainingStoppedError:
        """What to say when a step may not be taken."""
        if self.guard is None:
            last = checkpoints(self.folder / "checkpoints")
            return TrainingStoppedError(
                f"step {self.step}: {wrong}; stopped before the update, the last state saved is {last[-1] if last else 'the start'}; start again "
                "in a new --out with a lower training.learning_rate",
                None,
            )
        good = self.guard.good_step
        return TrainingStoppedError(
            f"step {self.step}: {wrong}; stopped before the update, the last good average is in {checkpoint_path(self.folder / 'checkpoints', good)} "
            f"(diffusion2gan export --step {good}); start again in a new --out with lower adversarial.learning_rate, "
            "adversarial.discriminator_learning_rate or adversarial.weight",
            good,
        )

    def _check(self, terms: dict[str, float]) -> None:
        """Raises UserError before anything non-finite is applied, and when phase 2 has gone wrong by its regression loss."""
        for name, term in terms.items():
            if not math.isfinite(term):
                raise self._stopped(f"the {name} is {term}, expected a finite number")
        if self.guard is not None and self.adversarial is not None:
            wrong = self.guard.follow_regression(terms["regression loss"], self.adversarial)
            if wrong:
                raise self._stopped(wrong)

    # --- Data -------------------------------------------------------------------------------------------------------

    def _load(self, step: int) -> list[OdePairBatch]:
        """This process' micro-batches of a step. Runs in a thread one step ahead; it draws nothing that depends on when it runs."""
        share = self.share(step)
        seen = min(step, self.config.steps) * self._phase_1.size + max(0, step - self.config.steps) * self._phase_2.size
        rows = self.order.rows(seen, share.size)
        first = self.accelerator.process_index * share.per_process
        parts = [slice(i, i + share.micro) for i in range(first, first + share.per_process, share.micro)]
        batches = self._micro_batches(rows, step, parts)
        if self.adversary is None or step < self.config.steps or not any(self.adversary.config.mix_shares):
            return batches
        # Partners come from the whole batch, so that two processes swap as one does.
        uniform = mix_uniforms(self.config.seed, step, len(rows))
        texts = self.teacher.reads([self.pairs.prompt(int(r)) for r in rows])
        kind, partner = mix_and_match(uniform, self.adversary.config.mix_shares, rows, texts, self.adversary.sees_noise)
        return [replace(b, mixed=mixed_fakes(b, self.pairs, kind[p], rows[partner[p]])) for b, p in zip(batches, parts, strict=True)]

    def _micro_batches(self, rows: np.ndarray, step: int, parts: list[slice]) -> list[OdePairBatch]:
        """The micro-batches `parts` of `rows`, augmented by the draws of `step`."""
        width = self.distance.n_uniform
        uniform = augmentation_uniforms(self.config.seed, step, len(rows), width) if width else None
        return [pair_batch(self.pairs, rows[p], None if uniform is None else uniform[p], self.device) for p in parts]

    # --- The run ----------------------------------------------------------------------------------------------------

    def run(self, progress: bool = True, deadline: Callable[[], bool] | None = None) -> None:
        """Trains from where the folder stands to the end of the last phase. Ctrl-C and SIGTERM save first, then raise KeyboardInterrupt.

        `deadline` may end the run early (the demo's time budget); what was trained is saved.
        """
        config = self.config
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not progress or not self.accelerator.is_main_process,
            mininterval=1,
        )
        # What is in float32, all of it or the last layers, is not rounded like float16; inside a compiled graph it cannot be asked for.
        with no_tf32(), stop_requests() as stop, ThreadPoolExecutor(1) as loader, bar:
            if self.step == 0:
                self._sample()
            upcoming: Future[list[OdePairBatch]] = loader.submit(self._load, self.step)
            images, seconds = 0, 0.0  # since the last row
            while self.step < self.total_steps and not self.stopping:
                if self.step == config.steps and not self.in_phase_2:
                    self._enter_phase_2()
                started = time.perf_counter()
                micro_batches = upcoming.result()
                if self.step + 1 < self.total_steps:
                    upcoming = loader.submit(self._load, self.step + 1)
                scalars = self.train_step(micro_batches, lambda: stop() or bool(deadline and deadline()))
                done = self.step in (config.steps, self.total_steps)
                images, seconds = images + self.share(self.step - 1).size, seconds + time.perf_counter() - started
                if self.step % config.log_every == 0 or done:
                    rate = images / seconds
                    images, seconds = 0, 0.0
                    of_d = self.adversary.tell() if self.adversary is not None and self.in_phase_2 else {}
                    self.log.scalars(self.step, scalars, images_per_second=round(rate, 2), **of_d)
                    bar.set_postfix(loss=f"{scalars['loss']:.4f}", img_s=f"{rate:.0f}")
                bar.update()
                if self.stopping:
                    # Before anything that takes time: who asks for a stop may not wait long.
                    self._save()
                if self.step % config.validate_every == 0 or done:
                    self.log.scalars(self.step, self._validation())
                if self.step % config.sample_every == 0 or done:
                    self._sample()
                # Last of a step: what is resumed from has all its rows and pictures.
                if (self.step % config.checkpoint_every == 0 or done) and not self.stopping:
                    self._save()
            if self.stopping and stop():
                raise KeyboardInterrupt

    def _enter_phase_2(self) -> None:
        """From the average of phase 1, with a new optimiser; the loss there is what the guard compares with."""
        load_trained(self.bare_generator, self.ema.state)
        self.descent.restart(self.adversarial.betas if self.adversarial else None)
        start = self._validation()["validation_loss"]
        self.guard = Guard(start=start, regression=start, good_step=self.step, judged_step=self.step)
        self._save()

    def _held_out(self, count: int) -> list[OdePairBatch]:
        first = len(self.pairs) - self.config.holdout
        rows = np.arange(first, first + min(count, self.config.holdout))
        # A step that no training reaches: always the same draws.
        micro = self._phase_1.micro
        return self._micro_batches(rows, _LATE, [slice(i, i + micro) for i in range(0, len(rows), micro)])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The EMA student on held-out pairs: the loss that is trained, and the mean squared error for every loss alike."""
        total, square, count = 0.0, 0.0, 0
        with self.ema.applied_to(self.bare_generator):
            for pairs in self._held_out(self.config.holdout):
                condition = self.teacher.encode_prompts(pairs.prompts)
                with self.accelerator.autocast():  # as in training, compiled or not
                    fake = self.bare_generator(pairs.noise, condition)
                total += self.distance(fake, pairs.latent, pairs.uniform).sum().item()
                square += (fake - pairs.latent).square().flatten(1).mean(1).sum().item()
                count += len(fake)
        return {"validation_loss": total / count, "validation_mse": square / count}

    @torch.no_grad()
    def _sample(self) -> None:
        """A grid of held-out pairs: the teacher's picture above the EMA student's, column by column."""
        # A network that is split has to be evaluated by all.
        if not self.accelerator.is_main_process and not self.placement.sharded:
            return
        targets, fakes, prompts = [], [], []
        with self.ema.applied_to(self.bare_generator):
            for pairs in self._held_out(self.config.sample_count):
                condition = self.teacher.encode_prompts(pairs.prompts)
                with self.accelerator.autocast():
                    fake = self.bare_generator(pairs.noise, condition)
                fakes.append(self.teacher.decode(fake.to(self.teacher.dtype)))
                targets.append(self.teacher.decode(pairs.latent.to(self.teacher.dtype)))
                prompts += pairs.prompts
        if not self.accelerator.is_main_process:
            return
        try:
            images = np.concatenate([to_uint8(torch.cat(targets)), to_uint8(torch.cat(fakes))])
        except UserError as error:
            # A decoder of half precision may overflow; a picture to look at is no reason to end a training.
            warnings.warn(f"step {self.step}: no pictures of held-out pairs: {error}", stacklevel=2)
        else:
            picture = grid(images, columns=len(prompts), captions=prompts + [""] * len(prompts), row_labels=["teacher", "student"])
            self.log.picture(self.step, "held-out", picture)
        # At the first step of phase 2 there is nothing to draw yet.
        told = [row for row in read_scalars(self.log.path) if "discriminator" in row] if self.in_phase_2 else []
        if told:
            self.log.picture(self.step, "discriminator", discriminator_picture(told))

    def _environment(self) -> dict[str, str]:
        here = environment(self.config.compile, self.accelerator.num_processes, self.placement.memory_format)
        return here | ({"r1_count": str(self.adversary.r1_count)} if self.adversary is not None else {})

    def _save(self) -> None:
        guard, adversary = self.guard, self.adversary.state() if self.adversary is not None and self.in_phase_2 else None
        # Who asked for a stop may not wait for a judgement.
        if not self.stopping:
            self._judge()
        main = self.accelerator.is_main_process
        model, average = (own_rows(s, main) for s in (trained_state(self.bare_generator), self.ema.state))
        optimizer = self.descent.state(main)
        told = None if guard is None else asdict(guard)
        scale, seen = self.descent.clip.state
        state = TrainingState(self.step, model, average, optimizer, scale, self._environment(), adversary, told, seen, self.experiment)
        # Phase 1's end stays too: other runs may start from it.
        kept = () if guard is None else (guard.good_step, self.config.steps)
        if self.placement.sharded:
            save_split_state(state, self.folder / "checkpoints", self.config.keep_checkpoints, kept, self.accelerator)
        elif main:
            save_state(state, self.folder / "checkpoints", self.config.keep_checkpoints, kept)
        if main:
            mark_checkpointed(self.folder)
        self.accelerator.wait_for_everyone()

    def _judge(self) -> None:
        """In phase 2: whether the average of this step is one to go back to. Every process comes to the same answer."""
        if self.guard is not None and self.adversarial is not None and self.guard.judged_step != self.step:
            self.guard.judge(self.step, self._validation()["validation_loss"], self.adversarial)

    def _validation(self) -> dict[str, float]:
        """`validate` of this step, computed once."""
        if self._validated[0] != self.step:
            self._validated = (self.step, self.validate())
        return self._validated[1]

    def _resume(self) -> None:
        last = last_checkpoint(self.folder / "checkpoints", self.accelerator)
        if last:
            state = load_state(last, self._environment(), in_pieces=True)
            state.check_experiment(self.experiment or {}, last)
            try:
                self._take(state)
            except (KeyError, RuntimeError) as error:
                if out_of_memory(error) is not None:
                    raise
                raise UserError(
                    f"{last}: does not fit this run's networks ({in_one_line(error)}); put this run's own back, or delete it to go on from the one "
                    "before"
                ) from None
            # Where the run was asked to stop, nobody had the time.
            self._judge()
        else:
            refuse_lost_checkpoint(self.folder, "checkpoints/step-*.pt")
        self.log.rewind(self.step)

    def _take(self, state: TrainingState) -> None:
        load_trained(self.bare_generator, split_like(state.model, self.ema.state))
        self.ema.load(split_like(state.ema, self.ema.state))
        self.descent.load(state.optimizer)
        self.step, self.descent.clip.state = state.step, (state.gradient_scale, state.gradients_seen)
        self.guard = None if state.guard is None else Guard(**state.guard)
        if self.adversary is not None and state.adversary is not None:
            self.adversary.load(state.adversary)
