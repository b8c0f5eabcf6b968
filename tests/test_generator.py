"""G is the teacher's one-step estimate before training, and its exported form runs in the stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusion2gan.errors import UserError
from diffusion2gan.export import export_student
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline
from tests.helpers import tree_digest

PROMPTS = ["red heart", "blue cat"]


@pytest.mark.parametrize("timestep", [999, 981])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_untrained_is_the_one_step_estimate(prediction_type: str, timestep: int) -> None:
    pipeline = tiny_pipeline(prediction_type).to(torch.float64)
    teacher = StableDiffusionTeacher.from_pipeline(pipeline)
    noise = torch.from_numpy(draw_noise([1, 2], (4, 8, 8))).double()
    condition = teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        x = OneStepGenerator.from_teacher(teacher, GeneratorConfig(timestep=timestep))(noise, condition)
        prediction = teacher.evaluate(noise, torch.tensor(timestep), condition)
    expected = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected.set_timesteps(1)
    original = expected.step(prediction, timestep, noise).pred_original_sample
    torch.testing.assert_close(x, original, atol=1e-12, rtol=0)


def test_training_does_not_touch_the_teacher(tiny_teacher: StableDiffusionTeacher) -> None:
    generator = OneStepGenerator.from_teacher(tiny_teacher)
    before = {k: v.clone() for k, v in tiny_teacher.network.state_dict().items()}
    assert all(p.requires_grad for p in generator.parameters())
    assert not any(p.requires_grad for p in tiny_teacher.network.parameters())
    generator(torch.randn(1, 4, 8, 8), tiny_teacher.encode_prompts(["cat"])).square().mean().backward()
    torch.optim.SGD(generator.parameters(), 1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in tiny_teacher.network.state_dict().items())
    assert not torch.equal(generator.network.conv_out.weight, before["conv_out.weight"])


def test_dropout_is_not_trained_with(tiny_teacher: StableDiffusionTeacher) -> None:
    """Its masks would differ after a resume, and between the two evaluations of a finite difference."""
    for module in tiny_teacher.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    noise, condition = torch.randn(1, 4, 8, 8), tiny_teacher.encode_prompts(["a"])
    for config in (GeneratorConfig(), GeneratorConfig(lora_rank=2)):
        student = OneStepGenerator.from_teacher(tiny_teacher, config)
        assert student.network.training
        assert torch.equal(student(noise, condition), student(noise, condition))


def test_last_layers_run_in_float32_under_autocast(tiny_teacher: StableDiffusionTeacher) -> None:
    """Rounding the prediction to bf16 would put 14.6 times its rounding error into x (design.md: 0.024 rms)."""
    generator = OneStepGenerator.from_teacher(tiny_teacher).eval()
    seen: dict[str, torch.dtype] = {}
    for name in ("conv_norm_out", "conv_out"):
        getattr(generator.network, name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = generator(torch.randn(1, 4, 8, 8), tiny_teacher.encode_prompts(["cat"]))
    assert seen == {"conv_norm_out": torch.float32, "conv_out": torch.float32}
    assert x.dtype == torch.float32
    assert set(generator.network.state_dict()) == set(tiny_teacher.network.state_dict())


def test_timestep_outside_the_schedule(tiny_teacher: StableDiffusionTeacher) -> None:
    with pytest.raises(UserError, match="expected 0 to 999"):
        OneStepGenerator.from_teacher(tiny_teacher, GeneratorConfig(timestep=1000))


def test_zero_terminal_snr_needs_v_prediction() -> None:
    """At abar = 0 the noise prediction says nothing of x."""
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline = tiny_pipeline(prediction_type)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        teacher = StableDiffusionTeacher.from_pipeline(pipeline)
        if prediction_type == "epsilon":
            with pytest.raises(UserError, match="abar is"):
                OneStepGenerator.from_teacher(teacher)
        else:
            noise, condition = torch.randn(1, 4, 8, 8), teacher.encode_prompts(["cat"])
            x = OneStepGenerator.from_teacher(teacher)(noise, condition)
            torch.testing.assert_close(x, -teacher.evaluate(noise, torch.tensor(999), condition), atol=1e-3, rtol=0)


def _export(folder: Path, prediction_type: str = "epsilon", seed: int = 3, **schedule: object) -> Path:
    """A student whose weights are not the teacher's."""
    pipeline = tiny_pipeline(prediction_type)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **schedule)
    torch.manual_seed(seed)
    weights = {f"network.{k}": v + 0.02 * torch.randn_like(v) for k, v in pipeline.unet.state_dict().items()}
    export_student(pipeline, weights, 999, folder, {"recipe": "tiny"}, torch.float32)
    return folder


