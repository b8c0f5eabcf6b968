"""Phase 2's other player: everything that trains D (paper section 3.3), and when the game has gone wrong.

update          one step of D: Eq. 5 on real latents and fakes, R1 every so often
generator_term  L_GAN of Eq. 6, which the trainer adds to the regression loss
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffusion2gan import losses
from diffusion2gan.config import Section
from diffusion2gan.device import compile_for_one_shape
from diffusion2gan.discriminator.multi_scale import Discriminator, score
from diffusion2gan.discriminator.regularization import GENERATED, KINDS, r1_finite_difference, r1_penalty, r1_samples
from diffusion2gan.errors import UserError
from diffusion2gan.precision import no_tf32
from diffusion2gan.schedule import warmup_and_decay
from diffusion2gan.teachers.attention import twice_differentiable_attention
from diffusion2gan.teachers.protocol import Teacher, TextCondition
from diffusion2gan.training.batches import BatchShare, OdePairBatch
from diffusion2gan.training.clipping import RelativeClip
from diffusion2gan.training.descent import WholeOrSplit
from diffusion2gan.training.optimizer import adamw
from diffusion2gan.training.order import r1_generator
from diffusion2gan.training.placement import Placement
from diffusion2gan.training.sharding import own_rows, split_like, whole
from diffusion2gan.training.state import LONG

Share = Annotated[float, Field(ge=0, le=1)]


class AdversarialConfig(Section):
    """Phase 2: L_G = regression loss + weight x L_GAN. It begins from the average of phase 1, with new optimisers."""

    steps: int = Field(ge=1)
    """Optimiser steps after those of `training.steps`."""
    batch_size: int | None = Field(None, ge=1)
    """Global, in phase 2; without a number `training.batch_size`."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Of the generator's average, in phase 2; without a number `training.ema_decay`."""
    weight: float = Field(0.25, ge=0)
    """lambda_GAN. With 0 there is no discriminator: the regression loss alone, trained on."""
    loss: Literal["logistic", "hinge", "relativistic"] = "logistic"
    """Eq. 5-6 are `logistic`."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of the generator."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Of the generator's Adam, in phase 2; without numbers `training.betas`."""
    discriminator_learning_rate: float = Field(1e-4, gt=0)
    """Of the discriminator."""
    discriminator_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.99)
    """Of its Adam."""
    discriminator_gradient_clip: float = Field(2.0, gt=0)
    """Relative, as `training.gradient_clip`; to the norm of the steps with R1 in those, of the others in the others. A sample with a steep
    score would otherwise, with R1's weight, throw D back for good."""
    warmup_steps: int = Field(100, ge=0)
    """Both learning rates rise linearly from 0 over the first so many steps of phase 2."""
    decay_steps: int = Field(0, ge=0)
    """Both learning rates fall linearly to 0 over the last so many steps."""
    r1: Literal["exact", "finite_difference", "none"] = "exact"
    """`finite_difference` needs no double backward."""
    r1_gamma: float = Field(1.0, gt=0)
    """gamma of gamma/2 |grad s|^2 at real latents; the score s is the mean of the logits over locations, then over maps."""
    r1_every: int = Field(16, ge=1)
    """R1 is computed every so many steps and weighs so many times as much then."""
    r1_count: int | None = Field(None, ge=1)
    """Samples of the whole batch that R1 looks at; without a number, one in each process."""
    r1_sigma: float = Field(0.01, gt=0)
    """Length of a finite difference, in standard deviations of the noise."""
    other_latent: Share = 0.1
    """Mix-and-match: the share of D's fakes that are real latents of another pair, in the company of this pair's noise and text."""
    other_text: Share = 0.1
    """The share that are this pair's own real latents, with another pair's text."""
    other_noise: Share = 0.1
    """The share that are this pair's own real latents, with another pair's noise."""
    stop_regression: float = Field(3.0, gt=1)
    """Training stops when the regression loss, averaged over about 50 steps, exceeds so many times its value at the start."""
    good_regression: float = Field(1.5, gt=0)
    """An average is one to go back to while its regression loss on held-out pairs is at most so many times its value at the start."""
    stop_accuracy: tuple[Share, Share] = (0.51, 0.99)
    """Training stops when D's accuracy on real and generated latents, over the last `stop_accuracy_steps` steps, lies outside."""
    stop_accuracy_steps: int = Field(500, ge=1)
    """Steps of phase 2; before so many are done, it does not stop for that."""

    @model_validator(mode="after")
    def _sensible(self) -> AdversarialConfig:
        if sum(self.mix_shares) > 0.9:
            raise ValueError(
                f"other_latent + other_text + other_noise is {sum(self.mix_shares):g}, expected at most 0.9: D must see generated latents too"
            )
        low, high = self.stop_accuracy
        if low >= high:
            raise ValueError(f"stop_accuracy is [{low:g}, {high:g}], expected the lower limit first")
        return self

    @property
    def mix_shares(self) -> tuple[float, float, float]:
        return self.other_latent, self.other_text, self.other_noise

    def schedule(self, step: int) -> float:
        """Factor of both learning rates at step `step` of phase 2, a function of the step alone."""
        assert step >= 0
        return warmup_and_decay(step, self.steps, self.warmup_steps, self.decay_steps)


