"""What a plan counts, against numbers counted elsewhere."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import HTTPError
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion2gan import plan
from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import accounting
from diffusion2gan.evaluation.models import ModelOptions
from diffusion2gan.plan import GPUS, TEXT_PARAMETERS, Cost, Networks, measure, networks, plan_table, stages
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.run import simulate_recipe, train_recipe
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import PUBLISHED
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline, tiny_sdxl_pipeline
from tests.helpers import recipe_values


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


def test_days_of_table_7(sd15: Recipe, counted: Networks) -> None:
    """36.0 A100-days of ODE distillation, 43.6 with the GAN, 183.2 of InstaFlow: what the plan has at 26 % of the matrix rate."""
    simulate, phase_1, phase_2, _ = (s.gpu_days(GPUS["a100"], 0.26) for s in stages(sd15, 8, counted))
    distilled = simulate + phase_1
    assert distilled / 36.0 == pytest.approx(1, abs=0.03)
    assert (distilled + phase_2) / 43.6 == pytest.approx(1, abs=0.03)
    assert accounting.gpu_days(accounting.INSTAFLOW[1:]) / (distilled + phase_2) == pytest.approx(183.2 / 43.6, rel=0.03)


def test_checkpointing_trades_memory_for_work(sd15: Recipe, counted: Networks) -> None:
    of = {"generator": {"gradient_checkpointing": True}, "discriminator": {"gradient_checkpointing": True}, "adversarial": {"r1": "none"}}
    checkpointed = sd15.model_copy(update={k: getattr(sd15, k).model_copy(update=v) for k, v in of.items()})
    found = networks(checkpointed)
    for plain, saving in ((counted.generator, found.generator), (counted.discriminator, found.discriminator)):
        assert plain is not None and saving is not None
        assert (saving.flops, saving.alive) == (plain.flops, plain.alive)
        assert saving.kept < plain.kept / 3
    before, now = stages(sd15, 8, counted), stages(checkpointed, 8, found)
    # One forward more of G; of D three, of real and fake latents and again in G's step.
    images, again = now[2].evaluations, counted.generator.flops
    assert now[1].flops - before[1].flops == pytest.approx(images * again)
    assert now[2].flops - before[2].flops == pytest.approx(images * (again + 3 * counted.discriminator.flops))
    # The ODE is solved without either.
    assert now[0].memory == before[0].memory


class _CudaNorms(TorchFunctionMode):
    """Norms in float32 under autocast, as on a GPU; the CPU's autocast leaves them in bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.group_norm, F.layer_norm):
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        with torch.autocast("cpu", enabled=False):
            return func(*wide, **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in (kwargs or {}).items()})


def test_what_autocast_keeps_of_a_network_that_is_not_compiled(sd15: Recipe, counted: Networks) -> None:
    """The difference of two samples and one, which leaves the weights' copies out."""
    configuration = plan._configuration(sd15.teacher, "unet")
    found = []
    for batch in (1, 2):
        with plan._shapes_alone(torch.float32):
            unet = UNet2DConditionModel.from_config(configuration)
            inputs = torch.empty(batch, *counted.latent), torch.empty((), dtype=torch.int64), plan._condition(configuration).expand(batch)
            with torch.autocast("cpu", torch.bfloat16), _CudaNorms():
                found.append(plan._kept(unet, partial(plan._evaluate, *inputs)))
    assert (found[1] - found[0]) / counted.generator.kept == pytest.approx(plan._EAGER, rel=0.02)


