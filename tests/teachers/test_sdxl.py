"""SDXL's adapter: against the stock pipeline, and through every stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffusion2gan.errors import UserError
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.run import export_run
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, solve_ode
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.sdxl import SDXLTeacher
from tests.conftest import tiny_sdxl_pipeline
from tests.helpers import recipe_values, trained_from_scratch

PROMPTS = ["red heart", "blue cat", "a very long prompt that is cut"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("negative", [None, "cat"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_stock_pipeline(guidance: float, negative: str | None, dtype: torch.dtype, limit: float) -> None:
    pipeline = tiny_sdxl_pipeline().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    given = None if negative is None else [negative] * 3
    stock = pipeline(
        PROMPTS, negative_prompt=given, num_inference_steps=10, guidance_scale=guidance, latents=noise.clone(), output_type="latent"
    ).images
    teacher = SDXLTeacher.from_pipeline(pipeline)
    config = SolverConfig(steps=10, guidance=guidance)
    ours = solve_ode(teacher, noise, teacher.encode_prompts(PROMPTS), teacher.encode_negative(negative or ""), config)
    assert (ours - stock).abs().mean().item() < limit
    assert ours.abs().mean() > 0.1
    solver = OdeSolver(teacher, config, batch_size=2, negative_prompt=negative or "")
    parts = solver.solve(noise.numpy(), PROMPTS)
    assert (parts - stock).abs().mean().item() < limit


def test_the_empty_negative_is_zeros_or_text() -> None:
    pipeline = tiny_sdxl_pipeline()
    zeros = SDXLTeacher.from_pipeline(pipeline).encode_negative()
    assert not zeros.embeddings.any()
    assert not zeros.added["text_embeds"].any()
    assert zeros.added["time_ids"].tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    teacher = SDXLTeacher.from_pipeline(pipeline)
    text = teacher.encode_negative()
    assert torch.equal(text.embeddings, teacher.encode_prompts([""]).embeddings)
    assert text.embeddings.any()


def test_identity_tells_second_encoders_apart(tmp_path: Path) -> None:
    pipeline = tiny_sdxl_pipeline()
    before = SDXLTeacher.from_pipeline(pipeline).identity()
    with torch.no_grad():
        pipeline.text_encoder_2.text_projection.weight.add_(1)
    after = SDXLTeacher.from_pipeline(pipeline).identity()
    assert {k for k in before if before[k] != after[k]} == {"weights"}
    digests = []
    for name in ("a", "b"):
        pipeline.save_pretrained(tmp_path / name)
        config = TeacherConfig(family="sdxl", source=str(tmp_path / name))
        digests.append(load_teacher(config).identity()["weights"])
        with torch.no_grad():
            pipeline.text_encoder_2.text_projection.weight.add_(1)
    assert digests[0] != digests[1]


def test_identity_tells_second_tokenizers_apart() -> None:
    pipeline = tiny_sdxl_pipeline()
    before = SDXLTeacher.from_pipeline(pipeline).identity()
    pipeline.tokenizer_2 = pipeline.tokenizer
    after = SDXLTeacher.from_pipeline(pipeline).identity()
    assert {k for k in before if before[k] != after[k]} == {"tokenizer_2"}


def test_families_are_not_confused(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "xl")
    with pytest.raises(UserError, match=r"teacher.family is stable_diffusion, but .*xl is of family sdxl; set teacher.family=sdxl"):
        load_teacher(TeacherConfig(source=str(tmp_path / "xl")))
    with pytest.raises(UserError, match=r"teacher.family is sdxl, but .* is of family stable_diffusion"):
        load_teacher(TeacherConfig(family="sdxl", source=str(tiny_teacher_folder)))


def test_half_precision_keeps_a_fragile_decoder_in_float32() -> None:
    pipeline = tiny_sdxl_pipeline()
    pipeline.vae.register_to_config(force_upcast=True)
    teacher = SDXLTeacher.from_pipeline(pipeline.to(torch.float16))
    assert (teacher.vae.dtype, teacher.dtype) == (torch.float32, torch.float16)
    assert torch.isfinite(teacher.decode(torch.randn(1, 4, 8, 8))).all()


def test_every_stage(tmp_path: Path, prompts_file: Path) -> None:
    """simulate, both phases, export: and the exported student is the stock pipeline's one step."""
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "teacher")
    values = recipe_values(tmp_path / "teacher", prompts_file, training__steps=6)
    values["teacher"] = {"family": "sdxl", "source": str(tmp_path / "teacher")}
    values["adversarial"] = {"steps": 4, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3, "r1_every": 2}
    trainer = trained_from_scratch(values, tmp_path)
    assert trainer.adversary is not None
    assert len(trainer.adversary.statistics.columns) == 1 + 9
    assert any("r1" in row for row in read_scalars(tmp_path / "run" / "metrics.jsonl"))
    export_run(tmp_path / "run", tmp_path / "student", "float32")
    assert "StableDiffusionXLPipeline.from_pretrained" in (tmp_path / "student" / "README.md").read_text()
    student = OneStepPipeline.from_pretrained(tmp_path / "student", "float64")
    noise = draw_noise([1, 2, 3], (4, 8, 8))
    ours = student.latents(PROMPTS, noise)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "student").to(torch.float64)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, latents=torch.from_numpy(noise).double(), num_inference_steps=1, guidance_scale=1, output_type="latent").images
    assert (ours - theirs).abs().max().item() < 1e-9
    assert student.generate(PROMPTS, [1, 2, 3]).shape == (3, 16, 16, 3)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["teacher"]["family"] == "sdxl"


def test_the_untrained_student_is_the_stock_one_step() -> None:
    pipeline = tiny_sdxl_pipeline().to(torch.float64)
    teacher = SDXLTeacher.from_pipeline(pipeline)
    noise = torch.from_numpy(draw_noise([5, 6, 7], (4, 8, 8))).double()
    ours = OneStepGenerator.from_teacher(teacher)(noise, teacher.encode_prompts(PROMPTS)).detach().numpy()
    prediction = teacher.evaluate(noise, torch.tensor(999), teacher.encode_prompts(PROMPTS)).numpy()
    a = float(teacher.alphas_cumprod[-1])
    np.testing.assert_allclose(ours, (noise.numpy() - (1 - a) ** 0.5 * prediction) / a**0.5, rtol=1e-5, atol=1e-6)