# The guard's running mean forgets over about 50 steps.
_FORGET = 0.02


@dataclass
class Guard:
    """Says when phase 2 has gone wrong. `start` is the regression loss before its first step, on held-out pairs."""

    start: float
    regression: float
    answers: list[list[float]] = field(default_factory=list)
    """D's in each of the last steps: right and all about real latents, right and all about generated ones."""
    good_step: int = 0
    """The last checkpoint whose average was good, of those up to `judged_step`."""
    judged_step: int = 0

    def follow_regression(self, value: float, config: AdversarialConfig) -> str | None:
        """Takes a step's regression loss; what is wrong with it, if anything."""
        self.regression += _FORGET * (value - self.regression)
        if self.regression > config.stop_regression * self.start:
            return (
                f"the regression loss is {self.regression:.4g}, more than {config.stop_regression:g} times the {self.start:.4g} at the start of "
                "phase 2 (adversarial.stop_regression)"
            )
        return None

    def follow_accuracy(self, answers: Sequence[float], config: AdversarialConfig) -> str | None:
        """Takes D's answers at a step; what is wrong with its accuracy, if anything."""
        self.answers = [*self.answers, list(answers)][-config.stop_accuracy_steps :]
        if len(self.answers) < config.stop_accuracy_steps:
            return None
        # Over so many steps, not a streak: in small batches one step says little. Of both kinds alike, however many of D's fakes
        # are G's own.
        sums = [sum(column) for column in zip(*self.answers, strict=True)]
        kinds = [(right, count) for right, count in (sums[:2], sums[2:]) if count]
        mean, (low, high) = sum(right / count for right, count in kinds) / len(kinds), config.stop_accuracy
        if low <= mean <= high:
            return None
        return (
            f"the discriminator's accuracy on real and generated latents was {mean:.1%} over {config.stop_accuracy_steps} steps, outside {low:.0%} "
            f"to {high:.0%} (adversarial.stop_accuracy)"
        )

    def judge(self, step: int, validation_loss: float, config: AdversarialConfig) -> None:
        """Takes the loss on held-out pairs of the average that is saved at `step`: is it one to go back to?"""
        self.judged_step = step
        if validation_loss <= config.good_regression * self.start:
            self.good_step = step


