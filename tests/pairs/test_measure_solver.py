"""`simulate --measure-solver`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion2gan.cli import main
from diffusion2gan.pairs.measure_solver import candidates, measure_solvers, setting_name
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, evaluations_per_pair
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pixel_pipeline
from tests.helpers import recipe_values, write_recipe

PROMPTS = ["red heart", "blue cat", "sun"]


def test_distances_are_those_of_the_latents(tiny_teacher: StableDiffusionTeacher) -> None:
    noise = draw_noise([1, 2, 3], tiny_teacher.latent_shape)
    settings = [SolverConfig(solver="ddim", steps=5, spacing="trailing"), SolverConfig(solver="heun", steps=3, spacing="trailing")]
    rows, whole = measure_solvers(tiny_teacher, settings, noise, PROMPTS, 2, reference_steps=20, progress=False)
    reference = OdeSolver(tiny_teacher, SolverConfig(solver="dpmpp", steps=20, spacing="trailing"), 2).solve(noise, PROMPTS)
    for row, config, evaluations in zip(rows, settings, (10, 10), strict=True):
        x = OdeSolver(tiny_teacher, config, 2).solve(noise, PROMPTS)
        assert row.distance == pytest.approx((x - reference).square().mean().sqrt().item(), rel=1e-5)
        assert row.evaluations == evaluations == evaluations_per_pair(config)
        assert torch.equal(row.shown, x)
    others = reference[[2, 0, 1]]
    assert whole.distance == pytest.approx((reference - others).square().mean().sqrt().item(), rel=1e-5)
    assert whole.evaluations == 40


def test_more_steps_are_nearer(tiny_teacher: StableDiffusionTeacher) -> None:
    noise = draw_noise([1, 2, 3], tiny_teacher.latent_shape)
    for solver in ("ddim", "dpmpp", "unipc", "heun"):
        settings = [SolverConfig.model_validate({"solver": solver, "steps": n, "spacing": "trailing"}) for n in (4, 32)]
        (few, many), _ = measure_solvers(tiny_teacher, settings, noise, PROMPTS, 3, reference_steps=100, progress=False)
        assert many.distance < 0.6 * few.distance, solver


def test_candidates_have_the_recipes_guidance_and_itself_once() -> None:
    own = SolverConfig(solver="unipc", steps=8, spacing="trailing", guidance=5.0)
    found = candidates(own)
    assert found[0] == own
    assert found.count(own) == 1
    assert {c.guidance for c in found} == {5.0}
    assert {c.solver for c in found} == {"ddim", "dpmpp", "unipc", "heun"}
    names = [setting_name(c) for c in found]
    assert len(set(names)) == len(names)
    edm = candidates(SolverConfig(solver="heun", steps=18, spacing="linspace", guidance=1.0))
    assert {c.spacing for c in edm if c.solver == "heun"} == {"linspace"}


def test_the_command_writes_table_plot_and_pictures(tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_teacher_folder, prompts_file, pairs__ode={"steps": 4, "guidance": 2.0}))
    out = tmp_path / "measured"
    command = ["simulate", str(recipe), "--out", str(out), "--measure-solver", "--measure-count", "3"]
    assert main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == ["pictures.png", "solver_distance.json", "solver_distance.md", "solver_distance.png"]
    result = json.loads((out / "solver_distance.json").read_text())
    assert result["rows"][0]["setting"] == "ddim 4, leading"
    assert all(np.isfinite(r["distance"]) and r["pairs/s"] > 0 for r in result["rows"])
    assert "ddim 4, leading (the recipe)" in (out / "solver_distance.md").read_text()
    assert np.asarray(Image.open(out / "pictures.png")).std() > 1
    assert main(command) == 0


def test_pixels_can_be_measured(tmp_path: Path) -> None:
    tiny_pixel_pipeline(edm=True).save_pretrained(tmp_path / "teacher")
    values = recipe_values(tmp_path / "teacher", tmp_path / "none", pairs__prompts={"source": "empty"})
    values["teacher"]["family"] = "pixel"
    values["pairs"]["ode"] = {"solver": "heun", "steps": 6, "spacing": "linspace", "guidance": 1.0}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert main(["simulate", str(recipe), "--out", str(tmp_path / "out"), "--measure-solver", "--measure-count", "2"]) == 0
    rows = json.loads((tmp_path / "out" / "solver_distance.json").read_text())["rows"]
    assert (rows[0]["setting"], rows[0]["evaluations"]) == ("heun 6, linspace", 11)


def test_every_solver_goes_to_the_reference_whatever_the_schedule_says_of_clipping() -> None:
    """Clipped at every step, solvers would not agree on a solution."""
    teacher = PixelTeacher.from_pipeline(tiny_pixel_pipeline(clip=True))
    noise = draw_noise([1, 2], teacher.latent_shape)
    settings = [SolverConfig.model_validate({"solver": "heun", "steps": n, "spacing": "trailing", "guidance": 1.0}) for n in (6, 60)]
    (few, many), whole = measure_solvers(teacher, settings, noise, ["", ""], 2, reference_steps=200, progress=False)
    assert many.distance < 0.3 * few.distance
    assert many.distance < 0.1 * whole.distance


def test_refusals(tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_teacher_folder, prompts_file))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    assert main(["simulate", str(recipe), "--out", str(tmp_path / "mine"), "--measure-solver"]) == 2
    assert "not empty and no measurement" in capsys.readouterr().err
    assert main(["simulate", str(recipe), "--out", str(tmp_path / "new"), "--measure-solver", "--measure-count", "1"]) == 2
    assert "--measure-count is 1, expected at least 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
