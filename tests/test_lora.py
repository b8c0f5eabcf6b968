"""Students that are low-rank changes of their teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from diffusion2gan.cli import main
from diffusion2gan.ema import load_trained, trained_state
from diffusion2gan.errors import UserError
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.recipe import Recipe, parse_recipe
from diffusion2gan.run import generator_weights, load_start, simulate_recipe, train_recipe
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.state import checkpoints, load_state
from tests.conftest import tiny_pixel_pipeline
from tests.helpers import compiled_whole, metrics, recipe_values, tree_digest

PROMPTS = ["red heart", "blue cat"]


def _recipe(teacher: Path, prompts: Path, **generator: Any) -> Recipe:
    values = recipe_values(teacher, prompts, generator={"lora_rank": 4} | generator)
    values["training"] |= {"learning_rate": 1e-2, "validate_every": 3, "ema_decay": 0.7}
    return parse_recipe(values, "lora")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> Path:
    """A store, and a finished LoRA run on it."""
    root = tmp_path_factory.mktemp("lora")
    recipe = _recipe(tiny_teacher_folder, prompts_file)
    simulate_recipe(recipe, root / "store", progress=False)
    train_recipe(recipe, root / "store", root / "run", progress=False)
    return root


def test_it_starts_as_the_teacher_and_little_of_it_is_trained(tiny_teacher: StableDiffusionTeacher) -> None:
    generator = OneStepGenerator.from_teacher(tiny_teacher, GeneratorConfig(lora_rank=2))
    whole = OneStepGenerator.from_teacher(tiny_teacher)
    noise = torch.from_numpy(draw_noise([1, 2], tiny_teacher.latent_shape))
    condition = tiny_teacher.encode_prompts(PROMPTS)
    torch.testing.assert_close(generator(noise, condition), whole(noise, condition))
    names = {n for n, p in generator.named_parameters() if p.requires_grad}
    assert names == trained_state(generator).keys()
    assert all("lora_" in n for n in names)
    parts = {"attn1.to_q", "attn2.to_k", "to_out.0", "ff.net.2", "conv1", "time_emb_proj", "proj_in"}
    assert all(any(part in n for n in names) for part in parts)
    assert not any(p.requires_grad for p in tiny_teacher.network.parameters())


def test_frozen_weights_keep_the_teachers_precision(tiny_teacher: StableDiffusionTeacher) -> None:
    torch.nn.Module.to(tiny_teacher.network, torch.bfloat16)
    generator = OneStepGenerator.from_teacher(tiny_teacher, GeneratorConfig(lora_rank=2))
    dtypes = {p.requires_grad: p.dtype for p in generator.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    noise = torch.from_numpy(draw_noise([1, 2], tiny_teacher.latent_shape))
    x = generator(noise, tiny_teacher.encode_prompts(PROMPTS))
    assert x.dtype == torch.float32
    x.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in generator.parameters() if p.requires_grad)


def test_compiled_it_is_one_graph_and_learns_the_same(
    root: Path, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compiled_whole(monkeypatch)
    recipe = _recipe(tiny_teacher_folder, prompts_file)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"compile": True})})
    train_recipe(recipe, root / "store", tmp_path, progress=False)
    assert compiled == [OneStepGenerator]
    plain, ours = (load_state(checkpoints(run / "checkpoints")[-1]).model for run in (root / "run", tmp_path))
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-3)


def test_a_run_learns_and_keeps_the_changes_alone(root: Path) -> None:
    losses = [r["validation_loss"] for r in metrics(root / "run") if "validation_loss" in r]
    assert losses[-1] < 0.95 * losses[0]
    state = load_state(checkpoints(root / "run" / "checkpoints")[-1])
    assert state.model.keys() == state.ema.keys()
    assert all("lora_" in k for k in state.model)


def test_resume_equals_an_unbroken_run(root: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    recipe = _recipe(tiny_teacher_folder, prompts_file)
    steps = iter(range(100))
    train_recipe(recipe, root / "store", root / "broken", progress=False, deadline=lambda: next(steps) >= 5)
    assert load_state(checkpoints(root / "broken" / "checkpoints")[-1]).step < 12
    train_recipe(recipe, root / "store", root / "broken", progress=False)
    ours, theirs = (load_state(checkpoints(root / n / "checkpoints")[-1]) for n in ("broken", "run"))
    assert ours.step == theirs.step == 12
    for part in ("model", "ema"):
        assert all(torch.equal(v, getattr(theirs, part)[k]) for k, v in getattr(ours, part).items())


def test_every_form_of_export_draws_the_same(root: Path, tiny_teacher_folder: Path, tiny_teacher: StableDiffusionTeacher) -> None:
    for kind, name in (("folder", "student"), ("lora", "changes"), ("single-file", "one.safetensors")):
        assert main(["export", str(root / "run"), str(root / name), "--format", kind, "--dtype", "float32"]) == 0
    noise = draw_noise([1, 2], tiny_teacher.latent_shape)
    generator = OneStepGenerator.from_teacher(tiny_teacher, GeneratorConfig(lora_rank=4)).eval()
    load_trained(generator, load_state(checkpoints(root / "run" / "checkpoints")[-1]).ema)
    with torch.no_grad():
        expected = generator(torch.from_numpy(noise), tiny_teacher.encode_prompts(PROMPTS))
        untrained = OneStepGenerator.from_teacher(tiny_teacher).eval()(torch.from_numpy(noise), tiny_teacher.encode_prompts(PROMPTS))
    assert (expected - untrained).abs().max() > 0.1
    fused = OneStepPipeline.from_pretrained(root / "student", "float32").latents(PROMPTS, noise)
    torch.testing.assert_close(fused, expected, atol=1e-3, rtol=1e-4)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_folder)
    pipeline.load_lora_weights(root / "changes")
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1, latents=torch.from_numpy(noise), output_type="latent").images
    torch.testing.assert_close(stock, expected, atol=1e-3, rtol=1e-4)
    one = load_file(root / "one.safetensors")
    student = StableDiffusionPipeline.from_pretrained(root / "student")
    assert torch.equal(
        one["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"], student.unet.down_blocks[0].resnets[0].conv1.weight
    )
    assert "load_lora_weights" in (root / "changes" / "README.md").read_text()
    with pytest.raises(UserError, match="a LoRA, not a whole student"):
        OneStepPipeline.from_pretrained(root / "changes")


def test_a_lora_may_start_from_a_student(root: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    assert main(["export", str(root / "run"), str(root / "first"), "--dtype", "float32"]) == 0
    recipe = _recipe(tiny_teacher_folder, prompts_file, start=str(root / "first"))
    teacher = load_teacher(recipe.teacher)
    generator = OneStepGenerator.from_teacher(teacher, recipe.generator)
    load_start(generator, generator_weights(root / "first", recipe), recipe.generator)
    noise = draw_noise([1, 2], teacher.latent_shape)
    with torch.no_grad():
        ours = generator(torch.from_numpy(noise), teacher.encode_prompts(PROMPTS))
    first = OneStepPipeline.from_pretrained(root / "first", "float32").latents(PROMPTS, noise)
    torch.testing.assert_close(ours, first, atol=1e-4, rtol=1e-5)
    trainer = train_recipe(recipe, root / "store", root / "second", progress=False)
    assert trainer.step == 12
    # The second LoRA's student holds both: the first one's in the weights that it froze.
    assert main(["export", str(root / "second"), str(root / "both"), "--dtype", "float32"]) == 0
    both = OneStepPipeline.from_pretrained(root / "both", "float32").latents(PROMPTS, noise)
    with trainer.ema.applied_to(trainer.bare_generator), torch.no_grad():
        torch.testing.assert_close(
            both, trainer.bare_generator(torch.from_numpy(noise), teacher.encode_prompts(PROMPTS)), atol=1e-3, rtol=1e-4
        )


def test_a_run_with_a_start_goes_on_from_its_own_frozen_weights(
    root: Path, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    assert main(["export", str(root / "run"), str(tmp_path / "start"), "--dtype", "float32"]) == 0
    recipe = _recipe(tiny_teacher_folder, prompts_file, start=str(tmp_path / "start"))
    unbroken = train_recipe(recipe, root / "store", tmp_path / "unbroken", progress=False)
    steps = iter(range(100))
    train_recipe(recipe, root / "store", tmp_path / "broken", progress=False, deadline=lambda: next(steps) >= 4)
    resumed = train_recipe(recipe, root / "store", tmp_path / "broken", progress=False)
    ours, theirs = resumed.bare_generator.state_dict(), unbroken.bare_generator.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    # Without those weights there is nothing to go on from.
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(UserError, match="no such folder"):
        train_recipe(recipe, root / "store", tmp_path / "broken", progress=False)


def test_with_a_discriminator_checkpointing_and_half_precision(
    root: Path, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """All that a small GPU would have at once; the export is what was trained, on the weights as bfloat16 has them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the fixture's run may have left its precision
    values = _recipe(tiny_teacher_folder, prompts_file, gradient_checkpointing=True, lora_alpha=8).model_dump(mode="json")
    values["teacher"]["dtype"] = "bfloat16"
    values["pairs"]["precision"] = "bfloat16"
    values["training"] |= {"steps": 4, "mixed_precision": "bf16"}
    values["adversarial"] = {"steps": 4, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3, "r1_every": 2}
    recipe = parse_recipe(values, "small")
    simulate_recipe(recipe, tmp_path / "store", progress=False)
    trainer = train_recipe(recipe, tmp_path / "store", tmp_path / "run", progress=False)
    assert trainer.step == 8
    assert all("lora_" in k for k in trainer.ema.state)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "student"), "--dtype", "float32"]) == 0
    student = OneStepPipeline.from_pretrained(tmp_path / "student", "float32")
    base = load_teacher(recipe.teacher).network.state_dict()["conv_in.weight"]
    assert base.dtype == torch.bfloat16
    assert torch.equal(student.generator.network.conv_in.weight, base.float())
    noise = draw_noise([1, 2], (4, 8, 8))
    generator = trainer.bare_generator
    with trainer.ema.applied_to(generator), torch.no_grad():
        # In float32 all of it, which the frozen weights fit into exactly; the prompts as the student's own encoder reads them.
        torch.nn.Module.to(generator, torch.float32)
        # Not the trainer's: its own calls have autocast.
        expected = OneStepGenerator.around(generator.network, trainer.teacher, 999)(
            torch.from_numpy(noise), student.teacher.encode_prompts(PROMPTS)
        )
        torch.testing.assert_close(student.latents(PROMPTS, noise), expected, atol=2e-3, rtol=1e-3)
    # Who follows the card of its LoRA gets the same student, not its changes on weights that they were not made for.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "changes"), "--format", "lora", "--dtype", "float32"]) == 0
    card = (tmp_path / "changes" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("\n```")[0]
    code = code.replace("this folder", str(tmp_path / "changes")).replace("the teacher", str(tiny_teacher_folder))
    names: dict[str, Any] = {}
    exec(code.rpartition("\n")[0], names)
    pipeline = names["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(PROMPTS, num_inference_steps=1, guidance_scale=1, latents=torch.from_numpy(noise), output_type="latent").images
    torch.testing.assert_close(stock, student.latents(PROMPTS, noise), atol=2e-3, rtol=1e-3)


def test_refusals(root: Path, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"generator.lora_rank is 2: UNet2DModel takes no LoRA"):
        OneStepGenerator.from_teacher(PixelTeacher.from_pipeline(tiny_pixel_pipeline()), GeneratorConfig(lora_rank=2))
    with pytest.raises(UserError, match=r"trained a LoRA; export its student and name that folder"):
        train_recipe(_recipe(tiny_teacher_folder, prompts_file, start=str(root / "run")), root / "store", tmp_path / "r", progress=False)
    with pytest.raises(UserError, match=r"generator.lora_rank is 4 there and 8 now"):
        train_recipe(_recipe(tiny_teacher_folder, prompts_file, lora_rank=8), root / "store", root / "run", progress=False)
    whole = parse_recipe(recipe_values(tiny_teacher_folder, prompts_file, training__steps=1), "whole")
    train_recipe(whole, root / "store", tmp_path / "whole", progress=False)
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "x"), "--format", "lora"]) == 2
    assert "no LoRA was trained here" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    assert main(["export", str(root / "run"), str(tmp_path / "mine"), "--format", "lora"]) == 2
    (tmp_path / "file").write_text("keep me")
    assert main(["export", str(root / "run"), str(tmp_path / "file")]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert main(["export", str(root / "run"), str(tmp_path / "mine"), "--format", "lora"]) == 2
    assert "not empty and no LoRA" in capsys.readouterr().err
    # Another tool's folder: its weights have the same file name.
    (tmp_path / "mine" / "pytorch_lora_weights.safetensors").write_bytes(b"another's")
    assert main(["export", str(root / "run"), str(tmp_path / "mine"), "--format", "lora"]) == 2
    assert "not empty and no LoRA of ours" in capsys.readouterr().err
    # And one of ours to which something was added.
    for _ in range(2):
        assert main(["export", str(root / "run"), str(tmp_path / "ours"), "--format", "lora"]) == 0
    (tmp_path / "ours" / "notes").mkdir()
    before = tree_digest(tmp_path / "ours")
    assert main(["export", str(root / "run"), str(tmp_path / "ours"), "--format", "lora"]) == 2
    assert "would be replaced by a folder without notes" in capsys.readouterr().err
    assert tree_digest(tmp_path / "ours") == before
    half = recipe_values(tiny_teacher_folder, prompts_file, generator={"lora_rank": 4}, teacher__dtype="float16")
    with pytest.raises(UserError, match="teacher.dtype is float16 with generator.lora_rank, expected bfloat16 or float32"):
        parse_recipe(half, "half")
    with pytest.raises(KeyError, match="do not belong to this network, or are missing"):
        load_trained(
            OneStepGenerator.from_teacher(StableDiffusionTeacher.from_pipeline(_tiny())), {"network.conv_in.weight": torch.zeros(1)}
        )


def _tiny() -> Any:
    from tests.conftest import tiny_pipeline

    return tiny_pipeline()


def test_a_start_that_has_changed(
    root: Path, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(root / "run"), str(tmp_path / "start"), "--dtype", "float32"]) == 0
    recipe = _recipe(tiny_teacher_folder, prompts_file, start=str(tmp_path / "start"))
    train_recipe(recipe, root / "store", tmp_path / "run", progress=False)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "x"), "--format", "lora"]) == 2
    assert "not the teacher; export a folder" in capsys.readouterr().err
    assert main(["export", str(root / "run"), str(tmp_path / "start"), "--last", "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "x")]) == 2
    assert "started from other weights" in capsys.readouterr().err
