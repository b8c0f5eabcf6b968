"""solve_ode against the stock pipeline and against a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from diffusion2gan.errors import UserError
from diffusion2gan.teachers.ode import SolverConfig, evaluations_per_pair, solve_ode
from diffusion2gan.teachers.protocol import TextCondition
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline

PROMPTS = ["red heart", "blue cat", "a very long prompt that is cut"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_stock_pipeline(prediction_type: str, guidance: float, dtype: torch.dtype, limit: float) -> None:
    pipeline = tiny_pipeline(prediction_type).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    stock = pipeline(PROMPTS, num_inference_steps=10, guidance_scale=guidance, latents=noise.clone(), output_type="latent").images
    teacher = StableDiffusionTeacher.from_pipeline(pipeline)
    config = SolverConfig(steps=10, guidance=guidance)
    ours = solve_ode(teacher, noise, teacher.encode_prompts(PROMPTS), teacher.encode_prompts([""]), config)
    assert (ours - stock).abs().mean().item() < limit
    assert ours.abs().mean() > 0.1


class GaussianTeacher:
    """The exact noise predictor of data N(mean, deviation^2): the ODE has a closed-form solution."""

    def __init__(self, mean: float, deviation: float) -> None:
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        self.mean, self.deviation = mean, deviation
        self.scheduler_config = dict(scheduler.config)
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.dtype = torch.float64
        self.network = torch.nn.Module()

    def evaluate(self, latent: torch.Tensor, timestep: torch.Tensor, condition: TextCondition, network: None = None) -> torch.Tensor:
        a = self.alphas_cumprod[int(timestep)].double()
        return (1 - a).sqrt() * (latent - a.sqrt() * self.mean) / (a * self.deviation**2 + 1 - a)


@pytest.mark.parametrize(("solver", "limit"), [("ddim", 2e-2), ("dpmpp", 1e-2), ("unipc", 1e-2)])
def test_gaussian_closed_form(solver: str, limit: float) -> None:
    """For Gaussian data the flow keeps (latent - sqrt(a) mean) / sqrt(a s^2 + 1 - a) constant."""
    teacher = GaussianTeacher(mean=0.3, deviation=0.5)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    nothing = TextCondition(torch.zeros(9, 1, 1))
    x = solve_ode(teacher, noise, nothing, nothing, SolverConfig(solver=solver, steps=200, spacing="trailing", guidance=1.0))  # type: ignore[arg-type]
    a = float(teacher.alphas_cumprod[-1])
    expected = 0.3 + 0.5 * (noise - math.sqrt(a) * 0.3) / math.sqrt(a * 0.25 + 1 - a)
    assert (x - expected).abs().max().item() < limit


def test_guidance_one_is_half_the_work() -> None:
    assert evaluations_per_pair(SolverConfig(steps=50, guidance=3.0)) == 100
    assert evaluations_per_pair(SolverConfig(steps=50, guidance=1.0)) == 50


def test_what_cannot_be_solved(tiny_teacher: StableDiffusionTeacher) -> None:
    noise, condition = torch.zeros(1, 4, 8, 8), tiny_teacher.encode_prompts(["cat"])
    with pytest.raises(UserError, match=r"guidance is 3.0 and there is no negative condition, expected .*encode_negative"):
        solve_ode(tiny_teacher, noise, condition, None, SolverConfig(steps=5))
    # A stride of 2 would begin at 799, where the noise is no longer all there is.
    with pytest.raises(UserError, match=r"400 steps with leading spacing start at timestep 799, expected about 999; use a divisor of 1000"):
        solve_ode(tiny_teacher, noise, condition, None, SolverConfig(steps=400, guidance=1))


def test_rows_do_not_influence_each_other(tiny_teacher: StableDiffusionTeacher) -> None:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    negative = tiny_teacher.encode_prompts([""])
    together = solve_ode(tiny_teacher, noise, tiny_teacher.encode_prompts(PROMPTS), negative, SolverConfig(steps=5))
    alone = solve_ode(tiny_teacher, noise[1:2], tiny_teacher.encode_prompts(PROMPTS[1:2]), negative, SolverConfig(steps=5))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
