"""How well the teacher with fewer steps keeps what the noise says, beside one-step students: a scale for the benchmark's retrieval.

    python benchmarks/few_steps.py --out benchmarks/results/few_steps_cpu.json

Retrieval as the protocol has it: of 16 noises of a coarse prompt, how often is the picture nearest to the teacher's own picture of that noise, in
the features of the scoring network. Chance is 1/16. `mse` is between latents, `pictures` between pixels in 0..1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion2gan.device import default_device
from diffusion2gan.evaluation.emoji10k import PRESERVATION_NOISES, preservation_samples
from diffusion2gan.evaluation.metrics import retrieval, within_prompt_diversity
from diffusion2gan.evaluation.scoring import ScoringNetwork
from diffusion2gan.files import write_json
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import to_uint8
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.precision import no_tf32
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, evaluations_per_pair
from diffusion2gan.teachers.protocol import TeacherConfig

COLUMNS = [
    "",
    "evaluations",
    "retrieval",
    "standard error",
    "distance to own / to another noise's",
    "diversity / teacher's",
    "mse",
    "pictures",
]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="coarse prompts, at least 2, of 16 noises each")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 3, 4, 6], help="of the teacher's solver")
    parser.add_argument("--student", nargs="*", default=["embedded"], help="folders of students")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    teacher, scorer = load_teacher(TeacherConfig(source="embedded"), default_device()), ScoringNetwork()
    own = load_recipe("emoji").pairs.ode
    prompts, seeds = preservation_samples(a.count)

    def solved(config: SolverConfig) -> Tensor:
        return OdeSolver(teacher, config).solve(draw_noise(seeds, teacher.latent_shape), prompts)

    def students_own(pipeline: OneStepPipeline) -> Tensor:
        x: Tensor = pipeline(prompts, seed=seeds, output_type="latent")
        return x

    def seen(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with no_tf32():
            images = to_uint8(teacher.decode(x))
        return images, scorer.features(images).reshape(a.count, PRESERVATION_NOISES, -1)

    what: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    for steps in a.steps:
        config = own.model_copy(update={"steps": steps})
        what[f"teacher, {config.solver} {steps}"] = evaluations_per_pair(config), partial(solved, config)
    untrained = OneStepGenerator.from_teacher(teacher).requires_grad_(False).eval()
    what["untrained student"] = 1, partial(students_own, OneStepPipeline(teacher, untrained))
    for name in a.student:
        what[f"student {name}"] = 1, partial(students_own, OneStepPipeline.from_pretrained(name, "float32"))
    target = solved(own)
    pictures, features = seen(target)
    diversity = within_prompt_diversity(features).mean()
    rows: list[dict[str, Any]] = []
    for name, (evaluations, make) in what.items():
        x = make()
        images, theirs = seen(x)
        kept = retrieval(theirs, features)
        by_prompt = kept.hits.mean(1)
        row = {
            "what": name,
            "evaluations": evaluations,
            "retrieval": kept.rate,
            "standard_error": float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5),
            "paired_to_control": kept.ratio,
            "diversity": float(within_prompt_diversity(theirs).mean() / diversity),
            "mse": (x - target).square().mean().item(),
            "pictures": float(np.square(images / 255.0 - pictures / 255.0).mean()),
        }
        rows.append(row)
        print(row, flush=True)
    print(markdown_table(COLUMNS, [list(row.values()) for row in rows]))
    if a.out:
        write_json(a.out, {"prompts": a.count, "noises": PRESERVATION_NOISES, "teacher": own.model_dump(), "rows": rows})


if __name__ == "__main__":
    main()
