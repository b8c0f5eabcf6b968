"""Diffusion models of pixels: against the stock pipeline, against EDM's own algorithm, and through every stage."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from torch import Tensor

from diffusion2gan.cli import main
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.accounting import heun_evaluations
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pairs.simulate import PairsConfig, simulate
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.recipe import load_recipe
from diffusion2gan.run import export_run
from diffusion2gan.teachers.folders import _files_digest, family_of
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, evaluations_per_pair, solve_ode
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.protocol import TeacherConfig
from tests.conftest import tiny_pixel_pipeline, tiny_pixel_unet
from tests.helpers import recipe_values, trained_from_scratch

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_stock_pipeline(prediction_type: str, dtype: torch.dtype, limit: float) -> None:
    pipeline = DDIMPipeline(tiny_pixel_unet(), DDIMScheduler(clip_sample=False, prediction_type=prediction_type)).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1))
    stock = pipeline(batch_size=3, generator=torch.Generator().manual_seed(1), num_inference_steps=10, output_type="numpy").images
    teacher = PixelTeacher.from_pipeline(pipeline)
    ours = solve_ode(teacher, noise, teacher.encode_prompts([""] * 3), None, SolverConfig(steps=10, guidance=1))
    pictures = (teacher.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures - stock).mean() < limit
    assert pictures.std() > 0.1


def _edm_heun(teacher: PixelTeacher, network: UNet2DModel, noise: Tensor, steps: int, sigma_data: float) -> tuple[Tensor, int]:
    """Algorithm 1 of Karras et al. 2022 without churn, in the data's own scale: an oracle that shares no code with the package."""
    alpha = teacher.alphas_cumprod.double()
    levels = ((1 - alpha) / alpha).sqrt() * sigma_data
    low, high = levels[0].item() ** (1 / 7), levels[-1].item() ** (1 / 7)
    sigmas = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    evaluations = 0

    def denoised(x: Tensor, sigma: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        total = sigma**2 + sigma_data**2
        output = network(x / math.sqrt(total), torch.tensor(math.log(sigma) / 4, dtype=torch.float64)).sample
        return sigma_data**2 / total * x + sigma * sigma_data / math.sqrt(total) * output

    with torch.no_grad():
        x = noise * sigmas[0]
        for now, after in itertools.pairwise(sigmas):
            slope = (x - denoised(x, now)) / now
            ahead = x + (after - now) * slope
            if after > 0:
                slope = (slope + (ahead - denoised(ahead, after)) / after) / 2
                ahead = x + (after - now) * slope
            x = ahead
    return x, evaluations


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_heun_is_edms_algorithm(sigma_data: float) -> None:
    pipeline = tiny_pixel_pipeline(edm=True, sigma_data=sigma_data).to(torch.float64)
    teacher = PixelTeacher.from_pipeline(pipeline)
    noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    config = SolverConfig(solver="heun", steps=18, spacing="linspace", guidance=1)
    ours = teacher.decode(solve_ode(teacher, noise, teacher.encode_prompts(["", ""]), None, config))
    theirs, evaluations = _edm_heun(teacher, pipeline.unet, noise, 18, sigma_data)
    # Table 6 counts 35 evaluations a pair.
    assert evaluations == evaluations_per_pair(config) == 35
    assert theirs.std() > 0.1
    # The solver keeps its noise levels in float32.
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_the_schedule_is_edms() -> None:
    teacher = PixelTeacher.from_pipeline(tiny_pixel_pipeline(edm=True))
    alpha = teacher.alphas_cumprod.double()
    sigma = ((1 - alpha) / alpha).sqrt() * 0.5
    assert sigma[-1].item() == pytest.approx(80, rel=1e-4)
    assert sigma[0].item() == pytest.approx(0.002, rel=0.01)
    # c_noise is read off the schedule itself, also between two of its steps.
    for t in (0, 7, 500, 999):
        assert teacher._noise_level(torch.tensor(t)).item() == pytest.approx(math.log(sigma[t]) / 4, abs=1e-12)
    between = teacher._noise_level(torch.tensor([3.25, 998.5]))
    expected = [0.75 * math.log(sigma[3]) + 0.25 * math.log(sigma[4]), 0.5 * (math.log(sigma[998]) + math.log(sigma[999]))]
    np.testing.assert_allclose(between.numpy(), np.array(expected) / 4, rtol=1e-6)


def test_heun_equals_the_stock_scheduler_for_an_alpha_bar_schedule() -> None:
    from diffusers import HeunDiscreteScheduler

    pipeline = tiny_pixel_pipeline().to(torch.float64)
    teacher = PixelTeacher.from_pipeline(pipeline)
    noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = solve_ode(
        teacher, noise, teacher.encode_prompts(["", ""]), None, SolverConfig(solver="heun", steps=6, spacing="trailing", guidance=1)
    )
    scheduler = HeunDiscreteScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(6)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert (ours - x).abs().max() < 1e-9


@pytest.mark.parametrize("edm_prediction", ["epsilon", "v_prediction"])
def test_one_step_of_an_edm_network_is_its_denoiser(edm_prediction: str) -> None:
    """G(z) = D(sigma_max z; sigma_max), by diffusers' own preconditioning."""
    pipeline = tiny_pixel_pipeline(edm=True).to(torch.float64)
    pipeline.scheduler = scheduler = EDMEulerScheduler(prediction_type=edm_prediction)
    teacher = PixelTeacher.from_pipeline(pipeline)
    noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = teacher.decode(OneStepGenerator.from_teacher(teacher)(noise, teacher.encode_prompts(["", ""])).detach())
    sigma = torch.tensor(80.0, dtype=torch.float64)
    with torch.no_grad():
        # The generator's input has unit variance, data included: at sigma_max that is c_in x to five digits.
        x = noise * (sigma**2 + 0.25).sqrt()
        output = pipeline.unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
        theirs = scheduler.precondition_outputs(x, output, sigma)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


def test_classes_are_numbers() -> None:
    teacher = PixelTeacher(tiny_pixel_unet(classes=300), dict(DDPMScheduler().config))
    condition = teacher.encode_prompts(["0", "299", "7"])
    assert condition.embeddings.shape == (3, 1, 300)
    noise = torch.randn(1, *SHAPE).expand(3, -1, -1, -1)
    three = teacher.evaluate(noise, torch.tensor(500), condition)
    with torch.no_grad():
        assert torch.allclose(three[1:2], teacher.network(noise[:1], torch.tensor(500), class_labels=torch.tensor([299])).sample, atol=1e-6)
    assert (three[0] - three[1]).abs().max() > 1e-4
    # One-hot: a number of 299 would be 300 in bfloat16.
    again = teacher.evaluate(noise, torch.tensor(500), condition.to(torch.bfloat16))
    assert torch.equal(three, again)
    for wrong in ("300", "-1", "cat", "", "1.5"):
        with pytest.raises(UserError, match=r"expected the number of a class, 0 to 299"):
            teacher.encode_prompts([wrong])


def test_what_cannot_be_a_teacher() -> None:
    with pytest.raises(UserError, match=r"embeds time as 'fourier', expected 'positional'"):
        PixelTeacher(tiny_pixel_unet(time_embedding_type="fourier"), dict(DDPMScheduler().config))
    with pytest.raises(UserError, match=r"draws 1 channels of size 8, expected 3 of a fixed size"):
        PixelTeacher(tiny_pixel_unet(in_channels=1, out_channels=1), dict(DDPMScheduler().config))
    with pytest.raises(UserError, match=r"gives 6 channels for 3"):
        PixelTeacher(tiny_pixel_unet(out_channels=6), dict(DDPMScheduler().config))
    with pytest.raises(UserError, match=r"embeds classes as 'timestep'"):
        PixelTeacher(tiny_pixel_unet(class_embed_type="timestep"), dict(DDPMScheduler().config))
    with pytest.raises(UserError, match=r"sigma_schedule 'exponential'"):
        PixelTeacher(tiny_pixel_unet(), dict(EDMEulerScheduler(sigma_schedule="exponential").config), True)
    with pytest.raises(UserError, match=r"guidance is above 1, expected 1"):
        OdeSolver(PixelTeacher.from_pipeline(tiny_pixel_pipeline()), SolverConfig(guidance=2.0))


@pytest.mark.parametrize("edm", [False, True])
def test_every_stage(edm: bool, tmp_path: Path, prompts_file: Path) -> None:
    """simulate, both phases, export; the exported student draws the stock pipeline's one step, or its own denoiser's."""
    tiny_pixel_pipeline(edm=edm).save_pretrained(tmp_path / "teacher")
    ode = {"solver": "heun", "steps": 4, "spacing": "linspace", "guidance": 1.0} if edm else {"steps": 4, "guidance": 1.0}
    values = recipe_values(tmp_path / "teacher", prompts_file, training__steps=6, pairs__ode=ode)
    values["teacher"] = {"family": "pixel", "source": str(tmp_path / "teacher")}
    values["pairs"]["prompts"] = {"source": "empty"}
    values["adversarial"] = {"steps": 4, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3, "r1_every": 2}
    trainer = trained_from_scratch(values, tmp_path)
    assert trainer.adversary is not None
    assert len(trainer.adversary.statistics.columns) == 1 + 6
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    export_run(tmp_path / "run", tmp_path / "student", "float32" if edm else None)
    student = OneStepPipeline.from_pretrained(tmp_path / "student", "float64")
    noise = draw_noise([1, 2, 3], SHAPE)
    ours = student.latents(["red heart"] * 3, noise)
    assert student.generate(["red heart"] * 3, [1, 2, 3]).shape == (3, 8, 8, 3)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["teacher"]["preconditioned"] is edm
    card = (tmp_path / "student" / "README.md").read_text()
    assert "pipeline_tag: unconditional-image-generation" in card
    if edm:
        # No stock pipeline draws one step of it.
        assert "OneStepPipeline.from_pretrained" in card
        assert "multiplied by" not in card
        assert DDPMPipeline.from_pretrained(tmp_path / "student").scheduler.config._class_name == "EDMEulerScheduler"
        return
    assert "DDIMPipeline.from_pretrained" in card
    # 1 / sqrt(abar) of DDPM's schedule.
    assert "Weights are stored in float32. Run in float32: the last layer's output is multiplied by 157" in card
    stock = DDIMPipeline.from_pretrained(tmp_path / "student").to(torch.float64)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler.set_timesteps(1)
    with torch.no_grad():
        z = torch.from_numpy(noise).double()
        x = stock.scheduler.step(stock.unet(z, 999).sample, stock.scheduler.timesteps[0], z).prev_sample
    assert stock.scheduler.timesteps.tolist() == [999]
    assert (ours - x).abs().max().item() < 1e-9
    theirs = stock(batch_size=3, num_inference_steps=1, output_type="numpy").images
    assert theirs.shape == (3, 8, 8, 3)


def test_identities_tell_teachers_apart(tmp_path: Path) -> None:
    tiny_pixel_pipeline().save_pretrained(tmp_path / "ddpm")
    tiny_pixel_pipeline(edm=True).save_pretrained(tmp_path / "edm")
    ddpm, edm = (load_teacher(TeacherConfig(family="pixel", source=str(tmp_path / n))).identity() for n in ("ddpm", "edm"))
    assert ddpm["weights"] == edm["weights"]
    assert ddpm["schedule"] != edm["schedule"]
    assert (ddpm["preconditioned"], edm["preconditioned"]) == (False, True)
    with pytest.raises(UserError, match=r"teacher.family is stable_diffusion, but .*ddpm is of family pixel; set teacher.family=pixel"):
        load_teacher(TeacherConfig(source=str(tmp_path / "ddpm")))


def test_flat_folders_are_told_apart(tmp_path: Path) -> None:
    """Repositories such as google/ddpm-cifar10-32 have their weights beside model_index.json."""
    digests = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        tiny_pixel_unet(seed=seed).save_pretrained(folder)
        digests.append(_files_digest(folder, None))
    assert digests[0] != digests[1]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no .safetensors weights of a network"):
        _files_digest(tmp_path / "none", None)
    (tmp_path / "none" / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        family_of(tmp_path / "none")


def test_its_latency_is_that_of_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pixel_pipeline().save_pretrained(tmp_path / "teacher")
    command = [
        "speed",
        "latency",
        f"teacher:{tmp_path / 'teacher'}",
        "--guidance",
        "1",
        "--steps",
        "1",
        "2",
        "--warmup",
        "1",
        "--runs",
        "1",
    ]
    assert main(command) == 0, capsys.readouterr().err


def test_the_papers_accounting_is_this_solver() -> None:
    """Table 6's evaluations of a pair are those of the CIFAR-10 recipe."""
    assert evaluations_per_pair(load_recipe("cifar10_ddpm").pairs.ode) == heun_evaluations(18) == 35


def test_a_list_with_what_is_no_class_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Later, the store would be nearly done, and with a mended list another one."""
    teacher = PixelTeacher(tiny_pixel_unet(classes=10), dict(DDPMScheduler().config))
    (tmp_path / "classes.txt").write_text("3\n7\ncat\n")
    config = PairsConfig.model_validate(
        {
            "count": 3,
            "prompts": {"source": str(tmp_path / "classes.txt")},
            "ode": {"steps": 2, "guidance": 1.0},
            "batch_size": 1,
            "shard_size": 1,
        }
    )
    with pytest.raises(UserError, match=r"pair 3 of 3: prompt 'cat': expected the number of a class"):
        simulate(teacher, config, tmp_path / "pairs", progress=False)
    assert not (tmp_path / "pairs").exists()
