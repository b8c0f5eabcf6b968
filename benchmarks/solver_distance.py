"""How far solvers and precisions are from the ODE's solution, against the network evaluations they spend.

    python benchmarks/solver_distance.py --count 128 --out benchmarks/results/solver_distance.json

The reference is DDIM with many steps in float32. Distances are root mean square differences of scaled latents, from the same
noises and prompts; the difference between two independent pictures is beside them as a yardstick.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from diffusion2gan.device import default_device, has_bf16
from diffusion2gan.evaluation.emoji10k import drawn_prompt_list, noise_seeds
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, evaluations_per_pair
from diffusion2gan.teachers.protocol import TeacherConfig

SETTINGS: list[tuple[str, SolverConfig, str | None]] = [
    ("ddim 50, leading (the paper's)", SolverConfig(), None),
    ("ddim 50, leading, bfloat16 network", SolverConfig(), "bfloat16"),
    ("ddim 50, trailing", SolverConfig(spacing="trailing"), None),
    ("ddim 25, trailing", SolverConfig(steps=25, spacing="trailing"), None),
    ("dpmpp 12, trailing", SolverConfig(solver="dpmpp", steps=12, spacing="trailing"), None),
    ("dpmpp 16, trailing", SolverConfig(solver="dpmpp", steps=16, spacing="trailing"), None),
    ("dpmpp 20, trailing", SolverConfig(solver="dpmpp", steps=20, spacing="trailing"), None),
    ("unipc 12, trailing", SolverConfig(solver="unipc", steps=12, spacing="trailing"), None),
    ("unipc 20, trailing", SolverConfig(solver="unipc", steps=20, spacing="trailing"), None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--reference-steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    teacher = load_teacher(TeacherConfig(source="embedded"), default_device())
    prompts = [p.prompt for p in drawn_prompt_list("validation", a.count)]
    noise = draw_noise(noise_seeds("validation", "A", a.count), teacher.latent_shape)
    reference = OdeSolver(teacher, SolverConfig(steps=a.reference_steps, spacing="trailing"), 64).solve(noise, prompts)
    rows = []
    for name, config, precision in SETTINGS:
        if precision == "bfloat16" and not has_bf16(teacher.device):
            continue  # the same numbers, computed in software
        solver = OdeSolver(teacher, config, 64, precision)
        started = time.perf_counter()
        x = solver.solve(noise, prompts)
        seconds = time.perf_counter() - started
        distance = (x - reference).square().mean().sqrt().item()
        rows.append({"setting": name, "evaluations": evaluations_per_pair(config), "distance": distance, "pairs/s": a.count / seconds})
    yardstick = (reference - reference.roll(1, 0)).square().mean().sqrt().item()
    rows.append({"setting": "two independent pictures", "evaluations": 0, "distance": yardstick, "pairs/s": 0.0})
    print(markdown_table(list(rows[0]), [list(r.values()) for r in rows]))
    if a.out:
        result = {"reference": f"ddim {a.reference_steps}, trailing, float32", "count": a.count, "torch": torch.__version__, "rows": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