@pytest.fixture
def student_folder(tmp_path: Path) -> Path:
    return _export(tmp_path / "student")


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("thresholding", [False, True])
def test_stock_pipeline_gives_the_same_latents(tmp_path: Path, dtype: str, limit: float, prediction_type: str, thresholding: bool) -> None:
    student_folder = _export(tmp_path / "student", prediction_type, thresholding=thresholding)
    pipeline = StableDiffusionPipeline.from_pretrained(student_folder, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise([7, 8], (4, 8, 8))
    stock = pipeline(
        PROMPTS, num_inference_steps=1, guidance_scale=1, latents=torch.from_numpy(noise).to(getattr(torch, dtype)), output_type="latent"
    ).images
    ours = OneStepPipeline.from_pretrained(student_folder, dtype).latents(PROMPTS, noise)
    assert (ours - stock).abs().max().item() < limit
    # A random network's v is small; its epsilon is divided by sqrt(abar).
    assert ours.std() > (0.1 if prediction_type == "epsilon" else 0.01)


def test_a_picture_depends_on_its_own_seed_and_prompt_alone(student_folder: Path) -> None:
    student = OneStepPipeline.from_pretrained(student_folder)
    together = student.generate(["red", "cat", "sun"], [3, 4, 5], batch_size=2)
    np.testing.assert_array_equal(together[1], student.generate(["cat"], [4])[0])


def test_export_refusals(tmp_path: Path) -> None:
    weights = {f"network.{k}": v for k, v in tiny_pipeline().unet.state_dict().items()}
    with pytest.raises(UserError, match="starts at 999"):
        export_student(tiny_pipeline(), weights, 500, tmp_path / "s", {}, torch.float32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty and no student"):
        export_student(tiny_pipeline(), weights, 999, tmp_path / "mine", {}, torch.float32)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="no student here"):
        OneStepPipeline.from_pretrained(tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_exported_folder_is_ordinary(student_folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(student_folder / "unet")
    assert type(unet.conv_out) is torch.nn.Conv2d
    assert not list(student_folder.rglob("*.bin"))
    assert json.loads((student_folder / STUDENT_FILE).read_text())["timestep"] == 999
    assert "num_inference_steps=1" in (student_folder / "README.md").read_text()


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupted_export_leaves_the_old_student(failing: int, student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its renames the first puts the old student aside, the second the new one in its place."""
    before, rename, calls = tree_digest(student_folder), Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _export(student_folder, seed=4)
    assert tree_digest(student_folder) == before
    assert [p.name for p in student_folder.parent.iterdir()] == ["student"]
    # Killed between the two: nothing put it back, the next export does.
    student_folder.rename(student_folder.with_name(".student.old"))
    with pytest.raises(UserError, match="starts at 999"):
        export_student(tiny_pipeline(), {}, 500, student_folder, {}, torch.float32)
    _export(student_folder, seed=5)
    assert tree_digest(student_folder) != before
    assert [p.name for p in student_folder.parent.iterdir()] == ["student"]


def test_pictures_of_a_damaged_network_are_none(student_folder: Path) -> None:
    student = OneStepPipeline.from_pretrained(student_folder)
    with torch.no_grad():
        student.generator.network.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        student.generate(["cat"], [4])
