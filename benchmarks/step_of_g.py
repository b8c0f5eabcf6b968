"""How far one step of G's optimiser moves its latents, and what of that all pictures have in common.

    python benchmarks/step_of_g.py runs/emoji runs/pairs/emoji --step 1200 --out step_of_g.json

On held-out pairs, by the moments of a checkpoint and the recipe's own rate (--rate for another): the root mean square of the change of
x = G(z, c), of it the part that is one constant a channel, and the rest; of all layers, and of each part of the network alone. Then
by channel how far G's latents and its average's are off their pairs on average, and in phase 2 D's mean score of real latents, of
G's own, of those without what they have in common, and of its average's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from what_d_sees import batches, discriminator_of, generator_of, open_run

from diffusion2gan.discriminator.multi_scale import score
from diffusion2gan.files import write_json
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import markdown_table
from diffusion2gan.training.state import TrainingState

COLUMNS = ["layers", "change of x", "one constant a channel", "the rest"]


def adam_step(state: TrainingState, generator: OneStepGenerator, rate: float) -> dict[str, Tensor]:
    """What a step at `rate` with no new gradient adds to each parameter, but for the decay of weights: -rate m / sqrt(v), both corrected
    for their start."""
    names = [name for name, _ in generator.named_parameters()]
    changes = {}
    for group in state.optimizer["param_groups"]:
        for i in group["params"]:
            if (moments := state.optimizer["state"].get(i)) is None:
                continue  # a layer that G does not use
            first, second = (1 - beta ** float(moments["step"]) for beta in group["betas"])
            move = moments["exp_avg"] / first / ((moments["exp_avg_sq"] / second).sqrt() + group["eps"])
            changes[names[i]] = -rate * move
    return changes


def part_of(name: str) -> str:
    """The block that a parameter belongs to."""
    first, second, *_ = name.removeprefix("network.").split(".")
    return f"{first}.{second}" if second.isdecimal() else first


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def constant(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, C, 1, 1): what all have in common."""
    return x.mean(dim=(0, 2, 3), keepdim=True)


@no_tf32()
@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the last)")
    parser.add_argument("--rate", type=float, default=None, help="learning rate (default: the recipe's, not yet falling)")
    parser.add_argument("--count", type=int, default=128, help="held-out pairs")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    of_run = open_run(a.run, a.store, a.step, a.count)
    recipe, teacher, state, held_out = of_run.recipe, of_run.teacher, of_run.state, of_run.held_out
    if recipe.training.optimizer != "adamw":
        raise SystemExit(f"{a.run}: of moments of 8 bits, expected a run that trains by adamw; name another")
    if not state.optimizer["state"]:
        raise SystemExit(f"{of_run.path}: its optimiser has made no step yet (a phase begins there); name a later step")
    in_phase_2 = recipe.adversarial is not None and state.step > recipe.training.steps
    settings = recipe.adversarial if in_phase_2 and recipe.adversarial else recipe.training
    rate = settings.learning_rate if a.rate is None else a.rate
    generator, count = generator_of(of_run, state.model), len(held_out.latent)
    conditions = [teacher.encode_prompts(held_out.prompts[at]) for at in batches(count)]

    def latents(of: OneStepGenerator) -> Tensor:
        return torch.cat([of(held_out.noise[at], c) for at, c in zip(batches(count), conditions, strict=True)])

    before = latents(generator)
    changes = adam_step(state, generator, rate)
    rows: list[list[Any]] = []
    for part in ["all", *sorted({part_of(n) for n in changes})]:
        moved = {n: state.model[n] + c for n, c in changes.items() if part in ("all", part_of(n))}
        generator.load_state_dict(state.model | moved)
        change = latents(generator) - before
        common = constant(change)
        rows.append([part, root_mean_square(change), root_mean_square(common), root_mean_square(change - common)])
    rows[1:] = sorted(rows[1:], key=lambda r: -r[1])
    generator.load_state_dict(state.ema)
    average = latents(generator)
    off = {"own": constant(before - held_out.latent).flatten().tolist(), "average": constant(average - held_out.latent).flatten().tolist()}
    scores = None
    if state.adversary is not None:
        d = discriminator_of(of_run)
        of = {
            "real": held_out.latent,
            "own": before,
            "own, nothing in common": before - constant(before - held_out.latent),
            "average": average,
        }

        def mean_score(x: Tensor) -> float:
            each = [score(d(x[at], held_out.noise[at], c)) for at, c in zip(batches(count), conditions, strict=True)]
            return torch.cat(each).mean().item()

        scores = {name: mean_score(x) for name, x in of.items()}
    print(f"step {state.step}, rate {rate:g}, {count} held-out pairs; off their pairs by channel: {off}; D's mean score: {scores}\n")
    print(markdown_table(COLUMNS, rows))
    if a.out:
        step = [dict(zip(COLUMNS, r, strict=True)) for r in rows]
        write_json(a.out, {"step": state.step, "rate": rate, "count": count, "moves": step, "off": off, "mean_score": scores})


if __name__ == "__main__":
    main()
