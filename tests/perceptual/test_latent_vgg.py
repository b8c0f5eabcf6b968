"""F of Eq. 2 against a plain VGG16 with batch norm, written out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig

torch.set_num_threads(1)
PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def random_vgg(**options: object) -> LatentVGG:
    """A LatentVGG whose batch norms have non-trivial statistics."""
    torch.manual_seed(0)
    vgg = LatentVGG(LatentVGGConfig(**options))  # type: ignore[arg-type]
    for module in vgg.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return vgg


def plain_features(vgg: LatentVGG, x: Tensor, removed: int) -> list[Tensor]:
    """The published network: torchvision's layer list with `removed` poolings replaced, tapped after every pooling."""
    layers: list[nn.Module] = []
    before, scale = x.shape[1], vgg.config.width
    for entry in PLAN:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        channels = int(entry * scale)
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    for index in [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)][:removed]:
        layers[index] = nn.Identity()
    network = nn.Sequential(*layers).to(x.dtype).eval()
    network.load_state_dict({name.split(".", 1)[1]: value for name, value in vgg.state_dict().items()})
    features = []
    for index, layer in enumerate(network):
        x = layer(x)
        if index in (6, 13, 23, 33, 43):
            features.append(x)
    return features


@pytest.mark.parametrize(("removed", "channels", "size"), [(3, 4, (16, 16)), (3, 16, (9, 14)), (0, 3, (45, 64)), (5, 4, (6, 6))])
def test_equals_plain_vgg(removed: int, channels: int, size: tuple[int, int]) -> None:
    vgg = random_vgg(in_channels=channels, width=0.25, kept_poolings=range(removed + 1, 6)).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    ours, plain = vgg(x), plain_features(vgg, x, removed)
    assert [f.shape[1] for f in ours] == vgg.channels
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_taps_before_the_poolings() -> None:
    """The other reading: poolings 3 and 4, features as LPIPS takes them in pixels."""
    after = random_vgg(width=0.25, kept_poolings=(3, 4))
    before = random_vgg(width=0.25, kept_poolings=(3, 4), tap="before")
    x = torch.randn(2, 4, 16, 16)
    assert [f.shape[2] for f in before(x)] == [16, 16, 16, 8, 4]
    assert [f.shape[2] for f in after(x)] == [16, 16, 8, 4, 4]
    for number, (a, b) in enumerate(zip(after(x), before(x), strict=True)):
        torch.testing.assert_close(a, torch.nn.functional.max_pool2d(b, 2) if number in (2, 3) else b)


def test_full_width_names_and_shapes() -> None:
    with torch.device("meta"):
        state = LatentVGG().state_dict()
    assert state["slice1.0.weight"].shape == (64, 4, 3, 3)
    assert state["slice3.14.weight"].shape == (256, 128, 3, 3)
    assert state["slice5.41.running_var"].shape == (512,)
    assert len(state) == 13 * 7 and sum(v.numel() for n, v in state.items() if n.endswith("weight")) == 14_711_040 + 4_224
    assert sorted({name.split(".")[0] for name in state}) == [f"slice{i}" for i in range(1, 6)]


def test_train_does_nothing() -> None:
    vgg = random_vgg(width=0.125)
    holder = nn.ModuleList([vgg])
    before = {k: v.clone() for k, v in vgg.state_dict().items()}
    holder.train()
    assert not any(module.training for module in vgg.modules()) and not any(p.requires_grad for p in vgg.parameters())
    vgg(torch.randn(2, 4, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in vgg.state_dict().items())


def test_for_training_and_back() -> None:
    vgg = random_vgg(width=0.125)
    x = torch.randn(4, 4, 8, 8)
    frozen = vgg(x)
    vgg.for_training()
    assert vgg.training and all(p.requires_grad for p in vgg.parameters())
    mean = vgg.get_buffer("slice1.1.running_mean").clone()
    vgg(x)[-1].sum().backward()
    assert not torch.equal(mean, vgg.get_buffer("slice1.1.running_mean"))
    assert vgg.get_parameter("slice1.0.weight").grad is not None
    assert not vgg.eval().training
    after = vgg(x)
    vgg.freeze().train()
    assert not vgg.training
    for a, b in zip(after, vgg(x), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(frozen[0], after[0])


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (4, 5), (2, 9)])
@pytest.mark.parametrize("removed", [0, 3])
def test_small_and_odd_sizes(size: tuple[int, int], removed: int) -> None:
    features = random_vgg(width=0.125, kept_poolings=range(removed + 1, 6))(torch.randn(1, 4, *size))
    poolings = [max(0, i + 1 - removed) for i in range(5)]
    assert [tuple(f.shape[2:]) for f in features] == [tuple(max(1, s >> p) for s in size) for p in poolings]


def test_group_norm() -> None:
    vgg = random_vgg(width=0.375, norm="group")
    x = torch.randn(2, 4, 8, 8)
    for both, alone in zip(vgg(x), vgg(x[:1]), strict=True):
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_round_trip(tmp_path: Path, norm: str) -> None:
    vgg = random_vgg(width=0.125, norm=norm).to(memory_format=torch.channels_last)
    vgg.save_pretrained(tmp_path)
    again = LatentVGG.from_pretrained(tmp_path)
    assert again.config == vgg.config and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in vgg.state_dict().items())
    vgg.save_pretrained(tmp_path / "half", torch.float16)
    half = LatentVGG.from_pretrained(tmp_path / "half").state_dict()
    assert torch.equal(half["slice1.0.weight"], vgg.state_dict()["slice1.0.weight"].half().float())
    assert torch.equal(half["slice1.1.weight"], vgg.state_dict()["slice1.1.weight"])
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["config.json", "model.safetensors"]


def test_errors(tmp_path: Path) -> None:
    for options in ({"in_channels": 0}, {"width": 0.0}, {"kept_poolings": (4, 6)}, {"tap": "inside"}, {"norm": "layer"}):
        with pytest.raises(UserError, match="expected"):
            LatentVGGConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(B, 4, H, W\)"):
        random_vgg(width=0.125)(torch.randn(1, 16, 8, 8))
    with pytest.raises(UserError, match="no such file"):
        LatentVGG.from_pretrained(tmp_path / "nowhere")
    random_vgg(width=0.125).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text = config.read_text()
    for old, new, message in (
        ("0.125", "0.25", "has shape"),
        ("LatentVGG", "LatentLPIPS", "class is"),
        ('"norm"', '"norms"', "keys are"),
        ('"batch"', '"group"', "unknown tensor"),
        ("{", "[", "expected JSON"),
    ):
        config.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            LatentVGG.from_pretrained(tmp_path)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors"):
        LatentVGG.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        LatentVGG.from_pretrained(tmp_path)