def above(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 1/2 where they are equal, as both logits are of a map that a mismatch does not reach, else 0."""
    return ((a > b).float() + (a >= b).float()) / 2


class Statistics:
    """Logits and accuracy of D by kind of sample and by map, summed on the device until they are told.

    Rows: real latents, then KINDS. Columns: the score of the whole, then every map. Cells: sum of logits, of right answers, count, and
    of fakes that got less than the real latent of their row. That last share is 50 % for a D that sees no difference, whatever it thinks
    of the share of fakes; in a row of OTHER_TEXT or OTHER_NOISE both latents are the same, and only the company differs.
    """

    ROWS = ("real", *KINDS)

    def __init__(self, map_names: list[str], device: torch.device):
        self.columns = ["score", *map_names]
        self.sums = torch.zeros(len(self.ROWS), len(self.columns), 4, device=device)

    @torch.no_grad()
    def add(self, real: losses.Maps, fake: losses.Maps, kind: Tensor, relative: bool = False) -> Tensor:
        """Counts a micro-batch. relative: an answer is right when the real logit is above the fake one of its row, not above 0; of the real
        latents only those beside a generated one count then.

        Returns (right, all) answers about real and about generated latents, (2, 2).
        """
        of_real, of_fake = self._by_column(real), self._by_column(fake)
        logits = torch.cat([of_real, of_fake])
        row = torch.cat([torch.zeros_like(kind), 1 + kind])
        margin = torch.cat([of_real - of_fake] * 2) if relative else torch.cat([of_real, -of_fake])
        right = (margin > 0).float()
        below = torch.cat([torch.zeros_like(of_real), above(of_real, of_fake)])
        member = nn.functional.one_hot(row, len(self.ROWS)).float()
        if relative:
            member[: len(kind), 0] = (kind == GENERATED).float()
        sums = torch.einsum("br,bck->rck", member, torch.stack([logits, right, torch.ones_like(right), below], dim=2))
        self.sums += sums
        return sums[: 2 + GENERATED, 0, 1:3]

    @staticmethod
    def _by_column(maps: losses.Maps) -> Tensor:
        of_map = torch.stack([m.flatten(1).mean(1) for m in maps.values()], dim=1).float()
        return torch.cat([of_map.mean(1, keepdim=True), of_map], dim=1)

    def tell(self, sums: Tensor) -> dict[str, Any]:
        """kind -> {"count", "logit": [by column], "accuracy": [by column]}, of the kinds that occurred; of fakes also "below_real"."""
        told: dict[str, Any] = {"columns": self.columns}
        for name, row in zip(self.ROWS, sums.double().cpu(), strict=True):
            count = row[0, 2].item()
            if count:
                told[name] = {
                    "count": int(count),
                    "logit": [round(v, 5) for v in (row[:, 0] / count).tolist()],
                    "accuracy": [round(v, 5) for v in (row[:, 1] / count).tolist()],
                }
                if name != "real":
                    told[name]["below_real"] = [round(v, 5) for v in (row[:, 3] / count).tolist()]
        return told


# Of R1's samples: x, z, c, and the directions of finite differences.
R1Input = tuple[Tensor, Tensor, TextCondition, Tensor | None]


class Adversary:
    """D with its optimiser, regularisation and statistics. share: how phase 2's batches are split.

    Raises UserError for R1 samples that the processes cannot share.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        teacher: Teacher,
        config: AdversarialConfig,
        accelerator: Accelerator,
        share: BatchShare,
        placement: Placement,
        *,
        seed: int,
        weight_decay: float,
        compiled: bool,
    ):
        self.config, self.accelerator, self.teacher, self.seed = config, accelerator, teacher, seed
        self.share, self.sharded = share, placement.sharded
        world = accelerator.num_processes
        self.r1_count = world if config.r1_count is None else config.r1_count
        if config.r1 != "none" and (self.r1_count % world or share.size % self.r1_count):
            raise UserError(
                f"adversarial.r1_count is {self.r1_count}, expected a multiple of the processes ({world}) that divides "
                f"phase 2's batch size ({share.size})"
            )
        self.bare = discriminator
        placement.place(discriminator, getattr(discriminator, "network", None), teacher.latent_shape)
        rate, betas = config.discriminator_learning_rate, config.discriminator_betas
        self._called: nn.Module = compile_for_one_shape(self.bare, accelerator.device, "training.compile") if compiled else self.bare
        optimizer = adamw(placement.optimizer, self.bare.parameters(), rate, betas, weight_decay)
        self.descent = WholeOrSplit(self.bare, self._called, optimizer, config.discriminator_gradient_clip, accelerator)
        # Steps with R1 have a norm of their own, many times the others': measured by theirs R1 would be cut away. It forgets sooner, for
        # there are few of them.
        self._plain_clip, self._r1_clip = self.descent.clip, RelativeClip(config.discriminator_gradient_clip, memory=10)
        described: Discriminator = discriminator  # type: ignore[assignment]
        self.sees_noise = described.config.noise
        self.statistics = Statistics(described.map_names, accelerator.device)
        self.told: dict[str, float] = {}
        # Sums of R1's values and of the gradient's norm with it, and their number, since they were last told.
        self._r1_told: list[float] = [0.0, 0.0, 0]

    # --- D's step ---------------------------------------------------------------------------------------------------

    def update(
        self, batches: list[OdePairBatch], conditions: list[TextCondition], fakes: list[Tensor], step: int, first_step: int, guard: Guard
    ) -> str | None:
        """One optimiser step of D on this process' micro-batches, their c and G's latents for them.

        step: of the whole run. first_step: of phase 2. Returns what is wrong, before anything was updated, or None.
        """
        r1_due = self._r1_due(step, first_step)
        self.descent.clip = self._r1_clip if r1_due else self._plain_clip
        r1_rows, directions = self._r1_rows(step, first_step)
        loss = torch.zeros((), device=self.accelerator.device)
        penalties, answers = torch.zeros_like(loss), torch.zeros(2, 2, device=loss.device)
        for number, (pairs, condition, fake) in enumerate(zip(batches, conditions, fakes, strict=True)):
            # Spread over the micro-batches, in whichever the samples lie: networks that are split must be evaluated by all as often.
            mine = [k for k in range(len(r1_rows)) if k * len(batches) // len(r1_rows) == number]
            r1 = self._r1_input(batches, conditions, [r1_rows[k] for k in mine], None if directions is None else directions[mine])
            last = number + 1 == len(batches)
            # Gradients are exchanged once, with the last micro-batch.
            with self.descent.exchanging(last):
                value, penalty, right = self._step(pairs, condition, fake, r1)
            loss, penalties, answers = loss + value, penalties + penalty, answers + right
        length = self.descent.norm()
        world = self.accelerator.num_processes
        summed = self.accelerator.reduce(torch.cat([torch.stack([loss, penalties]) / world, answers.flatten()]), "sum")
        total, told_r1, *counts = summed.tolist()
        self.told = {"discriminator_loss": total, "discriminator_gradient_norm": length}
        for name, found in (("discriminator loss", total), ("R1 penalty", told_r1), ("discriminator's gradient norm", length)):
            if not math.isfinite(found):
                return f"the {name} is {found}, expected a finite number"
        wrong = guard.follow_accuracy(counts, self.config)
        if wrong:
            return wrong
        if r1_due:
            self._r1_told = [a + b for a, b in zip(self._r1_told, (told_r1, length, 1), strict=True)]
        self.descent.step(self.config.discriminator_learning_rate * self.config.schedule(step - first_step), length)
        return None

    def _step(self, pairs: OdePairBatch, condition: TextCondition, fake: Tensor, r1: R1Input | None) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one micro-batch, and of R1: its share of Eq. 5, R1's penalty, and D's answers (`Statistics.add`)."""
        fake_latent, fake_noise, fake_condition = fake.detach().to(pairs.latent), pairs.noise, condition
        kind = torch.full((len(fake),), GENERATED, device=fake.device)
        if pairs.mixed is not None:
            kind = pairs.mixed.kind
            fake_latent = torch.where((kind == GENERATED)[:, None, None, None], fake_latent, pairs.mixed.latent)
            fake_noise, fake_condition = pairs.mixed.noise, self.teacher.encode_prompts(pairs.mixed.prompts)
        latent, noise = torch.cat([pairs.latent, fake_latent]), torch.cat([pairs.noise, fake_noise])
        with self.accelerator.autocast():
            maps = self.descent.trained(latent, noise, TextCondition.cat(condition, fake_condition))
        real = {k: v[: len(fake)].float() for k, v in maps.items()}
        of_fakes = {k: v[len(fake) :].float() for k, v in maps.items()}
        loss = losses.discriminator_loss(real, of_fakes, self.config.loss).mean() / self.share.accumulation
        penalty = torch.zeros_like(loss)
        if r1 is not None:
            found = self._r1(*r1)
            # Every process' gradient is divided by their number; the mean is over all of R1's samples.
            penalty = found.sum() * self.accelerator.num_processes / self.r1_count
        # R1 goes through one backward with the loss: alone it leaves the last biases without a gradient, and DDP waiting.
        self.descent.backward(loss + self.config.r1_every * self.config.r1_gamma / 2 * penalty)
        return loss.detach(), penalty.detach(), self.statistics.add(real, of_fakes, kind, self.config.loss == "relativistic")

    def _r1_due(self, step: int, first_step: int) -> bool:
        return self.config.r1 != "none" and (step - first_step) % self.config.r1_every == 0

    def _r1_rows(self, step: int, first_step: int) -> tuple[list[int], Tensor | None]:
        """R1's samples of this process in this step, counted from its first, and their directions if by finite differences."""
        if not self._r1_due(step, first_step):
            return [], None
        generator = r1_generator(self.seed, step)
        count = self.share.per_process
        first = self.accelerator.process_index * count
        chosen = r1_samples(generator, self.share.size, self.r1_count)
        mine = np.flatnonzero((chosen >= first) & (chosen < first + count))
        directions = None
        if self.config.r1 == "finite_difference":
            drawn = generator.standard_normal((self.r1_count, *self.teacher.latent_shape), dtype=np.float32)[mine]
            directions = torch.from_numpy(drawn).to(self.accelerator.device)
        return (chosen[mine] - first).tolist(), directions

    def _r1_input(
        self, batches: list[OdePairBatch], conditions: list[TextCondition], rows: list[int], directions: Tensor | None
    ) -> R1Input | None:
        """What R1 looks at: the samples `rows` of this process' share."""
        if not rows:
            return None
        at = [divmod(row, self.share.micro) for row in rows]
        latent, noise = (torch.stack([getattr(batches[n], name)[i] for n, i in at]) for name in ("latent", "noise"))
        condition = TextCondition.cat(*(conditions[n][torch.tensor([i], device=latent.device)] for n, i in at))
        return latent, noise, condition, directions

    def _r1(self, latent: Tensor, noise: Tensor, condition: TextCondition, direction: Tensor | None) -> Tensor:
        """|grad s|^2 of real samples (n, C, H, W) -> (n,), in float32: rounded logits have no slope."""
        # The class' own forward: without the autocast that accelerate has put around the module's. What is split is gathered by the
        # module's own call, and has none around it.
        forward = self.bare if self.sharded else partial(type(self.bare).forward, self.bare)

        def s(x: Tensor) -> Tensor:
            return score(forward(x, noise, condition))

        with torch.autocast(latent.device.type, enabled=False), no_tf32():
            if direction is not None:
                return r1_finite_difference(s, latent, direction, self.config.r1_sigma)
            with twice_differentiable_attention():
                return r1_penalty(s, latent)

    # --- G's step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around forward and backward of G's step: it leaves no gradient in D. The backward too, for it may recompute."""
        if self.sharded:
            # Its gathered parameters would not hear of it: their gradients are thrown away instead.
            yield
            self.bare.zero_grad(set_to_none=True)
            return
        self.bare.requires_grad_(False)
        try:
            yield
        finally:
            self.bare.requires_grad_(True)

    def generator_term(self, fake: Tensor, pairs: OdePairBatch, condition: TextCondition) -> Tensor:
        """L_GAN of Eq. 6 for G's latents (B, C, H, W) -> (B,). To be called inside `frozen`."""
        with self.accelerator.autocast():
            maps = self._called(fake, pairs.noise, condition)
            real = None
            if self.config.loss == "relativistic":
                with torch.no_grad():
                    real = {k: v.float() for k, v in self._called(pairs.latent, pairs.noise, condition).items()}
        return losses.generator_loss({k: v.float() for k, v in maps.items()}, self.config.loss, real)

    # --- What is kept and told --------------------------------------------------------------------------------------

    def tell(self) -> dict[str, Any]:
        """D's statistics since they were last told, over all processes; the means of R1 and of the gradient's norm in steps with it."""
        sums = self.accelerator.reduce(self.statistics.sums.clone(), "sum")
        self.statistics.sums.zero_()
        (r1, norm, count), self._r1_told = self._r1_told, [0.0, 0.0, 0]
        of_r1 = {"r1": r1 / count, "r1_gradient_norm": norm / count} if count else {}
        return {"discriminator": self.statistics.tell(sums), "input_norms": self._input_norms()} | of_r1

    def _input_norms(self) -> dict[str, float]:
        """Of the weights through which D sees the noise, and the latent below the first resolution: 0 at the start of a diffusion D."""
        inputs = {n: p for n, p in self.bare.named_parameters() if n.startswith(("noise_in", "latent_in")) and n.endswith("weight")}
        return {name.removesuffix(".weight"): round(whole(p.detach().norm()).item(), 6) for name, p in inputs.items()}

    def state(self) -> dict[str, Any]:
        """What this process saves for an exact resume (`own_rows`). To be called by every process: the statistics are of all of them."""
        sums = self.accelerator.reduce(self.statistics.sums.clone(), "sum")
        main = self.accelerator.is_main_process
        model, optimizer = own_rows(self.bare.state_dict(), main), self.descent.state(main)
        return {
            "model": model, "optimizer": optimizer, "statistics": sums, "r1": self._r1_told, "clip": self._plain_clip.state,
            "r1_clip": self._r1_clip.state,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(split_like(state["model"], self.bare.state_dict()))
        self.descent.load(state["optimizer"])
        # Checkpoints from before there was one: as at the first step.
        self._r1_told = state["r1"] if len(state["r1"]) == 3 else [0.0, 0.0, 0]
        for clip, of in ((self._plain_clip, ""), (self._r1_clip, "r1_")):
            clip.state = state[f"{of}clip"] if f"{of}clip" in state else (state.get(f"{of}gradient_scale", math.nan), LONG)
        if self.accelerator.is_main_process and state["statistics"].shape == self.statistics.sums.shape:
            self.statistics.sums.copy_(state["statistics"])