def test_a_lora_takes_less(sd15: Recipe, counted: Networks) -> None:
    changed = {
        "generator": sd15.generator.model_copy(update={"lora_rank": 8}),
        "teacher": sd15.teacher.model_copy(update={"dtype": "bfloat16"}),
        "adversarial": None,
    }
    lora = sd15.model_copy(update=changed)
    found = networks(lora)
    assert counted.trained == counted.generator.parameters
    # 8 x (inputs + outputs) of every changed layer: about a hundredth.
    assert 0.002 < found.trained / found.generator.parameters < 0.02
    whole, small = stages(sd15, 8, replace(counted, discriminator=None))[1], stages(lora, 8, found)[1]
    # A frozen copy of the teacher's network, text encoders and autoencoder are in half precision.
    saved = (24 + 2) * (counted.trained - found.trained) - 2 * counted.trained + (4 - 2) * counted.encoders
    assert whole.memory - small.memory == pytest.approx(saved, rel=1e-6)
    assert small.disk < whole.disk / 50
    # No gradients of the frozen weights: a third less work in the network itself.
    assert small.flops == pytest.approx(whole.flops - whole.evaluations * counted.generator.flops, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "saved"),
    # Of 4 for weights, 4 for gradients, 4 for DDP's buckets, 8 for moments and 4 for the average; ZeRO has buckets of a fixed size, and
    # another 4 of weights beside the moments.
    [
        ({"shard": True}, 4 + 20 * 7 / 8),
        ({"zero": 1}, 4 + 8 - (8 + 4) / 8),
        ({"zero": 2}, 4 + 8 + 4 * 7 / 8 - (8 + 4) / 8),
        ({"zero": 2, "zero_offload": True}, 4 + 8 + 4 * 7 / 8),
        ({"optimizer": "adamw_8bit"}, 6),
        ({"ema_on_cpu": True}, 4),
    ],
)
def test_bytes_a_parameter_on_eight_gpus(changes: dict[str, object], saved: float, sd15: Recipe, counted: Networks) -> None:
    changed = sd15.model_copy(update={"training": sd15.training.model_copy(update=changes)})
    alone = replace(counted, discriminator=None)
    less = stages(sd15, 8, alone)[1].memory - stages(changed, 8, alone)[1].memory
    assert less == pytest.approx(saved * counted.trained)


# --- Of costs that are easily added up --------------------------------------------------------------------------------
def _plain(recipe: Recipe, **changes: object) -> Networks:
    """Networks whose parameters take nothing and whose activations differ by powers of ten."""
    d = Cost(1.0, 0, 1000, 0) if recipe.adversarial else None
    return replace(Networks(Cost(1.0, 0, 10, 0), d, Cost(1.0, 0, 1, 0), None, (4, 8, 8), 0, 0, 100_000), **changes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # D's step: G's graph waits for its own, D reads real and fake, R1 2 samples.
        ([], 32 * 10 + 2 * 32 * 1000 + 2 * 100_000),
        # Of several micro-batches none waits; each has one sample of R1 at most.
        (["training.micro_batch_size=4"], 2 * 4 * 1000 + 100_000),
        (["training.mixed_precision=no", "training.micro_batch_size=4"], 2 * (2 * 4 * 1000) + 100_000),
        # Not compiled, autocast's norms keep float32; with checkpointing little is kept either way.
        (["training.micro_batch_size=4", "training.compile=false"], 4 / 3 * 2 * 4 * 1000 + 100_000),
        (
            ["training.micro_batch_size=4", "training.compile=false", "discriminator.gradient_checkpointing=true"],
            2 * 4 * 1000 + 100_000,
        ),
    ],
)
def test_memory_of_ds_step(settings: list[str], expected: float) -> None:
    recipe = load_recipe("emoji", settings)
    assert stages(recipe, 1, _plain(recipe))[2].memory == pytest.approx(expected)


def test_memory_of_gs_step() -> None:
    recipe = load_recipe("emoji", ["training.micro_batch_size=4"])
    heavy = _plain(recipe, perceptual=Cost(1.0, 0, 10_000_000, 0))
    _, phase_1, phase_2, _ = stages(recipe, 1, heavy)
    assert (phase_1.memory, phase_2.memory) == (4 * (10 + 10_000_000), 4 * (10 + 10_000_000 + 1000))


def test_only_one_of_both_networks_has_gradients_at_a_time() -> None:
    """And both have weights and moments; autocast has copies of the weights that are at work."""
    recipe = load_recipe("emoji", ["training.micro_batch_size=4"])
    both = replace(
        _plain(recipe, trained=1000), generator=Cost(1.0, 1000, 0, 0), discriminator=Cost(1.0, 1000, 0, 0), perceptual=None, penalty=0
    )
    _, phase_1, phase_2, _ = stages(recipe, 1, both)
    assert phase_2.memory == (4 + 8 + 4) * 1000 + (4 + 8) * 1000 + 4 * 1000 + 2 * 2 * 1000
    # Before its phase D has neither moments nor work.
    assert phase_1.memory == (4 + 8 + 4) * 1000 + 4 * 1000 + 4 * 1000 + 2 * 1000


