"""What only a GPU shows: the same numbers as on the CPU, no waiting for the device, autocast, a compiled graph, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.device import available_memory
from diffusion2gan.discriminator.multi_scale import MultiScaleDiscriminator, score
from diffusion2gan.discriminator.regularization import r1_penalty
from diffusion2gan.evaluation.speed import extra_memory
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.dataset import PairDataset
from diffusion2gan.perceptual import ELatentLPIPS
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.precision import no_tf32
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.run import export_run, train_recipe
from diffusion2gan.teachers.attention import twice_differentiable_attention
from diffusion2gan.teachers.protocol import TextCondition
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.state import checkpoint_path, load_state
from tests.conftest import tiny_pipeline
from tests.helpers import metrics, recipe_values, trained_from_scratch
from tests.perceptual.test_latent_lpips import metric_of

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 32, 32, generator=random), torch.randn(batch, 4, 32, 32, generator=random)


@pytest.mark.parametrize("letters", ["", "b", "bg", "bgco"])
def test_the_loss_is_that_of_the_cpu(letters: str) -> None:
    x0, x1 = _inputs()
    on_cpu = ELatentLPIPS(metric_of(), letters)
    uniform = torch.rand(4, on_cpu.augmentation.N_UNIFORM, generator=torch.Generator().manual_seed(1))
    values, gradients = [], []
    for device in ("cpu", DEVICE):
        loss, a, b = on_cpu.to(device), x0.clone().to(device).requires_grad_(), x1.to(device)
        with no_tf32():
            value = loss(a, b, loss.draw(4, x0.shape[1:], uniform=uniform))
            value.sum().backward()
        assert a.grad is not None
        values.append(value.detach().cpu())
        gradients.append(a.grad.cpu())
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2 * gradients[0].abs().max().item())


def test_the_loss_does_not_wait_for_the_device() -> None:
    """A read-back in every step would keep the GPU idle between kernels."""
    loss, (x0, x1) = ELatentLPIPS(metric_of(), "bgo").to(DEVICE), _inputs()
    x0, x1 = x0.to(DEVICE).requires_grad_(), x1.to(DEVICE)
    drawn = loss.draw(4, x0.shape[1:])
    loss(x0, x1, drawn).sum().backward()  # the first call looks at the values
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(x0, x1, drawn).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_under_autocast_and_compiled(dtype: torch.dtype) -> None:
    loss, (x0, x1) = ELatentLPIPS(metric_of(), "bgo").to(DEVICE), _inputs()
    x0, x1 = x0.to(DEVICE).requires_grad_(), x1.to(DEVICE)
    drawn = loss.draw(4, x0.shape[1:])
    with no_tf32():
        plain = loss(x0, x1, drawn)
        (expected,) = torch.autograd.grad(plain.sum(), x0)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    for act in (loss, compiled):
        with torch.autocast(DEVICE, dtype):
            value = act(x0, x1, drawn)
        (gradient,) = torch.autograd.grad(value.float().sum(), x0)
        torch.testing.assert_close(value.float(), plain, rtol=0.05, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98


def test_pairs_training_and_pictures(tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    """Pairs near those of the stock pipeline; both phases; the student's pictures near those that the CPU draws."""
    adversarial = {"steps": 3, "learning_rate": 1e-4, "discriminator_learning_rate": 1e-4, "r1_every": 2}
    values = recipe_values(tiny_teacher_folder, prompts_file, training__steps=4, training__checkpoint_every=7, adversarial=adversarial)
    trainer = trained_from_scratch(values, tmp_path)
    assert trainer.device.type == DEVICE
    assert all(torch.isfinite(p).all() for p in trainer.bare_generator.parameters())
    assert sum("discriminator_loss" in r for r in metrics(tmp_path / "run")) == 3
    pairs = PairDataset(tmp_path / "store").batch(range(4))
    pipeline = tiny_pipeline().to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(pairs.noise).float().to(DEVICE)
    with no_tf32():
        stock = pipeline(pairs.prompts, num_inference_steps=4, guidance_scale=2.0, latents=noise, output_type="latent").images
    assert (stock.cpu() - torch.from_numpy(pairs.latent).float()).abs().mean() < 2e-3  # float16 in the store
    export_run(tmp_path / "run", tmp_path / "student", "float32")
    with no_tf32():
        on_cpu, here = (
            OneStepPipeline.from_pretrained(tmp_path / "student", "float32", d).generate(["red heart"] * 3, [0, 1, 2]).astype(int)
            for d in ("cpu", DEVICE)
        )
    assert abs(on_cpu - here).max() <= 2


