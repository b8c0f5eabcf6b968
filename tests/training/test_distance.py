"""The distance that a recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG, released
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from diffusion2gan.training.distance import LossConfig, build_distance, perceptual_network


@pytest.mark.parametrize("named_by", ["folder", "hub"])
def test_a_metric_from_elsewhere(
    named_by: str, tiny_teacher: StableDiffusionTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = LatentLPIPS(LatentVGG(LatentVGGConfig(width=0.125)), calibrated=True)
    metric.save_pretrained(tmp_path)
    monkeypatch.setattr(released, "_from_hub", lambda repository, name, revision: tmp_path / name)
    source = "someone/latent-lpips" if named_by == "hub" else str(tmp_path)
    distance = build_distance(LossConfig(distance="latent_lpips", perceptual=source, l1_weight=0.5), tiny_teacher)
    x0, x1 = torch.randn(2, 3, 4, 8, 8)
    expected = metric(x0, x1) + 0.5 * (x0 - x1).abs().flatten(1).mean(1)
    torch.testing.assert_close(distance(x0, x1), expected)


def test_several_draws_are_averaged(tiny_teacher: StableDiffusionTeacher, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LatentLPIPS(LatentVGG(LatentVGGConfig(width=0.125)), calibrated=True).save_pretrained(tmp_path)
    one, three = (build_distance(LossConfig(perceptual=str(tmp_path), ensemble=n), tiny_teacher) for n in (1, 3))
    assert three.n_uniform == 3 * one.n_uniform
    x0, x1 = torch.randn(2, 2, 4, 8, 8)
    uniform = torch.rand(2, three.n_uniform)
    apart = [one(x0, x1, part) for part in uniform.chunk(3, dim=1)]
    assert not torch.allclose(apart[0], apart[1])
    torch.testing.assert_close(three(x0, x1, uniform), torch.stack(apart).mean(0))


def test_draws_that_would_be_the_same_are_refused() -> None:
    for idle in ({"distance": "latent_lpips"}, {"distance": "mse"}, {"augment": ""}):
        with pytest.raises(ValueError, match="loss.ensemble is 2 with loss..*, expected 1"):
            LossConfig(ensemble=2, **idle)


def test_a_metric_of_another_latent_space(tiny_teacher: StableDiffusionTeacher, tmp_path: Path) -> None:
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=16, width=0.125)), calibrated=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads 16 channels, expected 4"):
        build_distance(LossConfig(perceptual=str(tmp_path)), tiny_teacher)
    with pytest.raises(UserError, match="reads 16 channels, expected 4"):
        perceptual_network(LossConfig(perceptual=str(tmp_path)), 4)


def test_the_network_before_its_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LatentVGGConfig(width=0.125, kept_poolings=(3, 4), norm="group")
    LatentLPIPS(LatentVGG(own), calibrated=True).save_pretrained(tmp_path)
    assert perceptual_network(LossConfig(perceptual=str(tmp_path)), 4) == own
    assert perceptual_network(LossConfig(perceptual="sdxl"), 4) == LatentVGGConfig()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()  # training would look for the released one first, too
    assert perceptual_network(LossConfig(perceptual="sd15"), 4) == LatentVGGConfig()
    assert perceptual_network(LossConfig(distance="lpips", perceptual="someone/lpips"), 4) == LatentVGGConfig.pixels()
    assert perceptual_network(LossConfig(distance="l1"), 4) is None
    assert perceptual_network(LossConfig(), 4) == LatentLPIPS.from_pretrained(embedded_folder("latent_vgg")).net.config
