"""How far a choice of solver and steps is from the ODE's solution, against the network evaluations it spends.

So a user can choose before simulating: most of the method's bill is paid there. The reference is DPM-Solver++ with many steps,
in the teacher's own precision; distances are root mean square differences of scaled latents, from the same noises and prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.files import atomic_folder, refuse_other_folder, refuse_strangers, write_json
from diffusion2gan.images import grid, png_bytes, to_uint8
from diffusion2gan.pairs.prompts import read_prompts
from diffusion2gan.pairs.seeds import draw_noise, pair_seed
from diffusion2gan.pairs.simulate import PairsConfig
from diffusion2gan.report import curves, markdown_table
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, can_solve, evaluations_per_pair, new_solver
from diffusion2gan.teachers.protocol import Teacher

REFERENCE_STEPS = 200
_SHOWN = 6
RESULT = "solver_distance.json"
_FILES = (RESULT, "solver_distance.md", "solver_distance.png", "pictures.png")


@dataclass(frozen=True)
class Measured:
    """One setting: evaluations a pair, RMS distance to the reference, pairs a second on this machine, and x of the shown pairs."""

    name: str
    evaluations: int
    distance: float
    pairs_per_second: float
    shown: Tensor


def candidates(own: SolverConfig) -> list[SolverConfig]:
    """What is worth measuring at the guidance of `own`, which is first."""
    rows = [("ddim", "leading", (50,)), ("ddim", "trailing", (10, 25, 50)), ("dpmpp", "trailing", (8, 12, 16, 25))]
    rows += [("unipc", "trailing", (8, 12, 16, 25)), ("heun", "trailing", (8, 13))]
    # EDM's own steps lie between the ends of its schedule.
    spaced = [(s, own.spacing if s == own.solver == "heun" else spacing, n) for s, spacing, steps in rows for n in steps]
    found = [SolverConfig.model_validate({"solver": s, "steps": n, "spacing": p, "guidance": own.guidance}) for s, p, n in spaced]
    return [own, *(config for config in found if config != own)]


def setting_name(config: SolverConfig) -> str:
    """`dpmpp 16, trailing`."""
    return f"{config.solver} {config.steps}, {config.spacing}"


def measure_solvers(
    teacher: Teacher,
    settings: Sequence[SolverConfig],
    noise: np.ndarray,
    prompts: Sequence[str],
    batch_size: int,
    precision: str | None = None,
    reference_steps: int = REFERENCE_STEPS,
    negative_prompt: str = "",
    progress: bool = True,
) -> tuple[list[Measured], Measured]:
    """Each setting against the reference; noise (B, C, H, W), B prompts. All at one guidance scale.

    Returns the settings' rows in their order, and the reference itself, whose `distance` is that of two independent pictures: the
    yardstick.
    """
    # The first error is of the settings, not of what took minutes before it.
    for config in settings:
        new_solver(teacher, config)
    reference_config = SolverConfig.model_validate(
        {"solver": "dpmpp", "steps": reference_steps, "spacing": "trailing", "guidance": settings[0].guidance}
    )
    with tqdm(total=len(settings) + 1, desc="measure", unit="setting", disable=not progress) as bar:

        def solve(config: SolverConfig, dtype: str | None) -> tuple[Tensor, float]:
            solver = OdeSolver(teacher, config, batch_size, dtype, negative_prompt=negative_prompt)
            started = time.perf_counter()
            x = solver.solve(noise, prompts).cpu()
            bar.update()
            return x, len(noise) / (time.perf_counter() - started)

        reference, speed = solve(reference_config, None)
        yardstick = (reference - reference.roll(1, 0)).square().mean().sqrt().item()
        whole = Measured(setting_name(reference_config), evaluations_per_pair(reference_config), yardstick, speed, reference[:_SHOWN])
        rows = []
        for config in settings:
            x, speed = solve(config, precision)
            distance = (x - reference).square().mean().sqrt().item()
            rows.append(Measured(setting_name(config), evaluations_per_pair(config), distance, speed, x[:_SHOWN]))
    return rows, whole


def measure_recipe(teacher: Teacher, config: PairsConfig, out: Path, count: int = 64) -> str:
    """Measures the candidates for `config` on its own first prompts; writes OUT/solver_distance.{json,md,png} and OUT/pictures.png.

    Returns the table. Raises UserError for a folder that holds something else.
    """
    refuse_other_folder(out, RESULT, "measurement")
    refuse_strangers(out, _FILES)
    if count < 2:
        raise UserError(f"--measure-count is {count}, expected at least 2: the yardstick is the distance of two pictures")
    prompts = read_prompts(config.prompts, count, config.seed)
    noise = draw_noise([pair_seed(config.seed, i) for i in range(count)], teacher.latent_shape)
    own, *others = candidates(config.ode)
    settings = [own, *(other for other in others if can_solve(teacher, other.solver))]
    rows, whole = measure_solvers(
        teacher, settings, noise, prompts, config.batch_size, config.precision, negative_prompt=config.negative_prompt
    )
    table = solver_table(rows, whole)
    with atomic_folder(out, ours=_FILES) as target:
        target.mkdir()
        write_json(target / RESULT, solver_result(rows, whole, count, config.ode.guidance, teacher))
        (target / "solver_distance.md").write_text(table)
        (target / "solver_distance.png").write_bytes(_plot(rows))
        (target / "pictures.png").write_bytes(_pictures(teacher, rows, whole))
    return table


def solver_table(rows: Sequence[Measured], whole: Measured) -> str:
    """The rows by their evaluations, the recipe's own (the first) marked, then the yardstick."""
    ordered = sorted(rows, key=lambda r: (r.evaluations, r.distance))
    cells = [[r.name + (" (the recipe)" if r is rows[0] else ""), r.evaluations, r.distance, r.pairs_per_second] for r in ordered]
    return markdown_table(
        ["setting", "evaluations", "RMS distance", "pairs/s"], [*cells, ["two independent pictures", "", whole.distance, ""]]
    )


def solver_result(rows: Sequence[Measured], whole: Measured, count: int, guidance: float, teacher: Teacher) -> dict[str, Any]:
    """The same for a file."""
    return {
        "reference": f"{whole.name}, {teacher.dtype}".replace("torch.", ""),
        "count": count,
        "guidance": guidance,
        "torch": torch.__version__,
        "two_independent_pictures": whole.distance,
        "rows": [{"setting": r.name, "evaluations": r.evaluations, "distance": r.distance, "pairs/s": r.pairs_per_second} for r in rows],
    }


def _pictures(teacher: Teacher, rows: Sequence[Measured], whole: Measured) -> bytes:
    """A row of pictures for the reference, then one for each setting in the order of the table."""
    ordered = [whole, *sorted(rows, key=lambda r: (r.evaluations, r.distance))]
    with torch.inference_mode():
        images = [to_uint8(teacher.decode(r.shown.to(teacher.device, teacher.dtype))) for r in ordered]
    return png_bytes(grid(np.concatenate(images), len(images[0])))


def _plot(rows: Sequence[Measured]) -> bytes:
    series = {}
    for solver in dict.fromkeys(r.name.partition(" ")[0] for r in rows):
        own = sorted((r for r in rows if r.name.startswith(f"{solver} ")), key=lambda r: r.evaluations)
        series[solver] = ([r.evaluations for r in own], [r.distance for r in own])
    return png_bytes(curves(series, "network evaluations a pair", "RMS distance to the reference", log_y=True))
