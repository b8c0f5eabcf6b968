"""How far solvers and precisions are from the ODE's solution, against the network evaluations they spend.

    python benchmarks/solver_distance.py --count 128 --out benchmarks/results/solver_distance_cpu.json

`diffusion2gan simulate RECIPE --measure-solver` does this for any recipe; here the embedded teacher and, where the machine has
it, bfloat16 beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffusion2gan.device import default_device, has_bf16
from diffusion2gan.evaluation.emoji10k import drawn_prompt_list, noise_seeds
from diffusion2gan.files import write_json
from diffusion2gan.pairs.measure_solver import REFERENCE_STEPS, candidates, measure_solvers, solver_result, solver_table
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.recipe import load_recipe
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    teacher = load_teacher(TeacherConfig(source="embedded"), default_device())
    own = load_recipe("emoji").pairs.ode
    prompts = [p.prompt for p in drawn_prompt_list("validation", a.count)]
    noise = draw_noise(noise_seeds("validation", "A", a.count), teacher.latent_shape)
    rows, whole = measure_solvers(teacher, candidates(own), noise, prompts, 64, reference_steps=a.reference_steps)
    if has_bf16(teacher.device):
        papers = SolverConfig(guidance=own.guidance)
        (row,), _ = measure_solvers(teacher, [papers], noise, prompts, 64, "bfloat16", a.reference_steps)
        rows.append(dataclasses.replace(row, name=f"{row.name}, bfloat16 network"))
    print(solver_table(rows, whole))
    if a.out:
        write_json(a.out, solver_result(rows, whole, a.count, own.guidance, teacher))


if __name__ == "__main__":
    main()