@pytest.mark.parametrize("settings", [{"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "compile": True}, {"ema_on_cpu": True}])
def test_a_run_goes_on(settings: dict[str, object], tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    values = recipe_values(tiny_teacher_folder, prompts_file)
    values["training"] |= settings
    trained_from_scratch(values, tmp_path)
    half = parse_recipe(values | {"training": values["training"] | {"steps": 6}}, "tiny")
    for recipe in (half, parse_recipe(values, "tiny")):
        train_recipe(recipe, tmp_path / "store", tmp_path / "again", progress=False)
    ours, theirs = (load_state(checkpoint_path(tmp_path / run / "checkpoints", 12)) for run in ("again", "run"))
    for name, value in theirs.ema.items():
        torch.testing.assert_close(ours.ema[name], value, rtol=1e-3, atol=1e-4)


def test_phase_2_as_the_recipes_for_one_gpu_have_it(tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    """bf16, compiled, both networks recomputed, exact R1 beside them: D learns to tell, and nothing breaks."""
    adversarial = {"steps": 30, "learning_rate": 1e-4, "discriminator_learning_rate": 1e-3, "r1_every": 4, "r1_count": 2, "warmup_steps": 1}
    values = recipe_values(tiny_teacher_folder, prompts_file, training__steps=0, adversarial=adversarial)
    values["training"] |= {"mixed_precision": "bf16", "compile": True, "log_every": 1}
    values |= {"generator": {"gradient_checkpointing": True}, "discriminator": {"gradient_checkpointing": True}}
    trained_from_scratch(values, tmp_path)
    rows = [row for row in metrics(tmp_path / "run") if "discriminator_loss" in row]
    assert [i for i, row in enumerate(rows) if "r1" in row] == list(range(0, 30, 4))
    assert rows[-1]["discriminator_loss"] < rows[0]["discriminator_loss"]


def test_r1_is_that_of_the_cpu() -> None:
    penalties = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        teacher = StableDiffusionTeacher.from_pipeline(tiny_pipeline())
        d = MultiScaleDiscriminator.from_teacher(teacher)
        with torch.no_grad():
            for p in d.parameters():
                p.add_(0.1 * torch.randn_like(p))
        x, z = (torch.randn(2, 4, 8, 8) for _ in range(2))
        d, x, z, c = d.to(device), x.to(device), z.to(device), TextCondition(torch.randn(2, 8, 16).to(device))
        with no_tf32(), twice_differentiable_attention():
            penalties.append(r1_penalty(lambda of, d=d, z=z, c=c: score(d(of, z, c)), x).detach().cpu())  # type: ignore[misc]
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-3, atol=1e-6)


def test_checkpointing_takes_less_memory() -> None:
    """Forward and backward of a generator; the first call also allocates what stays."""
    taken = []
    for again in (False, True):
        config = GeneratorConfig(gradient_checkpointing=again)
        generator = OneStepGenerator.from_teacher(StableDiffusionTeacher.from_pipeline(tiny_pipeline()), config).to(DEVICE).train()
        noise, text = torch.randn(64, 4, 32, 32, device=DEVICE), TextCondition(torch.randn(64, 8, 16, device=DEVICE))

        def step(g: OneStepGenerator = generator, z: torch.Tensor = noise, c: TextCondition = text) -> None:
            g(z, c).square().mean().backward()

        step()
        taken.append(extra_memory(step, torch.device(DEVICE)))
    assert taken[1] < 0.8 * taken[0]


def test_memory_that_is_there() -> None:
    free, total = torch.cuda.mem_get_info()
    assert 0.9 * free <= available_memory(DEVICE) <= total