def test_memory_of_lpips_through_the_decoder() -> None:
    recipe = load_recipe("ablations/lpips")
    decoder = Cost(100.0, 0, 100, 0)
    phase_1 = stages(recipe, 1, _plain(recipe, decoder=decoder))[1]
    assert phase_1.memory == 64 * (10 + 1 + 100)
    assert phase_1.flops == phase_1.evaluations * (3 * 1 + 3 * (1 + 100))


def test_each_draw_of_an_ensemble_costs_as_much() -> None:
    perceptual = Cost(100.0, 0, 1000, 0)
    one, four = (
        stages(r, 1, _plain(r, perceptual=perceptual))[1]
        for r in map(load_recipe, ("ablations/e_latent_lpips", "ablations/e_latent_lpips_4_draws"))
    )
    assert four.flops - one.flops == 3 * 3 * 100 * one.evaluations
    assert four.memory - one.memory == 3 * 64 * 1000


def test_memory_of_the_pictures_in_training() -> None:
    """Where a step takes less than decoding in float32, beside a second set of weights."""
    recipe = load_recipe("emoji", ["training.micro_batch_size=2", "training.sample_count=8"])
    n = _plain(recipe, trained=1000, decoder=Cost(1.0, 0, 0, 10**9))
    assert stages(recipe, 1, n)[1].memory == (4 + 8 + 4) * 1000 + 4 * 1000 + 2 * 2 * 10**9


def test_what_simulate_keeps() -> None:
    """The whole teacher; its network in the precision that it solves in, or while it is loaded in its own."""
    recipe = load_recipe("emoji", ["teacher.dtype=bfloat16"])
    n = _plain(recipe, generator=Cost(1.0, 1000, 0, 10), encoders=300)
    guided = 2 * 64 * 10

    def kept(**changes: object) -> float:
        return stages(recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update=changes)}), 1, n)[0].memory

    assert kept(precision="bfloat16", compile=True) == 2 * 1300 + guided
    assert kept(precision=None, compile=False) == 2 * 1300 + guided
    assert kept(precision="float32", compile=False) == 2 * 300 + 4 * 1000 + 2 * guided
    assert kept(precision="bfloat16", batch_size=1) == 2 * 1300 + 2 * 10


def test_what_is_alive_at_once() -> None:
    """Of a chain of layers no more than one's input and output; of a skip connection what waits for its end."""
    x, layers = torch.zeros(1, 1000), torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(5)])

    def skipped(network: torch.nn.Module) -> torch.Tensor:
        start = x.neg()
        return network(start) + start

    assert measure(layers, lambda n: n(x)).alive == 2 * 4000
    assert measure(layers, skipped).alive == 3 * 4000


def test_gs_latents_are_computed_once_more_for_several_micro_batches() -> None:
    of_one, of_many = (load_recipe("emoji", [f"training.micro_batch_size={n}"]) for n in (32, 4))
    n = _plain(of_one, generator=Cost(1.0, 0, 0, 0), discriminator=Cost(0.0, 0, 0, 0))
    whole, split = stages(of_one, 1, n)[2], stages(of_many, 1, n)[2]
    assert split.flops - whole.flops == whole.evaluations


_SPLIT = ["training.shard=true", "training.compile=false", "adversarial.r1=finite_difference"]


