"""What the discriminator of a run sees on held-out pairs, and how near finite-difference R1 comes to the exact one there.

    python benchmarks/what_d_sees.py runs/emoji runs/pairs/emoji --step 200 --out what_d_sees.json

`below_real`: the share of fakes that get a lower score than the real latent of their pair: G's (by its average), another pair's latent,
the pair's own with another pair's text, or with another pair's noise (50 %: D sees no difference; one standard error with 256 pairs is
3 %). R1: the mean of |grad s|^2 over real pairs, exact, and by finite differences with one direction a sample and draw, whose spread
over samples is theirs beside the exact one's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion2gan.device import default_device
from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.discriminator.multi_scale import score
from diffusion2gan.discriminator.regularization import r1_finite_difference, r1_penalty
from diffusion2gan.files import write_json
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.precision import no_tf32
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.attention import twice_differentiable_attention
from diffusion2gan.teachers.load import LoadedTeacher, load_teacher
from diffusion2gan.training.adversarial import above
from diffusion2gan.training.batches import OdePairBatch, pair_batch
from diffusion2gan.training.state import TrainingState, checkpoint_path, checkpoints, load_state

BATCH = 32
SIGMAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
R1_COLUMNS = ["sigma", "mean |grad s|^2", "of the exact one", "deviation / mean, one sample", "standard error of the ratio"]


def partners(prompts: list[str], other_text: bool) -> np.ndarray:
    """For each pair the next one further on, in a circle, that lends something: with `other_text` of another prompt."""
    n = len(prompts)
    found = np.empty(n, dtype=np.int64)
    for i in range(n):
        further = [(i + k) % n for k in range(1, n)]
        found[i] = next((j for j in further if not other_text or prompts[j] != prompts[i]), i)
    return found


def share_above(a: Tensor, b: Tensor) -> float:
    """The share of a > b, ties as half: 0.5 where a and b are the same."""
    return above(a, b).mean().item()


@dataclass(frozen=True)
class Opened:
    """A checkpoint of a run, and held-out pairs of its store."""

    recipe: Recipe
    teacher: LoadedTeacher
    path: Path
    state: TrainingState
    held_out: OdePairBatch


def open_run(run: Path, store: Path, step: int | None, count: int) -> Opened:
    """The checkpoint of `step` (None: the last) with at most `count` pairs. Ends the program for a LoRA."""
    recipe, pairs = load_recipe(str(run / "recipe.yaml")), PairDataset(store)
    folder = run / "checkpoints"
    path = checkpoints(folder)[-1] if step is None else checkpoint_path(folder, step)
    if recipe.generator.lora_rank is not None:
        raise SystemExit(f"{path}: of a LoRA, expected a run that trains all weights; name another")
    teacher = load_teacher(recipe.teacher, default_device())
    rows = np.arange(len(pairs) - recipe.training.holdout, len(pairs))[:count]
    return Opened(recipe, teacher, path, load_state(path), pair_batch(pairs, rows, None, teacher.device))


def discriminator_of(of: Opened) -> nn.Module:
    """D of the checkpoint, frozen. Ends the program where there is none."""
    if of.state.adversary is None:
        raise SystemExit(f"{of.path}: has no discriminator; name a step of phase 2")
    d = build_discriminator(of.recipe.discriminator, of.teacher).to(of.teacher.device)
    d.load_state_dict(of.state.adversary["model"])
    return d.requires_grad_(False).eval()


def generator_of(of: Opened, weights: dict[str, Tensor]) -> OneStepGenerator:
    """G with the checkpoint's `model` or `ema`, frozen."""
    generator = OneStepGenerator.from_teacher(of.teacher, of.recipe.generator)
    generator.load_state_dict(weights)
    return generator.requires_grad_(False).eval()


def batches(count: int) -> list[slice]:
    return [slice(i, i + BATCH) for i in range(0, count, BATCH)]


def r1_rows(score_of: Callable[[slice], Callable[[Tensor], Tensor]], x: Tensor, draws: int) -> list[list[Any]]:
    """The exact penalty and, for each sigma, finite differences with `draws` directions a sample: cells as R1_COLUMNS. score_of: rows of x
    -> s of such latents."""
    parts = batches(len(x))
    with twice_differentiable_attention():
        exact = torch.cat([r1_penalty(score_of(at), x[at]).detach() for at in parts])
    random = torch.Generator().manual_seed(0)
    rows: list[list[Any]] = [["exact", exact.mean().item(), 1.0, (exact.std() / exact.mean()).item(), None]]
    for sigma in SIGMAS:
        drawn = []
        for _ in range(draws):
            e = torch.randn(x.shape, generator=random).to(x.device)
            with torch.no_grad():
                drawn.append(torch.cat([r1_finite_difference(score_of(at), x[at], e[at], sigma) for at in parts]))
        value = torch.stack(drawn)
        error = value.mean(1).std() / draws**0.5 / exact.mean()
        rows.append([sigma, value.mean().item(), (value.mean() / exact.mean()).item(), (value.std() / value.mean()).item(), error.item()])
    return rows


@no_tf32()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the last)")
    parser.add_argument("--count", type=int, default=256, help="held-out pairs")
    parser.add_argument("--draws", type=int, default=16, help="directions a sample of the finite differences")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    of_run = open_run(a.run, a.store, a.step, a.count)
    d, generator, teacher, step = discriminator_of(of_run), generator_of(of_run, of_run.state.ema), of_run.teacher, of_run.state.step
    x, z, c = of_run.held_out.latent, of_run.held_out.noise, of_run.held_out.prompts
    count = len(x)

    @torch.no_grad()
    def scores(latent: Tensor, noise: Tensor, prompts: list[str]) -> Tensor:
        return torch.cat([score(d(latent[at], noise[at], teacher.encode_prompts(prompts[at]))) for at in batches(count)])

    with torch.no_grad():
        fake = torch.cat([generator(z[at], teacher.encode_prompts(c[at])) for at in batches(count)])
    any_other, of_text = (partners(c, other) for other in (False, True))
    real = scores(x, z, c)
    fakes = {
        "generated": scores(fake, z, c),
        "other_latent": scores(x[any_other], z, c),
        "other_text": scores(x, z, [c[i] for i in of_text]),
        "other_noise": scores(x, z[any_other], c),
    }
    below = {kind: share_above(real, of) for kind, of in fakes.items()}
    # Does a generated latent look more real beside its own noise? Under 0.5 D takes following from the noise for a mark of a fake.
    generated_own_noise = share_above(fakes["generated"], scores(fake, z[any_other], c))

    def of_real(at: slice) -> Callable[[Tensor], Tensor]:
        condition = teacher.encode_prompts(c[at])
        return lambda latent: score(d(latent, z[at], condition))

    rows = r1_rows(of_real, x, a.draws)
    accuracy = {"real": (real > 0).float().mean().item(), "generated": (fakes["generated"] < 0).float().mean().item()}
    print(
        f"step {step}, {count} held-out pairs; accuracy at 0: {accuracy}; below_real: {below}; generated, own noise above another's: {generated_own_noise}\n"
    )
    print(markdown_table(R1_COLUMNS, rows))
    if a.out:
        write_json(
            a.out,
            {
                "step": step,
                "count": count,
                "accuracy": accuracy,
                "below_real": below,
                "generated_own_noise_above_another": generated_own_noise,
                "r1": [dict(zip(R1_COLUMNS, r, strict=True)) for r in rows],
            },
        )


if __name__ == "__main__":
    main()
