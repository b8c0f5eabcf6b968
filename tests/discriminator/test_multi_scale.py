from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from diffusion2gan.discriminator.build import build_discriminator
from diffusion2gan.discriminator.convolutional import WIDTH, ConvolutionalDiscriminator
from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, MultiScaleDiscriminator, score
from diffusion2gan.discriminator.unet_taps import READOUTS, UNetTaps
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.pixel import PixelTeacher
from diffusion2gan.teachers.protocol import Teacher, TeacherConfig, TextCondition
from diffusion2gan.teachers.published import SD15
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline, tiny_pixel_pipeline, tiny_pixel_unet, tiny_sdxl_pipeline, tiny_sdxl_unet


def _evaluate(latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module) -> Tensor:
    added = dict(condition.added) or None
    return network(latent, timestep, condition.embeddings, added_cond_kwargs=added, return_dict=False)[0]


def _like_sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's plan, two orders of magnitude narrower."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16, 32, 32), layers_per_block=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip


def _like_pixels() -> UNet2DConditionModel:
    return tiny_pipeline().unet


PLANS = {"sd15": (_like_sd15, 4), "sdxl": (tiny_sdxl_unet, 3), "tiny": (_like_pixels, 2)}


def _inputs(plan: str, batch: int = 2, size: int = 16) -> tuple[Tensor, Tensor, TextCondition]:
    width = {"sd15": 12, "sdxl": 32, "tiny": 16}[plan]
    added = {"text_embeds": torch.randn(batch, 12), "time_ids": torch.rand(batch, 6)} if plan == "sdxl" else {}
    return torch.randn(batch, 4, size, size), torch.randn(batch, 4, size, size), TextCondition(torch.randn(batch, 5, width), added)