@pytest.mark.parametrize(
    ("settings", "g", "d"),
    # Rounds of all parameters of G and of D a step of phase 2, on two GPUs in batches of 32.
    [
        ([], 2, 2),
        (["training.micro_batch_size=4"], 2, 2),
        # Weights for forward and backward, then gradients; D in both steps. Of several micro-batches G's weights once more.
        (_SPLIT, 3, 6),
        ([*_SPLIT, "training.micro_batch_size=4"], 4 * (3 + 1), 4 * 6),
    ],
)
def test_what_gpus_exchange(settings: list[str], g: int, d: int) -> None:
    recipe = load_recipe("emoji", settings)
    n = _plain(recipe, trained=1000, discriminator=Cost(1.0, 100, 0, 0))
    simulate, _, phase_2, pictures = stages(recipe, 2, n)
    assert phase_2.exchanged == 2000 * 4 * (g * 1000 + d * 100) / 2
    assert simulate.exchanged == pictures.exchanged == stages(recipe, 1, n)[2].exchanged == 0


def test_what_gpus_exchange_with_zero() -> None:
    recipe = load_recipe("emoji", ["adversarial=null", "training.zero=2", "training.compile=false", "training.micro_batch_size=8"])
    # Gradients of every one of four micro-batches, then the weights.
    assert stages(recipe, 2, _plain(recipe, trained=1000))[1].exchanged == 16000 * 4 * 5 * 1000 / 2


def test_an_exchange_takes_time() -> None:
    """Within a node by its links, beyond it by the network too, and nothing is computed meanwhile."""
    recipe = load_recipe("emoji")
    n = _plain(recipe, trained=10**9)
    for gpus, rate in ((8, 450e9), (16, 400e9)):
        s = stages(recipe, gpus, n)[1]
        seconds = 16000 * 2 * (gpus - 1) / gpus * 4e9 / rate
        assert s.exchange_days(GPUS["h100"]) == pytest.approx(gpus * seconds / 86_400)
        assert s.gpu_days(GPUS["h100"], 0.3) == s.arithmetic_days(GPUS["h100"], 0.3) + s.exchange_days(GPUS["h100"])
    alone = stages(recipe, 1, n)[1]
    assert alone.gpu_days(GPUS["h100"], 0.3) == alone.arithmetic_days(GPUS["h100"], 0.3)


# --- Of small real networks -------------------------------------------------------------------------------------------
def test_a_discriminator_from_scratch_is_counted(tiny_teacher_folder: Path) -> None:
    settings = [f"teacher.source={tiny_teacher_folder}", "loss.distance=mse"]
    recipe, without = load_recipe("table2/scratch", settings), load_recipe("table2/regression", settings)
    found = networks(recipe)
    real = build_discriminator(recipe.discriminator, StableDiffusionTeacher.from_pipeline(tiny_pipeline()))
    d = found.discriminator
    assert d is not None and d.flops > 0
    assert d.parameters == sum(p.numel() for p in real.parameters())
    phase_2 = stages(recipe, 1, found)[2]
    # Three times real and fake, and forward and backward to the latent in G's step.
    assert phase_2.flops - stages(without, 1, replace(found, discriminator=None))[2].flops == pytest.approx(
        phase_2.evaluations * 8 * d.flops
    )


def test_r1_keeps_more_than_the_step(tiny_teacher_folder: Path) -> None:
    settings = [f"teacher.source={tiny_teacher_folder}", "loss.distance=mse"]
    difference, exact = (networks(load_recipe("emoji", [*settings, f"adversarial.r1={r1}"])) for r1 in ("finite_difference", "exact"))
    d = exact.discriminator
    assert d is not None
    # Twice a forward in twice the bits; a double backward has the backward's numbers and every attention's scores besides.
    assert difference.penalty == 4 * d.kept < exact.penalty


