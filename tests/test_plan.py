"""What a plan counts, against numbers counted elsewhere."""

from __future__ import annotations

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import accounting
from diffusion2gan.plan import GPUS, Networks, networks, plan_table, stages
from diffusion2gan.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def sd15() -> Recipe:
    return load_recipe("sd15_cfg3")


@pytest.fixture(scope="module")
def counted(sd15: Recipe) -> Networks:
    return networks(sd15)


def test_flops_and_parameters_of_stable_diffusion(counted: Networks) -> None:
    """2 x multiply-adds of one evaluation at 4 x 64 x 64, of its decoder and of the latent VGG: design figures counted by hand."""
    found = counted
    assert found.generator.flops == pytest.approx(0.803e12, rel=2e-3)
    assert found.generator.parameters == 859_520_964
    assert found.decoder.flops == pytest.approx(2.51e12, rel=3e-3)
    assert found.perceptual is not None and found.perceptual.flops == pytest.approx(0.077e12, rel=3e-3)
    # D is the teacher's network and a little around it.
    assert found.discriminator is not None
    assert 1 < found.discriminator.flops / found.generator.flops < 1.2
    assert 859e6 < found.discriminator.parameters < 900e6


def test_stages_of_the_papers_recipe(sd15: Recipe, counted: Networks) -> None:
    simulate, phase_1, phase_2, pictures = stages(sd15, 8, counted)
    assert simulate.evaluations == 3_000_000 * 50 * 2
    assert simulate.flops == pytest.approx(3e6 * 80.3e12, rel=2e-3)
    assert simulate.disk == pytest.approx(3e6 * 32 * 1024, rel=0.01)
    assert phase_1.evaluations == phase_2.evaluations == 20_000 * 256
    # Forward, backward, and the loss' two forwards and one backward: 2.4 + 0.23 TFLOP an image.
    assert phase_1.flops / phase_1.evaluations == pytest.approx(2.64e12, rel=0.01)
    assert phase_2.flops > 3 * phase_1.flops and phase_2.memory > phase_1.memory
    assert pictures.evaluations == 30_000
    # Table 7's order: distillation alone, then with the GAN, then InstaFlow (183.2).
    a100 = GPUS["a100"]
    ode = sum(s.gpu_days(a100, 0.3) for s in (simulate, phase_1))
    assert ode < ode + phase_2.gpu_days(a100, 0.3) < accounting.gpu_days(accounting.INSTAFLOW[1:])


def test_checkpointing_trades_memory_for_work(sd15: Recipe, counted: Networks) -> None:
    checkpointed = sd15.model_copy(update={"generator": sd15.generator.model_copy(update={"gradient_checkpointing": True})})
    found = networks(checkpointed)
    plain, saving = counted.generator, found.generator
    assert saving.flops == plain.flops
    assert saving.activations < plain.activations / 3
    assert stages(checkpointed, 8, found)[1].flops > stages(sd15, 8, counted)[1].flops


def test_a_lora_takes_less(sd15: Recipe, counted: Networks) -> None:
    changed = {
        "generator": sd15.generator.model_copy(update={"lora_rank": 8}),
        "teacher": sd15.teacher.model_copy(update={"dtype": "bfloat16"}),
    }
    lora = sd15.model_copy(update=changed)
    found = networks(lora)
    assert counted.trained == counted.generator.parameters
    # 8 x (inputs + outputs) of every changed layer: about a hundredth.
    assert 0.002 < found.trained / found.generator.parameters < 0.02
    whole, small = stages(sd15, 8, counted)[1], stages(lora, 8, found)[1]
    saved = 20 * (counted.trained - found.trained)
    assert whole.memory - small.memory == pytest.approx(saved, rel=0.01)
    assert small.disk < whole.disk / 50
    # No gradients of the frozen weights: a third less work in the network itself.
    assert small.flops == pytest.approx(whole.flops - whole.evaluations * counted.generator.flops, rel=1e-6)


def test_pixels() -> None:
    """DDPM's CIFAR-10 network has 35.7 million parameters (Ho et al. 2020), no decoder and no guidance."""
    recipe = load_recipe("cifar10_ddpm")
    found = networks(recipe)
    assert found.generator.parameters == pytest.approx(35.7e6, rel=2e-3)
    assert found.decoder is None
    simulate, phase_1, pictures = stages(recipe, 8, found)
    # Table 6: 35 evaluations a pair, and 76.8 million of the student.
    assert simulate.evaluations == 35 * 500_000
    assert phase_1.evaluations == 150_000 * 512 == 76_800_000
    assert pictures.flops == pytest.approx(30_000 * found.generator.flops)
    assert "cifar10_ddpm on 1 x a100" in plan_table(recipe, "a100", 1, 0.3)


def test_the_table_says_what_is_assumed() -> None:
    text = plan_table(load_recipe("emoji"), "rtx4090", 1, 0.3)
    assert "89,600" in text and "25,600" in text and "an assumption" in text
    assert "does not fit" in plan_table(load_recipe("sd15_cfg3_single_gpu"), "rtx4090", 1, 0.3)


def test_what_cannot_be_planned_is_said(sd15: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--gpu tpu, expected one of a100-40gb"):
        plan_table(sd15, "tpu", 1, 0.3)
    with pytest.raises(UserError, match="utilisation 2"):
        plan_table(sd15, "h100", 1, 2.0)
    with pytest.raises(UserError, match="expected a multiple of processes x micro_batch_size"):
        stages(sd15, 7)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unknown = sd15.model_copy(update={"teacher": sd15.teacher.model_copy(update={"source": "nobody/nothing"})})
    with pytest.raises(UserError, match="its sizes are not known here"):
        networks(unknown)