def _teachers_features(
    network: UNet2DConditionModel, latent: Tensor, condition: TextCondition, timestep: int = 0
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The network's prediction and its decoder blocks' READOUTS, by hooks of the test's own.

    `joined`: the outputs of their last layers. `below`: the outputs of the middle block and of the upsamplers. `skip`: of the
    encoder's residuals each block takes as many as it has resnets, from the end; its first resnet joins the last of them.
    """
    joined: list[Tensor] = []
    below: list[Tensor] = []
    residuals: list[Tensor] = []

    def keep(into: list[Tensor]) -> Callable[[Any, Any, Any], None]:
        return lambda _m, _a, out: into.append(out[0] if isinstance(out, tuple) else out)

    blocks = network.up_blocks
    hooks = [(getattr(b, "attentions", None) or b.resnets)[-1].register_forward_hook(keep(joined)) for b in blocks]
    hooks += [m.register_forward_hook(keep(below)) for m in (network.mid_block, *(u for b in blocks for u in b.upsamplers or []))]
    hooks.append(network.conv_in.register_forward_hook(keep(residuals)))
    hooks += [b.register_forward_hook(lambda _m, _a, out: residuals.extend(out[1])) for b in network.down_blocks]
    prediction = _evaluate(latent, torch.tensor(timestep), condition, network)
    for hook in hooks:
        hook.remove()
    skip = []
    for block in blocks:
        skip.append(residuals[-1])
        del residuals[-len(block.resnets) :]
    assert not residuals
    return prediction, {"skip": skip, "below": below, "joined": [k if isinstance(k, Tensor) else k.sample for k in joined]}


@pytest.mark.parametrize("timestep", [0, 500])
@pytest.mark.parametrize("plan", PLANS)
def test_at_the_start_the_features_are_the_teachers(plan: str, timestep: int) -> None:
    build, levels = PLANS[plan]
    torch.manual_seed(0)
    network = build()
    latent, noise, condition = _inputs(plan)
    with torch.no_grad():
        prediction, features = _teachers_features(network, latent, condition, timestep)
        norm, act, out = network.conv_norm_out, network.conv_act, network.conv_out
        discriminator = MultiScaleDiscriminator(network, _evaluate, DiscriminatorConfig(timestep=timestep))
        read: dict[str, Tensor] = {}
        for name, head in zip(discriminator._maps, discriminator.readouts, strict=True):
            head.register_forward_pre_hook(lambda _m, a, name=name: read.update({f"{name[0]}.{name[1]}": a[0]}))
        maps = discriminator(latent, noise, condition)
    assert list(maps) == [f"{i}.{r}" for i in range(levels) for r in READOUTS]
    assert len(maps) == 3 * levels
    for i in range(levels):
        for name in READOUTS:
            assert torch.equal(read[f"{i}.{name}"], features[name][i]), (i, name)
        # Read before the upsampler: each resolution is its own.
        assert maps[f"{i}.joined"].shape == (2, 1, 16 >> (levels - 1 - i), 16 >> (levels - 1 - i))
        assert maps[f"{i}.joined"].shape == maps[f"{i}.below"].shape == maps[f"{i}.skip"].shape
    assert torch.equal(out(act(norm(read[f"{levels - 1}.joined"]))), prediction)
    assert all(0 < m.abs().max() < 1 for m in maps.values())


TEACHERS: dict[str, Callable[[], Teacher]] = {
    "sd": lambda: StableDiffusionTeacher.from_pipeline(tiny_pipeline()),
    "sdxl": lambda: SDXLTeacher.from_pipeline(tiny_sdxl_pipeline()),
    "edm": lambda: PixelTeacher.from_pipeline(tiny_pixel_pipeline(edm=True)),
    "embedded": lambda: load_teacher(TeacherConfig(source="embedded")),
}


@pytest.mark.parametrize("timestep", [0, 500])
@pytest.mark.parametrize("kind", TEACHERS)
def test_from_teacher_begins_as_what_the_teacher_evaluates(kind: str, timestep: int) -> None:
    """With each family's own conditions and preconditioning: what reaches the network's output layers."""
    teacher = TEACHERS[kind]()
    discriminator = MultiScaleDiscriminator.from_teacher(teacher, DiscriminatorConfig(timestep=timestep))
    condition = teacher.encode_prompts(["red heart", ""] if kind != "edm" else ["", ""])
    latent, noise = (torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    read: dict[str, Tensor] = {}
    teacher.network.conv_norm_out.register_forward_pre_hook(lambda _m, a: read.update(teacher=a[0]))
    discriminator.readouts[-1].register_forward_pre_hook(lambda _m, a: read.update(ours=a[0]))
    with torch.no_grad():
        teacher.evaluate(latent, torch.tensor(timestep), condition)
        discriminator(latent, noise, condition)
    # Not to the bit: Intel's MKL rounds by where in memory its operands begin.
    torch.testing.assert_close(read["ours"], read["teacher"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_taps_change_nothing_of_the_network(plan: str) -> None:
    torch.manual_seed(0)
    network = PLANS[plan][0]()
    latent, _, condition = _inputs(plan)
    with torch.no_grad():
        before = _evaluate(latent, torch.tensor(0), condition, network)
        taps = UNetTaps(network)
        read: list[Tensor] = []
        taps.run(lambda: read.append(_evaluate(latent, torch.tensor(0), condition, network)))
        after = _evaluate(latent, torch.tensor(0), condition, network)
    assert torch.equal(before, after)
    assert torch.equal(before, read[0])
    assert taps._read is None


def test_taps_of_an_unconditional_network() -> None:
    """`UNet2DModel` calls its blocks by position."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    discriminator = MultiScaleDiscriminator(network, lambda x, t, _c, n: n(x, t, return_dict=False)[0], DiscriminatorConfig())
    maps = discriminator(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), TextCondition(torch.zeros(2, 0, 0)))
    assert {k: tuple(m.shape[2:]) for k, m in maps.items()} == {f"{i}.{r}": (s, s) for i, s in ((0, 4), (1, 8)) for r in READOUTS}
    sum(m.square().sum() for m in maps.values()).backward()
    assert not [n for n, p in discriminator.named_parameters() if p.grad is None]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_noise_text_and_every_resized_input(plan: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    network = PLANS[plan][0]()
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    discriminator = MultiScaleDiscriminator(network, _evaluate, DiscriminatorConfig())
    latent, noise, condition = _inputs(plan)
    latent.requires_grad_()
    condition.embeddings.requires_grad_()
    sum(m.square().sum() for m in discriminator(latent, noise, condition).values()).backward()
    missing = [n for n, p in discriminator.named_parameters() if p.grad is None]
    assert not missing
    assert discriminator.noise_in is not None
    assert len(discriminator.latent_in) == PLANS[plan][1] - 1
    for added in (discriminator.noise_in, *discriminator.latent_in):
        assert added.weight.grad.norm() > 0
        assert added.weight.detach().norm() == 0
    assert latent.grad.norm() > 0
    assert condition.embeddings.grad.norm() > 0


def test_each_addition_is_seen_once_it_has_weight() -> None:
    """z alone through its convolution; the resized latents alone through theirs."""
    torch.manual_seed(0)
    discriminator = MultiScaleDiscriminator(_like_sd15(), _evaluate, DiscriminatorConfig()).eval()
    latent, noise, condition = _inputs("sd15")
    with torch.no_grad():
        first = score(discriminator(latent, noise, condition))
        assert torch.equal(score(discriminator(latent, -noise, condition)), first)
        discriminator.noise_in.weight.normal_()
        changed = score(discriminator(latent, noise, condition))
        assert (changed - first).abs().min() > 0
        assert (score(discriminator(latent, -noise, condition)) - changed).abs().min() > 0
        for projection in discriminator.latent_in:
            before = score(discriminator(latent, noise, condition))
            projection.weight.normal_()
            assert (score(discriminator(latent, noise, condition)) - before).abs().min() > 0


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (20, 24)])
def test_any_size_of_latent(size: tuple[int, int]) -> None:
    discriminator = MultiScaleDiscriminator(tiny_sdxl_unet(), _evaluate, DiscriminatorConfig())
    _, _, condition = _inputs("sdxl")
    maps = discriminator(torch.randn(2, 4, *size), torch.randn(2, 4, *size), condition)
    assert maps["2.joined"].shape[2:] == size
    assert maps["0.skip"].shape[2:] == (size[0] // 4, size[1] // 4)


@pytest.mark.parametrize("kind", ["diffusion", "scratch"])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("multi_scale", [False, True])
def test_the_switches_of_table_2(kind: str, noise: bool, multi_scale: bool, tiny_teacher: StableDiffusionTeacher) -> None:
    config = DiscriminatorConfig.model_validate({"kind": kind, "noise": noise, "multi_scale": multi_scale})
    build = MultiScaleDiscriminator.from_teacher if kind == "diffusion" else ConvolutionalDiscriminator.for_teacher
    torch.manual_seed(0)
    discriminator = build(tiny_teacher, config)
    condition = tiny_teacher.encode_prompts(["red heart", "cat", "blue sun"])
    latent, z = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    maps = discriminator(latent, z, condition)
    assert len(maps) == ((6 if kind == "diffusion" else 2) if multi_scale else 1)
    assert all(m.shape[:2] == (3, 1) and m.dtype == torch.float32 for m in maps.values())
    assert score(maps).shape == (3,)
    torch.testing.assert_close(score(maps), torch.stack([m.mean((1, 2, 3)) for m in maps.values()]).mean(0))
    score(maps).sum().backward()
    assert not [n for n, p in discriminator.named_parameters() if p.grad is None]
    # Each sample is judged by itself.
    alone = score(discriminator(latent[1:2], z[1:2], condition[torch.tensor([1])]))
    torch.testing.assert_close(alone, score(maps)[1:2], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        base = score(discriminator(latent, z, condition))
        assert torch.equal(base, score(discriminator(latent, z.flip(0), condition))) is not noise
        assert not torch.equal(base, score(discriminator(latent, z, condition[torch.tensor([2, 1, 0])])))


@pytest.mark.parametrize("name", ["embedded", "sd15"])
def test_the_scratch_discriminator_weighs_what_the_teacher_does(name: str) -> None:
    """Within an eighth."""
    config = SD15.unet if name == "sd15" else UNet2DConditionModel.load_config(str(embedded_folder("teacher")), subfolder="unet")
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(dict(config))
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        channels = [WIDTH * c for c in config["block_out_channels"]]
        scratch = ConvolutionalDiscriminator(shape, channels, config["cross_attention_dim"], DiscriminatorConfig(kind="scratch"))
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (scratch, network))
    assert 7 / 8 < ours / theirs < 9 / 8


@pytest.mark.parametrize("classes", [None, 10])
@pytest.mark.parametrize("kind", ["diffusion", "scratch"])
def test_around_a_teacher_of_pixels(kind: str, classes: int | None) -> None:
    teacher = PixelTeacher(tiny_pixel_unet(classes=classes), dict(DDPMScheduler().config))
    discriminator = build_discriminator(DiscriminatorConfig.model_validate({"kind": kind}), teacher)
    maps = discriminator(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), teacher.encode_prompts(["3", "7"]))
    assert len(maps) == (6 if kind == "diffusion" else 2)
    assert score(maps).shape == (2,)


def test_a_copy_of_the_teacher_not_the_teacher(tiny_teacher: StableDiffusionTeacher) -> None:
    before = {k: v.clone() for k, v in tiny_teacher.network.state_dict().items()}
    discriminator = MultiScaleDiscriminator.from_teacher(tiny_teacher)
    with torch.no_grad():
        for p in discriminator.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in tiny_teacher.network.state_dict().items())
    assert tiny_teacher.network.conv_norm_out is not None
    assert not any(p.requires_grad for p in tiny_teacher.network.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())


def test_what_cannot_be_a_discriminator_is_said(tiny_teacher: StableDiffusionTeacher) -> None:
    with pytest.raises(UserError, match="Linear has no conv_in, down_blocks, mid_block, up_blocks, expected a U-Net"):
        UNetTaps(nn.Linear(2, 2))
    with pytest.raises(UserError, match="timestep is 1000, expected 0 to 999"):
        MultiScaleDiscriminator.from_teacher(tiny_teacher, DiscriminatorConfig(timestep=1000))