def test_text_encoders_and_autoencoder_stay_loaded(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    one, two = tiny_pipeline(), tiny_sdxl_pipeline()
    two.save_pretrained(tmp_path)
    for family, folder, parts in (
        ("stable_diffusion", tiny_teacher_folder, (one.text_encoder, one.vae)),
        ("sdxl", tmp_path, (two.text_encoder, two.text_encoder_2, two.vae)),
    ):
        recipe = load_recipe("emoji", [f"teacher.source={folder}", f"teacher.family={family}", "loss.distance=mse", "adversarial=null"])
        found = networks(recipe)
        assert found.encoders == sum(p.numel() for part in parts for p in part.parameters())
        kept = stages(recipe, 1, found)[1].memory - stages(recipe, 1, replace(found, encoders=0))[1].memory
        assert kept == pytest.approx(4 * found.encoders)


def test_published_text_encoders() -> None:
    """Counted from their configurations: 123.06 M (CLIP ViT-L/14), 340.39 M (OpenCLIP ViT-H/14), 694.66 M (ViT-bigG/14)."""
    with torch.device("meta"):
        base = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        huge = CLIPTextModel(CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16))
        giant = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        )
    counts = [sum(p.numel() for p in model.parameters()) for model in (base, huge, giant)]
    assert list(TEXT_PARAMETERS.values()) == [counts[0], counts[1], counts[1], counts[0] + counts[2]]
    assert TEXT_PARAMETERS.keys() <= PUBLISHED.keys()


def test_what_stays_loaded_of_stable_diffusion(counted: Networks) -> None:
    assert counted.encoders == pytest.approx(123.06e6 + 83.65e6, rel=1e-4)


def test_another_resolution(tiny_teacher_folder: Path) -> None:
    settings = [f"teacher.source={tiny_teacher_folder}", "loss.distance=mse", "adversarial=null"]
    own, larger = (networks(load_recipe("emoji", [*settings, *more])) for more in ([], ["teacher.resolution=32"]))
    assert own.latent == (4, 8, 8) and larger.latent == (4, 16, 16)
    assert larger.generator.flops > 3.5 * own.generator.flops


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


def test_the_table_says_what_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("emoji")
    n = _plain(recipe)
    monkeypatch.setattr("diffusion2gan.plan.networks", lambda _: n)
    text = plan_table(recipe, "rtx4090", 2, 0.3)
    assert "1,024,000" in text and "64,000" in text and "assumptions" in text
    assert "exchanged at 32 GB/s each way, none of it during the arithmetic" in text
    assert "does not fit" not in text and "| exchange |" not in text
    n = _plain(recipe, trained=10**10)
    text = plan_table(recipe, "rtx4090", 2, 0.3)
    assert "does not fit" in text and text.count("| exchange |") == 2


def test_the_table_stands_below_what_matters_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion2gan.plan.networks", lambda recipe: _plain(recipe))
    text = plan_table(load_recipe("emoji", ["training.steps=77"]), "h100", 1, 0.3)
    above = text[: text.index("| stage")]
    for line in (
        "    pairs: {count: 192000, ode: {solver: unipc, steps: 8, ",
        "    loss: {distance: e_latent_lpips, ",
        "    training: {steps: 77, batch_size: 64, ",
        "    adversarial: {steps: 2000, batch_size: 32, weight: 0.5, ",
        "    discriminator: {kind: diffusion, ",
    ):
        assert f"\n{line}" in above
    assert "discriminator:" not in plan_table(load_recipe("ablations/mse"), "h100", 1, 0.3)


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


def test_too_little_memory_is_said_before_the_start(
    tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(tiny_teacher_folder, prompts_file)
    written_recipe = tmp_path / "recipe.yaml"
    written_recipe.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(written_recipe))
    n = networks(recipe)
    simulated, trained = plan._simulate(recipe, 1, n).memory, max(s.memory for s in stages(recipe, 1, n)[1:-1])

    def has(memory: float) -> None:
        monkeypatch.setattr(plan, "available_memory", lambda _device: memory)

    has(simulated / 2)
    with pytest.raises(UserError, match=r"simulate of \w+ needs about .* GiB, and this CPU has .* GiB for it; lower pairs.batch_size"):
        simulate_recipe(recipe, tmp_path / "pairs", progress=False)
    assert not (tmp_path / "pairs").exists()
    monkeypatch.setenv(plan.IGNORE_MEMORY, "1")
    with pytest.warns(UserWarning, match="it may run out"):
        plan.check_memory(recipe, "simulate", torch.nn.Linear(1000, 1000), 1, torch.device("cpu"))
    monkeypatch.delenv(plan.IGNORE_MEMORY)
    has(simulated)
    with pytest.warns(UserWarning, match="simulate of .* it may run out; lower pairs.batch_size"):
        simulate_recipe(recipe, tmp_path / "pairs", progress=False)
    has(trained / 2)
    with pytest.raises(UserError, match=r"phase \d of .* needs about .*; lower training.micro_batch_size"):
        train_recipe(recipe, tmp_path / "pairs", tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    has(2 * trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_recipe(recipe, tmp_path / "pairs", tmp_path / "run", progress=False)
    # What is done needs nothing more.
    has(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate_recipe(recipe, tmp_path / "pairs", progress=False)
        train_recipe(recipe, tmp_path / "pairs", tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        (
            [],
            1,
            "lower training.micro_batch_size, or set adversarial.r1=finite_difference or generator.gradient_checkpointing=true or "
            "training.optimizer=adamw_8bit or training.ema_on_cpu=true or generator.lora_rank=64",
        ),
        (
            ["generator.gradient_checkpointing=true", "training.optimizer=adamw_8bit", "training.micro_batch_size=1"],
            1,
            "set adversarial.r1=finite_difference or training.ema_on_cpu=true or generator.lora_rank=64",
        ),
        (
            ["generator.gradient_checkpointing=true", "training.zero=1", "adversarial=null"],
            8,
            "lower training.micro_batch_size, or set training.ema_on_cpu=true",
        ),
        (
            [
                "generator.gradient_checkpointing=true",
                "generator.lora_rank=4",
                "training.optimizer=adamw_8bit",
                "training.ema_on_cpu=true",
                "adversarial=null",
                "training.micro_batch_size=1",
            ],
            1,
            "take a larger GPU",
        ),
        (
            ["generator.gradient_checkpointing=true", "training.optimizer=adamw_8bit", "training.compile=true", "training.ema_on_cpu=true"],
            8,
            "lower training.micro_batch_size, or set adversarial.r1=finite_difference or generator.lora_rank=64 or training.shard=true with "
            "training.compile=false and adversarial.r1=finite_difference",
        ),
    ],
)
def test_advice_is_what_is_still_open(settings: list[str], gpus: int, expected: str) -> None:
    assert plan._with_less(load_recipe("emoji", ["training.compile=false", *settings]), "train", gpus) == expected


def test_memory_of_small_networks_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "networks", lambda _recipe: pytest.fail("counted"))
    monkeypatch.setattr(plan, "available_memory", lambda _device: 2**34)
    plan.check_memory(load_recipe("emoji"), "train", torch.nn.Linear(1000, 1000), 1, torch.device("cpu"))


def test_an_estimate_that_fails_stops_nothing(sd15: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda _device: 1)

    def fails(error: Exception) -> None:
        def networks(_recipe: Recipe) -> Networks:
            raise error

        monkeypatch.setattr(plan, "networks", networks)
        plan.check_memory(sd15, "train", torch.nn.Linear(1, 1), 1, torch.device("cpu"))

    with pytest.warns(UserWarning, match="how much memory this takes is not known .an encoder of another kind"):
        fails(AttributeError("an encoder of another kind"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails(UserError("that the teacher's own loading will tell"))


@pytest.mark.parametrize(
    ("name", "settings", "gpus", "gibibytes"),
    [
        ("sd15_cfg3_single_gpu", [], 1, GPUS["h100"].memory),
        ("sd15_cfg3_single_gpu", ["adversarial.r1=finite_difference"], 1, GPUS["l40s"].memory),
        ("sd15_cfg3_single_gpu", ["adversarial=null"], 1, GPUS["rtx4090"].memory),
        ("sd15_cfg3_lora", [], 1, 12 * 15 / 16),
        ("sdxl_cfg7_lora", [], 1, GPUS["rtx4090"].memory),
        ("sdxl_cfg7_single_gpu", [], 1, GPUS["h100"].memory),
        ("sd15_cfg3_8_gpu", [], 8, GPUS["h100"].memory),
        ("sdxl_cfg7_8_gpu", [], 8, GPUS["a100-40gb"].memory),
    ],
)
def test_a_recipe_fits_the_gpus_it_names(name: str, settings: list[str], gpus: int, gibibytes: float) -> None:
    """As recipes/README.md has them, with the tenth left free that `plan` leaves; by the estimate, which knows nothing of a fragmented
    heap. Of pictures fewer may be drawn at a time."""
    recipe = load_recipe(name, settings)
    most = max(s.memory for s in stages(recipe, gpus, networks(recipe))[:-1])
    assert 0 < most < 0.9 * gibibytes * 2**30


def test_pictures_are_drawn_in_float32(sd15: Recipe, counted: Networks) -> None:
    """As `evaluate` does by default: at the rate of float32, with the network's own activations beside the weights."""
    drawn = stages(sd15, 1, counted)[-1]
    assert drawn.arithmetic_days(GPUS["h100"], 1.0) == pytest.approx(30_000 * (0.803e12 + 2.51e12) / 67e12 / 86_400, rel=0.01)
    parameters = counted.generator.parameters + counted.encoders
    assert drawn.memory >= 4 * parameters + ModelOptions().batch_size * 2 * counted.generator.alive
    assert ModelOptions().dtype == "float32"


@pytest.mark.parametrize("bits", ["float16", "bfloat16"])
def test_a_v100_knows_no_bf16(bits: str) -> None:
    recipe = load_recipe("emoji", [f"pairs.precision={bits}"])
    v100, a100 = (stages(recipe, 1, _plain(recipe))[0].arithmetic_days(GPUS[g], 1.0) for g in ("v100", "a100"))
    assert v100 / a100 == pytest.approx(312 / (125 if bits == "float16" else 15.7))


def test_another_family_or_size_is_refused_as_by_the_teacher(sd15: Recipe, tiny_teacher_folder: Path) -> None:
    for name, settings, told in (
        ("sd15_cfg3_single_gpu", ["teacher.family=pixel", "adversarial=null"], "is of family stable_diffusion; set teacher.family="),
        ("cifar10_ddpm", ["teacher.family=stable_diffusion"], "is of family pixel"),
        ("emoji", [f"teacher.source={tiny_teacher_folder}", "teacher.family=sdxl"], "is of family stable_diffusion"),
        ("sd15_cfg3_lora", ["teacher.resolution=500"], "teacher.resolution is 500, expected a multiple of 8"),
        ("cifar10_ddpm", ["teacher.resolution=33"], "teacher.resolution is 33, expected a multiple of 8, by which its network"),
    ):
        with pytest.raises(UserError, match=told):
            networks(load_recipe(name, settings))


def test_a_hub_that_refuses_is_one_line(sd15: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_arguments: Any, **_options: Any) -> None:
        raise HTTPError("501 Not Implemented")

    monkeypatch.setattr(UNet2DConditionModel, "load_config", refuses)
    unknown = sd15.model_copy(update={"teacher": sd15.teacher.model_copy(update={"source": "nobody/nothing"})})
    with pytest.raises(UserError, match=r"its sizes are not known here \(501 Not Implemented\)"):
        networks(unknown)


def test_float32_has_no_half_precision_rate() -> None:
    half = load_recipe("emoji")
    single = load_recipe("emoji", ["training.mixed_precision=no", "pairs.precision=float32"])
    n, gpu = _plain(half), GPUS["h100"]
    for ours, theirs in zip(stages(single, 1, n)[:3], stages(half, 1, n)[:3], strict=True):
        assert ours.flops == theirs.flops
        assert ours.arithmetic_days(gpu, 0.3) / theirs.arithmetic_days(gpu, 0.3) == pytest.approx(989 / 67)
    assert "of the 67 of float32" in plan_table(single, "h100", 1, 0.3)
    # But for the pictures, which are drawn in float32 whatever the training is.
    assert "of the 67 of float32 where a stage computes in float32" in plan_table(half, "h100", 1, 0.3)


def test_encoders_whose_configuration_lacks_their_class(tmp_path: Path) -> None:
    tiny_sdxl_pipeline().save_pretrained(tmp_path)
    teacher = TeacherConfig(family="sdxl", source=str(tmp_path))
    counted = plan._text_parameters(teacher)
    for part in ("text_encoder", "text_encoder_2"):
        path = tmp_path / part / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    assert plan._text_parameters(teacher) == counted > 0
